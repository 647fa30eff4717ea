"""Names are matched as PEFT's own functions match them, and no pattern can hang the server."""

from __future__ import annotations

import re
import time

import peft
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.tuners.tuners_utils import _ExcludedModule, check_target_module_exists
from peft.utils.other import get_pattern_key

from lora_runtime.adapters.config import matching
from lora_runtime.adapters.config.matching import (
    PatternMatcher,
    Selection,
    select_modules,
    unmatched_targets,
)
from lora_runtime.errors import AdapterRefused

NAMES = [
    f"model.layers.{layer}.{module}"
    for layer in (0, 1, 2, 10)
    for module in ("self_attn.q_proj", "self_attn.qkv_proj", "mlp.up_proj", "mlp.experts.1.up_proj")
]
NUM_LAYERS = 11
ENTRIES = st.sampled_from([
    "q_proj", "proj", "self_attn.q_proj", "0.self_attn.q_proj", "up_proj", "mlp.up_proj",
    "1.up_proj", "model.layers.1.mlp.up_proj", "layers.10.self_attn.qkv_proj",
])  # fmt: skip
PATTERNS = st.sampled_from([
    "q_proj", ".*q_proj", r".*\.(q|qkv)_proj", r"model\.layers\.[01]\..*", ".*", "(?i).*UP_PROJ",
    r".*\.1\..*", "q|.*up_proj", r"model.*?\d+.*?(?:up|q)_proj$", "layers.0.mlp.up_proj",
    "^model.*", r"\bmodel\.layers\.[\d]{1,}\.mlp\..*", "up", r".*layers\.(?!0)\d+\..*",
])  # fmt: skip


def as_peft(value: str | tuple) -> str | list | None:
    return list(value) if isinstance(value, tuple) and value else value or None


def peft_selects(selection: Selection, name: str) -> bool:
    config = peft.LoraConfig(
        target_modules=as_peft(selection.target_modules),
        exclude_modules=as_peft(selection.exclude_modules),
        layers_to_transform=as_peft(selection.layers_to_transform),
        layers_pattern=as_peft(selection.layers_pattern),
    )
    found = check_target_module_exists(config, name)
    return bool(found) and not isinstance(found, _ExcludedModule)


@st.composite
def selections(draw) -> Selection:
    exclude = draw(st.just(()) | st.lists(ENTRIES, max_size=2).map(tuple) | PATTERNS)
    if draw(st.booleans()):
        return Selection(target_modules=draw(PATTERNS), exclude_modules=exclude)
    layers = tuple(draw(st.lists(st.sampled_from([0, 1, 10]), max_size=2)))
    patterns = st.sampled_from([(), ("layers",), ("h", "layers"), (r"model\.\w+",), ("a|layers",)])
    return Selection(
        target_modules=tuple(draw(st.lists(ENTRIES, min_size=1, max_size=3))),
        exclude_modules=exclude,
        layers_to_transform=layers,
        layers_pattern=draw(patterns) if layers else (),
    )


def dead_entries(selection: Selection) -> set[str]:
    """List entries that mean no module at all: PEFT passes over them, we do and say so."""
    targets = selection.target_modules
    entries = targets if isinstance(targets, tuple) else ()
    alone = {entry: Selection(target_modules=(entry,)) for entry in entries}
    return {e for e, own in alone.items() if not any(peft_selects(own, name) for name in NAMES)}


@given(selections())
@settings(max_examples=200)
def test_selection_is_pefts(selection: Selection) -> None:
    expected = {name for name in NAMES if peft_selects(selection, name)}
    assert unmatched_targets(selection, NAMES) == sorted(dead_entries(selection))
    if expected:
        assert select_modules(selection, NAMES, NUM_LAYERS, PatternMatcher()) == expected
    else:
        with pytest.raises(AdapterRefused):
            select_modules(selection, NAMES, NUM_LAYERS, PatternMatcher())


@given(st.lists(ENTRIES | PATTERNS.filter(lambda p: "(?i)" not in p), max_size=4))
@settings(max_examples=200)
def test_the_first_pattern_that_matches_wins_as_in_peft(patterns: list[str]) -> None:
    keys = list(dict.fromkeys(patterns))
    lookup = PatternMatcher().first_match({key: key for key in keys}, "rank_pattern")
    for name in NAMES:
        expected = get_pattern_key(keys, name)
        assert lookup(name) == (expected if expected in keys else None)


def test_all_linear_leaves_out_the_head() -> None:
    selection = Selection(target_modules="All-Linear")
    names = [*NAMES, "lm_head"]
    selected = select_modules(selection, names, NUM_LAYERS, PatternMatcher(), ends=["lm_head"])
    assert selected == set(NAMES)


HOSTILE = {
    "catastrophic": "(.|..)+(.+)+[#!]",
    "nested groups": "(" * 5000 + ")" * 5000,
    "too long": "a" * 100_000,
    "invalid": "q_proj(",
    "other engines' syntax": "(?:q_proj){e<=1}",
    "POSIX class": "[[:alpha:]]+",
    "fuzzy by a range": "(q_porj){1<=e<=2}",
    "fuzzy by a cost": "(q_porj){2i+2d+1s<=4}",
    "letters of other alphabets": "(?i)q_proj|ı",
    "recursion": "(?R)",
    "a huge count": "a{99999999999999999999}",
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("field", ["target_modules", "exclude_modules"])
def test_hostile_patterns_are_refused_quickly(name: str, field: str) -> None:
    options = {"target_modules": ("q_proj",), field: HOSTILE[name]}
    started = time.monotonic()
    with pytest.raises(AdapterRefused) as refusal:
        select_modules(Selection(**options), NAMES, NUM_LAYERS, PatternMatcher())
    assert refusal.value.field == field
    assert time.monotonic() - started < 5


def test_many_slow_patterns_share_one_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matching, "MAX_TOTAL_S", 0.05)
    patterns = {rf"(.*)(.*)(.*)(.*)x{number}": number for number in range(100_000)}
    with pytest.raises(AdapterRefused, match="too long to match") as refusal:
        PatternMatcher().first_match(patterns, "alpha_pattern")
    assert refusal.value.field == "alpha_pattern"


SYNTAX = st.text("ab.*+?()[]{},12|^$\\-&~:<>=!Pdwb", max_size=14)


@given(SYNTAX, st.sampled_from(["ab", "a.b.1", ""]))
@settings(max_examples=1000)
def test_an_accepted_pattern_means_what_re_means(pattern: str, name: str) -> None:
    try:
        match = PatternMatcher().compile(pattern, "target_modules", is_whole=True)
    except AdapterRefused:
        return
    assert bool(match(name)) == bool(re.fullmatch(pattern, name))


@given(st.text("ab.1_", min_size=1, max_size=6), st.text("ab.1_", max_size=8))
@settings(max_examples=1000)
def test_a_name_as_a_pattern_means_what_re_means(pattern: str, name: str) -> None:
    lookup = PatternMatcher().first_match({pattern: "found"}, "rank_pattern")
    assert (lookup(name) == "found") == bool(re.match(rf"(.*\.)?({pattern})$", name))


@pytest.mark.parametrize("num_patterns", [2049, 9000])
def test_a_config_of_too_many_patterns_is_refused_at_once(num_patterns: int) -> None:
    patterns = {f"layers.{number}.self_attn.q_proj": 4 for number in range(num_patterns)}
    started = time.thread_time()
    with pytest.raises(AdapterRefused, match="at most 2048 are accepted") as refusal:
        PatternMatcher().first_match(patterns, "rank_pattern")
    assert refusal.value.field == "rank_pattern"
    assert time.thread_time() - started < 3


def test_as_many_patterns_as_a_large_base_has_modules_are_read() -> None:
    names = [f"model.layers.{layer}.mlp.m{index}" for layer in range(126) for index in range(7)]
    matcher = PatternMatcher()
    for field in ("rank_pattern", "alpha_pattern"):
        lookup = matcher.first_match({name: name for name in names}, field)
        assert [lookup(name) for name in names] == names

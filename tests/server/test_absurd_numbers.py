"""Every number of every command's settings has a bound, and what is beyond it is named at once."""

from __future__ import annotations

import math
import re
import time
from itertools import product
from resource import RUSAGE_SELF, getrusage
from typing import Literal, Union, get_args, get_origin

import pytest
from annotated_types import Ge, Gt, Le, Lt
from pydantic.fields import FieldInfo

from lora_runtime.config import EngineConfig
from lora_runtime.errors import ConfigError
from lora_runtime.settings import entries, parse_yaml
from lora_runtime.training.config import TrainConfig, UnitConfig
from lora_runtime.training.sweep import expand
from loramux.server.config import SETTINGS, ServerConfig, load_config

HUGE_HEX = parse_yaml(f"0x{'f' * 5000}")
"""Python writes no decimal of over 4,300 digits: an error that shows such a value fails itself."""
ABSURD = [10**30, 2**63, -1, 1e308, math.nan, math.inf, "1e30", HUGE_HEX]
ACCEPTED = {
    **{("seed", value): "any 64 bits, as torch takes them" for value in (-1, 2**63)},
    **{("learning_rate", value): "divergence is said" for value in (10**30, 2**63, "1e30")},
}  # fmt: skip
"""(setting, value) → why it is taken."""


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch):
    for name in SETTINGS:
        monkeypatch.delenv(f"LORAMUX_{name.upper()}", raising=False)


def serve(name, value):
    return load_config(flags={name: value})


def train(name, value):
    required = {"data": "d.jsonl", "output": "run"}
    return TrainConfig.of({**required, name: value}, [{}])


def engine(name, value):
    entry = entries(EngineConfig)[name]
    values = {entry.name: value}
    part = EngineConfig.__pydantic_fields__[entry.part].default_factory if entry.part else None
    return EngineConfig(**{entry.part: part(**values)} if part else values)


MAKERS = {
    "serve": (serve, entries(ServerConfig)),
    "train": (train, {**entries(UnitConfig), **entries(TrainConfig)}),
    "engine": (engine, entries(EngineConfig)),
}
CASES = [(maker, name) for maker, (_, found) in MAKERS.items() for name in found if name != "units"]


def members(hint):
    """A type's members, an Annotated's metadata left out, with how a value stands in each."""
    origin = get_origin(hint)
    if hasattr(hint, "__metadata__"):
        yield from members(hint.__origin__)
    elif origin is tuple:
        for member, wrap in members(get_args(hint)[0]):
            yield member, lambda value, wrap=wrap: [wrap(value)]
    elif origin is dict:
        for member, wrap in members(get_args(hint)[1]):
            yield member, lambda value, wrap=wrap: {"k": wrap(value)}
    elif origin is Union or type(hint).__name__ == "UnionType":
        for each in get_args(hint):
            yield from members(each)
    elif origin is not Literal:
        yield hint, lambda value: value


def bounds(hint, metadata=()):
    """Numbers in a type, each with the bounds that hold for it."""
    if hasattr(hint, "__metadata__"):
        inner = [m for m in hint.__metadata__]
        inner += [n for m in inner if isinstance(m, FieldInfo) for n in m.metadata]
        yield from bounds(hint.__origin__, (*metadata, *inner))
    elif hint in (int, float):
        yield metadata
    else:
        is_union = get_origin(hint) is Union or type(hint).__name__ == "UnionType"
        for each in get_args(hint):
            yield from bounds(each, metadata if is_union else ())


def is_number(hint):
    return any(member in (int, float) for member, _ in members(hint))


@pytest.mark.parametrize("kind", [ServerConfig, UnitConfig, TrainConfig], ids=lambda k: k.__name__)
def test_every_number_has_bounds_on_both_sides(kind):
    def owner(entry):
        part = entry.part and kind.__pydantic_fields__[entry.part].default_factory
        return part or kind

    for entry in entries(kind).values():
        if entry.name in ("seed", "sweep"):  # checked by a function; by the settings it varies
            continue
        own = owner(entry).__pydantic_fields__[entry.name].metadata
        for each in bounds(entry.hint, tuple(own)):
            assert any(isinstance(bound, Le | Lt) for bound in each), (
                f"{entry.key} has no upper bound"
            )
            assert any(isinstance(bound, Ge | Gt) for bound in each), (
                f"{entry.key} has no lower bound"
            )


@pytest.mark.parametrize(("maker", "name"), CASES)
def test_an_absurd_number_is_refused_by_name_and_at_once(maker, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make, found = MAKERS[maker]
    before = getrusage(RUSAGE_SELF).ru_maxrss
    for (member, wrap), value in product(members(found[name].hint), ABSURD):
        refusal, start = None, time.perf_counter()
        try:
            make(name, wrap(value))
        except ConfigError as error:
            refusal = error
        assert time.perf_counter() - start < 1
        if member in (int, float) and name != "sweep" and (name, value) not in ACCEPTED:
            assert refusal is not None, f"{name} took {value!r:.40}"
        if refusal is not None:
            assert {name, found[name].name} & set(re.split(r"\W+", refusal.field)), refusal
            assert found[name].name in str(refusal) or name in str(refusal)
            assert len(str(refusal)) < 500
    assert getrusage(RUSAGE_SELF).ru_maxrss - before < 64 << 10, "in KiB"


@pytest.mark.parametrize("name", [n for n, e in entries(UnitConfig).items() if is_number(e.hint)])
def test_a_sweep_of_absurd_numbers_is_refused_by_name(name):
    if entries(UnitConfig)[name].is_fixed or entries(UnitConfig)[name].default in ((), {}):
        return
    for value in (10**30, -1):
        if (name, value) not in ACCEPTED:
            with pytest.raises(ConfigError, match=name):
                expand(train("sweep", {name: [value, 1]}).units)

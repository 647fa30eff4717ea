"""Families of models, tried on tiny random ones against PEFT; docs/families.md has them all."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from lora_runtime.errors import BaseRefused
from tests.families import FAMILIES, TEXT_TOWERS, VARIANTS, tiny_family
from tests.family_checks import base_of, serves

DOCS = Path(__file__).parents[1] / "docs"


def rows(title: str) -> dict[str, str]:
    """Family → its line, of one table of the page."""
    text = (
        (DOCS / "families.md")
        .read_text(encoding="utf-8")
        .split(f"\n## {title}")[1]
        .split("\n## ")[0]
    )
    lines = [line for line in text.splitlines() if line.startswith("| ")][1:]
    return {line.split("|")[1].strip(): line for line in lines}


def loaded_script():
    spec = importlib.util.spec_from_file_location("families_page", DOCS / "families.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


page = loaded_script()
SERVED = rows("Served: ") | rows("Served: the text")
REFUSED = rows("Refused at load")
UNMADE = {family for family, line in REFUSED.items() if page.UNMADE in line}
WHOLE = ["llama", "gemma4_text", "granitemoehybrid"]
"""Of these every column is made anew: the others take four seconds each."""


@pytest.mark.parametrize("family", SERVED)
def test_a_mixed_batch_is_pefts(family, tmp_path):
    """A base row, LoRA, DoRA and rsLoRA of three ranks: float32 logits and greedy tokens."""
    serves(family, tmp_path)


@pytest.mark.parametrize(
    "family", [name for name, line in REFUSED.items() if page.UNMADE not in line]
)
def test_what_is_refused_is_refused_by_name_at_load(family):
    model = tiny_family(family)
    with pytest.raises(BaseRefused) as refused:
        base_of(model, "none")
    assert page.plain(str(refused.value)) in REFUSED[family], "run: make families"


@pytest.mark.parametrize("family", sorted(UNMADE))
def test_of_what_the_page_has_not_tried_no_tiny_model_is_made(family):
    with pytest.raises(Exception):  # noqa: B017 - whatever transformers raises
        tiny_family(family)


@pytest.mark.parametrize("family", WHOLE)
def test_a_line_of_the_page_is_what_make_families_writes(family):
    assert page.row(family, page.verdicts(family)) == SERVED[family], "run: make families"


def test_the_page_has_every_family_of_this_transformers():
    """A release that brings a family, or takes one away, shows here."""
    assert sorted(SERVED.keys() | REFUSED.keys()) == sorted([*FAMILIES, *TEXT_TOWERS, *VARIANTS])
    good = [f for f, line in SERVED.items() if set(line.split("|")[2:-1]) <= {" yes ", " – "}]
    assert len(good) == len(SERVED) >= 110

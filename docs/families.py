"""Prints docs/families.md, made by running every family; `make families` keeps it."""

from __future__ import annotations

import re
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

import transformers
from peft import PeftModel

from tests import family_checks as checks
from tests.families import FAMILIES, TEXT_TOWERS, VARIANTS, is_composite, tiny_family
from tests.family_checks import Verdict, verdict_of

HEAD = """# Families of models

Written by `make families`, which makes a tiny random model of every causal language model that
transformers {version} has, and does all of this with it; not edited by hand. *yes*: float32 logits
within 2e-4 of PEFT's, and PEFT's tokens or gradients. A family is the `model_type` in a
`config.json` (Granite 4 is granitemoehybrid), in brackets a kind of it. It is served by what its
model is, not by its name: one that is missing here is tried when it is loaded, before it is
quantised, and either gives its own logits or is refused.

- **serve**: a base row, LoRA, DoRA and rsLoRA of three ranks on every linear layer, in one batch.
- **train**: the gradients of every factor, with and without activation checkpointing.
- **NF4**, **int8**: as serve, over the quantised base.
- **experts**: adapters on the fused weights of experts (`target_parameters`); –: it has none.
- **prefix**: a second prompt that begins as the first finds it in the cache; where layers carry a
  state, up to the last snapshot of it.
"""
UNMADE = "no tiny model of it was made"
"""Why a family is not tried."""
COLUMNS: dict[str, Callable[[str, Path], None]] = {
    "serve": checks.serves,
    "train": checks.trains,
    "NF4": partial(checks.serves, quantization="nf4"),
    "int8": partial(checks.serves, quantization="int8"),
    "experts": checks.serves_experts,
    "prefix": checks.serves_a_prefix,
}


def verdicts(family: str) -> dict[str, Verdict]:
    """Column → verdict; only the first column of a family that is refused."""
    try:
        tiny_family(family)
    except Exception as error:
        return {"serve": Verdict(False, f"{UNMADE}: {type(error).__name__}")}
    found = {}
    for name, check in COLUMNS.items():
        with tempfile.TemporaryDirectory() as folder:
            found[name] = verdict_of(partial(check, family, Path(folder)))
        if not found["serve"].is_good:
            break
    return found


def row(family: str, found: dict[str, Verdict]) -> str:
    """A line of the page."""
    if not found["serve"].is_good:
        return f"| {family} | {plain(found['serve'].why)} |"
    return f"| {family} | " + " | ".join(map(cell, found.values())) + " |"


def cell(verdict: Verdict) -> str:
    return verdict.why if verdict.has_nothing else "yes" if verdict.is_good else plain(verdict.why)


def plain(why: str) -> str:
    """One line without what differs between machines."""
    why = re.sub(r" \(error [^)]*\)", "", " ".join(why.split()))
    return why.removeprefix("refused: ").replace("|", "\\|")


def page(families: Iterable[str]) -> Iterator[str]:
    """The lines of the page."""
    found = {family: verdicts(family) for family in families}
    served = {family: of for family, of in found.items() if of["serve"].is_good}
    composite = sorted(filter(is_composite, served))
    text = sorted(served.keys() - set(composite))
    yield HEAD.format(version=transformers.__version__)
    yield f"## Served: {len(text)}\n"
    yield from table(served, text)
    yield "\n## Served: the text of models of text and images\n"
    yield (
        "Other parts are left out, with a note, and so are an adapter's tensors of them, which\n"
        "change no answer to text. Adapters of the same text model alone fit too.\n"
    )
    yield from table(served, composite)
    refused = sorted(found.keys() - served.keys())
    yield f"\n## Refused at load: {len(refused)}\n"
    yield "| family | why |\n|---|---|"
    yield from (row(family, found[family]) for family in refused)


def table(found: dict[str, dict[str, Verdict]], families: Iterable[str]) -> Iterator[str]:
    """The verdicts of families that are served."""
    yield "| family | " + " | ".join(COLUMNS) + " |"
    yield "|---" * (len(COLUMNS) + 1) + "|"
    yield from (row(family, found[family]) for family in families)


def quiet() -> None:
    """transformers and PEFT warn of much that is meant here."""
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    PeftModel.create_or_update_model_card = lambda self, folder: None


if __name__ == "__main__":
    quiet()
    print(*page(sys.argv[1:] or [*FAMILIES, *TEXT_TOWERS, *VARIANTS]), sep="\n")

"""Every variant's serving form gives PEFT's logits, on every kind of base; none is a dead one."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import pytest
import torch

from lora_runtime.adapters.reduction import load_adapter
from tests.lora_runtime.adapters.dense_form import form_logits
from tests.tiny import dense_twin, tiny_base, tiny_checkpoint
from tests.variants import INVOCATION, composed, variant_names, write_variants

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]

PROMPT = [5, 9, *INVOCATION, 250, 44, *INVOCATION, 77, 130]
TOKENS = [3, 8, *INVOCATION, 100]
TOLERANCE = 2e-4
MIN_EFFECT, MIN_DIFFERENCE = 1.0, 0.5


@pytest.mark.parametrize("shape", ["llama", "llama-bias", "gemma2", "gemma3", "qwen3", "phi3"])
def test_logits_are_pefts(shape: str, tmp_path: Path) -> None:
    base = tiny_base(shape, folder=tiny_checkpoint(tmp_path / "base", shape))
    names = variant_names(has_bias=shape == "llama-bias")
    if shape != "llama":
        names = [name for name in names if name in OF_EVERY_FAMILY or "bias" in name]
    twin = dense_twin(base, shape)
    logits = {}
    for variant in write_variants(base, shape, tmp_path / "adapters", names):
        form = load_adapter(variant.folder, base.spec, base.weights)
        expected = variant.expected(PROMPT, TOKENS, torch.float32)
        found = form_logits(form, base.spec, twin, PROMPT, TOKENS)
        torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE, msg=variant.name)
        logits[variant.name] = expected
    with torch.no_grad():
        ids = torch.tensor([[*PROMPT, *TOKENS[:-1]]])
        logits["base"] = twin(ids).logits[0, len(PROMPT) - 1 :]
    for one, other in combinations(logits, 2):
        apart = float((logits[one] - logits[other]).abs().max())
        assert apart >= (MIN_EFFECT if other == "base" else MIN_DIFFERENCE), (one, other)


OF_EVERY_FAMILY = {
    "dora", "pissa", "embedding", "lm-head", "trainable-tokens", "alora", "replication",
    "replication-dora", "modules-to-save-embedding",
}  # fmt: skip


def test_a_composition_of_one_is_that_one(tmp_path: Path) -> None:
    """The oracle of compositions itself, in float64, at weights 1 and 0."""
    base = tiny_base("llama", folder=tiny_checkpoint(tmp_path / "base", "llama"))
    names = ["dora", "alora", "modules-to-save-head"]
    dora, alora, head = write_variants(base, "llama", tmp_path / "adapters", names)
    for variant in (dora, alora, head):
        expected = variant.expected(PROMPT, TOKENS, torch.float64)
        others = [(other, 0.0) for other in (dora, alora, head) if other is not variant]
        found = composed([(variant, 1.0), *others], PROMPT, TOKENS)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)

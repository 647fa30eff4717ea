"""A base seen in another dtype against the same base loaded in that dtype."""

from __future__ import annotations

import pytest
import torch
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

from lora_runtime.adapters.reduction import load_adapter
from lora_runtime.base.dtype_view import CastEmbedding, as_bfloat16_holds, in_dtype
from lora_runtime.base.fingerprint import fingerprint
from lora_runtime.base.loader import load_base
from lora_runtime.base.recompute import recomputed
from lora_runtime.config import BaseConfig
from lora_runtime.engine.probe import probe_logits
from tests.tiny import (
    CONFIGS,
    HYBRIDS,
    MIXTURES,
    VOCAB_SIZE,
    float32_checkpoint,
    tiny_base,
    tiny_checkpoint,
)
from tests.variants import write_variants

GENERATOR = torch.Generator().manual_seed(3)
ROWS = [torch.randint(VOCAB_SIZE, (n,), generator=GENERATOR).tolist() for n in (9, 40)]


def largest_difference(found, expected):
    pairs = zip(found, expected, strict=True)
    return max(float((one.float() - other.float()).abs().max()) for one, other in pairs)


@pytest.mark.parametrize("quantization", ["nf4", "nf4-double", "fp4", "int8", "none"])
@pytest.mark.parametrize("shape", ["llama-bias", "gemma3"])
def test_float32_of_a_bfloat16_base_is_the_base_loaded_in_float32(shape, quantization):
    assert_alike(shape, quantization, torch.bfloat16, torch.float32)


@pytest.mark.parametrize("shape", CONFIGS)
def test_every_family_has_a_view(shape):
    assert_alike(shape, "nf4", torch.bfloat16, torch.float32)
    assert_alike(shape, "nf4", torch.float64, torch.float32)
    assert_alike(shape, "nf4", torch.float32, torch.bfloat16)


def assert_alike(shape, quantization, loaded, seen):
    """Base, PEFT's adapter on it and the numbers adapters ask for; nothing of the base changes."""
    base = tiny_base(shape, quantization=quantization, dtype=loaded)
    before = fingerprint(base.model, quantization)
    own = probe_logits(base, None, ROWS)
    view, expected = in_dtype(base, seen), tiny_base(shape, quantization=quantization, dtype=seen)
    assert view.spec == expected.spec or quantization == "none" or loaded == torch.float64
    found, exact = (torch.cat(probe_logits(one, None, ROWS)).float() for one in (view, expected))
    off = torch.cat(own).float() - exact
    if seen == torch.float32:
        assert (found - exact).abs().max() <= 1e-5
        assert off.abs().max() > 1e-3 or loaded == torch.float64
    else:  # sums in another order round otherwise, but no further
        rounding = (torch.cat(own).float() - found).square().mean().sqrt()
        assert 0.8 < rounding / off.square().mean().sqrt() < 1.25
    for path in base.spec.linears:
        weights = view.weights.serving(path), expected.weights.serving(path)
        assert torch.equal(*weights)
        norms = view.weights.squared_norms(path), expected.weights.squared_norms(path)
        assert torch.allclose(*norms, rtol=1e-6)
    assert all(map(torch.equal, probe_logits(base, None, ROWS), own))
    assert fingerprint(base.model, quantization) == before and base.dtype == loaded


@pytest.mark.parametrize("shape", CONFIGS | MIXTURES | HYBRIDS)
@pytest.mark.parametrize("quantization", ["nf4", "int8", "none"])
def test_what_bfloat16_holds_of_a_float32_checkpoint(tmp_path, shape, quantization):
    """The load in bfloat16, seen in float32, is the load in float32 with its values rounded."""
    folder = str(float32_checkpoint(tmp_path, shape))
    coarse, fine = (
        load_base(BaseConfig(model=folder, quantization=quantization, dtype=dtype, device="cpu"))
        for dtype in ("bfloat16", "float32")
    )
    assert fine.spec.exceeds_bfloat16 and fine.spec.fingerprint == coarse.spec.fingerprint
    before = probe_logits(fine, None, ROWS)
    found = probe_logits(as_bfloat16_holds(fine), None, ROWS)
    expected = probe_logits(in_dtype(coarse, torch.float32), None, ROWS)
    # Falcon-H1's load in bfloat16 makes a vector of factors in bfloat16, of its config alone.
    limit = 2e-2 if shape == "falcon-h1" else 2e-5
    assert largest_difference(found, expected) <= limit < largest_difference(before, expected)
    assert all(map(torch.equal, probe_logits(fine, None, ROWS), before))


@pytest.mark.parametrize(
    "name", ["dora-vocabulary", "replication-dora", "trainable-tokens", "modules-to-save-head"]
)
def test_adapters_act_on_a_view_as_on_a_base(tmp_path, name):
    folder = tiny_checkpoint(tmp_path / "base", "llama")
    base, exact = (
        tiny_base("llama", dtype=d, folder=folder) for d in (torch.bfloat16, torch.float32)
    )
    (variant,) = write_variants(exact, "llama", tmp_path / "adapters", [name])
    view = in_dtype(base, torch.float32)
    found, expected = (
        probe_logits(one, load_adapter(variant.folder, one.spec, one.weights), ROWS)
        for one in (view, exact)
    )
    assert largest_difference(found, expected) <= 2e-5
    assert largest_difference(expected, probe_logits(exact, None, ROWS)) > 0.3


def test_a_base_with_recomputed_layers_has_a_view():
    base = tiny_base("llama", dtype=torch.bfloat16)
    lighter = in_dtype(recomputed(base), torch.float32)
    expected = probe_logits(in_dtype(base, torch.float32), None, ROWS)
    assert all(map(torch.equal, probe_logits(lighter, None, ROWS), expected))


def test_a_view_holds_no_second_model(tmp_path):
    """Of its tensors only norms are new; the base itself is its own view."""
    base = tiny_base("llama", dtype=torch.bfloat16)
    view = in_dtype(base, torch.float32)
    probe_logits(view, None, ROWS)
    held = {tensor.data_ptr() for tensor in base.model.state_dict().values()}
    new = [t for t in view.model.state_dict().values() if t.data_ptr() not in held]
    assert new and all(tensor.ndim == 1 for tensor in new)
    linears = [m for m in view.model.modules() if hasattr(m, "keep_copies")]
    viewed = [m for m in linears if not m.keep_copies]
    assert viewed and all(m._dense is None and not m._panels for m in viewed)
    assert in_dtype(base, torch.bfloat16) is base


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_scaled_embedding_is_scaled_as_if_it_were_loaded_in_the_dtype(dtype):
    """Its buffer was rounded when the model was made: √6 is 2.453 in bfloat16."""
    embeddings = []
    for made in (torch.bfloat16, dtype):
        torch.set_default_dtype(made)
        try:
            torch.manual_seed(0)
            embedding = Gemma3TextScaledWordEmbedding(10, 6, 0, embed_scale=6**0.5)
        finally:
            torch.set_default_dtype(torch.float32)
        embeddings.append(embedding)
    embeddings[1].weight.data = embeddings[0].weight.data.to(dtype)
    ids = torch.tensor([[1, 9, 1, 0]])
    assert torch.equal(CastEmbedding(embeddings[0], dtype)(ids), embeddings[1](ids))

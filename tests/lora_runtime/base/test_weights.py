"""What adapters ask of a base's weights equals the dense answer, without making anything dense."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import bitsandbytes.functional as bnb
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lora_runtime.adapters.variants.dora import dora_gain
from lora_runtime.adapters.variants.mutated_base import Factors
from lora_runtime.base.model.int8_linear import Int8Linear
from lora_runtime.base.model.quant_linear import ROW_BLOCK, DenseLinear, QuantLinear
from lora_runtime.base.weights import BaseWeights
from lora_runtime.core import BaseSpec, LinearShape
from lora_runtime.errors import AdapterRefused
from tests.tiny import tiny_base, tiny_checkpoint

DTYPES = [torch.float32, torch.bfloat16]
VOCAB, HIDDEN = 1000, 96


@given(
    out_features=st.integers(1, 3 * ROW_BLOCK),
    in_features=st.integers(1, 8).map(lambda n: 2 * n),
    dtype=st.sampled_from(DTYPES),
    is_nested=st.booleans(),
)
@settings(max_examples=25)
def test_row_blocks_are_the_weight(out_features, in_features, dtype, is_nested) -> None:
    weight = torch.randn(out_features, in_features).to(dtype)
    layers = [
        DenseLinear(weight, None),
        Int8Linear(weight, None),
        QuantLinear(weight, None, is_nested=is_nested),
        QuantLinear(weight, None, quant_type="fp4"),
    ]
    for layer in layers:
        blocks = [block for _, block in layer.row_blocks()]
        assert torch.equal(torch.cat(blocks), layer.weight_values())
        assert max(len(block) for block in blocks) <= ROW_BLOCK


def by_definition(
    packed: torch.Tensor, absmax: torch.Tensor, size: tuple[int, int], kind: str
) -> torch.Tensor:
    """code × absmax of each block of 64, the high nibble first."""
    codes = torch.stack([packed.flatten() >> 4, packed.flatten() & 15], dim=1).flatten()
    code = bnb.get_4bit_type(kind, device="cpu")
    scales = absmax.repeat_interleave(64)[: codes.numel()]
    return (code[codes.long()] * scales).view(size)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("size", [(64, 64), (96, 160), (3, 10), (700, 96), (5, 1440)])
def test_rows_that_end_inside_a_block(size: tuple[int, int], kind: str) -> None:
    """bitsandbytes' own CPU kernel is wrong there."""
    weight = torch.randn(size).bfloat16()
    packed, state = bnb.quantize_4bit(weight, blocksize=64, quant_type=kind)
    expected = by_definition(packed, state.absmax, size, kind)
    assert torch.equal(QuantLinear(weight, None, quant_type=kind).dequantize(), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [(64, 64), (512, 384)])
def test_double_quantisation_is_bitsandbytes(size: tuple[int, int], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight = (0.02 * torch.randn(size)).bfloat16()
    packed, state = bnb.quantize_4bit(
        weight, blocksize=64, quant_type="nf4", compress_statistics=True
    )
    assert state.nested
    state.dtype = torch.float32
    expected = bnb.dequantize_4bit(packed, state)
    layer = QuantLinear(weight.to(dtype), None, is_nested=True)
    assert torch.equal(layer.dequantize(), expected)
    assert torch.equal(layer.weight_values(), expected.to(dtype))
    assert layer.resident_bytes < QuantLinear(weight, None).resident_bytes
    layer.to(torch.bfloat16)
    assert torch.equal(layer.dequantize(), expected)


FORMATS = {
    "nf4": QuantLinear,
    "nf4-double": partial(QuantLinear, is_nested=True),
    "fp4": partial(QuantLinear, quant_type="fp4"),
    "int8": Int8Linear,
    "none": DenseLinear,
}


def table(dtype: torch.dtype, quantization: str = "nf4") -> tuple[BaseWeights, torch.nn.Module]:
    """A model of an embedding, one linear and a head."""
    torch.manual_seed(1)
    model = torch.nn.Module()
    model.embed = torch.nn.Embedding(VOCAB, HIDDEN, dtype=dtype)
    weight = torch.randn(700, HIDDEN).to(dtype)
    model.linear = FORMATS[quantization](weight, None)
    model.head = DenseLinear(torch.randn(VOCAB, HIDDEN).to(dtype), torch.randn(VOCAB).to(dtype))
    spec = BaseSpec(
        name="table", fingerprint="", linears={"linear": LinearShape(HIDDEN, 700)},
        embedding="embed", head="head", is_tied=False, num_layers=1, hidden_size=HIDDEN,
        vocab_size=VOCAB, max_model_len=8, quantization="nf4", dtype="float32", device="cpu",
        model_type="llama",
    )  # fmt: skip
    return BaseWeights(model, spec, Path("no checkpoint")), model


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("path", "quantization"),
    [*(("linear", name) for name in FORMATS), ("head", "nf4"), ("embed", "nf4")],
)
def test_norms_and_products(path: str, quantization: str, dtype: torch.dtype) -> None:
    weights, model = table(dtype, quantization)
    layer = model.get_submodule(path)
    dense = (layer.weight.T if path == "embed" else layer.weight_values()).detach().double()
    a = torch.randn(5, dense.shape[1])
    torch.testing.assert_close(
        weights.squared_norms(path), dense.square().sum(1), rtol=1e-6, atol=0
    )
    torch.testing.assert_close(
        weights.times_transposed(path, a).double(), dense @ a.double().T, rtol=1e-5, atol=1e-3
    )
    assert weights.squared_norms(path) is weights.squared_norms(path)


def test_biases_and_rows() -> None:
    weights, model = table(torch.bfloat16)
    assert weights.bias("linear") is None
    assert torch.equal(weights.bias("head"), model.head.bias.float())
    rows = slice(3, 9)
    assert torch.equal(weights.vocabulary_rows("embed", rows), model.embed.weight[rows])
    assert torch.equal(weights.vocabulary_rows("head", rows), model.head.weight[rows])
    assert weights.dtype == torch.bfloat16


class Largest(TorchDispatchMode):
    """Remembers the most elements that any tensor made inside has."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        made = [leaf for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        self.elements = max([self.elements, *(tensor.numel() for tensor in made)])
        return out


@pytest.mark.parametrize("keep_copies", [False, True])
def test_doras_norm_makes_nothing_dense(keep_copies: bool) -> None:
    """Neither W nor ΔW, (out, in), is ever made: the largest tensor is a block of rows."""
    out_features, in_features, rank = 16 * ROW_BLOCK, 512, 8
    weights, model = table(torch.float32)
    weight = torch.randn(out_features, in_features)
    model.linear = QuantLinear(weight, None, keep_copies=keep_copies)
    a, b = torch.randn(rank, in_features), 0.1 * torch.randn(out_features, rank)
    with Largest() as largest:
        gain = dora_gain(weights, "linear", Factors(a, b), torch.ones(out_features))
    assert largest.elements <= ROW_BLOCK * in_features
    expected = 1 / (model.linear.weight_values().double() + b.double() @ a.double()).norm(dim=1)
    torch.testing.assert_close(gain.double(), expected, rtol=2e-6, atol=0)


def test_the_original_is_the_checkpoints(tmp_path: Path) -> None:
    base = tiny_base("llama", folder=tiny_checkpoint(tmp_path, "llama"))
    path = "model.layers.1.mlp.up_proj"
    stored = load_file(tmp_path / "model.safetensors")[f"{path}.weight"]
    assert torch.equal(base.weights.original(path), stored)
    served = base.model.get_submodule(path).linear.weight_values()
    assert not torch.equal(served, stored.float())


def test_a_base_without_a_checkpoint_says_so() -> None:
    weights, _ = table(torch.float32)
    with pytest.raises(AdapterRefused, match="linear.weight is needed") as refusal:
        weights.original("linear")
    assert refusal.value.field == "init_lora_weights"

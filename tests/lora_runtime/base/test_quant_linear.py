"""Quantised layers against bitsandbytes: same bits, same values, right gradients, never changed."""

from __future__ import annotations

import copy

import bitsandbytes.functional as bnb
import pytest
import torch

from lora_runtime.base.model.int8_linear import Int8Linear
from lora_runtime.base.model.quant_linear import DenseLinear, QuantLinear
from lora_runtime.kernels import (
    can_multiply_codes,
    can_quantize,
    can_use_panels,
    quantize_four_bit,
)

FOUR_BITS = ["nf4", "fp4"]
FORMATS = [*FOUR_BITS, "int8"]


def quantized(out_features=96, in_features=64, dtype=torch.float32, kind="nf4", **kwargs):
    torch.manual_seed(0)
    weight = torch.randn(out_features, in_features, dtype=torch.bfloat16)
    bias = torch.randn(out_features).to(dtype)
    if kind == "int8":
        return weight, Int8Linear(weight.to(dtype), bias, **kwargs)
    return weight, QuantLinear(weight.to(dtype), bias, quant_type=kind, **kwargs)


def canonical(layer):
    return {name: b.clone() for name, b in layer.named_buffers() if name != "bias"}


def assert_unchanged(layer, before):
    assert len(before) >= 2 and not list(layer.parameters())
    for name, value in canonical(layer).items():
        assert value.dtype == before[name].dtype and torch.equal(value, before[name])


@pytest.mark.parametrize("kind", FOUR_BITS)
@pytest.mark.parametrize("sizes", [(96, 64), (33, 10), (576, 1536), (5, 13)])
def test_packed_bits_and_values_equal_bitsandbytes(sizes, kind):
    weight, layer = quantized(*sizes, kind=kind)
    packed, state = bnb.quantize_4bit(weight, blocksize=64, quant_type=kind)
    assert torch.equal(layer.packed, packed.flatten())
    assert torch.equal(layer.absmax, state.absmax)
    codes = torch.stack([layer.packed >> 4, layer.packed & 15], 1).flatten()[: weight.numel()]
    absmax = layer.absmax.repeat_interleave(64)[: weight.numel()]
    code = bnb.get_4bit_type(kind, device="cpu")
    assert torch.equal(layer.dequantize().flatten(), code[codes.long()] * absmax)
    if sizes[1] % 64 == 0:  # elsewhere bitsandbytes' own kernel misreads absmax
        state.dtype = torch.float32
        assert torch.equal(layer.dequantize(), bnb.dequantize_4bit(packed, state))


def hard_weights(num_weights, seed):
    """Blocks of zeros, of subnormal numbers, with NaN, with infinities, of equal weights, of values
    half way between two codes, and of every bfloat16 in turn.
    """
    numbers = torch.Generator().manual_seed(seed)
    every = torch.arange(1 << 16).to(torch.int16).view(torch.bfloat16)
    weights = torch.randn(num_weights, generator=numbers).to(torch.bfloat16)
    starts = torch.randint(0, num_weights, (8,), generator=numbers).tolist()
    weights[: len(every)] = every[:num_weights]
    for start, value in zip(
        starts, (0.0, -0.0, 1e-40, torch.nan, torch.inf, -torch.inf, 1, -3), strict=True
    ):
        weights[start : start + 100] = value
    halves = torch.tensor([1.0, -1.0, 0.5, -0.5, 0.25, 0.125]).to(torch.bfloat16)
    weights[-700:-636] = halves.repeat(11)[:64]
    return weights


@pytest.mark.parametrize("kind", FOUR_BITS)
@pytest.mark.parametrize("num_weights", [70_000, 66_049, 66_010])
def test_weights_of_any_kind_have_bitsandbytes_codes(num_weights, kind):
    """Some in whole blocks, some with a rest, of an even and an odd number."""
    code = bnb.get_4bit_type(kind, device="cpu")
    assert can_quantize(code), "the library was not built"
    for seed in range(3):
        weights = hard_weights(num_weights, seed)
        packed, absmax = quantize_four_bit(weights, code)
        expected, state = bnb.quantize_4bit(weights, blocksize=64, quant_type=kind)
        assert torch.equal(packed, expected.flatten())
        torch.testing.assert_close(absmax, state.absmax, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", [(96, 64), (33, 10), (576, 1536), (5, 13), (700, 7), (1, 1)])
def test_int8_codes_and_scales_equal_bitsandbytes(sizes, dtype):
    weight, layer = quantized(*sizes, dtype, kind="int8")
    codes, absmax, _ = bnb.int8_vectorwise_quant(weight)
    assert torch.equal(layer.codes, codes) and layer.codes.dtype == torch.int8
    assert torch.equal(layer.absmax, absmax) and layer.absmax.dtype == torch.float32
    assert torch.equal(layer.dequantize(), codes.float() * (absmax / 127)[:, None])
    theirs = bnb.int8_vectorwise_dequant(codes, absmax)  # multiplies by a rounded 1/127
    torch.testing.assert_close(layer.dequantize(), theirs, rtol=3e-7, atol=0)


def test_a_row_of_zeros_and_one_too_small_to_scale_are_zero_in_int8():
    weight = torch.randn(4, 6, dtype=torch.bfloat16)
    weight[1], weight[2] = 0, 1e-39
    layer = Int8Linear(weight, None)
    assert not layer.codes[1:3].any() and layer.codes[[0, 3]].abs().amax(1).eq(127).all()
    assert torch.equal(layer.codes, bnb.int8_vectorwise_quant(weight)[0])
    assert layer.weight_values().isfinite().all()


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("keep_copies", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_value_is_rounded_once_to_the_compute_dtype(dtype, keep_copies, kind):
    _, layer = quantized(dtype=dtype, kind=kind, keep_copies=keep_copies)
    for _ in range(2):
        assert layer.dequantize().dtype == torch.float32
        assert torch.equal(layer.weight_values(), layer.dequantize().to(dtype))
        assert torch.equal(layer.kept_values(), layer.dequantize().to(dtype))


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("keep_copies", [False, True])
def test_gradient_through_the_layer_equals_the_dequantized_weight(keep_copies, kind):
    _, layer = quantized(kind=kind, keep_copies=keep_copies)
    x = torch.randn(7, 64, requires_grad=True)
    grad = torch.randn(7, 96)
    layer(x).backward(grad)
    torch.testing.assert_close(x.grad, grad @ layer.dequantize())
    assert x.grad.abs().sum() > 0


@pytest.mark.parametrize("kind", FORMATS)
def test_serving_and_training_leave_the_packed_bits_alone(kind):
    _, layer = quantized(kind=kind, keep_copies=True)
    before = canonical(layer)
    layer.eval()
    with torch.inference_mode():
        layer(torch.randn(3, 64))
    layer.train()
    layer(torch.randn(3, 64, requires_grad=True)).sum().backward()
    assert_unchanged(layer, before)


@pytest.mark.parametrize("kind", FORMATS)
def test_casting_a_module_keeps_codes_and_scales(kind):
    _, layer = quantized(kind=kind, keep_copies=True)
    before = canonical(layer)
    layer.kept_values()
    layer.to(torch.bfloat16)
    assert layer.absmax.dtype == torch.float32 and layer.bias.dtype == torch.bfloat16
    assert layer._dense is None
    assert_unchanged(layer, before)


@pytest.mark.parametrize("kind", FORMATS)
def test_resident_bytes_count_the_private_copies(kind):
    _, layer = quantized(kind=kind, keep_copies=True)
    packed_bytes, dense_bytes = 96 * 64 // 2 + 96 * 64 // 64 * 4, 96 * 64 * 4
    if kind == "int8":
        packed_bytes = 96 * 64 + 96 * 4
    assert layer.resident_bytes == packed_bytes
    layer(torch.randn(2, 64, requires_grad=True))
    assert layer.resident_bytes == packed_bytes + dense_bytes
    x = torch.randn(2, 64)
    with torch.inference_mode():
        layer(x)
    has_panels = can_use_panels(x) and not can_multiply_codes(x)
    assert layer.resident_bytes == packed_bytes + (1 + has_panels) * dense_bytes


def test_a_copy_is_in_the_same_memory_until_one_of_both_is_cast():
    layer = DenseLinear(torch.randn(32, 64), None, keep_copies=True)
    x, weight = torch.randn(3, 64), layer.weight.clone()
    layer(x)  # makes a private copy of the weight
    copied = copy.copy(layer)
    assert copied.weight.data_ptr() == layer.weight.data_ptr()
    layer.to(torch.bfloat16)
    assert torch.equal(copied.weight, weight) and layer.weight.dtype == torch.bfloat16
    torch.testing.assert_close(copied(x), x @ weight.T)


def test_int8_rows_do_not_touch_each_other():
    """An outlier in one row of x, which LLM.int8's own product would take out of all rows."""
    _, layer = quantized(kind="int8")
    x = torch.randn(4, 64)
    before = layer(x)
    x[2, 5] = 1e4
    after = layer(x)
    rest = [0, 1, 3]
    assert torch.equal(before[rest], after[rest]) and not torch.equal(before[2], after[2])


def test_dense_layer_has_gradients_in_x_only():
    layer = DenseLinear(torch.randn(5, 4), None)
    x = torch.randn(2, 4, requires_grad=True)
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, layer.weight.sum(0).expand(2, 4))
    assert layer.weight.grad is None


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("sizes", [(96, 64), (33, 10), (16, 577)])
@pytest.mark.parametrize("num_rows", [1, 2, 5, 6, 13])
def test_panels_give_the_product_and_every_row_is_its_own(sizes, num_rows, kind):
    weight, layer = quantized(*sizes, kind=kind, keep_copies=True)
    x = torch.randn(num_rows, sizes[1])
    with torch.inference_mode():
        y = layer.product(x)
        torch.testing.assert_close(y, x @ layer.dequantize().T, rtol=1e-4, atol=1e-4)
        rows = [layer.product(row[None])[0] for row in x]
    assert torch.equal(y, torch.stack(rows))

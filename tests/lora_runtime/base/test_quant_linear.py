"""QuantLinear against bitsandbytes: same bits, same values, right gradients, never changed."""

from __future__ import annotations

import bitsandbytes.functional as bnb
import pytest
import torch

from lora_runtime.base.quant_linear import DenseLinear, QuantLinear


def quantized(out_features=96, in_features=64, dtype=torch.float32, **kwargs):
    torch.manual_seed(0)
    weight = torch.randn(out_features, in_features, dtype=torch.bfloat16)
    return weight, QuantLinear(weight.to(dtype), torch.randn(out_features).to(dtype), **kwargs)


@pytest.mark.parametrize("sizes", [(96, 64), (33, 10), (576, 1536)])
def test_packed_bits_and_values_equal_bitsandbytes(sizes):
    weight, layer = quantized(*sizes)
    packed, state = bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    assert torch.equal(layer.packed, packed.flatten())
    assert torch.equal(layer.absmax, state.absmax)
    state.dtype = torch.float32
    assert torch.equal(layer.dequantize(), bnb.dequantize_4bit(packed, state))
    codes = torch.stack([layer.packed >> 4, layer.packed & 15], 1).flatten()[: weight.numel()]
    absmax = layer.absmax.repeat_interleave(64)[: weight.numel()]
    assert torch.equal(layer.dequantize().flatten(), layer.code[codes.long()] * absmax)


@pytest.mark.parametrize("keep_copies", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_value_is_rounded_once_to_the_compute_dtype(dtype, keep_copies):
    _, layer = quantized(dtype=dtype, keep_copies=keep_copies)
    for _ in range(2):
        assert torch.equal(layer.weight_values(), layer.dequantize().to(dtype))


@pytest.mark.parametrize("keep_copies", [False, True])
def test_gradient_through_the_layer_equals_the_dequantized_weight(keep_copies):
    _, layer = quantized(keep_copies=keep_copies)
    x = torch.randn(7, 64, requires_grad=True)
    grad = torch.randn(7, 96)
    layer(x).backward(grad)
    torch.testing.assert_close(x.grad, grad @ layer.dequantize())
    assert x.grad.abs().sum() > 0


def test_serving_and_training_leave_the_packed_bits_alone():
    _, layer = quantized(keep_copies=True)
    before = [t.clone() for t in (layer.packed, layer.absmax)]
    layer.eval()
    with torch.inference_mode():
        layer(torch.randn(3, 64))
    layer.train()
    layer(torch.randn(3, 64, requires_grad=True)).sum().backward()
    assert all(torch.equal(a, b) for a, b in zip(before, (layer.packed, layer.absmax), strict=True))
    assert not list(layer.parameters())


def test_casting_a_module_keeps_absmax_in_float32():
    _, layer = quantized()
    absmax = layer.absmax.clone()
    layer.to(torch.bfloat16)
    assert layer.absmax.dtype == torch.float32 and torch.equal(layer.absmax, absmax)
    assert layer.packed.dtype == torch.uint8


def test_resident_bytes_count_the_private_copies():
    _, layer = quantized(keep_copies=True)
    packed_bytes, dense_bytes = 96 * 64 // 2 + 96 * 64 // 64 * 4, 96 * 64 * 4
    assert layer.resident_bytes == packed_bytes
    layer(torch.randn(2, 64, requires_grad=True))
    assert layer.resident_bytes == packed_bytes + dense_bytes
    with torch.inference_mode():
        layer(torch.randn(2, 64))
    assert layer.resident_bytes == packed_bytes + 2 * dense_bytes


def test_dense_layer_has_gradients_in_x_only():
    layer = DenseLinear(torch.randn(5, 4), None)
    x = torch.randn(2, 4, requires_grad=True)
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, layer.weight.sum(0).expand(2, 4))
    assert layer.weight.grad is None


@pytest.mark.parametrize("sizes", [(96, 64), (33, 10), (16, 577)])
@pytest.mark.parametrize("num_rows", [1, 2, 5, 6, 13])
def test_panels_give_the_product_and_every_row_is_its_own(sizes, num_rows):
    weight, layer = quantized(*sizes, keep_copies=True)
    x = torch.randn(num_rows, sizes[1])
    with torch.inference_mode():
        y = layer.product(x)
        torch.testing.assert_close(y, x @ layer.dequantize().T, rtol=1e-4, atol=1e-4)
        rows = [layer.product(row[None])[0] for row in x]
    assert torch.equal(y, torch.stack(rows))

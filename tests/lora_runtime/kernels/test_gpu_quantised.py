"""Quantised products in Triton against bitsandbytes' dequantised weight in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lora_runtime.base.int8_linear import Int8Linear
from lora_runtime.base.quant_linear import QuantLinear
from lora_runtime.kernels import gpu, gpu_counters, gpu_quantised
from tests.lora_runtime.kernels.on_triton import DEVICE

SHAPES = [(17, 64), (64, 192), (70, 320), (130, 1088)]
"""(out, in): no multiples of the tiles, with and without a split of the inputs."""
BFLOAT16, FLOAT32 = torch.bfloat16, torch.float32


@pytest.fixture(autouse=True)
def triton_takes_the_device(monkeypatch):
    monkeypatch.setattr(gpu, "DEVICES", {DEVICE})


def layer_of(kind, shape, dtype):
    generator = torch.Generator().manual_seed(sum(shape))
    weight = torch.randn(*shape, generator=generator).to(DEVICE, dtype)
    if kind == "int8":
        return Int8Linear(weight, None)
    return QuantLinear(weight, None, quant_type=kind[:3], is_nested=kind == "nf4-double")


def counted(monkeypatch, name):
    calls, real = [], getattr(gpu_quantised, name)
    monkeypatch.setattr(gpu_quantised, name, lambda *a: calls.append(1) or real(*a))
    return calls


def expected_product(layer, x):
    """By W as bitsandbytes gives it, rounded once."""
    return x.double() @ layer.dequantize().to(layer.dtype).double().T


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16])
@pytest.mark.parametrize("num_rows", [1, 2, 3, 7, 64])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_small_batches_multiply_codes(monkeypatch, kind, shape, num_rows, dtype):
    layer = layer_of(kind, shape, dtype)
    calls = counted(monkeypatch, "int8_product" if kind == "int8" else "four_bit_product")
    x = torch.randn(num_rows, shape[1]).to(DEVICE, dtype)
    y = layer.product(x)
    assert calls == [1] and y.dtype == dtype and y.shape == (num_rows, shape[0])
    rounding = 2**-8 if dtype == BFLOAT16 else 1e-5
    torch.testing.assert_close(y.double(), expected_product(layer, x), rtol=rounding, atol=2e-4)


@pytest.mark.parametrize("kind", ["fp4", "nf4-double"])
def test_other_formats_multiply_codes(monkeypatch, kind):
    layer = layer_of(kind, (48, 256), BFLOAT16)
    calls = counted(monkeypatch, "four_bit_product")
    x = torch.randn(2, 3, 256).to(DEVICE, BFLOAT16)
    y = layer.product(x)
    assert calls == [1] and y.shape == (2, 3, 48)
    torch.testing.assert_close(y.double(), expected_product(layer, x), rtol=2**-8, atol=2e-4)


@pytest.mark.parametrize("num_rows", [1, 5])
def test_weights_are_rounded_to_the_compute_dtype_first(num_rows):
    """Sums of W's exact values would differ: x = 1 − 2⁻⁷ units make single weights visible."""
    layer = layer_of("nf4", (40, 128), BFLOAT16)
    x = torch.zeros(num_rows, 128, device=DEVICE, dtype=BFLOAT16)
    x[:, 77] = 1
    y = layer.product(x)
    column = layer.dequantize()[:, 77]
    assert torch.equal(y, column.bfloat16().expand(num_rows, -1))
    assert not torch.equal(column.bfloat16().float(), column)


def test_a_row_does_not_hear_of_its_neighbours():
    layer = layer_of("nf4", (40, 192), FLOAT32)
    x = torch.randn(7, 192, device=DEVICE)
    clean = layer.product(x)
    x[3, 100] = float("nan")
    y = layer.product(x)
    rest = [0, 1, 2, 4, 5, 6]
    assert torch.equal(y[rest], clean[rest]) and y[3].isnan().all()


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_row_is_bit_equal_in_any_batch_and_splits_leave_no_trace(kind):
    layer = layer_of(kind, (130, 1088), BFLOAT16)
    x = torch.randn(40, 1088).to(DEVICE, BFLOAT16)
    y = layer.product(x)
    for rows in (slice(0, 1), slice(3, 10), slice(0, 40)):
        assert torch.equal(layer.product(x[rows]), y[rows])
    assert not gpu_counters.counters(x.device).any()


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16])
@pytest.mark.parametrize("kind", ["nf4", "fp4", "nf4-double"])
@pytest.mark.parametrize("shape", [(64, 192), (33, 130), (7, 9), (130, 1088)])
def test_values_are_bit_equal_to_bitsandbytes(monkeypatch, kind, shape, dtype):
    layer = layer_of(kind, shape, dtype)
    calls = counted(monkeypatch, "four_bit_values")
    values = layer.weight_values()
    assert calls == [1] and values.dtype == dtype
    assert torch.equal(values, layer.dequantize().to(dtype))


def test_large_batches_odd_widths_and_gradients_take_the_dequantised_weight(monkeypatch):
    calls = counted(monkeypatch, "four_bit_product")
    for shape, num_rows, has_grad in [
        ((20, 64), 65, False),
        ((20, 66), 2, False),
        ((20, 64), 2, True),
    ]:
        layer = layer_of("nf4", shape, FLOAT32)
        x = torch.randn(num_rows, shape[1], device=DEVICE, requires_grad=has_grad)
        y = layer.product(x)
        torch.testing.assert_close(y, F.linear(x, layer.dequantize()))
    y.sum().backward()
    assert calls == [] and x.grad is not None


def test_a_layer_that_keeps_copies_uses_them(monkeypatch):
    calls = counted(monkeypatch, "four_bit_product")
    layer = QuantLinear(torch.randn(20, 64, device=DEVICE), None, keep_copies=True)
    layer.product(torch.randn(2, 64, device=DEVICE))
    assert calls == []

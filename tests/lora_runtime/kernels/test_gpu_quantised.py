"""Quantised products in Triton against bitsandbytes' dequantised weight in float64."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F

from lora_runtime.base.model.quant_linear import QuantLinear
from lora_runtime.kernels import counters, gated_activation, gpu
from lora_runtime.kernels.triton import quantised as triton_quantised
from tests.lora_runtime.kernels.adapter_cases import layer_of
from tests.lora_runtime.kernels.on_triton import DEVICE

ROWS = [1, 2, 3, 7, 16, 33, 64]
"""Part of a tile, whole tiles, more than a program multiplies at once."""
KINDS = ["nf4", "fp4", "nf4-double", "int8"]
BFLOAT16, FLOAT32 = torch.bfloat16, torch.float32


@pytest.fixture(autouse=True)
def triton_takes_the_device(monkeypatch):
    monkeypatch.setattr(gpu, "DEVICES", {DEVICE})


def random_shape(blocks):
    """(out, in), in up to so many blocks of 64: mostly no multiples of the tiles."""
    out_features, num_blocks = torch.randint(1, 300, ()), torch.randint(1, blocks, ())
    return int(out_features), 64 * int(num_blocks)


def counted(monkeypatch, name):
    calls, real = [], getattr(triton_quantised, name)
    monkeypatch.setattr(triton_quantised, name, lambda *a: calls.append(1) or real(*a))
    return calls


def expected_product(layer, x):
    """By W as bitsandbytes gives it, rounded once."""
    return x.double() @ layer.dequantize().to(layer.dtype).double().T


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16])
@pytest.mark.parametrize("num_rows", ROWS)
@pytest.mark.parametrize("kind", KINDS)
def test_batches_multiply_codes(monkeypatch, kind, num_rows, dtype):
    shape = random_shape(14)
    layer = layer_of(kind, shape, dtype)
    calls = counted(monkeypatch, "int8_product" if kind == "int8" else "four_bit_product")
    x = torch.randn(1, num_rows, shape[1]).to(DEVICE, dtype)
    y = layer.product(x)
    assert calls == [1] and y.dtype == dtype and y.shape == (1, num_rows, shape[0])
    rounding = 2**-8 if dtype == BFLOAT16 else 1e-5
    torch.testing.assert_close(y.double(), expected_product(layer, x), rtol=rounding, atol=2e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_every_weight_that_is_multiplied_is_bitsandbytes_rounded_once(monkeypatch, kind):
    """Rows of the identity; 64 rows a program, as on a GPU with much shared memory."""
    monkeypatch.setattr(triton_quantised, "max_tiles", lambda device: 8)
    for dtype, num_inputs in ((BFLOAT16, 320), (FLOAT32, 128)):
        layer = layer_of(kind, (140, num_inputs), dtype)
        values = layer.dequantize().to(dtype)
        y = torch.cat([layer.product(x) for x in torch.eye(num_inputs).to(values).split(64)])
        assert torch.equal(y, values.T)


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16])
@pytest.mark.parametrize("kind", ["nf4", "nf4-double", "int8"])
@pytest.mark.parametrize(("activation", "num_rows"), [("silu", 1), ("gelu_tanh", 17)])
def test_a_gated_product_is_bit_equal_to_product_and_activation(kind, dtype, activation, num_rows):
    """With splits and without, an output width that fills no tile."""
    for shape in ((2 * 77, 192), (2 * 70, 1088)):
        layer = layer_of(kind, shape, dtype)
        x = (torch.randn(num_rows, shape[1]) / shape[1] ** 0.5).to(DEVICE, dtype)
        gate, up = layer.product(x).chunk(2, 1)
        expected = gated_activation(gate[None], up[None], activation)[0]
        assert torch.equal(layer.gated_product(x[None], activation)[0], expected)


def test_a_bias_is_added_before_the_activation():
    layer = QuantLinear(torch.randn(40, 64, device=DEVICE), torch.randn(40, device=DEVICE))
    x = torch.randn(1, 2, 64, device=DEVICE)
    y = F.linear(x.double(), layer.dequantize().double(), layer.bias.double())
    gate, up = y.float().chunk(2, -1)
    torch.testing.assert_close(layer.gated_product(x, "silu"), F.silu(gate) * up)


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
    layer = layer_of(kind, (100, 1088), BFLOAT16)
    x = torch.randn(60, 1088).to(DEVICE, BFLOAT16)
    y = layer.product(x)
    for rows in (slice(0, 1), slice(3, 10), slice(33, 60), slice(0, 40)):
        assert torch.equal(layer.product(x[rows]), y[rows])
    assert not counters.counters(x.device).any()


def test_counters_are_as_many_as_wanted_and_a_thread_has_its_own():
    device = torch.device(DEVICE)
    own, many = counters.counters(device), counters.counters(device, 65_537)
    assert len(many) >= 65_537 and counters.counters(device) is own
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(counters.counters, device).result() is not own


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
        ((20, 64), 257, False),
        ((20, 66), 2, False),
        ((20, 64), 2, True),
    ]:
        layer = layer_of("nf4", shape, FLOAT32)
        x = torch.randn(num_rows, shape[1], device=DEVICE, requires_grad=has_grad)
        y = layer.product(x)
        torch.testing.assert_close(y, F.linear(x, layer.dequantize()))
    y.sum().backward()
    assert calls == [] and x.grad is not None


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16])
@pytest.mark.parametrize("kind", KINDS)
def test_grouped_products_are_those_of_each_groups_rows(kind, dtype):
    """Groups without rows, of one row, of several tiles; outputs and inputs that fill no tile."""
    counts, out_features, num_inputs = [0, 1, 19, 0, 8, 33], 140, 320
    if kind == "nf4-double":
        out_features = 256  # whole blocks of scales a group
    layer = layer_of(kind, (len(counts) * out_features, num_inputs), dtype)
    x = torch.randn(sum(counts), num_inputs).to(DEVICE, dtype)
    starts = torch.tensor([0, *counts]).cumsum(0).int().to(DEVICE)
    y = layer.grouped_product(x, starts)
    weights = layer.dequantize().to(dtype).double().view(len(counts), out_features, num_inputs)
    rows = x.double().split(counts)
    expected = torch.cat([own @ weight.T for own, weight in zip(rows, weights, strict=True)])
    rounding = 2**-8 if dtype == BFLOAT16 else 1e-5
    torch.testing.assert_close(y.double(), expected, rtol=rounding, atol=2e-4)


def test_tiles_cover_every_row_once_and_no_group_but_its_own():
    for counts in ([0, 0, 5], [8, 9, 0, 1], [1] * 7, [40], [0, 17, 16, 0]):
        starts = torch.tensor([0, *counts]).cumsum(0).int()
        tiles = triton_quantised.row_tiles(starts, sum(counts), 8).tolist()
        rows = [(g, row) for g, first, end in tiles for row in range(first, end)]
        owners = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts)).tolist()
        assert rows == list(zip(owners, range(sum(counts)), strict=True))

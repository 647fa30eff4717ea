"""The compiled products against bitsandbytes' dequantised weight in float64."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest
import torch

from lora_runtime.base.model.quant_linear import DenseLinear
from lora_runtime.kernels import cpu, reference
from lora_runtime.kernels.cpu_library import LEVELS
from tests.lora_runtime.kernels.adapter_cases import layer_of

BFLOAT16, FLOAT32 = torch.bfloat16, torch.float32
KINDS = ["nf4", "fp4", "nf4-double", "int8", "none", "wide"]
ROWS = [1, 2, 3, 4, 5, 15, 16, 17, 32, 33, 48, 133]
"""Parts of a block of 4 tokens and of a tile of 16, whole ones, and more than share a pass."""

needs_bfloat16 = pytest.mark.skipif(not cpu.multiplies_bfloat16(), reason="needs AVX512-BF16")
each_kind_of_product = pytest.mark.parametrize(
    "level, dtype",
    [("amx", BFLOAT16), ("avx512_bf16", BFLOAT16), ("avx512", FLOAT32), ("avx2", FLOAT32)],
    indirect=["level"],
)
needs_codes = pytest.mark.skipif(
    not cpu.can_multiply_codes(torch.empty(1, 64)), reason="needs AVX2"
)
TOLERANCE = {FLOAT32: {"rtol": 1e-5, "atol": 2e-5}, BFLOAT16: {"rtol": 2**-8, "atol": 2e-4}}


def layer(kind, out_features, in_features, dtype=BFLOAT16):
    """In float32 "none" has a copy in panels of bfloat16, "wide" one in panels of float32."""
    if kind in ("none", "wide"):
        weight = torch.randn(out_features, in_features) / in_features**0.5
        held = weight.to(BFLOAT16).to(dtype) if kind == "none" else weight.to(dtype)
        return DenseLinear(held, None, keep_copies=dtype == FLOAT32)
    return layer_of(kind, (out_features, in_features), dtype)


def random_shape():
    """(out, in): mostly no multiples of a tile's 16 or a panel's 32 outputs."""
    return int(torch.randint(1, 200, ())), 64 * int(torch.randint(1, 9, ()))


def expected(frozen, x):
    return x.double() @ frozen.weight_values().double().T


@each_kind_of_product
@pytest.mark.parametrize("num_rows", ROWS)
@pytest.mark.parametrize("kind", KINDS)
def test_products_are_those_of_the_dequantised_weight(level, kind, num_rows, dtype):
    shape = random_shape()
    frozen, x = layer(kind, *shape, dtype), torch.randn(1, num_rows, shape[1]).to(dtype)
    assert frozen.is_compiled_for(x)
    y = frozen.product(x)
    assert y.dtype == dtype and y.shape == (1, num_rows, shape[0])
    torch.testing.assert_close(y.double(), expected(frozen, x), **TOLERANCE[dtype])


@each_kind_of_product
@pytest.mark.parametrize("num_inputs", [192, 256])
@pytest.mark.parametrize("kind", KINDS)
def test_every_weight_is_bitsandbytes_rounded_once(level, kind, num_inputs, dtype):
    """Rows of the identity read the weights themselves: not one bit may differ."""
    frozen = layer(kind, 70, num_inputs, dtype)
    identity = torch.eye(num_inputs).to(dtype)
    assert torch.equal(frozen.product(identity).T, frozen.weight_values())
    alone = torch.cat([frozen.product(row[None]) for row in identity])
    assert torch.equal(alone.T, frozen.weight_values())


@each_kind_of_product
@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_bit_equal_whatever_stands_beside_them(level, kind, dtype):
    shape = random_shape()
    frozen, x = layer(kind, *shape, dtype), torch.randn(133, shape[1]).to(dtype)
    x[7] = float("nan")
    together = frozen.product(x)
    for rows in (slice(0, 1), slice(3, 9), slice(20, 50), slice(100, 133)):
        some = frozen.product(x[rows])
        assert torch.equal(some.nan_to_num(7.0), together[rows].nan_to_num(7.0))
    assert together[7].isnan().all() and not together[8:].isnan().any()


@each_kind_of_product
@pytest.mark.parametrize("kind", KINDS)
def test_rows_too_wide_to_be_kept_whole_are_the_same_in_parts(level, kind, dtype):
    frozen, x = layer(kind, 37, 64 * 51, dtype), torch.randn(300, 64 * 51).to(dtype)
    together = frozen.product(x)
    tolerance = {"rtol": 1e-5, "atol": 2e-4} if dtype == FLOAT32 else {"rtol": 2**-7, "atol": 5e-3}
    torch.testing.assert_close(together.double(), expected(frozen, x), **tolerance)
    for rows in (slice(0, 1), slice(2, 5), slice(5, 12), slice(0, 128), slice(120, 260)):
        assert torch.equal(frozen.product(x[rows]), together[rows])


@needs_bfloat16
def test_a_weight_that_lies_in_columns_is_read_by_rows():
    weight, x = torch.randn(128, 30).to(BFLOAT16), torch.randn(3, 128).to(BFLOAT16)
    y = DenseLinear(weight.T, None).product(x)
    torch.testing.assert_close(y.double(), x.double() @ weight.double(), rtol=2**-8, atol=2e-3)


@pytest.mark.parametrize("dtype, limit", [("float32", 1), ("bfloat16", 3), ("bfloat16", 4)])
def test_no_rows_touch_no_memory(limit, dtype):
    """The output layer of a step that samples nothing. In a process of its own: what is written
    past the end of a buffer shows when memory is taken or given back.
    """
    if cpu.library().loramux_level() < limit:
        pytest.skip(f"the processor has no {LEVELS[limit]}")
    program = f"""
        import torch
        from lora_runtime.kernels import cpu
        from lora_runtime.kernels.cpu_library import library

        library().loramux_limit_level({limit})
        dtype = torch.{dtype}
        weight = torch.ones(64, 8192, dtype=torch.bfloat16)
        codes, scales = weight.to(torch.int8), torch.ones(64)
        packed = torch.zeros(64 * 8192 // 2, dtype=torch.uint8)
        absmax, code = torch.ones(8192), torch.ones(16)
        for rows in (1, 0, 2, 0):
            x = torch.ones(rows, 8192, dtype=dtype)
            found = (
                cpu.dense_product(x, weight) if dtype == torch.bfloat16 else
                cpu.panel_product(x, cpu.pack_panels(weight.float()), 64),
                cpu.int8_product(x, codes, scales),
                cpu.four_bit_product(x, packed, absmax, code, 64),
            )
            assert all(y.shape == (rows, 64) for y in found)
            kept = [torch.ones(size) for size in range(1, 4000, 7)]
            assert all(bool((one == 1).all()) for one in kept)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


@each_kind_of_product
def test_threads_change_no_bit(level, dtype):
    frozen, x = layer("nf4", 500, 320, dtype), torch.randn(40, 320).to(dtype)
    found, num_threads = [], torch.get_num_threads()
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            found.append(frozen.product(x))
    finally:
        torch.set_num_threads(num_threads)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@needs_bfloat16
def test_what_tiles_do_not_take_goes_by_torch():
    """Inputs that are no multiple of a unit, and x that wants a gradient."""
    odd, x = layer("none", 30, 96), torch.randn(3, 96).to(BFLOAT16)
    assert not cpu.can_multiply_dense(x)
    torch.testing.assert_close(odd.product(x).double(), expected(odd, x), rtol=2**-7, atol=2e-3)
    tracked = torch.randn(3, 128).to(BFLOAT16).requires_grad_()
    layer("nf4", 30, 128).product(tracked).float().sum().backward()
    assert tracked.grad.abs().sum() > 0


@each_kind_of_product
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_codes_are_multiplied_without_a_copy(level, kind, dtype):
    frozen = layer_of(kind, (64, 128), dtype)
    frozen.keep_copies, before = True, frozen.resident_bytes
    frozen.product(torch.randn(3, 128).to(dtype))
    assert frozen.resident_bytes == before


@needs_codes
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_copy_is_kept_where_codes_are_not_multiplied(kind):
    """Inputs that are no multiple of a block: in panels of float32, whole ones of 32 outputs."""
    frozen, x = layer_of(kind, (64, 96), FLOAT32), torch.randn(3, 96)
    frozen.keep_copies, before = True, frozen.resident_bytes
    torch.testing.assert_close(
        frozen.product(x).double(), expected(frozen, x), **TOLERANCE[FLOAT32]
    )
    assert frozen.resident_bytes == before + 64 * 96 * 4


@pytest.mark.parametrize("height", [5, 40, 48, 64])
def test_a_row_of_a_group_is_bit_equal_whatever_stands_beside_it(height):
    """Of unquantised experts in float32, with heights that are no whole panels."""
    frozen = DenseLinear(torch.randn(3 * height, 100) / 10, None, keep_copies=True)
    x, starts = torch.randn(24, 100), torch.tensor([0, 9, 9, 24], dtype=torch.int32)
    with torch.inference_mode():
        together = frozen.grouped_product(x, starts)
        for row, group in ((3, 0), (20, 2)):
            alone = torch.tensor([0] * (group + 1) + [1] * (3 - group), dtype=torch.int32)
            assert torch.equal(frozen.grouped_product(x[row : row + 1], alone)[0], together[row])
    groups = frozen.weight.double().view(3, height, 100)
    wanted = torch.cat([x[:9].double() @ groups[0].T, x[9:].double() @ groups[2].T])
    torch.testing.assert_close(together.double(), wanted, **TOLERANCE[FLOAT32])


def test_panels_hold_bfloat16_where_that_holds_every_value():
    weight = torch.randn(40, 10)
    rounded = weight.to(BFLOAT16).float()
    assert cpu.pack_panels(weight).dtype == FLOAT32
    assert cpu.pack_panels(rounded).dtype == BFLOAT16
    x = torch.eye(10)
    assert torch.equal(cpu.panel_product(x, cpu.pack_panels(rounded), 40).T, rounded)
    assert torch.equal(cpu.panel_product(x, cpu.pack_panels(weight), 40).T, weight)


@pytest.mark.parametrize("height", [1, 32, 40, 1100])
@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16])
def test_each_group_of_rows_begins_with_a_panel(height, dtype):
    weight = torch.randn(3 * height, 7).to(dtype).float()
    panels = cpu.pack_panels(weight, 3)
    assert panels.dtype == dtype
    for own, rows in zip(panels.chunk(3), weight.split(height), strict=True):
        assert torch.equal(own.float(), cpu.pack_panels(rows).float())
        assert torch.equal(cpu.panel_product(torch.eye(7), own, height).T, rows)
        assert own.sum(dtype=torch.float64) == pytest.approx(rows.sum(dtype=torch.float64))


def test_one_value_beyond_bfloat16_keeps_all_in_float32():
    weight = torch.randn(3000, 5).bfloat16().float()
    weight[2999, 4] = 1 + 2**-20
    assert cpu.pack_panels(weight).dtype == FLOAT32


@pytest.mark.parametrize("dtype", [torch.float32, BFLOAT16])
@pytest.mark.parametrize("width", [1, 15, 49, 1024, 5000])
def test_the_most_likely_token_is_the_first_of_the_largest(dtype, width):
    logits = torch.randn(9, width).to(dtype)
    logits[1] = -3.0
    logits[2, width // 2] = float("nan")
    logits[3, width - 1] = float("inf")
    logits[4] = float("-inf")
    logits[5, width - 1] = 100.0
    found, wanted = cpu.most_likely(logits), reference.most_likely(logits)
    assert torch.equal(found[:, 1], wanted[:, 1])
    is_finite = wanted[:, 1].bool()
    assert torch.equal(found[is_finite, 0], logits[is_finite].max(dim=1).indices)
    assert 0 <= found[:, 0].min() and found[:, 0].max() < width

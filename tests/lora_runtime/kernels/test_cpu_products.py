"""The compiled products of bfloat16 against bitsandbytes' dequantised weight in float64."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest
import torch

from lora_runtime.base.model.quant_linear import DenseLinear
from lora_runtime.kernels import cpu, reference
from tests.lora_runtime.kernels.adapter_cases import layer_of

BFLOAT16 = torch.bfloat16
KINDS = ["nf4", "fp4", "nf4-double", "int8", "none"]
ROWS = [1, 2, 3, 4, 5, 15, 16, 17, 32, 33, 48, 133]
"""Parts of a block of 4 tokens and of a tile of 16, whole ones, and more than share a pass."""

needs_bfloat16 = pytest.mark.skipif(not cpu.multiplies_bfloat16(), reason="needs AVX512-BF16")


def layer(kind, out_features, in_features):
    if kind == "none":
        weight = (torch.randn(out_features, in_features) / in_features**0.5).to(BFLOAT16)
        return DenseLinear(weight, None)
    return layer_of(kind, (out_features, in_features), BFLOAT16)


def random_shape():
    """(out, in): mostly no multiples of a tile's 16 or a panel's 32 outputs."""
    return int(torch.randint(1, 200, ())), 64 * int(torch.randint(1, 9, ()))


def expected(frozen, x):
    return x.double() @ frozen.weight_values().double().T


@needs_bfloat16
@pytest.mark.parametrize("num_rows", ROWS)
@pytest.mark.parametrize("kind", KINDS)
def test_products_are_those_of_the_dequantised_weight(level, kind, num_rows):
    shape = random_shape()
    frozen, x = layer(kind, *shape), torch.randn(1, num_rows, shape[1]).to(BFLOAT16)
    y = frozen.product(x)
    assert y.dtype == BFLOAT16 and y.shape == (1, num_rows, shape[0])
    torch.testing.assert_close(y.double(), expected(frozen, x), rtol=2**-8, atol=2e-4)


@needs_bfloat16
@pytest.mark.parametrize("kind", KINDS)
def test_every_weight_is_bitsandbytes_rounded_once(level, kind):
    """Rows of the identity read the weights themselves: not one bit may differ."""
    shape = (70, 192)
    frozen = layer(kind, *shape)
    read = frozen.product(torch.eye(shape[1]).to(BFLOAT16))
    assert torch.equal(read.T, frozen.weight_values())


@needs_bfloat16
@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_bit_equal_whatever_stands_beside_them(level, kind):
    shape = random_shape()
    frozen, x = layer(kind, *shape), torch.randn(133, shape[1]).to(BFLOAT16)
    x[7] = float("nan")
    together = frozen.product(x)
    for rows in (slice(0, 1), slice(3, 9), slice(20, 50), slice(100, 133)):
        some = frozen.product(x[rows])
        assert torch.equal(some.nan_to_num(7.0), together[rows].nan_to_num(7.0))
    assert together[7].isnan().all() and not together[8:].isnan().any()


@needs_bfloat16
@pytest.mark.parametrize("kind", KINDS)
def test_rows_too_wide_to_be_kept_whole_are_the_same_in_parts(level, kind):
    frozen, x = layer(kind, 37, 64 * 51), torch.randn(300, 64 * 51).to(BFLOAT16)
    together = frozen.product(x)
    torch.testing.assert_close(together.double(), expected(frozen, x), rtol=2**-7, atol=5e-3)
    for rows in (slice(0, 1), slice(2, 5), slice(5, 12), slice(0, 128), slice(120, 260)):
        assert torch.equal(frozen.product(x[rows]), together[rows])


@needs_bfloat16
def test_a_weight_that_lies_in_columns_is_read_by_rows():
    weight, x = torch.randn(128, 30).to(BFLOAT16), torch.randn(3, 128).to(BFLOAT16)
    y = DenseLinear(weight.T, None).product(x)
    torch.testing.assert_close(y.double(), x.double() @ weight.double(), rtol=2**-8, atol=2e-3)


@needs_bfloat16
@pytest.mark.parametrize("limit", [3, 4])
def test_no_rows_touch_no_memory(limit):
    """The output layer of a step that samples nothing. In a process of its own: what is written
    past the end of a buffer shows when memory is taken or given back.
    """
    program = f"""
        import torch
        from lora_runtime.kernels import cpu
        from lora_runtime.kernels.cpu_library import library

        library().loramux_limit_level({limit})
        weight = torch.ones(64, 8192, dtype=torch.bfloat16)
        codes, scales = weight.to(torch.int8), torch.ones(64)
        packed = torch.zeros(64 * 8192 // 2, dtype=torch.uint8)
        absmax, code = torch.ones(8192), torch.ones(16)
        for rows in (1, 0, 2, 0):
            x = torch.ones(rows, 8192, dtype=torch.bfloat16)
            found = (
                cpu.dense_product(x, weight),
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


@needs_bfloat16
def test_threads_change_no_bit(level):
    frozen, x = layer("nf4", 500, 320), torch.randn(40, 320).to(BFLOAT16)
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
    """Inputs that are no multiple of a unit, float32, and x that wants a gradient."""
    odd, x = layer("none", 30, 96), torch.randn(3, 96).to(BFLOAT16)
    assert not cpu.can_multiply(x)
    torch.testing.assert_close(odd.product(x).double(), expected(odd, x), rtol=2**-7, atol=2e-3)
    tracked = torch.randn(3, 128).to(BFLOAT16).requires_grad_()
    layer("nf4", 30, 128).product(tracked).float().sum().backward()
    assert tracked.grad.abs().sum() > 0


@needs_bfloat16
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_copy_is_kept_where_the_codes_are_not_multiplied(kind):
    """In float32, if the layer may; bfloat16 takes no more memory than the codes."""
    for dtype, is_kept in ((torch.float32, True), (BFLOAT16, False)):
        frozen = layer_of(kind, (64, 128), dtype)
        frozen.keep_copies, before = True, frozen.resident_bytes
        frozen.product(torch.randn(3, 128).to(dtype))
        assert (frozen.resident_bytes > before) == is_kept


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

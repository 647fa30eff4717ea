"""Products with quantised weights in Triton: codes are dequantised in registers.

One row is a matrix-vector product, 2 to 64 rows go through tensor cores; inputs are split where
the outputs alone give too few programs, and the partial sums are added in a fixed order.
W = fp32(code × absmax) is rounded once to the compute dtype; sums are float32.
Unmeasured: tested through Triton's interpreter only, never run or timed on a GPU. The code table
is a load of one cache line a weight, which is exact; whether it is the fastest way is open.
Source: QLoRA (arXiv:2305.14314) for the format, split-K as in arXiv:2402.00025.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

MIN_PROGRAMS = 256
"""Programs wanted a launch, about two a multiprocessor; unmeasured."""
MAX_SPLITS = 8
BLOCK_K = 64
"""Inputs at once: those that share one absmax."""
VALUES_BLOCK = 1024
"""Bytes of codes that one program dequantises."""


def four_bit_product(
    x: Tensor, packed: Tensor, absmax: Tensor, code: Tensor, out_features: int
) -> Tensor:
    """See `lora_runtime.kernels.four_bit_product`."""
    return _product(x, packed, absmax, code, out_features, is_int8=False)


def int8_product(x: Tensor, codes: Tensor, absmax: Tensor) -> Tensor:
    """See `lora_runtime.kernels.int8_product`."""
    return _product(x, codes, absmax, absmax, len(codes), is_int8=True)


def four_bit_values(
    packed: Tensor, absmax: Tensor, code: Tensor, shape: tuple[int, int], dtype: torch.dtype
) -> Tensor:
    """See `lora_runtime.kernels.four_bit_values`."""
    values = torch.empty(shape, dtype=dtype, device=packed.device)
    grid = (triton.cdiv(len(packed), VALUES_BLOCK),)
    _values_kernel[grid](
        values, packed, absmax, code, values.numel(), len(packed), BLOCK=VALUES_BLOCK
    )
    return values


def _product(
    x: Tensor, codes: Tensor, absmax: Tensor, table: Tensor, out_features: int, *, is_int8: bool
) -> Tensor:
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    num_rows, in_features = rows.shape
    out_block = 32 if num_rows == 1 else 64
    num_blocks = triton.cdiv(in_features, BLOCK_K)
    num_tiles = triton.cdiv(out_features, out_block)
    num_splits = min(triton.cdiv(MIN_PROGRAMS, num_tiles), MAX_SPLITS, max(1, num_blocks // 4))
    partial = rows.new_empty(num_splits, num_rows, out_features, dtype=torch.float32)
    y = rows.new_empty(num_rows, out_features)
    kernel = _vector_kernel if num_rows == 1 else _rows_kernel
    tile = {} if num_rows == 1 else {"BLOCK_M": max(16, triton.next_power_of_2(num_rows))}
    kernel[num_tiles, num_splits](
        y if num_splits == 1 else partial,
        rows,
        codes,
        absmax,
        table,
        num_rows,
        in_features,
        out_features,
        triton.cdiv(num_blocks, num_splits) * BLOCK_K,
        IS_INT8=is_int8,
        BLOCK_N=out_block,
        BLOCK_K=BLOCK_K,
        num_stages=3 if is_int8 else 1,  # stages would copy every table look-up to shared memory
        **tile,
    )
    if num_splits > 1:
        grid = (triton.cdiv(y.numel(), VALUES_BLOCK),)
        _sum_kernel[grid](y, partial, y.numel(), SPLITS=num_splits, BLOCK=VALUES_BLOCK)
    return y.view(*x.shape[:-1], out_features)


@triton.jit
def _weights(
    codes_ptr, absmax_ptr, table_ptr, n, out_features, start, in_features, dtype: tl.constexpr,
    IS_INT8: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Two halves of W[n, start : start + BLOCK_K], each (BLOCK_N, BLOCK_K / 2) in `dtype`.

    Four bits: the even inputs and the odd ones, as they lie in a byte; the block is one absmax
    wide. Eight bits: the first and the last inputs. Cells outside of W are 0.
    """
    HALF: tl.constexpr = BLOCK_K // 2
    i = tl.arange(0, HALF)
    row = n[:, None].to(tl.int64)
    is_row = (n < out_features)[:, None]
    if IS_INT8:
        k = start + i[None, :]
        scale = tl.div_rn(tl.load(absmax_ptr + n, mask=n < out_features, other=0.0), 127.0)
        place = codes_ptr + row * in_features + k
        first = tl.load(place, mask=is_row & (k < in_features), other=0)
        second = tl.load(place + HALF, mask=is_row & (k + HALF < in_features), other=0)
        first_values = first.to(tl.float32) * scale[:, None]
        second_values = second.to(tl.float32) * scale[:, None]
    else:
        place = codes_ptr + row * (in_features // 2) + start // 2 + i[None, :]
        byte = tl.load(place, mask=is_row, other=0)
        scale = tl.load(absmax_ptr + (row * in_features + start) // 64, mask=is_row, other=0.0)
        first_values = tl.load(table_ptr + (byte >> 4)) * scale
        second_values = tl.load(table_ptr + (byte & 15)) * scale
    return first_values.to(dtype), second_values.to(dtype)


@triton.jit
def _vector_kernel(
    y_ptr,
    x_ptr,
    codes_ptr,
    absmax_ptr,
    table_ptr,
    num_rows,
    in_features,
    out_features,
    inputs_per_split,
    IS_INT8: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """y[split, n] = Σ_k W[n, k] x[k] over the split's inputs, for one row."""
    split = tl.program_id(1)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    i = tl.arange(0, BLOCK_K // 2)
    begin = split * inputs_per_split
    acc = tl.zeros((BLOCK_N, BLOCK_K // 2), tl.float32)
    for start in range(begin, tl.minimum(begin + inputs_per_split, in_features), BLOCK_K):
        first, second = _weights(
            codes_ptr, absmax_ptr, table_ptr, n, out_features, start, in_features,
            x_ptr.dtype.element_ty, IS_INT8, BLOCK_K,
        )  # fmt: skip
        k0 = start + (i if IS_INT8 else 2 * i)
        k1 = k0 + (BLOCK_K // 2 if IS_INT8 else 1)
        x0 = tl.load(x_ptr + k0, mask=k0 < in_features, other=0.0).to(tl.float32)
        x1 = tl.load(x_ptr + k1, mask=k1 < in_features, other=0.0).to(tl.float32)
        acc += first.to(tl.float32) * x0[None, :] + second.to(tl.float32) * x1[None, :]
    y = tl.sum(acc, 1)
    place = split.to(tl.int64) * out_features + n
    tl.store(y_ptr + place, y.to(y_ptr.dtype.element_ty), mask=n < out_features)


@triton.jit
def _rows_kernel(
    y_ptr,
    x_ptr,
    codes_ptr,
    absmax_ptr,
    table_ptr,
    num_rows,
    in_features,
    out_features,
    inputs_per_split,
    IS_INT8: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """y[split, m, n] = Σ_k x[m, k] W[n, k] over the split's inputs, for up to BLOCK_M rows."""
    split = tl.program_id(1)
    m = tl.arange(0, BLOCK_M)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    i = tl.arange(0, BLOCK_K // 2)
    x_rows = x_ptr + m[:, None] * in_features
    is_row = (m < num_rows)[:, None]
    begin = split * inputs_per_split
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(begin, tl.minimum(begin + inputs_per_split, in_features), BLOCK_K):
        first, second = _weights(
            codes_ptr, absmax_ptr, table_ptr, n, out_features, start, in_features,
            x_ptr.dtype.element_ty, IS_INT8, BLOCK_K,
        )  # fmt: skip
        k0 = start + (i if IS_INT8 else 2 * i)[None, :]
        k1 = k0 + (BLOCK_K // 2 if IS_INT8 else 1)
        x0 = tl.load(x_rows + k0, mask=is_row & (k0 < in_features), other=0.0)
        x1 = tl.load(x_rows + k1, mask=is_row & (k1 < in_features), other=0.0)
        acc = tl.dot(x0, tl.trans(first), acc, input_precision="ieee")
        acc = tl.dot(x1, tl.trans(second), acc, input_precision="ieee")
    place = (split.to(tl.int64) * num_rows + m[:, None]) * out_features + n[None, :]
    is_cell = is_row & (n < out_features)[None, :]
    tl.store(y_ptr + place, acc.to(y_ptr.dtype.element_ty), mask=is_cell)


@triton.jit
def _sum_kernel(y_ptr, partial_ptr, size, SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    """y[i] = Σ_split partial[split, i], in order, rounded once."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK,), tl.float32)
    for split in tl.static_range(SPLITS):
        acc += tl.load(partial_ptr + split * size + i, mask=i < size, other=0.0)
    tl.store(y_ptr + i, acc.to(y_ptr.dtype.element_ty), mask=i < size)


@triton.jit
def _values_kernel(
    values_ptr, packed_ptr, absmax_ptr, table_ptr, size, num_bytes, BLOCK: tl.constexpr
):
    """values[2i] and values[2i + 1] of every byte i; a row may end inside a byte or a block."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    byte = tl.load(packed_ptr + i, mask=i < num_bytes, other=0)
    scale = tl.load(absmax_ptr + i // 32, mask=i < num_bytes, other=0.0)
    first = (tl.load(table_ptr + (byte >> 4)) * scale).to(values_ptr.dtype.element_ty)
    second = (tl.load(table_ptr + (byte & 15)) * scale).to(values_ptr.dtype.element_ty)
    tl.store(values_ptr + 2 * i, first, mask=2 * i < size)
    tl.store(values_ptr + 2 * i + 1, second, mask=2 * i + 1 < size)

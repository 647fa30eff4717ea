"""Products with quantised weights in Triton: codes are dequantised in registers.

One kernel for 1 to 64 rows: a tile of W is made in registers and multiplied by all rows on tensor
cores. Inputs are split where the outputs alone give too few programs; the program that comes last
adds up the partial sums, always in the same order.
W = fp32(code × absmax) is rounded once to the compute dtype; sums are float32.
Unmeasured: tested through Triton's interpreter only, never run or timed on a GPU. Tile sizes come
from counting the instructions of the compiled loop, 6 to 7 a weight; bench/NOTES.md has them.
Source: QLoRA (arXiv:2305.14314) for the format, split-K as in arXiv:2402.00025.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_runtime.kernels.gpu_counters import counters

MIN_PROGRAMS = 512
"""Programs wanted a launch, about four a multiprocessor; unmeasured."""
MAX_SPLITS = 16
BLOCK_N = 128
BLOCK_K = 128
"""Inputs at once."""
VALUES_BLOCK = 1024
"""Bytes of codes that one program dequantises."""


def four_bit_product(
    x: Tensor, packed: Tensor, absmax: Tensor, code: Tensor, out_features: int
) -> Tensor:
    """See `lora_runtime.kernels.four_bit_product`."""
    return _product(x, packed.view(torch.int32), absmax, code, out_features, is_int8=False)


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
    num_tiles, num_blocks = triton.cdiv(out_features, BLOCK_N), triton.cdiv(in_features, BLOCK_K)
    num_splits = min(triton.cdiv(MIN_PROGRAMS, num_tiles), MAX_SPLITS, max(1, num_blocks // 4))
    blocks_per_split = triton.cdiv(num_blocks, num_splits)
    num_splits = triton.cdiv(num_blocks, blocks_per_split)
    block_rows = max(16, triton.next_power_of_2(num_rows))
    y = rows.new_empty(num_rows, out_features)
    partial = y
    if num_splits > 1:
        partial = rows.new_empty(num_splits, num_rows, out_features, dtype=torch.float32)
    _product_kernel[num_tiles, num_splits](
        y,
        partial,
        counters(rows.device),
        rows,
        codes,
        absmax,
        table,
        num_rows,
        in_features,
        out_features,
        blocks_per_split * BLOCK_K,
        IS_INT8=is_int8,
        SPLITS=num_splits,
        BLOCK_M=block_rows,
        BLOCK_N=BLOCK_N,
        BLOCK_K=BLOCK_K,
        num_warps=4 if block_rows <= 32 else 8,
        num_stages=1,  # a pipeline would take the words through shared memory first
    )
    return y.view(*x.shape[:-1], out_features)


@triton.jit(do_not_specialize=["num_rows"])  # 1 would be a Python int
def _product_kernel(
    y_ptr,
    partial_ptr,
    counters_ptr,
    x_ptr,
    codes_ptr,
    absmax_ptr,
    table_ptr,
    num_rows,
    in_features,
    out_features,
    inputs_per_split,
    IS_INT8: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """y[m, n] = Σ_k W[n, k] x[m, k] for up to BLOCK_M rows m and one tile of outputs n."""
    split = tl.program_id(1)
    m = tl.arange(0, BLOCK_M)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    begin = split * inputs_per_split
    end = tl.minimum(begin + inputs_per_split, in_features)
    rows_ptr = x_ptr + m[None, :] * in_features
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    if IS_INT8:
        acc = _add_int8(
            acc, rows_ptr, codes_ptr, absmax_ptr, m < num_rows, n, begin, end, in_features,
            out_features, BLOCK_K,
        )  # fmt: skip
    else:
        acc = _add_four_bit(
            acc, rows_ptr, codes_ptr, absmax_ptr, table_ptr, m < num_rows, n, begin, end,
            in_features, out_features, BLOCK_N, BLOCK_K,
        )  # fmt: skip
    is_cell = (n < out_features)[:, None] & (m < num_rows)[None, :]
    cell = m[None, :].to(tl.int64) * out_features + n[:, None]
    if SPLITS > 1:
        size = num_rows.to(tl.int64) * out_features
        tl.store(partial_ptr + split * size + cell, acc, mask=is_cell)
        tl.debug_barrier()
        counter = counters_ptr + tl.program_id(0)
        if tl.atomic_add(counter, 1, sem="acq_rel") < SPLITS - 1:
            return
        tl.store(counter, 0)
        acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        for s in range(SPLITS):
            place = partial_ptr + s * size + cell
            acc += tl.load(place, mask=is_cell, other=0.0, cache_modifier=".cg")
    tl.store(y_ptr + cell, acc.to(y_ptr.dtype.element_ty), mask=is_cell)


@triton.jit
def _add_four_bit(
    acc, rows_ptr, words_ptr, absmax_ptr, table_ptr, is_row, n, begin, end, in_features,
    out_features, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """acc + W xᵀ. A word is eight codes; the j-th of all words and every eighth input from j on go
    together, so that nothing has to be put in order.
    """
    WORDS: tl.constexpr = BLOCK_K // 8
    dtype: tl.constexpr = rows_ptr.dtype.element_ty
    code = tl.load(table_ptr + tl.arange(0, 16))
    i = tl.arange(0, WORDS)
    row = tl.minimum(n, out_features - 1)[:, None].to(tl.int64)
    word_ptr = words_ptr + row * (in_features // 8) + i[None, :]
    scale_ptr = absmax_ptr + row * (in_features // 64) + (i // 8)[None, :]
    for start in range(begin, end, BLOCK_K):
        is_in = start + 8 * i < end
        word = tl.load(word_ptr + start // 8, mask=is_in[None, :], other=0)
        scale = tl.load(scale_ptr + start // 64, mask=is_in[None, :], other=0.0)
        word = tl.reshape(word, (BLOCK_N * WORDS,))
        scale = tl.reshape(scale, (BLOCK_N * WORDS,))
        for j in tl.static_range(8):
            values = tl.gather(code, (word >> (4 * (j ^ 1))) & 15, 0) * scale
            values = tl.reshape(values.to(dtype), (BLOCK_N, WORDS))
            x = tl.load(
                rows_ptr + (start + j + 8 * i)[:, None],
                mask=is_in[:, None] & is_row[None, :],
                other=0.0,
            )
            acc = tl.dot(values, x, acc, input_precision="ieee")
    return acc


@triton.jit
def _add_int8(
    acc, rows_ptr, codes_ptr, absmax_ptr, is_row, n, begin, end, in_features, out_features,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """acc + W xᵀ."""
    k = tl.arange(0, BLOCK_K)
    row = tl.minimum(n, out_features - 1)
    scale = tl.div_rn(tl.load(absmax_ptr + row), 127.0)[:, None]
    code_ptr = codes_ptr + row[:, None].to(tl.int64) * in_features + k[None, :]
    for start in range(begin, end, BLOCK_K):
        is_in = start + k < end
        codes = tl.load(code_ptr + start, mask=is_in[None, :], other=0)
        x = tl.load(
            rows_ptr + (start + k)[:, None], mask=is_in[:, None] & is_row[None, :], other=0.0
        )
        values = (codes.to(tl.float32) * scale).to(x.dtype)
        acc = tl.dot(values, x, acc, input_precision="ieee")
    return acc


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

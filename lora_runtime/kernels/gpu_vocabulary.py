"""`embed_adapters` and `patch_logits` in Triton: where rows of the vocabulary are replaced.

A program works for one token or one entry, so that nothing of another row is ever read. Every cell
of the result is written by one program, in the order of the token's entries.
Unmeasured: tested through Triton's interpreter only, never run or timed on a GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_runtime.kernels.gpu_adapters import step_tiles
from lora_runtime.kernels.types import AdapterMemory, Run, StepMeta

TILE = 16
BLOCK_N = 256
"""Columns of an embedding a program writes."""
BLOCK_R = 16
BLOCK_ROWS = 32
"""Replaced rows of the output layer a program multiplies."""
BLOCK_K = 128
SEARCH_STEPS = tl.constexpr(24)
"""Halvings that find an id among up to 2²⁴ rows."""


def embed_adapters(
    base: Tensor,
    token_ids: Tensor,
    scale: float,
    memory: AdapterMemory,
    runs: Tensor,
    meta: StepMeta,
    vocab_size: int,
) -> Tensor:
    """See `lora_runtime.kernels.embed_adapters`."""
    base, runs = base.contiguous(), runs.contiguous()
    tiles = step_tiles(meta, len(base), TILE)
    y = torch.empty_like(base)
    width = base.shape[1]
    _embed_kernel[tiles.tokens.numel(), triton.cdiv(width, BLOCK_N)](
        y, base, token_ids, memory.weights, memory.vectors, memory.indices, runs, meta.slots,
        meta.replicas, meta.weights, tiles.tokens, tiles.entries, tiles.next_entry,
        tiles.entries.numel(), scale, vocab_size, width, runs.shape[1],
        BLOCK_N=BLOCK_N, BLOCK_R=BLOCK_R,
    )  # fmt: skip
    return y


def patch_logits(
    y: Tensor, base: Tensor, x: Tensor, memory: AdapterMemory, runs: Tensor, meta: StepMeta
) -> Tensor:
    """See `lora_runtime.kernels.patch_logits`. Changes y in place; nothing to do without rows."""
    max_rows = memory.max_rows
    if max_rows is None:
        max_rows = int(runs[..., Run._fields.index("num_rows")].max())
    if max_rows > 0:
        base, x, runs = base.contiguous(), x.contiguous(), runs.contiguous()
        _patch_kernel[len(meta.tokens), triton.cdiv(max_rows, BLOCK_ROWS)](
            y, base, x, memory.weights, memory.indices, runs, meta.tokens, meta.slots,
            meta.replicas, meta.weights, meta.segment_starts, len(meta.segment_starts) - 1,
            x.shape[1], y.stride(0), base.stride(0), runs.shape[1],
            BLOCK_ROWS=BLOCK_ROWS, BLOCK_K=BLOCK_K,
        )  # fmt: skip
    return y


@triton.jit
def _find(indices_ptr, row_ids_at, num_rows, ids):
    """Where `ids` are among the replaced rows: their places, and whether they are there."""
    low, high = ids * 0, ids * 0 + num_rows
    for _ in range(SEARCH_STEPS):
        middle = (low + high) // 2
        is_row = (row_ids_at >= 0) & (middle < num_rows)
        found = tl.load(indices_ptr + row_ids_at + middle, mask=is_row, other=2147483647)
        is_less = found < ids
        low = tl.where(is_less & (low < high), middle + 1, low)
        high = tl.where(is_less, high, middle)
    is_row = (row_ids_at >= 0) & (low < num_rows)
    found = tl.load(indices_ptr + row_ids_at + low, mask=is_row, other=-1)
    is_there = tl.where(row_ids_at >= 0, found == ids, ids < num_rows)
    return tl.where(row_ids_at >= 0, low, ids), is_there


@triton.jit
def _embed_kernel(
    y_ptr, base_ptr, ids_ptr, weights_ptr, vectors_ptr, indices_ptr, runs_ptr, slots_ptr,
    replicas_ptr, scales_ptr, tokens_ptr, entries_ptr, next_ptr, num_entry_places, embed_scale,
    vocab_size, width, num_replicas, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Some columns of one token's embedding, under all of its entries."""
    place = tl.program_id(0)
    token = tl.load(tokens_ptr + place).to(tl.int64)
    if token < 0:
        return
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_in = n < width
    embedded = tl.load(base_ptr + token * width + n, mask=is_in, other=0.0).to(tl.float32)
    acc = embedded
    token_id = tl.load(ids_ptr + token)
    entry = tl.load(entries_ptr + place, mask=place < num_entry_places, other=-1)
    while entry >= 0:
        run = tl.load(slots_ptr + entry).to(tl.int64) * num_replicas + tl.load(replicas_ptr + entry)
        run_ptr = runs_ptr + run * 8
        weight = tl.load(scales_ptr + entry)
        rank = tl.load(run_ptr).to(tl.int32)
        a_ptr = weights_ptr + tl.load(run_ptr + 1) + token_id
        b_ptr = weights_ptr + tl.load(run_ptr + 2)
        for start in range(0, rank, BLOCK_R):
            r = (start + tl.arange(0, BLOCK_R)).to(tl.int64)
            a = tl.load(a_ptr + r * vocab_size, mask=r < rank, other=0.0).to(tl.float32)
            mask = (r < rank)[:, None] & is_in[None, :]
            b = tl.load(b_ptr + r[:, None] * width + n[None, :], mask=mask, other=0.0)
            acc += weight * embed_scale * tl.sum(a[:, None] * b.to(tl.float32), 0)
        gain_at = tl.load(run_ptr + 3)
        if gain_at >= 0:
            gain = tl.load(vectors_ptr + gain_at + n, mask=is_in, other=1.0)
            acc += weight * (gain - 1) * embedded
        num_rows = tl.load(run_ptr + 5).to(tl.int32)
        if num_rows > 0:
            row, is_there = _find(
                indices_ptr, tl.load(run_ptr + 7), num_rows, token_id.to(tl.int32)
            )
            if is_there:
                row_ptr = weights_ptr + tl.load(run_ptr + 6) + row.to(tl.int64) * width
                values = tl.load(row_ptr + n, mask=is_in, other=0.0).to(tl.float32)
                acc += weight * (embed_scale * values - embedded)
        entry = tl.load(next_ptr + entry)
    tl.store(y_ptr + token * width + n, acc.to(y_ptr.dtype.element_ty), mask=is_in)


@triton.jit
def _row_products(
    weights_ptr, rows_at, place, is_row, x_ptr, in_features, BLOCK_K: tl.constexpr
):  # fmt: skip
    """rows[place] · x, (rows,) float32."""
    acc = place * 0.0
    for start in range(0, in_features, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        x = tl.load(x_ptr + k, mask=k < in_features, other=0.0).to(tl.float32)
        at = rows_at + place[:, None].to(tl.int64) * in_features + k[None, :]
        mask = is_row[:, None] & (k < in_features)[None, :]
        acc += tl.sum(
            tl.load(weights_ptr + at, mask=mask, other=0.0).to(tl.float32) * x[None, :], 1
        )
    return acc


@triton.jit
def _patch_kernel(
    y_ptr, base_ptr, x_ptr, weights_ptr, indices_ptr, runs_ptr, tokens_ptr, slots_ptr,
    replicas_ptr, scales_ptr, starts_ptr, num_segments, in_features, stride_y, stride_base,
    num_replicas, BLOCK_ROWS: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Some replaced rows of one entry.

    Where a token has several entries that replace an id, the first of them adds up all.
    """
    entry = tl.program_id(0)
    num_entries = tl.load(starts_ptr + num_segments)
    if entry >= num_entries:
        return
    run = tl.load(slots_ptr + entry).to(tl.int64) * num_replicas + tl.load(replicas_ptr + entry)
    run_ptr = runs_ptr + run * 8
    num_rows = tl.load(run_ptr + 5).to(tl.int32)
    i = tl.program_id(1) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    if tl.program_id(1) * BLOCK_ROWS >= num_rows:
        return
    is_mine = i < num_rows
    row_ids_at = tl.load(run_ptr + 7)
    ids = tl.load(indices_ptr + row_ids_at + i, mask=is_mine & (row_ids_at >= 0), other=0)
    ids = tl.where(row_ids_at >= 0, ids, i)
    token = tl.load(tokens_ptr + entry)
    x_ptr += token.to(tl.int64) * in_features
    base = tl.load(base_ptr + token.to(tl.int64) * stride_base + ids, mask=is_mine, other=0.0)
    base = base.to(tl.float32)
    product = _row_products(
        weights_ptr, tl.load(run_ptr + 6), i, is_mine, x_ptr, in_features, BLOCK_K
    )
    acc = tl.load(scales_ptr + entry) * (product - base)
    for other in range(0, num_entries):
        if (other != entry) & (tl.load(tokens_ptr + other) == token):
            run = tl.load(slots_ptr + other).to(tl.int64) * num_replicas
            run_ptr = runs_ptr + (run + tl.load(replicas_ptr + other)) * 8
            place, is_there = _find(
                indices_ptr, tl.load(run_ptr + 7), tl.load(run_ptr + 5).to(tl.int32), ids
            )
            is_there &= is_mine
            if other < entry:
                is_mine &= ~is_there
            else:
                product = _row_products(
                    weights_ptr, tl.load(run_ptr + 6), place, is_there, x_ptr, in_features, BLOCK_K
                )
                acc += tl.where(is_there, tl.load(scales_ptr + other) * (product - base), 0.0)
    cell = y_ptr + token.to(tl.int64) * stride_y + ids
    y = tl.load(cell, mask=is_mine, other=0.0).to(tl.float32) + acc
    tl.store(cell, y.to(y_ptr.dtype.element_ty), mask=is_mine)

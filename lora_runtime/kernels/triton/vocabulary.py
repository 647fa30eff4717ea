"""`embed_adapters` and `patch_logits` in Triton: where rows of the vocabulary are replaced.

A program computes some columns of one token's embedding. Replaced rows of the output layer are read
once for a tile of tokens under one adapter, which may be all tokens of a step. Every element of a
result is written by one program, entry after entry, so it does not depend on which program is
first. Offsets into an extent are those of the fields of Extent: 5 num_rows, 6 rows, 7 row_ids.
Not timed on a GPU yet.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_runtime.kernels.triton.adapter_kernels import NO_KEY, batch_jit, keys_of
from lora_runtime.kernels.triton.adapters import step_tiles
from lora_runtime.kernels.types import AdapterMemory, Extent, StepMeta

TILE = 16
BLOCK_N = 256
"""Columns of an embedding that a program writes."""
BLOCK_R = 16
BLOCK_ROWS = 32
"""Replaced rows of the output layer that are multiplied at once."""
BLOCK_K, STAGES = 32, 5
"""Inputs that are multiplied at once, and how many such passes are loaded ahead. Wider passes spill
registers."""
MAX_REGISTERS = 255
"""Said of such programs in float32, of which the compiler spills some by itself."""
MAX_PROGRAMS = 512
"""Programs for one tile of tokens at most, about four a multiprocessor; not timed. Their number
follows the bound of rows: once a pool has held a whole output layer, every adapter gets so many."""


def embed_adapters(
    base: Tensor,
    token_ids: Tensor,
    scale: float,
    memory: AdapterMemory,
    extents: Tensor,
    meta: StepMeta,
    vocab_size: int,
) -> Tensor:
    """See `lora_runtime.kernels.embed_adapters`."""
    base, extents = base.contiguous(), extents.contiguous()
    tiles = step_tiles(meta, len(base), TILE)
    y = torch.empty_like(base)
    width = base.shape[1]
    _embed_kernel[tiles.tokens.numel(), triton.cdiv(width, BLOCK_N)](
        y, base, token_ids, memory.weights, memory.vectors, memory.indices, extents, meta.slots,
        meta.replicas, meta.weights, tiles.tokens, tiles.entries, tiles.next_entry,
        tiles.entries.numel(), scale, vocab_size, width, extents.shape[1],
        BLOCK_N=BLOCK_N, BLOCK_R=BLOCK_R,
    )  # fmt: skip
    return y


def patch_logits(
    y: Tensor, base: Tensor, x: Tensor, memory: AdapterMemory, extents: Tensor, meta: StepMeta
) -> Tensor:
    """See `lora_runtime.kernels.patch_logits`. Changes y in place."""
    max_rows = memory.max_rows
    if max_rows is None:
        max_rows = int(extents[..., Extent._fields.index("num_rows")].max())
    if max_rows > 0:
        base, x, extents = base.contiguous(), x.contiguous(), extents.contiguous()
        tiles = step_tiles(meta, len(y), TILE)
        grid = len(tiles.entries), min(triton.cdiv(max_rows, BLOCK_ROWS), MAX_PROGRAMS)
        _patch_kernel[grid](
            y, base, x, memory.weights, memory.indices, extents, meta.slots, meta.replicas,
            meta.weights, tiles.tokens, tiles.entries, tiles.next_entry, x.shape[1], y.stride(0),
            base.stride(0), y.shape[1], extents.shape[1],
            BLOCK_M=TILE, BLOCK_ROWS=BLOCK_ROWS, BLOCK_K=BLOCK_K,
            ALIGNMENT=max(1, memory.alignment // memory.weights.itemsize), num_stages=STAGES,
            maxnreg=MAX_REGISTERS if memory.weights.itemsize == 4 else None,
        )  # fmt: skip
    return y


@triton.jit
def _find(indices_ptr, row_ids_at, num_rows, wanted):
    """Place of the first replaced row whose id is at least `wanted`, and whether that is its id."""
    has_ids = row_ids_at >= 0
    place, size = wanted * 0, tl.where(has_ids, num_rows, 0)
    while size > 0:
        size = size // 2
        middle = place + size
        row_id = tl.load(indices_ptr + row_ids_at + middle, mask=middle < num_rows, other=wanted)
        place = tl.where(row_id < wanted, middle + 1, place)
    is_row = has_ids & (place < num_rows)
    row_id = tl.load(indices_ptr + row_ids_at + place, mask=is_row, other=-1)
    is_there = tl.where(has_ids, row_id == wanted, wanted < num_rows)
    return tl.where(has_ids, place, wanted), is_there


@batch_jit
def _embed_kernel(
    y_ptr, base_ptr, ids_ptr, weights_ptr, vectors_ptr, indices_ptr, extents_ptr, slots_ptr,
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
        key = keys_of(entry, slots_ptr, replicas_ptr, num_replicas)
        has_extent = key >= 0
        extent_ptr = extents_ptr + key.to(tl.int64) * 8
        weight = tl.load(scales_ptr + entry)
        rank = tl.load(extent_ptr, mask=has_extent, other=0).to(tl.int32)
        a_ptr = weights_ptr + tl.load(extent_ptr + 1, mask=has_extent, other=0) + token_id
        b_ptr = weights_ptr + tl.load(extent_ptr + 2, mask=has_extent, other=0)
        for start in range(0, rank, BLOCK_R):
            r = (start + tl.arange(0, BLOCK_R)).to(tl.int64)
            a = tl.load(a_ptr + r * vocab_size, mask=r < rank, other=0.0).to(tl.float32)
            mask = (r < rank)[:, None] & is_in[None, :]
            b = tl.load(b_ptr + r[:, None] * width + n[None, :], mask=mask, other=0.0)
            acc += weight * embed_scale * tl.sum(a[:, None] * b.to(tl.float32), 0)
        gain_at = tl.load(extent_ptr + 3, mask=has_extent, other=-1)
        if gain_at >= 0:
            gain = tl.load(vectors_ptr + gain_at + n, mask=is_in, other=1.0)
            acc += weight * (gain - 1) * embedded
        num_rows = tl.load(extent_ptr + 5, mask=has_extent, other=0).to(tl.int32)
        if num_rows > 0:
            row_ids_at = tl.load(extent_ptr + 7)
            row, is_there = _find(indices_ptr, row_ids_at, num_rows, token_id.to(tl.int32))
            if is_there:
                row_ptr = weights_ptr + tl.load(extent_ptr + 6) + row.to(tl.int64) * width
                values = tl.load(row_ptr + n, mask=is_in, other=0.0).to(tl.float32)
                acc += weight * (embed_scale * values - embedded)
        entry = tl.load(next_ptr + entry)
    tl.store(y_ptr + token * width + n, acc.to(y_ptr.dtype.element_ty), mask=is_in)


@triton.jit
def _id_at(indices_ptr, row_ids_at, place, is_there):
    """Ids of the rows at `place`."""
    ids = tl.load(indices_ptr + row_ids_at + place, mask=is_there & (row_ids_at >= 0), other=0)
    return tl.where(row_ids_at >= 0, ids, place)


@triton.jit
def _row_products(
    x_rows, is_token, rows_ptr, n, is_n, in_features, BLOCK_M: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """x[m] · rows[n], (BLOCK_M, BLOCK_ROWS) float32."""
    acc = tl.zeros((BLOCK_M, BLOCK_ROWS), tl.float32)
    row_ptr = rows_ptr + n[None, :].to(tl.int64) * in_features
    for start in range(0, in_features, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        is_in = k < in_features
        x = tl.load(x_rows + k[None, :], mask=is_token[:, None] & is_in[None, :], other=0.0)
        rows = tl.load(row_ptr + k[:, None], mask=is_in[:, None] & is_n[None, :], other=0.0)
        acc = tl.dot(x.to(rows.dtype), rows, acc, input_precision="ieee")
    return acc


@batch_jit
def _patch_kernel(
    y_ptr, base_ptr, x_ptr, weights_ptr, indices_ptr, extents_ptr, slots_ptr, replicas_ptr,
    scales_ptr, tokens_ptr, entries_ptr, next_ptr, in_features, stride_y, stride_base, vocab_size,
    num_replicas, BLOCK_M: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_K: tl.constexpr,
    ALIGNMENT: tl.constexpr,
):  # fmt: skip
    """The logits of some ids, for one tile of tokens under all of their entries.

    Programs share out the ids by the extent that replaces the most rows on this tile: it is cut
    into blocks, and the ids from the first of a block to the first of the next belong to one
    program, whichever extents replace them.
    """
    at = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    token = tl.load(tokens_ptr + at).to(tl.int64)
    first = tl.load(entries_ptr + at, mask=token >= 0, other=-1)
    x_rows = x_ptr + token[:, None] * in_features
    entry, most, most_ids_at = first, 0, tl.full((), -1, tl.int64)
    key = keys_of(entry, slots_ptr, replicas_ptr, num_replicas)
    lowest = tl.min(key, 0)
    while lowest < NO_KEY:
        extent_ptr = extents_ptr + lowest.to(tl.int64) * 8
        num_rows = tl.load(extent_ptr + 5, mask=lowest >= 0, other=0).to(tl.int32)
        row_ids_at = tl.load(extent_ptr + 7, mask=lowest >= 0, other=-1)
        most_ids_at = tl.where(num_rows > most, row_ids_at, most_ids_at)
        most = tl.maximum(most, num_rows)
        entry = tl.where(
            key == lowest, tl.load(next_ptr + entry, mask=key == lowest, other=-1), entry
        )
        key = keys_of(entry, slots_ptr, replicas_ptr, num_replicas)
        lowest = tl.min(key, 0)
    for block in range(tl.program_id(1), tl.cdiv(most, BLOCK_ROWS), tl.num_programs(1)):
        low = block * BLOCK_ROWS
        high = low + BLOCK_ROWS
        low = tl.where(low > 0, _id_at(indices_ptr, most_ids_at, low, low < most), 0)
        is_last = high >= most
        high = tl.where(is_last, vocab_size, _id_at(indices_ptr, most_ids_at, high, high < most))
        entry = first
        key = keys_of(entry, slots_ptr, replicas_ptr, num_replicas)
        lowest = tl.min(key, 0)
        while lowest < NO_KEY:
            is_token = key == lowest
            extent_ptr = extents_ptr + lowest.to(tl.int64) * 8
            num_rows = tl.load(extent_ptr + 5, mask=lowest >= 0, other=0).to(tl.int32)
            row_ids_at = tl.load(extent_ptr + 7, mask=lowest >= 0, other=-1)
            begin, _ = _find(indices_ptr, row_ids_at, num_rows, low)
            end, _ = _find(indices_ptr, row_ids_at, num_rows, high)
            end = tl.minimum(end, num_rows)
            rows_at = tl.load(extent_ptr + 6, mask=lowest >= 0, other=0)
            rows_ptr = weights_ptr + tl.multiple_of(rows_at, ALIGNMENT)
            scale = tl.load(scales_ptr + entry, mask=is_token, other=0.0)[:, None]
            for start in range(begin, end, BLOCK_ROWS):
                n = start + tl.arange(0, BLOCK_ROWS)
                product = _row_products(
                    x_rows, is_token, rows_ptr, n, n < end, in_features, BLOCK_M, BLOCK_ROWS,
                    BLOCK_K,
                )  # fmt: skip
                ids = _id_at(indices_ptr, row_ids_at, n, n < end)[None, :]
                is_cell = is_token[:, None] & (n < end)[None, :]
                base_at = base_ptr + token[:, None] * stride_base + ids
                base = tl.load(base_at, mask=is_cell, other=0.0).to(tl.float32)
                cell = y_ptr + token[:, None] * stride_y + ids
                y = tl.load(cell, mask=is_cell, other=0.0).to(tl.float32)
                y += scale * (product - base)
                tl.store(cell, y.to(y_ptr.dtype.element_ty), mask=is_cell)
            tl.debug_barrier()  # the next extent's threads read what these wrote
            entry = tl.where(is_token, tl.load(next_ptr + entry, mask=is_token, other=-1), entry)
            key = keys_of(entry, slots_ptr, replicas_ptr, num_replicas)
            lowest = tl.min(key, 0)

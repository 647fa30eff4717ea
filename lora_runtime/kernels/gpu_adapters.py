"""`apply_adapters` in Triton: a batched gather-matmul over true-rank rows in the pool.

Two launches a module, whatever mix of adapters, ranks and compositions the step holds. Shrink:
H[e] = A x[t] of every entry e, tiles of entries of one segment, K split where tiles are few.
Expand: y[t] of every token, written once, with gain, bias and all further entries of the token
in the epilogue. Grids follow from shapes alone and all tables are made on the device, so a CUDA
graph can be replayed with any adapters: no host sync as long as `memory.max_rank` is set.
Unmeasured: tested through Triton's interpreter only, never run or timed on a GPU.
Source: the SGMV of Punica (arXiv:2310.18547), ranks of different sizes in one batch as in S-LoRA
(arXiv:2311.03285).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_runtime.kernels.types import AdapterMemory, StepMeta

MIN_DOT = 16
"""Smallest side of a tensor-core product."""
SHRINK_BLOCK = 64
"""Inputs that are reduced at once."""
MIN_PROGRAMS = 256
"""Shrink splits K until it has as many programs, about two a multiprocessor; unmeasured."""
MAX_SPLITS = 8


class Tiles(NamedTuple):
    """Which rows each program works on, made on the device once a step. P tiles of M places.

    entries (P1, M) int32: every entry once, a tile within one segment, −1 for an empty place.
    tokens (P2, M) int32: every token once, −1 for an empty place; the first P1 tiles hold tokens
    at the place of their first entry, the others tokens without any entry.
    next_entry (E,) int32: the following entry of the same token, −1 after the last.
    """

    entries: Tensor
    tokens: Tensor
    next_entry: Tensor


def step_tiles(meta: StepMeta, num_tokens: int, block: int) -> Tiles:
    """The tiles of a step, shapes from E, K and T alone: P1 = K + ⌊E/M⌋, P2 = P1 + ⌈T/M⌉.

    Entries beyond the last segment's end are padding.
    """
    key = (num_tokens, block)
    if key not in meta.derived:
        entries = _entry_tiles(meta.segment_starts, len(meta.tokens), block)
        is_first, next_entry = _chains(meta)
        tokens = torch.where(is_first, meta.tokens, -1)[entries.clamp(min=0).long()]
        tokens = torch.where(entries < 0, -1, tokens)
        rest = _untouched(meta, num_tokens, block)
        meta.derived[key] = Tiles(entries, torch.cat([tokens, rest]).int(), next_entry)
    return meta.derived[key]


def _entry_tiles(starts: Tensor, num_entries: int, block: int) -> Tensor:
    num_tiles = len(starts) - 1 + num_entries // block
    ends = ((starts.diff() + block - 1) // block).cumsum(0)
    tile = torch.arange(num_tiles, device=starts.device)
    segment = torch.searchsorted(ends, tile, right=True)
    is_used, segment = segment < len(ends), segment.clamp(max=len(ends) - 1)
    first_tile = torch.where(segment > 0, ends[segment - 1], 0)
    begin = starts[segment] + (tile - first_tile) * block
    entries = begin[:, None] + torch.arange(block, device=starts.device)
    is_used = is_used[:, None] & (entries < starts[segment + 1][:, None])
    return torch.where(is_used, entries, -1).int()


def _chains(meta: StepMeta) -> tuple[Tensor, Tensor]:
    """is_first (E,) bool: the first entry of its token, and next_entry (E,)."""
    tokens, order = torch.where(_is_entry(meta), meta.tokens, -1).sort(stable=True)
    same = (tokens[1:] == tokens[:-1]) & (tokens[1:] >= 0)
    is_first = torch.ones_like(tokens, dtype=torch.bool)
    is_first[order[1:]] = ~same
    next_entry = torch.full_like(tokens, -1)
    next_entry[order[:-1]] = torch.where(same, order[1:], -1).int()
    return is_first, next_entry


def _untouched(meta: StepMeta, num_tokens: int, block: int) -> Tensor:
    place = torch.where(_is_entry(meta), meta.tokens, num_tokens).long()
    size = -(-num_tokens // block) * block
    token = torch.arange(max(size, num_tokens + 1), device=place.device)
    is_free = (token < num_tokens).index_fill(0, place, False)
    return torch.where(is_free, token, -1)[:size].view(-1, block)


def _is_entry(meta: StepMeta) -> Tensor:
    entry = torch.arange(len(meta.tokens), device=meta.tokens.device)
    return entry < meta.segment_starts[-1]


def apply_adapters(
    base: Tensor,
    x: Tensor,
    bias: Tensor | None,
    memory: AdapterMemory,
    runs: Tensor,
    meta: StepMeta,
) -> Tensor:
    """See `lora_runtime.kernels.apply_adapters`."""
    base, x, runs = base.contiguous(), x.contiguous(), runs.contiguous()
    is_small = len(meta.tokens) <= 256
    tiles = step_tiles(meta, len(base), 16 if is_small else 64)
    max_rank = int(runs[..., 0].max()) if memory.max_rank is None else memory.max_rank
    rank_block = min(32, max(MIN_DOT, triton.next_power_of_2(max_rank)))
    hidden = _shrink(x, memory, max_rank, rank_block, runs, meta, tiles)
    y = torch.empty_like(base)
    num_tiles, block = tiles.tokens.shape
    out_block = 64 if is_small else 128
    _expand_kernel[num_tiles, triton.cdiv(base.shape[1], out_block)](
        y,
        base,
        base if bias is None else bias,
        hidden,
        memory.weights,
        memory.vectors,
        runs,
        meta.slots,
        meta.replicas,
        meta.weights,
        tiles.tokens,
        tiles.entries,
        tiles.next_entry,
        len(tiles.entries),
        base.shape[1],
        runs.shape[1],
        hidden.stride(0),
        hidden.stride(1),
        HAS_BIAS=bias is not None,
        SPLITS=len(hidden),
        BLOCK_M=block,
        BLOCK_R=rank_block,
        BLOCK_N=out_block,
        ALIGNMENT=_elements(memory, memory.weights),
        VECTOR_ALIGNMENT=_elements(memory, memory.vectors),
    )
    return y


def _elements(memory: AdapterMemory, view: Tensor) -> int:
    """The memory's alignment in elements of a view."""
    return max(1, memory.alignment // view.itemsize)


def _shrink(
    x: Tensor,
    memory: AdapterMemory,
    max_rank: int,
    rank_block: int,
    runs: Tensor,
    meta: StepMeta,
    tiles: Tiles,
) -> Tensor:
    """Partial sums of A x over slices of the inputs: (splits, E, max_rank) float32."""
    num_tiles, block = tiles.entries.shape
    rank_blocks = triton.cdiv(max_rank, rank_block)
    num_splits = triton.cdiv(MIN_PROGRAMS, num_tiles * max(rank_blocks, 1))
    num_splits = min(num_splits, MAX_SPLITS, triton.cdiv(x.shape[1], 2 * SHRINK_BLOCK))
    num_splits = 1 << (num_splits.bit_length() - 1)
    hidden = x.new_empty(num_splits, len(meta.tokens), max_rank, dtype=torch.float32)
    if max_rank > 0:
        _shrink_kernel[num_tiles, rank_blocks, num_splits](
            hidden,
            x,
            memory.weights,
            runs,
            meta.tokens,
            meta.slots,
            meta.replicas,
            tiles.entries,
            x.shape[1],
            runs.shape[1],
            hidden.stride(0),
            hidden.stride(1),
            triton.cdiv(triton.cdiv(x.shape[1], num_splits), SHRINK_BLOCK) * SHRINK_BLOCK,
            BLOCK_M=block,
            BLOCK_R=rank_block,
            BLOCK_K=SHRINK_BLOCK,
            ALIGNMENT=_elements(memory, memory.weights),
        )
    return hidden


@triton.jit
def _shrink_kernel(
    hidden_ptr,
    x_ptr,
    weights_ptr,
    runs_ptr,
    tokens_ptr,
    slots_ptr,
    replicas_ptr,
    tiles_ptr,
    in_features,
    num_replicas,
    stride_split,
    stride_entry,
    inputs_per_split,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ALIGNMENT: tl.constexpr,
):
    """hidden[split, e, r] = Σ_k A[r, k] x[token_e, k] over the split's inputs k, r < rank."""
    split = tl.program_id(2)
    entry = tl.load(tiles_ptr + tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M))
    first = tl.max(entry, 0)
    if first < 0:
        return
    run = tl.load(slots_ptr + first).to(tl.int64) * num_replicas + tl.load(replicas_ptr + first)
    rank = tl.load(runs_ptr + run * 8).to(tl.int32)
    r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    if tl.program_id(1) * BLOCK_R >= rank:
        return
    a_ptr = weights_ptr + tl.multiple_of(tl.load(runs_ptr + run * 8 + 1), ALIGNMENT)
    is_row = entry >= 0
    token = tl.load(tokens_ptr + entry, mask=is_row, other=0).to(tl.int64)
    x_rows = x_ptr + token[:, None] * in_features
    a_rows = a_ptr + r[None, :].to(tl.int64) * in_features
    begin = split * inputs_per_split
    end = tl.minimum(begin + inputs_per_split, in_features)
    acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for start in range(begin, end, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        x = tl.load(x_rows + k[None, :], mask=is_row[:, None] & (k < end)[None, :], other=0.0)
        a = tl.load(a_rows + k[:, None], mask=(k < end)[:, None] & (r < rank)[None, :], other=0.0)
        acc = tl.dot(x.to(a.dtype), a, acc, input_precision="ieee")
    place = entry[:, None].to(tl.int64) * stride_entry + r[None, :]
    tl.store(
        hidden_ptr + split.to(tl.int64) * stride_split + place,
        acc,
        mask=is_row[:, None] & (r < rank)[None, :],
    )


@triton.jit
def _low_rank(
    hidden_ptr, b_ptr, rank, rows, is_row, n, out_features, stride_split,
    SPLITS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Σ_r h[m, r] B'[r, n] (BLOCK_M, BLOCK_N) float32; h is kept to 16 bits of precision."""
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, rank, BLOCK_R):
        r = start + tl.arange(0, BLOCK_R)
        is_rank = r < rank
        h = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
        for split in tl.static_range(SPLITS):
            h_ptr = hidden_ptr + split * stride_split + rows[:, None] + r[None, :]
            h += tl.load(h_ptr, mask=is_row[:, None] & is_rank[None, :], other=0.0)
        b_place = r[:, None].to(tl.int64) * out_features + n[None, :]
        is_b = is_rank[:, None] & (n < out_features)[None, :]
        b = tl.load(b_ptr + b_place, mask=is_b, other=0.0)
        if b.dtype == tl.float32:
            acc = tl.dot(h, b, acc, input_precision="ieee")
        else:
            high = h.to(b.dtype)
            low = tl.where(tl.abs(h) < float("inf"), h - high.to(tl.float32), 0.0).to(b.dtype)
            acc = tl.dot(high, b, acc)
            acc = tl.dot(low, b, acc)
    return acc


@triton.jit
def _expand_kernel(
    y_ptr,
    base_ptr,
    bias_ptr,
    hidden_ptr,
    weights_ptr,
    vectors_ptr,
    runs_ptr,
    slots_ptr,
    replicas_ptr,
    scales_ptr,
    tokens_ptr,
    entries_ptr,
    next_ptr,
    num_entry_tiles,
    out_features,
    num_replicas,
    stride_split,
    stride_entry,
    HAS_BIAS: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    VECTOR_ALIGNMENT: tl.constexpr,
):
    """y of one tile of tokens and outputs, all their entries included.

    The entries of a tile are of one adapter, so the loop runs once, unless tokens have more: then
    every row steps along its own chain, and the rows of the lowest run that is left go together.
    Rows are selected, never multiplied by a mask.
    """
    place = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    token = tl.load(tokens_ptr + place).to(tl.int64)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_out = n < out_features
    is_cell = (token >= 0)[:, None] & is_out[None, :]
    cell = token[:, None] * out_features + n[None, :]
    product = tl.load(base_ptr + cell, mask=is_cell, other=0.0).to(tl.float32)
    b0 = tl.zeros((BLOCK_N,), tl.float32)
    if HAS_BIAS:
        b0 = tl.load(bias_ptr + n, mask=is_out, other=0.0).to(tl.float32)
    acc = product + b0[None, :]
    has_entry = (token >= 0) & (place < num_entry_tiles * BLOCK_M)
    entry = tl.load(entries_ptr + place, mask=has_entry, other=-1)
    slot = tl.load(slots_ptr + entry, mask=entry >= 0, other=0)
    replica = tl.load(replicas_ptr + entry, mask=entry >= 0, other=0)
    key = tl.where(entry >= 0, slot * num_replicas + replica, 2147483647)
    lowest = tl.min(key, 0)
    while lowest < 2147483647:
        is_row = key == lowest
        run_ptr = runs_ptr + lowest.to(tl.int64) * 8
        scale = tl.load(scales_ptr + entry, mask=is_row, other=0.0)[:, None]
        rank = tl.load(run_ptr).to(tl.int32)
        if rank > 0:
            b_ptr = weights_ptr + tl.multiple_of(tl.load(run_ptr + 2), ALIGNMENT)
            delta = _low_rank(
                hidden_ptr, b_ptr, rank,
                entry.to(tl.int64) * stride_entry, is_row, n, out_features, stride_split,
                SPLITS, BLOCK_M, BLOCK_R, BLOCK_N,
            )  # fmt: skip
            acc = tl.where(is_row[:, None], acc + scale * delta, acc)
        gain_at = tl.multiple_of(tl.load(run_ptr + 3), VECTOR_ALIGNMENT)
        if gain_at >= 0:
            gain = tl.load(vectors_ptr + gain_at + n, mask=is_out, other=1.0)
            acc = tl.where(is_row[:, None], acc + scale * ((gain - 1)[None, :] * product), acc)
        bias_at = tl.multiple_of(tl.load(run_ptr + 4), VECTOR_ALIGNMENT)
        if bias_at >= 0:
            bias = tl.load(vectors_ptr + bias_at + n, mask=is_out, other=0.0)
            acc = tl.where(is_row[:, None], acc + scale * (bias - b0)[None, :], acc)
        entry = tl.where(is_row, tl.load(next_ptr + entry, mask=is_row, other=-1), entry)
        slot = tl.load(slots_ptr + entry, mask=entry >= 0, other=0)
        replica = tl.load(replicas_ptr + entry, mask=entry >= 0, other=0)
        key = tl.where(entry >= 0, slot * num_replicas + replica, 2147483647)
        lowest = tl.min(key, 0)
    tl.store(y_ptr + cell, acc.to(y_ptr.dtype.element_ty), mask=is_cell)

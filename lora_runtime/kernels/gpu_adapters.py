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
from torch import Tensor

from lora_runtime.kernels.gpu_adapter_kernels import expand_kernel, shrink_kernel
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
    expand_kernel[num_tiles, triton.cdiv(base.shape[1], out_block)](
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
        shrink_kernel[num_tiles, rank_blocks, num_splits](
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

"""`apply_adapters` in Triton: a batched gather-matmul over true-rank rows in the pool.

Two launches a module, or for up to three modules that share x, whatever mix of adapters, ranks and
compositions the step holds. Shrink: H[e] = A x[t] of every entry e, tiles of entries of one
segment, the inputs split where tiles are few.
Expand: y[t] of every token, written once, with gain, bias and all further entries of the token
in the epilogue. Grids follow from shapes alone and all tables are made on the device, so a CUDA
graph can be replayed with any adapters: no host sync as long as `memory.max_rank` is set.
Unmeasured: tested through Triton's interpreter only, never run or timed on a GPU.
Source: the SGMV of Punica (arXiv:2310.18547), ranks of different sizes in one batch as in S-LoRA
(arXiv:2311.03285).
"""

from __future__ import annotations

from itertools import accumulate
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from lora_runtime.kernels.gpu_adapter_kernels import (
    expand_kernel,
    shrink_kernel,
    tiles_kernel,
)
from lora_runtime.kernels.types import AdapterMemory, StepMeta

MIN_DOT = 16
"""Smallest side of a tensor-core product."""
SHRINK_BLOCK = 64
"""Inputs that are reduced at once."""
MIN_PROGRAMS = 256
"""Shrink splits K until it has as many programs, about two a multiprocessor; unmeasured."""
MAX_SPLITS = 8
MAX_PARTS = 3
"""Modules of one launch: the query, key and value projections."""
TILES_CHUNK = 64
"""Segments or entries that are looked at together when tiles are made."""


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
    """The tiles of a step, made once, shapes from E, K and T alone: P1 = K + ⌊E/M⌋,
    P2 = P1 + ⌈T/M⌉. Entries beyond the last segment's end are padding.
    """
    key = (num_tokens, block)
    if key not in meta.derived:
        num_entries, num_segments = len(meta.tokens), len(meta.segment_starts) - 1
        num_entry_tiles = num_segments + num_entries // block
        num_tiles = num_entry_tiles + triton.cdiv(num_tokens, block)
        tiles = Tiles(
            meta.tokens.new_empty(num_entry_tiles, block),
            meta.tokens.new_empty(num_tiles, block),
            meta.tokens.new_empty(num_entries),
        )
        tiles_kernel[(num_tiles,)](
            tiles.entries,
            tiles.tokens,
            tiles.next_entry,
            meta.tokens,
            meta.segment_starts,
            num_segments,
            num_tokens,
            num_entry_tiles,
            BLOCK_M=block,
            CHUNK=TILES_CHUNK,
        )
        meta.derived[key] = tiles
    return meta.derived[key]


def apply_adapters(
    base: Tensor,
    x: Tensor,
    bias: Tensor | None,
    memory: AdapterMemory,
    runs: Tensor,
    meta: StepMeta,
    widths: tuple[int, ...],
) -> Tensor:
    """See `lora_runtime.kernels.apply_stacked_adapters`; runs (P, S, R, 8) of P ≤ 3 parts."""
    base, x, runs = base.contiguous(), x.contiguous(), runs.contiguous()
    is_small = len(meta.tokens) <= 256
    tiles = step_tiles(meta, len(base), 16 if is_small else 64)
    max_rank = int(runs[..., 0].max()) if memory.max_rank is None else memory.max_rank
    rank_block = min(32, max(MIN_DOT, triton.next_power_of_2(max_rank)))
    hidden = _shrink(x, memory, max_rank, rank_block, runs, meta, tiles)
    y = torch.empty_like(base)
    num_tiles, block = tiles.tokens.shape
    out_block = 64 if is_small else 128
    starts = [*accumulate(widths[:-1]), *[base.shape[1]] * (MAX_PARTS - len(widths))]
    expand_kernel[num_tiles, sum(triton.cdiv(width, out_block) for width in widths)](
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
        *starts,
        base.shape[1],
        runs.shape[2],
        runs.stride(0),
        *hidden.stride()[:3],
        HAS_BIAS=bias is not None,
        SPLITS=hidden.shape[1],
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
    """Partial sums of A x over slices of the inputs: (P, splits, E, max_rank) float32."""
    num_tiles, block = tiles.entries.shape
    rank_blocks = triton.cdiv(max_rank, rank_block)
    num_splits = triton.cdiv(MIN_PROGRAMS, num_tiles * len(runs) * max(rank_blocks, 1))
    num_splits = min(num_splits, MAX_SPLITS, triton.cdiv(x.shape[1], 2 * SHRINK_BLOCK))
    num_splits = 1 << (num_splits.bit_length() - 1)
    hidden = x.new_empty(len(runs), num_splits, len(meta.tokens), max_rank, dtype=torch.float32)
    if max_rank > 0:
        shrink_kernel[num_tiles, rank_blocks * len(runs), num_splits](
            hidden,
            x,
            memory.weights,
            runs,
            meta.tokens,
            meta.slots,
            meta.replicas,
            tiles.entries,
            x.shape[1],
            runs.shape[2],
            rank_blocks,
            runs.stride(0),
            *hidden.stride()[:3],
            triton.cdiv(triton.cdiv(x.shape[1], num_splits), SHRINK_BLOCK) * SHRINK_BLOCK,
            BLOCK_M=block,
            BLOCK_R=rank_block,
            BLOCK_K=SHRINK_BLOCK,
            ALIGNMENT=_elements(memory, memory.weights),
        )
    return hidden

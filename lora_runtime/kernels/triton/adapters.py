"""`apply_adapters` in Triton: a batched gather-matmul over true-rank rows in the pool.

Two launches a module, or for up to three modules that share x, whatever mix of adapters, ranks and
compositions the step holds. Shrink: H[e] = A x[t] of every entry e, tiles of entries of one
segment, the inputs split; in a small step its programs run in the launch of the base's product,
which reads the same x (`triton/quantised.py`). Expand: y[t] of every token, written once, with
gain, bias and all further entries of the token; of a gate and an up projection together their gated
activation.
Grids follow from shapes alone and all tables are made on the device, so a CUDA graph can be
replayed with any adapters: no host sync as long as `memory.max_rank` is set.
Source: the SGMV of Punica (arXiv:2310.18547), ranks of different sizes in one batch as in S-LoRA
(arXiv:2311.03285).
"""

from __future__ import annotations

from itertools import accumulate
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from lora_runtime.kernels.gpu import MAX_SMALL_STEP
from lora_runtime.kernels.triton.adapter_kernels import (
    expand_kernel,
    gated_expand_kernel,
    shrink_kernel,
    tiles_kernel,
)
from lora_runtime.kernels.types import AdapterMemory, StepMeta

SHRINK_RANKS, EXPAND_RANKS = 32, 16
"""Ranks that are multiplied at once, whatever the largest is: other numbers would be other kernels.
Most adapters are one or two passes of expand, where more at once would cost registers.
"""
MAX_PARTS = 3
"""Modules of one launch: the query, key and value projections."""
TILES_CHUNK = 64
"""Segments or entries that are looked at together when tiles are made."""


class Shape(NamedTuple):
    """How a step is cut, by its number of entries.

    Shrink's splits follow from the inputs alone, so that few tiles are as quick as many: every
    program of a decode step reads about as much. Of many tiles each would write as many sums.
    """

    block_rows: int
    """Entries or tokens of a tile."""
    shrink_bytes: int
    """Bytes of one row of A that are read at once."""
    stages: int
    """Reads of A and x that are under way at once, and the one in use."""
    split_inputs: int
    """Inputs of a split of shrink, at least."""
    max_splits: int
    out_bytes: int
    """Bytes of one row of B' that a program of expand reads at once."""
    expand_stages: int
    """Reads of B' and the base's product that are under way at once, and the one in use."""
    expand_warps: int


SMALL_STEP = Shape(16, 512, 3, 512, 15, out_bytes=256, expand_stages=4, expand_warps=4)
LARGE_STEP = Shape(64, 128, 4, 2048, 4, out_bytes=128, expand_stages=3, expand_warps=4)
EXPAND_PROGRAMS = 528
"""Programs of expand, four a multiprocessor, over which its blocks of outputs are spread: before it
can ask for weights each waits for one table after another, which with a block a program is most of
its time."""
MAX_REGISTERS, UNLIMITED_SPLITS = 255, 8
"""Said of programs of expand but those of small tiles and so many splits, which 4,096 inputs have:
left to itself the compiler takes 128 or 168 a thread, and spills some of all others."""
MAX_BLOCKS = 16
"""Blocks of outputs of a program of expand, at most: the last programs end alone."""


def step_shape(num_entries: int) -> Shape:
    """The tiles of a step of E entries."""
    return SMALL_STEP if num_entries <= MAX_SMALL_STEP else LARGE_STEP


class Tiles(NamedTuple):
    """Which rows each program works on, made on the device once a step. P tiles of M places.

    entries (P1, M) int32: every entry once, a tile within one segment, −1 for an empty place.
    tokens (P2, M) int32: every token once, −1 for an empty place; the first P1 tiles hold tokens
    at the place of their first entry, the others tokens without any entry.
    next_entry (E,) int32: the following entry of the same token, −1 after the last.
    slots, replicas (P1,) int32: of a tile's entries; the slot of an empty tile is −1.
    """

    entries: Tensor
    tokens: Tensor
    next_entry: Tensor
    slots: Tensor
    replicas: Tensor


def step_tiles(meta: StepMeta, num_tokens: int, block: int) -> Tiles:
    """The tiles of a step, made once, shapes from E, K and T alone. Entries beyond the last
    segment's end are padding.

    P1 = min(K, E) + ⌊max(E − K, 0) / M⌋, the most that E entries in K segments can need: one a
    segment, and one more for every M entries beyond the first of each. P2 = P1 + ⌈T/M⌉.
    """
    key = (num_tokens, block)
    if key not in meta.derived:
        num_entries, num_segments = len(meta.tokens), len(meta.segment_starts) - 1
        num_firsts = min(num_segments, num_entries)
        num_entry_tiles = num_firsts + (num_entries - num_firsts) // block
        num_tiles = num_entry_tiles + triton.cdiv(num_tokens, block)
        tiles = Tiles(
            meta.tokens.new_empty(num_entry_tiles, block),
            meta.tokens.new_empty(num_tiles, block),
            meta.tokens.new_empty(num_entries),
            meta.tokens.new_empty(num_entry_tiles),
            meta.tokens.new_empty(num_entry_tiles),
        )
        tiles_kernel[(num_tiles,)](
            *tiles,
            meta.tokens,
            meta.slots,
            meta.replicas,
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
    extents: Tensor,
    meta: StepMeta,
    widths: tuple[int, ...],
    hidden: Tensor | None = None,
) -> Tensor:
    """See `lora_runtime.kernels.apply_stacked_adapters`; extents (P, S, R, 8) of P ≤ 3 parts."""
    base, extents = base.contiguous(), extents.contiguous()
    shape, tiles = _cut(meta, len(base))
    hidden = shrink(x, memory, extents, meta) if hidden is None else hidden
    y = torch.empty_like(base)
    width = base.shape[1]
    starts = [*accumulate(widths[:-1]), *[width] * (MAX_PARTS - len(widths))]
    out_block = _out_block(shape, memory, (*starts, width))
    blocks = _blocks_per_program(len(tiles.tokens), sum(widths), out_block)
    num_chunks = sum(triton.cdiv(part, out_block * blocks) for part in widths)
    expand_kernel[len(tiles.tokens), num_chunks](
        y,
        *_expand_arguments(base, bias, hidden, memory, extents, meta, tiles),
        blocks,
        *starts,
        width,
        maxnreg=None if _is_unlimited(bias, hidden, shape) else MAX_REGISTERS,
        **_expand_options(bias, hidden, memory, shape, out_block),
    )
    return y


def apply_gated_adapters(
    base: Tensor,
    x: Tensor,
    bias: Tensor | None,
    memory: AdapterMemory,
    extents: Tensor,
    meta: StepMeta,
    kind: str,
    hidden: Tensor | None = None,
) -> Tensor:
    """See `lora_runtime.kernels.apply_gated_adapters`; extents (2, S, R, 8)."""
    base, extents = base.contiguous(), extents.contiguous()
    shape, tiles = _cut(meta, len(base))
    hidden = shrink(x, memory, extents, meta) if hidden is None else hidden
    width = base.shape[1] // 2
    y = base.new_empty(len(base), width)
    out_block = _out_block(shape, memory, (width,))
    blocks = _blocks_per_program(len(tiles.tokens), width, out_block)
    gated_expand_kernel[len(tiles.tokens), triton.cdiv(width, out_block * blocks)](
        y,
        *_expand_arguments(base, bias, hidden, memory, extents, meta, tiles),
        blocks,
        width,
        IS_SILU=kind == "silu",
        maxnreg=MAX_REGISTERS,
        **_expand_options(bias, hidden, memory, shape, out_block),
    )
    return y


def _out_block(shape: Shape, memory: AdapterMemory, edges: tuple[int, ...]) -> int:
    """Outputs that a program of expand has at once. Rows of 16-bit outputs that begin anywhere are
    read and written one by one, each by an address of its own: for a quarter registers suffice.
    """
    block = shape.out_bytes // memory.weights.itemsize
    is_even = all(edge % 16 == 0 for edge in edges)
    return block if is_even or memory.weights.itemsize == 4 else block // 4


def _is_unlimited(bias: Tensor | None, hidden: Tensor, shape: Shape) -> bool:
    """True where the compiler chooses registers itself, and spills none."""
    return shape is SMALL_STEP and bias is None and hidden.shape[1] == UNLIMITED_SPLITS


def _blocks_per_program(num_tiles: int, width: int, out_block: int) -> int:
    """Blocks of outputs that one program of expand goes through."""
    num_blocks = num_tiles * triton.cdiv(width, out_block)
    return max(1, min(MAX_BLOCKS, num_blocks // EXPAND_PROGRAMS))


def _cut(meta: StepMeta, num_tokens: int) -> tuple[Shape, Tiles]:
    shape = step_shape(len(meta.tokens))
    return shape, step_tiles(meta, num_tokens, shape.block_rows)


def _expand_arguments(
    base: Tensor,
    bias: Tensor | None,
    hidden: Tensor,
    memory: AdapterMemory,
    extents: Tensor,
    meta: StepMeta,
    tiles: Tiles,
) -> tuple[Tensor | int, ...]:
    """The first arguments of both kernels of expand, after y."""
    return (
        base,
        base if bias is None else bias,
        hidden,
        memory.weights,
        memory.vectors,
        extents,
        meta.slots,
        meta.replicas,
        meta.weights,
        *(tiles.tokens, tiles.entries, tiles.next_entry, tiles.slots, tiles.replicas),
        tiles.entries.numel(),
        len(meta.tokens),
        extents.shape[2],
        extents.stride(0),
        hidden.shape[3],
    )


def _expand_options(
    bias: Tensor | None, hidden: Tensor, memory: AdapterMemory, shape: Shape, out_block: int
) -> dict[str, Any]:
    return {
        "HAS_BIAS": bias is not None,
        "SPLITS": hidden.shape[1],
        "BLOCK_M": shape.block_rows,
        "BLOCK_R": EXPAND_RANKS,
        "BLOCK_N": out_block,
        "STAGES": shape.expand_stages,
        "ALIGNMENT": _elements(memory, memory.weights),
        "VECTOR_ALIGNMENT": _elements(memory, memory.vectors),
        "num_warps": shape.expand_warps,
        "num_stages": 1,
    }


def _elements(memory: AdapterMemory, view: Tensor) -> int:
    """The memory's alignment in elements of a view."""
    return max(1, memory.alignment // view.itemsize)


def num_splits(in_features: int, shape: Shape, block: int) -> tuple[int, int]:
    """How many splits shrink has, and inputs of each, a multiple of what is read at once."""
    inputs = max(shape.split_inputs, triton.cdiv(in_features, shape.max_splits))
    inputs = triton.cdiv(inputs, block) * block
    return triton.cdiv(in_features, inputs), inputs


class ShrinkLaunch(NamedTuple):
    """The arguments of shrink, in a launch of its own or in that of a product.

    hidden (P, splits, E, R) float32: its result, partial sums of A x over slices of the inputs, R
    the largest rank rounded up to a multiple of 16. grid: tiles of entries, P parts, splits; a
    program goes through all ranks of its adapter, mostly one block of them. `arguments` and
    `options` are of `shrink_tile`, without hidden.
    """

    hidden: Tensor
    grid: tuple[int, int, int]
    arguments: tuple[Tensor | int, ...]
    options: dict[str, int]
    stages: int
    """Passes that are loaded ahead, in a launch of its own."""

    def run(self, *, lets_next_begin: bool = False) -> None:
        """Fill `hidden`, by a launch of its own; the next one may begin while it is at work."""
        if self.hidden.numel() > 0:
            shrink_kernel[self.grid](
                self.hidden,
                *self.arguments,
                **self.options,
                LETS_NEXT_BEGIN=lets_next_begin,
                num_stages=self.stages,
            )


def shrink_launch(
    x: Tensor, memory: AdapterMemory, extents: Tensor, meta: StepMeta
) -> ShrinkLaunch:
    """The launch for x (T, in), contiguous, and extents (P, S, R, 8)."""
    shape, tiles = _cut(meta, len(x))
    max_rank = int(extents[..., 0].max()) if memory.max_rank is None else memory.max_rank
    in_features = x.shape[1]
    block = shape.shrink_bytes // memory.weights.itemsize
    splits, inputs_per_split = num_splits(in_features, shape, block)
    size = (len(extents), splits, len(meta.tokens), triton.cdiv(max_rank, 16) * 16)
    hidden = x.new_empty(size, dtype=torch.float32)
    assert hidden.numel() < 2**31, "places in a part are 32-bit numbers"
    return ShrinkLaunch(
        hidden=hidden,
        grid=(len(tiles.entries), len(extents), splits),
        arguments=(
            *(x, memory.weights, extents, meta.tokens, tiles.slots, tiles.replicas, tiles.entries),
            *(in_features, inputs_per_split, len(meta.tokens), extents.shape[2]),
            *(extents.stride(0), size[3]),
        ),
        options={
            "SPLITS": splits,
            "BLOCK_M": shape.block_rows,
            "BLOCK_R": SHRINK_RANKS,
            "BLOCK_K": block,
            "ALIGNMENT": _elements(memory, memory.weights),
        },
        stages=shape.stages,
    )


def shrink(x: Tensor, memory: AdapterMemory, extents: Tensor, meta: StepMeta) -> Tensor:
    """`ShrinkLaunch.hidden` of x, by a launch of its own."""
    launch = shrink_launch(x.contiguous(), memory, extents, meta)
    launch.run()
    return launch.hidden

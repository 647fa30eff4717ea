"""The 4-bit product of nf4_product.cu, compiled by NVRTC as torch brings it: a candidate.

y = x Wᵀ with W = fp32(code × absmax) rounded once to bfloat16, for 1 to 64 rows of bfloat16 x. The
source says how it works. Unmeasured: the kernel's code was emulated on a CPU and never run on a
GPU, so `checks` comes before any timing.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

SOURCE = Path(__file__).with_name("nf4_product.cu").read_text(encoding="utf-8")
CONSTANTS = {
    name: int(value, 0) for name, value in re.findall(r"#define (\w+) (0x\w+|\d+)", SOURCE)
}
"""The source's own numbers, by name."""
OUTPUTS = 16
"""Outputs of a tile, and rows of W that mma.m16n8k16 takes."""
ROWS = 8
"""Rows of x of a tile, the columns of mma.m16n8k16."""
PIECES_PER_PROGRAM = 256
"""Pieces of 16 bytes that a program of permute_rows writes."""


@dataclass(frozen=True)
class Variant:
    """What the source is compiled with, for up to 8 · row_tiles rows; see there."""

    row_tiles: int
    out_tiles: int
    min_programs: int

    @property
    def options(self) -> list[str]:
        """Macros, as the compiler's options."""
        return [
            f"-DROW_TILES={self.row_tiles}",
            f"-DOUT_TILES={self.out_tiles}",
            f"-DMIN_PROGRAMS={self.min_programs}",
        ]

    @property
    def resident_warps(self) -> int:
        """Warps that a multiprocessor has registers for."""
        return self.min_programs * CONSTANTS["MAX_WARPS"]


VARIANTS = (Variant(1, 1, 2), Variant(2, 1, 2), Variant(4, 2, 1), Variant(8, 2, 1))
"""Beyond 16 rows a warp makes two tiles of outputs, so that it reads x half as often."""
MAX_ROWS = ROWS * VARIANTS[-1].row_tiles


@dataclass(frozen=True)
class Launch:
    """How one product is spread over the multiprocessors."""

    variant: Variant
    tiles: int
    """Warps' tiles: 16 · out_tiles outputs each."""
    warps: int
    """A program."""
    splits: int
    chunks_per_split: int

    @property
    def grid(self) -> tuple[int, int, int]:
        """(programs, splits, 1)."""
        return -(-self.tiles // self.warps), self.splits, 1

    @property
    def partial_size(self) -> int:
        """Numbers of the partial sums; none if there is one split."""
        cells = OUTPUTS * self.variant.out_tiles * ROWS * self.variant.row_tiles
        return self.splits * self.tiles * cells if self.splits > 1 else 0


def variant_for(num_rows: int) -> Variant:
    """The smallest variant that takes so many rows. Raises ValueError if none does."""
    for variant in VARIANTS:
        if 0 < num_rows <= ROWS * variant.row_tiles:
            return variant
    raise ValueError(f"x has {num_rows} rows; give it 1 to {MAX_ROWS}")


@cache
def plan(variant: Variant, out_features: int, in_features: int, num_multiprocessors: int) -> Launch:
    """The launch of least `cost`. On a tie the fewest splits, then the largest programs."""
    tiles = -(-out_features // (OUTPUTS * variant.out_tiles))
    chunks = -(-in_features // CONSTANTS["CHUNK"])
    launches = []
    for chunks_per_split in range(1, chunks + 1):
        splits = -(-chunks // chunks_per_split)
        for warps in range(1, CONSTANTS["MAX_WARPS"] + 1):
            launches.append(Launch(variant, tiles, warps, splits, chunks_per_split))
    return min(launches, key=lambda a: (cost(a, num_multiprocessors), a.splits, -a.warps))


def cost(launch: Launch, num_multiprocessors: int) -> float:
    """Bytes of W that the busiest multiprocessor could read in the time it needs; a guess.

    It has room for so many warps at once, and with fewer than three quarters of them it waits for
    memory the more, in proportion. A program's x, once for all its warps, and the partial sums,
    written and read, come from the second-level cache: a byte is taken to cost half of one of W.
    """
    variant, chunk = launch.variant, CONSTANTS["CHUNK"]
    programs = -(-launch.grid[0] * launch.splits // num_multiprocessors)
    full, rest = divmod(programs * launch.warps, variant.resident_warps)
    wanted = 3 * variant.resident_warps // 4
    warps = full * variant.resident_warps + (max(rest, wanted) if rest else 0)
    weights = OUTPUTS * variant.out_tiles * chunk * (1 / 2 + 4 / CONSTANTS["BLOCK"])
    x = 2 * ROWS * variant.row_tiles * chunk
    partial = 2 * 4 * launch.partial_size / num_multiprocessors
    return launch.chunks_per_split * (warps * weights + programs * x / 2) + partial / 2


def four_bit_product(
    x: Tensor, packed: Tensor, absmax: Tensor, code: Tensor, out_features: int
) -> Tensor:
    """y (…, out) = x Wᵀ in bfloat16, sums in float32.

    x (…, in) bfloat16 of 1 to 64 rows, in a multiple of 64; packed (out · in / 2,) uint8, two codes
    a byte, high nibble first; absmax (out · in / 64,) and code (16,) float32. Two launches: x is
    permuted first. Raises ValueError if x is of another kind.
    """
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    y = product_of_permuted(permuted(rows), *rows.shape, packed, absmax, code, out_features)
    return y.view(*x.shape[:-1], out_features)


def permuted(rows: Tensor) -> Tensor:
    """rows (num_rows, in) bfloat16 in the order in which warps read it, padded with zeros to whole
    tiles and chunks.
    """
    num_rows, in_features = rows.shape
    if rows.dtype != torch.bfloat16:
        raise ValueError(f"x is {rows.dtype}; this product takes bfloat16 only")
    if in_features % CONSTANTS["BLOCK"]:
        raise ValueError(f"in_features is {in_features}; make it a multiple of 64")
    variant = variant_for(num_rows)
    chunks = -(-in_features // CONSTANTS["CHUNK"])
    result = rows.new_empty(chunks * CONSTANTS["CHUNK"] * ROWS * variant.row_tiles)
    kernel("permute_rows", variant)(
        grid=(-(-len(result) // (8 * PIECES_PER_PROGRAM)), 1, 1),
        block=(PIECES_PER_PROGRAM, 1, 1),
        args=[result, rows, num_rows, in_features],
    )
    return result


def product_of_permuted(
    xp: Tensor, num_rows: int, in_features: int, packed: Tensor, absmax: Tensor, code: Tensor,
    out_features: int,
) -> Tensor:  # fmt: skip
    """y (num_rows, out) bfloat16 of what `permuted` gave: one launch."""
    device = xp.device
    launch = plan(variant_for(num_rows), out_features, in_features, multiprocessors(device))
    y = xp.new_empty(num_rows, out_features)
    partial = xp.new_empty(launch.partial_size, dtype=torch.float32)
    kernel("nf4_product", launch.variant)(
        grid=launch.grid,
        block=(32 * launch.warps, 1, 1),
        args=[
            y, partial, counters(device, launch.tiles), packed, absmax, code, xp, num_rows,
            in_features, out_features, launch.chunks_per_split,
        ],
    )  # fmt: skip
    return y


@cache
def kernel(name: str, variant: Variant) -> Callable[..., None]:
    """A kernel of the source, compiled for the current device: kernel(grid=, block=, args=)."""
    return torch.cuda._compile_kernel(SOURCE, name, nvcc_options=variant.options)


@cache
def multiprocessors(device: torch.device) -> int:
    """How many there are."""
    return torch.cuda.get_device_properties(device).multi_processor_count


@cache
def counters(device: torch.device, num_tiles: int) -> Tensor:
    """(num_tiles,) int32, 0 between launches. The first call makes them: do not capture it."""
    return torch.zeros(num_tiles, dtype=torch.int32, device=device)


def checks(device: torch.device) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(name, y, the same in float64) at shapes with every kind of tail and every variant."""
    for out_features, in_features in ((16, 64), (1000, 1088), (4096, 4096), (77, 14336)):
        size = out_features * in_features
        packed = torch.randint(0, 256, (size // 2,), dtype=torch.uint8, device=device)
        absmax = torch.rand(size // 64, device=device) / in_features**0.5
        code = torch.linspace(-1, 1, 16, device=device)
        codes = torch.stack([packed >> 4, packed & 15], 1).flatten().long()
        weight = (code[codes] * absmax.repeat_interleave(64)).bfloat16().double()
        weight = weight.view(out_features, in_features)
        for num_rows in (1, 2, 7, 8, 9, 16, 17, 32, 33, 64):
            x = torch.randn(num_rows, in_features, device=device).bfloat16()
            y = four_bit_product(x, packed, absmax, code, out_features)
            yield f"{num_rows} × {in_features} → {out_features}", y, x.double() @ weight.T

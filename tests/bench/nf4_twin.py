"""nf4_product.cu in numpy: every warp, lane, byte and index of both kernels as the source has them.

A function here has the name of the function there that it repeats, and takes its numbers from the
source's own #defines. What the hardware does is written from NVIDIA's PTX ISA: prmt, lop3,
cvt.rn.bf16x2.f32 and the fragments of mma.m16n8k16. An array of registers has a cell a lane in its
last dimension and, before it, one a warp. Memory is read within its bounds only, what is not
written yet is NaN, and each output is written once.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from bench.nf4_product import CONSTANTS, Variant

Registers = NDArray[np.uint32]
Floats = NDArray[np.float32]

BLOCK, CHUNK, WORDS = (CONSTANTS[name] for name in ("BLOCK", "CHUNK", "WORDS"))
LANES = np.arange(32)
G, T = LANES >> 2, LANES & 3


# What the hardware does


def permute(a: Registers, b: Registers, selector: Registers | int) -> Registers:
    """prmt.b32: digit i of the selector picks byte i of the result among those of a, 0 to 3, and
    of b, 4 to 7; with the digit's top bit set, that byte's sign eight times.
    """
    both = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
    selector = np.asarray(selector, np.uint64)
    result = np.zeros(both.shape, np.uint64)
    for i in range(4):
        digit = selector >> np.uint64(4 * i) & np.uint64(15)
        byte = both >> (digit & np.uint64(7)) * np.uint64(8) & np.uint64(0xFF)
        if (digit & np.uint64(8)).any():
            byte = np.where(digit & np.uint64(8), (byte >> np.uint64(7)) * np.uint64(0xFF), byte)
        result |= byte << np.uint64(8 * i)
    return result.astype(np.uint32)


def lop3(a: Registers, b: Registers, c: Registers, truth: int) -> Registers:
    """lop3.b32: bit 4a + 2b + c of the truth table, for each bit."""
    result = np.zeros_like(a)
    for case in range(8):
        if truth >> case & 1:
            terms = [x if case >> i & 1 else ~x for x, i in ((a, 2), (b, 1), (c, 0))]
            result |= terms[0] & terms[1] & terms[2]
    return result


def bfloat16_bits(values: Floats) -> Registers:
    """Rounded to nearest, ties to even; NaN is 0x7FFF."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + (bits >> np.uint64(16) & 1)) >> np.uint64(16)
    return np.where(np.isnan(values), 0x7FFF, rounded).astype(np.uint32)


def bfloat16_pair(low: Floats, high: Floats) -> Registers:
    """cvt.rn.bf16x2.f32 %0, high, low."""
    return bfloat16_bits(low) | bfloat16_bits(high) << np.uint32(16)


def values_of_pair(pair: Registers) -> list[NDArray[np.float64]]:
    """The two bfloat16 of a register, the lower first."""
    halves = ((pair & 0xFFFF) << np.uint32(16), pair & np.uint32(0xFFFF0000))
    return [np.ascontiguousarray(half).view(np.float32).astype(np.float64) for half in halves]


def multiply(sums: Floats, w: list[Registers], x: list[Registers]) -> None:
    """mma.sync.m16n8k16 of each warp: sums (warps, 32, 4) += A B, rounded to float32.

    A's register j holds row g + 8 (j % 2), columns 2t and 2t + 1 + 8 (j // 2); B's register j rows
    2t and 2t + 1 + 8j, column g; the sums' number i row g + 8 (i // 2), column 2t + i % 2.
    """
    a, b = np.empty((len(sums), 16, 16)), np.empty((len(sums), 16, 8))
    for j in range(4):
        for i, value in enumerate(values_of_pair(w[j])):
            a[:, G + 8 * (j % 2), 2 * T + i + 8 * (j // 2)] = value
    for j in range(2):
        for i, value in enumerate(values_of_pair(x[j])):
            b[:, 2 * T + i + 8 * j, G] = value
    product = a @ b
    for i in range(4):
        sums[:, :, i] = sums[:, :, i] + product[:, G + 8 * (i // 2), 2 * T + i % 2]


def load(memory: NDArray, index: NDArray) -> NDArray:
    """memory[index]; IndexError for what lies outside."""
    if np.min(index) < 0:
        raise IndexError(f"read before the beginning, at {np.min(index)}")
    return memory[index]


# What the source does


def values_of(code: Floats, scale: Floats) -> tuple[list[Registers], list[Registers]]:
    """add_values for all i: the low and the high bytes of a block's sixteen values."""
    low, high = [], []
    for i in range(4):
        pair = [bfloat16_pair(*(c * scale for c in code[k : k + 2])) for k in (4 * i, 4 * i + 2)]
        low.append(permute(*pair, CONSTANTS["LOW_BYTES"]))
        high.append(permute(*pair, CONSTANTS["HIGH_BYTES"]))
    return low, high


def look_up(
    table: tuple[list[Registers], list[Registers]], index: Registers, is_upper: Registers
) -> list[Registers]:
    planes = [
        lop3(is_upper, permute(part[2], part[3], index), permute(part[0], part[1], index),
             CONSTANTS["SELECT"])
        for part in table
    ]  # fmt: skip
    return [permute(*planes, CONSTANTS[name]) for name in ("FIRST_PAIR", "SECOND_PAIR")]


def dequantise(table: tuple[list[Registers], list[Registers]], codes: Registers) -> list[Registers]:
    index, raised = codes & np.uint32(CONSTANTS["INDEX_BITS"]), codes << np.uint32(4)
    first = look_up(table, index, permute(raised, codes, CONSTANTS["TOP_BITS_FIRST"]))
    index = index >> np.uint32(16)
    return first + look_up(table, index, permute(raised, codes, CONSTANTS["TOP_BITS_SECOND"]))


def permute_rows(variant: Variant, grid, block, xp, x, num_rows: int, in_features: int) -> None:
    """xp and x: arrays of uint16."""
    row_tiles, chunks = variant.row_tiles, -(-in_features // CHUNK)
    i = np.arange(grid[0] * block[0])
    t, g, m = i & 3, i >> 2 & 7, i // 32 % row_tiles
    q, chunk = i // (32 * row_tiles) % WORDS, i // (32 * row_tiles * WORDS)
    row, k = 8 * m + g, CHUNK * chunk + BLOCK * t + 8 * q
    is_piece = (row < num_rows) & (k < in_features)
    piece = load(x.reshape(-1, 8), np.where(is_piece, row * in_features + k, 0) // 8)
    is_written = chunk < chunks
    pieces = np.where(is_piece[:, None], piece, 0)[is_written]
    assert pieces.size == xp.size, "every piece is written"
    xp.reshape(-1, 8)[i[is_written]] = pieces


def warp_sums(
    variant: Variant, tile: NDArray, split: int, packed, absmax, code, xp, in_features: int,
    out_features: int, chunks_per_split: int,
) -> Floats:  # fmt: skip
    """The sums of one split, (OUT_TILES, ROW_TILES, warps, 32, 4): the kernel's first half."""
    row_tiles, out_tiles = variant.row_tiles, variant.out_tiles
    blocks, chunks = in_features // BLOCK, -(-in_features // CHUNK)
    start = split * chunks_per_split
    end = min(start + chunks_per_split, chunks)
    sums = np.zeros((out_tiles, row_tiles, len(tile), 32, 4), np.float32)
    words, pieces = packed.view(np.uint32).reshape(-1, WORDS), xp.view(np.uint32).reshape(-1, 4)
    output = [
        [np.minimum((tile * out_tiles + a)[:, None] * 16 + 8 * r + G, out_features - 1)
         for r in range(2)]
        for a in range(out_tiles)
    ]  # fmt: skip
    place = np.minimum(4 * start + T, blocks - 1)
    for chunk in range(start, end):
        if chunk > start:
            place = place + np.where(4 * chunk + T < blocks, 4, 0)
        block = [[output[a][r] * blocks + place for r in range(2)] for a in range(out_tiles)]
        table = [[values_of(code, load(absmax, b)) for b in of] for of in block]
        codes = [[load(words, b) for b in of] for of in block]
        first_piece = chunk * WORDS * row_tiles * 32
        for q in range(WORDS):
            weights = [
                [dequantise(table[a][r], codes[a][r][..., q]) for r in range(2)]
                for a in range(out_tiles)
            ]
            for m in range(row_tiles):
                x = load(pieces, first_piece + (q * row_tiles + m) * 32 + LANES).T
                for a, (near, far) in enumerate(weights):
                    multiply(sums[a, m], [near[0], far[0], near[1], far[1]], list(x[:2]))
                    multiply(sums[a, m], [near[2], far[2], near[3], far[3]], list(x[2:]))
    return sums


def nf4_product(
    variant: Variant, arrivals: np.random.Generator, grid, block, y, partial, counters, packed,
    absmax, code, xp, num_rows: int, in_features: int, out_features: int, chunks_per_split: int,
) -> None:  # fmt: skip
    """y: bits of bfloat16; `arrivals` shuffles the order in which the splits of a tile end."""
    warps = block[0] // 32
    tile = (np.arange(grid[0])[:, None] * warps + np.arange(warps)).ravel()
    tile = tile[tile * 16 * variant.out_tiles < out_features]
    sums = [
        warp_sums(variant, tile, split, packed, absmax, code, xp, in_features, out_features,
                  chunks_per_split)
        for split in range(grid[1])
    ]  # fmt: skip
    total = sums[0]
    if grid[1] > 1:
        total = np.full_like(total, np.nan)
        parts = partial.reshape(grid[1], len(tile), variant.out_tiles, variant.row_tiles, 32, 4)
        parts[:] = np.nan
        for i in tile:
            for split in arrivals.permutation(grid[1]):
                parts[split, i] = sums[split][:, :, i]
                counters[i] += 1
                if counters[i] == grid[1]:
                    counters[i] = 0
                    total[:, :, i] = 0
                    for part in parts[:, i]:
                        total[:, :, i] += part
    store(variant, y.reshape(num_rows, out_features), total, tile)


def store(variant: Variant, y: NDArray, sums: Floats, tile: NDArray) -> None:
    num_rows, out_features = y.shape
    times_written = np.zeros(y.shape, int)
    for a in range(variant.out_tiles):
        for m in range(variant.row_tiles):
            pairs = [bfloat16_pair(sums[a, m, ..., i], sums[a, m, ..., i + 1]) for i in (0, 2)]
            for far in range(2):
                for i in range(2):
                    row = 8 * m + 2 * T + i + 0 * tile[:, None]
                    output = (tile[:, None] * variant.out_tiles + a) * 16 + G + 8 * far
                    cells = (row < num_rows) & (output < out_features)
                    place = row[cells], output[cells]
                    y[place] = ((pairs[far] >> np.uint32(16 * i)) & 0xFFFF)[cells]
                    np.add.at(times_written, place, 1)
    assert (times_written == 1).all(), "each output is written once"

"""The bodies of the quantised products; `triton/quantised.py` says what they are for, and launches.

The 4-bit product in bfloat16. A sum over inputs may take them in any order, if that of W is that of
x. So each thread of a tensor-core product is given, of a row of W, one whole block of 64 inputs
out of every 256. It makes the sixteen values fp32(code × absmax) that the block can have once,
rounds them, keeps them as bytes in eight registers, and looks four codes up at a time by byte
permutations. The result is already the operand of the tensor core: weights do not go through shared
memory, and no table is read from memory.

How Triton is led there: words and x are loaded in their natural order and reordered by views, and
all that stands between the loads and `tl.dot` is elementwise or a view, so that the compiler moves
the change of layout in front of it. A value that is not loaded, such as `tl.arange` or a scalar
taken along, would hinder that. Tiles of 8 rows are the tensor core's smallest; larger ones would
make Triton share the weights out among warps so that each decodes them anew, or take them through
shared memory.
On an H100 it reads its bytes at 0.43 of the memory's rate at up to 8 rows, and at 0.16 at 32 rows.

Sources: PTX ISA, `prmt` and `mma.m16n8k16`; bench/NOTES.md has the counts.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lora_runtime.kernels.triton.adapter_kernels import batch_jit, shrink_tile
from lora_runtime.kernels.triton.elementwise import gated_value


@triton.jit
def _sums(
    x_ptr, codes_ptr, absmax_ptr, table_ptr, m, end_row, row, begin, end, in_features, num_blocks,
    FORMAT: tl.constexpr, IS_EVEN: tl.constexpr, TILES: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Of TILES tiles Σ_k W[row, k] x[m, k], (BLOCK_N, BLOCK_M) each, over the inputs k from `begin`
    to `end`; rows of x from `end_row` on are none.
    """
    sums = (tl.zeros((BLOCK_N, BLOCK_M), tl.float32),)
    for _ in tl.static_range(TILES - 1):
        sums = sums + (tl.zeros((BLOCK_N, BLOCK_M), tl.float32),)
    if FORMAT == "eight_bit":
        sums = _add_int8(
            sums, x_ptr, codes_ptr, absmax_ptr, m, end_row, row, begin, end, in_features,
            IS_EVEN, TILES, BLOCK_M, BLOCK_K,
        )  # fmt: skip
    elif x_ptr.dtype.element_ty == tl.bfloat16:
        sums = _add_four_bit(
            sums, x_ptr, codes_ptr.to(tl.pointer_type(tl.int32)), absmax_ptr, table_ptr, m,
            end_row, row, begin, end, num_blocks, IS_EVEN, TILES, BLOCK_M, BLOCK_N,
        )  # fmt: skip
    else:
        sums = _add_four_bit_float32(
            sums, x_ptr, codes_ptr, absmax_ptr, table_ptr, m, end_row, row, begin, end,
            num_blocks, TILES, BLOCK_M,
        )  # fmt: skip
    return sums


@triton.jit
def product_program(
    program, y_ptr, partial_ptr, counters_ptr, x_ptr, codes_ptr, absmax_ptr, table_ptr,
    num_rows, in_features, num_blocks, out_features, inputs_per_split, FORMAT: tl.constexpr,
    GATE: tl.constexpr, IS_EVEN: tl.constexpr, SPLITS: tl.constexpr, TILES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One of the programs of a product: y[m, n] = Σ_k W[n, k] x[m, k] for a tile of outputs n, up
    to TILES · BLOCK_M rows m and one split of the inputs.

    Rows vary fastest, then outputs: programs that read the same weights run together.
    With GATE the outputs are those of two joined layers: a tile is half gate, half the same
    outputs of up, and y (rows, out / 2) = act(gate) · up of both, rounded to y's dtype first.
    """
    row_tiles = tl.cdiv(num_rows, TILES * BLOCK_M)
    output_tiles = tl.cdiv(out_features, BLOCK_N)
    unit = program % (row_tiles * output_tiles)
    split = program // (row_tiles * output_tiles)
    first_row = unit % row_tiles * (TILES * BLOCK_M)
    i = tl.arange(0, BLOCK_N)
    n = unit // row_tiles * BLOCK_N + i
    is_output = n < out_features
    if GATE != "":
        half: tl.constexpr = BLOCK_N // 2
        inner = out_features // 2
        n = unit // row_tiles * half + i % half
        is_output = n < inner
        n += i // half * inner
    row = tl.where(is_output, n, 0).to(tl.int64)
    begin = split * inputs_per_split
    end = tl.minimum(begin + inputs_per_split, in_features)
    m = first_row + tl.arange(0, BLOCK_M)
    sums = _sums(
        x_ptr, codes_ptr, absmax_ptr, table_ptr, m, num_rows, row, begin, end, in_features,
        num_blocks, FORMAT, IS_EVEN, TILES, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    if SPLITS == 1:
        for tile in tl.static_range(TILES):
            _store(
                y_ptr, sums[tile], unit // row_tiles, n, tile * BLOCK_M + m, is_output, num_rows,
                out_features, GATE, BLOCK_M, BLOCK_N,
            )  # fmt: skip
    else:
        size = tl.cast(num_rows, tl.int64) * out_features
        for tile in tl.static_range(TILES):
            cell, is_cell = _cells(tile * BLOCK_M + m, n, is_output, num_rows, out_features)
            tl.store(partial_ptr + split * size + cell, sums[tile], mask=is_cell)
        tl.debug_barrier()
        if tl.atomic_add(counters_ptr + unit, 1, sem="acq_rel") == SPLITS - 1:
            tl.store(counters_ptr + unit, 0)
            for tile in tl.static_range(TILES):
                cell, is_cell = _cells(tile * BLOCK_M + m, n, is_output, num_rows, out_features)
                acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
                for s in range(SPLITS):
                    place = partial_ptr + s * size + cell
                    acc += tl.load(place, mask=is_cell, other=0.0, cache_modifier=".cg")
                _store(
                    y_ptr, acc, unit // row_tiles, n, tile * BLOCK_M + m, is_output, num_rows,
                    out_features, GATE, BLOCK_M, BLOCK_N,
                )  # fmt: skip


@triton.jit
def _store(
    y_ptr, acc, output_tile, n, m, is_output, num_rows, out_features, GATE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Round the sums of a tile and write them, or act(gate) · up of them."""
    y = acc.to(y_ptr.dtype.element_ty)
    if GATE == "":
        cell, is_cell = _cells(m, n, is_output, num_rows, out_features)
        tl.store(y_ptr + cell, y, mask=is_cell)
    else:
        half: tl.constexpr = BLOCK_N // 2
        inner = out_features // 2
        pair = tl.permute(tl.reshape(y, (2, half, BLOCK_M)), (1, 2, 0)).to(tl.float32)
        gate, up = tl.split(pair)
        y = gated_value(gate, up, GATE == "silu").to(y_ptr.dtype.element_ty)
        n = output_tile * half + tl.arange(0, half)
        cell, is_cell = _cells(m, n, n < inner, num_rows, inner)
        tl.store(y_ptr + cell, y, mask=is_cell)


@triton.jit
def _cells(m, n, is_output, num_rows, width):
    """Places of (n, m) in (rows, width), and which of them exist."""
    cell = m[None, :].to(tl.int64) * width + n[:, None]
    return cell, is_output[:, None] & (m < num_rows)[None, :]


@triton.jit
def _add_four_bit(
    sums, x_ptr, words_ptr, absmax_ptr, table_ptr, m, num_rows, row, begin, end, num_blocks,
    IS_EVEN: tl.constexpr, TILES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """sums + W xᵀ in bfloat16, four blocks of 64 inputs a pass. A word is eight codes."""
    end_block = end // 64
    b, word, k = tl.arange(0, 4), tl.arange(0, 8), tl.arange(0, 64)
    first_block = row.to(tl.int32) * num_blocks
    word_place = (first_block[:, None, None] + b[None, :, None]) * 8 + word
    code = _code_pairs(table_ptr)
    for block in range(tl.multiple_of(begin // 64, 4), end_block, 4):
        is_in = (block + b < end_block) | IS_EVEN
        words = tl.load(words_ptr + (word_place + block * 8), mask=is_in[None, :, None], other=0)
        scale_place = first_block[:, None] + block + b[None, :]
        scale = tl.load(absmax_ptr + scale_place, mask=is_in[None, :], other=0.0)
        values = _look_up(words, scale[:, :, None], code)
        values = tl.permute(values, (0, 2, 4, 1, 3, 5))
        values = tl.reshape(values, (BLOCK_N, 256))
        added = ()
        for tile in tl.static_range(TILES):
            # Beyond the last row, read that row again: a mask would cost registers.
            place = tl.minimum(tile * BLOCK_M + m, num_rows - 1)[:, None, None] * (num_blocks * 64)
            place += b[None, :, None] * 64 + k + block * 64
            x = tl.load(x_ptr + place, mask=is_in[None, :, None], other=0.0)
            x = tl.permute(tl.reshape(x, (BLOCK_M, 4, 8, 2, 2, 2)), (2, 4, 1, 3, 5, 0))
            x = tl.reshape(x, (256, BLOCK_M))
            added = added + (tl.dot(values, x, sums[tile]),)
        sums = added
    return sums


@triton.jit
def _code_pairs(table_ptr):
    """The sixteen codes, each loaded as a tensor of one element, which fits any layout."""
    one = table_ptr + tl.arange(0, 1)[None, None, :]
    codes = (tl.load(one),)
    for i in tl.static_range(1, 16):
        codes = codes + (tl.load(one + i),)
    return codes


@triton.jit
def _look_up(words, scale, code):
    """The values (N, 4, 8, 2, 2, 2) bfloat16 of words (N, 4, 8) under scales (N, 4, 1); the last
    three dimensions count a word's codes in order.

    Of sixteen 16-bit products the low bytes are one table, the high bytes another, four registers
    each. `prmt` takes three bits of a code to choose among eight bytes; the fourth bit chooses
    which eight, through a mask of whole bytes, which `prmt` makes by repeating a byte's sign.
    """
    low_0, high_0 = _byte_tables(scale, code[0], code[1], code[2], code[3])
    low_1, high_1 = _byte_tables(scale, code[4], code[5], code[6], code[7])
    low_2, high_2 = _byte_tables(scale, code[8], code[9], code[10], code[11])
    low_3, high_3 = _byte_tables(scale, code[12], code[13], code[14], code[15])
    shifted, index = words << 4, words & 0x77777777
    is_upper = byte_permute(shifted, words, 0xD9C8)
    low = _choose(is_upper, index, low_0, low_1, low_2, low_3)
    high = _choose(is_upper, index, high_0, high_1, high_2, high_3)
    pair_0, pair_1 = byte_permute(low, high, 0x4051), byte_permute(low, high, 0x6273)
    is_upper, index = byte_permute(shifted, words, 0xFBEA), index >> 16
    low = _choose(is_upper, index, low_0, low_1, low_2, low_3)
    high = _choose(is_upper, index, high_0, high_1, high_2, high_3)
    pair_2, pair_3 = byte_permute(low, high, 0x4051), byte_permute(low, high, 0x6273)
    pairs = tl.join(tl.join(pair_0, pair_2), tl.join(pair_1, pair_3))
    first = pairs.to(tl.int16).to(tl.bfloat16, bitcast=True)
    return tl.join(first, (pairs >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True))


@triton.jit
def _choose(is_upper, index, table_0, table_1, table_2, table_3):
    """Four bytes at once, each out of sixteen."""
    upper, lower = byte_permute(table_2, table_3, index), byte_permute(table_0, table_1, index)
    return (is_upper & upper) | (~is_upper & lower)


@triton.jit
def _byte_tables(scale, code_0, code_1, code_2, code_3):
    """The low and the high bytes of four products code × scale, rounded to bfloat16."""
    first = _round_pair(code_0 * scale, code_1 * scale)
    second = _round_pair(code_2 * scale, code_3 * scale)
    return byte_permute(first, second, 0x6420), byte_permute(first, second, 0x7531)


@triton.jit
def byte_permute(a, b, selector):
    """Four of the eight bytes of a (low) and b, chosen by the selector's low four nibbles; a
    nibble's top bit asks for the byte's sign, repeated. PTX: prmt.b32.
    """
    return tl.inline_asm_elementwise(
        "prmt.b32 $0, $1, $2, $3;", "=r,r,r,r", [a, b, selector], tl.int32, is_pure=True, pack=1
    )


@triton.jit
def _round_pair(a, b):
    """Two float32 rounded to the nearest bfloat16, a in the low half of 32 bits."""
    return tl.inline_asm_elementwise(
        "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f", [a, b], tl.int32, is_pure=True, pack=1
    )


@triton.jit
def _add_four_bit_float32(
    sums, x_ptr, packed_ptr, absmax_ptr, table_ptr, m, num_rows, row, begin, end, num_blocks,
    TILES: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """sums + W xᵀ in float32, one block of 64 inputs a pass: the plain form, for exactness."""
    byte, k = tl.arange(0, 32), tl.arange(0, 64)
    byte_ptr = packed_ptr + row[:, None] * (num_blocks * 32) + byte[None, :]
    rows_ptr = x_ptr + m.to(tl.int64)[None, :] * (num_blocks * 64) + k[:, None]
    for block in range(begin // 64, end // 64):
        pairs = tl.load(byte_ptr + block * 32)
        scale = tl.load(absmax_ptr + row * num_blocks + block)[:, None]
        first = tl.load(table_ptr + (pairs >> 4)) * scale
        second = tl.load(table_ptr + (pairs & 15)) * scale
        values = tl.interleave(first, second)
        added = ()
        for tile in tl.static_range(TILES):
            is_row = (tile * BLOCK_M + m < num_rows)[None, :]
            place = rows_ptr + (tile * BLOCK_M * 64) * tl.cast(num_blocks, tl.int64) + block * 64
            x = tl.load(place, mask=is_row, other=0.0)
            added = added + (tl.dot(values, x, sums[tile], input_precision="ieee"),)
        sums = added
    return sums


@triton.jit
def _add_int8(
    sums, x_ptr, codes_ptr, absmax_ptr, m, num_rows, row, begin, end, in_features,
    IS_EVEN: tl.constexpr, TILES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """sums + W xᵀ."""
    k = tl.arange(0, BLOCK_K)
    scale = tl.div_rn(tl.load(absmax_ptr + row), 127.0)[:, None]
    code_ptr = codes_ptr + row[:, None] * in_features + k[None, :]
    rows_ptr = x_ptr + m.to(tl.int64)[None, :] * in_features + k[:, None]
    for start in range(begin, end, BLOCK_K):
        is_in = (start + k < end) | IS_EVEN
        codes = tl.load(code_ptr + start, mask=is_in[None, :], other=0)
        values = (codes.to(tl.float32) * scale).to(x_ptr.dtype.element_ty)
        added = ()
        for tile in tl.static_range(TILES):
            is_row = (tile * BLOCK_M + m < num_rows)[None, :]
            place = rows_ptr + (tile * BLOCK_M) * tl.cast(in_features, tl.int64) + start
            x = tl.load(place, mask=is_in[:, None] & is_row, other=0.0)
            added = added + (tl.dot(values, x, sums[tile], input_precision="ieee"),)
        sums = added
    return sums


@batch_jit
def product_kernel(
    y_ptr, partial_ptr, counters_ptr, x_ptr, codes_ptr, absmax_ptr, table_ptr, num_rows,
    in_features, num_blocks, out_features, inputs_per_split, FORMAT: tl.constexpr,
    GATE: tl.constexpr, IS_EVEN: tl.constexpr, SPLITS: tl.constexpr, TILES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A product and nothing else."""
    product_program(
        tl.program_id(0), y_ptr, partial_ptr, counters_ptr, x_ptr, codes_ptr, absmax_ptr,
        table_ptr, num_rows, in_features, num_blocks, out_features, inputs_per_split, FORMAT, GATE,
        IS_EVEN, SPLITS, TILES, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip


@batch_jit
def grouped_product_kernel(
    y_ptr, x_ptr, codes_ptr, absmax_ptr, table_ptr, tiles_ptr, num_tiles, in_features, num_blocks,
    out_features, FORMAT: tl.constexpr, IS_EVEN: tl.constexpr, TILES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Groups of rows, each multiplied by its own part of W's rows: a tile of outputs for up to
    TILES · BLOCK_M rows of one group.

    tiles (num_tiles, 3) int32: the group, and its first and end row; a tile without rows is none.
    Tiles vary fastest, and those of a group follow one another: they read the same weights.
    """
    tile_at = tiles_ptr + tl.program_id(0) % num_tiles * 3
    group, first, end = tl.load(tile_at), tl.load(tile_at + 1), tl.load(tile_at + 2)
    if first < end:
        n = tl.program_id(0) // num_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
        is_output = n < out_features
        row = tl.where(is_output, n, 0).to(tl.int64) + group.to(tl.int64) * out_features
        m, begin = first + tl.arange(0, BLOCK_M), tl.full((), 0, tl.int32)
        sums = _sums(
            x_ptr, codes_ptr, absmax_ptr, table_ptr, m, end, row, begin, in_features, in_features,
            num_blocks, FORMAT, IS_EVEN, TILES, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        for tile in tl.static_range(TILES):
            cell, is_cell = _cells(tile * BLOCK_M + m, n, is_output, end, out_features)
            tl.store(y_ptr + cell, sums[tile].to(y_ptr.dtype.element_ty), mask=is_cell)


@batch_jit
def product_and_shrink_kernel(
    y_ptr, partial_ptr, counters_ptr, x_ptr, codes_ptr, absmax_ptr, table_ptr, num_rows,
    in_features, num_blocks, out_features, inputs_per_split,
    hidden_ptr, num_tiles, num_parts, shrunk_ptr, weights_ptr, extents_ptr, tokens_ptr,
    slots_ptr, replicas_ptr, entries_ptr, shrunk_features, inputs_per_shrink, num_entries,
    num_replicas, stride_part_extents, stride_entry,
    FORMAT: tl.constexpr, GATE: tl.constexpr, IS_EVEN: tl.constexpr, SPLITS: tl.constexpr,
    TILES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    SHRINK_SPLITS: tl.constexpr, SHRINK_BLOCK_M: tl.constexpr, SHRINK_BLOCK_R: tl.constexpr,
    SHRINK_BLOCK_K: tl.constexpr, SHRINK_ALIGNMENT: tl.constexpr,
):  # fmt: skip
    """A product, and A x of the adapters of the same x, by different programs of one launch.

    The programs of shrink come first: they are short, and after the product's programs they could
    begin only when those end.
    """
    program = tl.program_id(0)
    num_shrinks = num_tiles * num_parts * SHRINK_SPLITS
    if program < num_shrinks:
        rest = program // num_tiles
        shrink_tile(
            hidden_ptr, shrunk_ptr, weights_ptr, extents_ptr, tokens_ptr, slots_ptr, replicas_ptr,
            entries_ptr, program % num_tiles, rest % num_parts, rest // num_parts, shrunk_features,
            inputs_per_shrink, num_entries, num_replicas, stride_part_extents, stride_entry,
            SHRINK_SPLITS, SHRINK_BLOCK_M, SHRINK_BLOCK_R, SHRINK_BLOCK_K, SHRINK_ALIGNMENT,
        )  # fmt: skip
    else:
        product_program(
            program - num_shrinks, y_ptr, partial_ptr, counters_ptr, x_ptr, codes_ptr, absmax_ptr,
            table_ptr, num_rows, in_features, num_blocks, out_features, inputs_per_split, FORMAT,
            GATE, IS_EVEN, SPLITS, TILES, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip


@triton.jit
def _nested_scale(codes_ptr, absmax_ptr, code_ptr, offset_ptr, block, is_block):
    """absmax of blocks under double quantisation; compiled without fused multiply-adds."""
    code = tl.load(code_ptr + tl.load(codes_ptr + block, mask=is_block, other=0).to(tl.int32))
    scale = tl.load(absmax_ptr + block // 256, mask=is_block, other=0.0)
    return code * scale + tl.load(offset_ptr + block // 256, mask=is_block, other=0.0)


@triton.jit
def scales_kernel(
    scales_ptr, codes_ptr, absmax_ptr, code_ptr, offset_ptr, num_blocks, BLOCK: tl.constexpr
):
    """The absmax of every 4-bit block, which double quantisation keeps as 8-bit codes."""
    block = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    is_block = block < num_blocks
    scale = _nested_scale(codes_ptr, absmax_ptr, code_ptr, offset_ptr, block, is_block)
    tl.store(scales_ptr + block, scale, mask=is_block)


@triton.jit
def values_kernel(
    values_ptr, packed_ptr, absmax_ptr, table_ptr, nested_absmax_ptr, nested_code_ptr,
    nested_offset_ptr, size, num_bytes, IS_NESTED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """values[2i] and values[2i + 1] of every byte i; a row may end inside a byte or a block.

    A thread's values are written together, 16 bytes at a time.
    """
    start = tl.program_id(0).to(tl.int64) * BLOCK
    i = start + tl.arange(0, BLOCK)
    byte = tl.load(packed_ptr + i, mask=i < num_bytes, other=0).to(tl.int32)
    if IS_NESTED:
        scale = _nested_scale(
            absmax_ptr, nested_absmax_ptr, nested_code_ptr, nested_offset_ptr, i // 32,
            i < num_bytes,
        )  # fmt: skip
    else:
        scale = tl.load(absmax_ptr + i // 32, mask=i < num_bytes, other=0.0)
    code = tl.load(table_ptr + tl.arange(0, 16))
    first = (tl.gather(code, byte >> 4, 0) * scale).to(values_ptr.dtype.element_ty)
    second = (tl.gather(code, byte & 15, 0) * scale).to(values_ptr.dtype.element_ty)
    k = 2 * start + tl.arange(0, 2 * BLOCK)
    tl.store(values_ptr + k, tl.interleave(first, second), mask=k < size)

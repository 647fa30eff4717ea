"""The bodies of the adapter kernels; `triton/adapters.py` says what they are for and launches them.

An Extent is 8 int64: rank, then where a, b, gain and bias start (kernels/types.py). Modules that
share x are parts of one launch: their outputs lie side by side, their extent tables one after
another. Numbers that change from step to step (`BATCH_SIZES`) are never specialised on: for a value
of 1, or a multiple of 16, Triton would compile another kernel while requests wait.
Before a program can ask for weights it waits for each load that tells it where they are. So what it
needs to know of its tile lies in tables by the tile (`tiles_kernel`), which it reads at once; it
then reads the extent.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents

from lora_runtime.kernels.triton.elementwise import gated_value

NO_KEY = tl.constexpr(2147483647)
"""The key of a token without an entry that is left: larger than all keys, so that it comes last."""

BATCH_SIZES = [
    "num_rows", "num_segments", "num_tokens", "num_entries", "num_entry_tiles",
    "num_entry_places", "num_tiles", "num_parts", "num_replicas", "stride_part_extents",
    "blocks_per_program",
]  # fmt: skip
"""Arguments whose values depend on the rows of a step or on the largest adapter so far."""


def batch_jit(function):
    """`triton.jit` that compiles one kernel for all values of BATCH_SIZES."""
    names = function.__code__.co_varnames[: function.__code__.co_argcount]
    return triton.jit(function, do_not_specialize=[n for n in BATCH_SIZES if n in names])


@triton.jit
def keys_of(entry, slots_ptr, replicas_ptr, num_replicas):
    """The place in an extent table of each entry, slot · R + replica.

    −1: none, for a replica that the table has no room for. NO_KEY: there is no entry.
    """
    slot = tl.load(slots_ptr + entry, mask=entry >= 0, other=0)
    replica = tl.load(replicas_ptr + entry, mask=entry >= 0, other=0)
    key = tl.where(replica < num_replicas, slot * num_replicas + replica, -1)
    return tl.where(entry >= 0, key, NO_KEY)


@batch_jit
def tiles_kernel(
    entries_ptr,
    owners_ptr,
    next_ptr,
    tile_slots_ptr,
    tile_replicas_ptr,
    tokens_ptr,
    slots_ptr,
    replicas_ptr,
    starts_ptr,
    num_segments,
    num_tokens,
    num_entry_tiles,
    BLOCK_M: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """One tile of `Tiles` a program: first those of entries, then those of the other tokens."""
    tile = tl.program_id(0)
    m, c = tl.arange(0, BLOCK_M), tl.arange(0, CHUNK)
    num_entries = tl.load(starts_ptr + num_segments)
    begin, end, num_tiles = 0, 0, 0
    for s0 in range(0, num_segments, CHUNK):
        s = s0 + c
        low = tl.load(starts_ptr + s, mask=s < num_segments, other=0)
        high = tl.load(starts_ptr + s + 1, mask=s < num_segments, other=0)
        count = (high - low + BLOCK_M - 1) // BLOCK_M
        first = num_tiles + tl.cumsum(count, 0) - count
        is_here = (first <= tile) & (tile < first + count)
        begin += tl.sum(tl.where(is_here, low + (tile - first) * BLOCK_M, 0), 0)
        end += tl.sum(tl.where(is_here, high, 0), 0)
        num_tiles += tl.sum(count, 0)
    entry = begin + m
    is_entry = (entry < end) & (tile < num_entry_tiles)
    is_used = (begin < end) & (tile < num_entry_tiles)
    slot = tl.load(slots_ptr + begin, mask=is_used, other=-1)
    replica = tl.load(replicas_ptr + begin, mask=is_used, other=0)
    tl.store(tile_slots_ptr + tile, slot, mask=tile < num_entry_tiles)
    tl.store(tile_replicas_ptr + tile, replica, mask=tile < num_entry_tiles)
    other_token = (tile - num_entry_tiles) * BLOCK_M + m
    token = tl.load(tokens_ptr + entry, mask=is_entry, other=-1)
    token = tl.where(tile < num_entry_tiles, token, other_token)
    is_owned = m < 0
    following = tl.full((BLOCK_M,), NO_KEY, tl.int32)
    for c0 in range(0, num_entries, CHUNK):
        other = c0 + c
        others = tl.load(tokens_ptr + other, mask=other < num_entries, other=-2)
        is_same = token[:, None] == others[None, :]
        is_before = (other[None, :] < entry[:, None]) | (tile >= num_entry_tiles)
        is_owned |= tl.max((is_same & is_before).to(tl.int32), 1) > 0
        later = tl.where(is_same & (other[None, :] > entry[:, None]), other[None, :], NO_KEY)
        following = tl.minimum(following, tl.min(later, 1))
    place = tile * BLOCK_M + m
    owner = tl.where(is_owned | (token >= num_tokens), -1, token)
    tl.store(owners_ptr + place, owner)
    tl.store(entries_ptr + place, tl.where(is_entry, entry, -1), mask=tile < num_entry_tiles)
    tl.store(next_ptr + entry, tl.where(following < num_entries, following, -1), mask=is_entry)


@triton.jit
def shrink_tile(
    hidden_ptr, x_ptr, weights_ptr, extents_ptr, tokens_ptr, slots_ptr, replicas_ptr, entries_ptr,
    tile, part, split, in_features, inputs_per_split, num_entries, num_replicas,
    stride_part_extents, stride_entry, SPLITS: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, ALIGNMENT: tl.constexpr,
):  # fmt: skip
    """hidden[part, split, e, r] = Σ_k A[r, k] x[token_e, k] of one tile's entries e and all ranks
    r, over the split's inputs k. Ranks up to the next multiple of 8 are zeros: what reads them may
    read 32 bytes at once. slots, replicas: of each tile.
    """
    entry = tl.load(entries_ptr + tile * BLOCK_M + tl.arange(0, BLOCK_M))
    slot, replica = tl.load(slots_ptr + tile), tl.load(replicas_ptr + tile)
    has_extent = (slot >= 0) & (replica < num_replicas)
    extent_ptr = extents_ptr + part.to(tl.int64) * stride_part_extents
    extent_ptr += (slot * num_replicas + replica).to(tl.int64) * 8
    rank = tl.load(extent_ptr, mask=has_extent, other=0).to(tl.int32)
    a_at = tl.load(extent_ptr + 1, mask=has_extent, other=0)
    is_row = entry >= 0
    token = tl.load(tokens_ptr + entry, mask=is_row, other=0).to(tl.int64)
    x_rows = x_ptr + token[:, None] * in_features
    a_ptr = weights_ptr + tl.multiple_of(a_at, ALIGNMENT)
    begin = split * inputs_per_split
    end = tl.minimum(begin + inputs_per_split, in_features)
    row = (part * SPLITS + split).to(tl.int64) * num_entries + entry
    for first_rank in range(0, rank, BLOCK_R):
        r = first_rank + tl.arange(0, BLOCK_R)
        is_rank = r < rank
        a_rows = a_ptr + r[None, :].to(tl.int64) * in_features
        acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
        for start in range(begin, end, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            is_in = k < end
            x = tl.load(x_rows + k[None, :], mask=is_row[:, None] & is_in[None, :], other=0.0)
            a = tl.load(a_rows + k[:, None], mask=is_in[:, None] & is_rank[None, :], other=0.0)
            acc = tl.dot(x.to(a.dtype), a, acc, input_precision="ieee")
        tl.store(
            hidden_ptr + row[:, None] * stride_entry + r[None, :],
            tl.where(is_rank[None, :], acc, 0.0),
            mask=is_row[:, None] & (r < (rank + 7) // 8 * 8)[None, :],
        )


@batch_jit
def shrink_kernel(
    hidden_ptr, x_ptr, weights_ptr, extents_ptr, tokens_ptr, slots_ptr, replicas_ptr, entries_ptr,
    in_features, inputs_per_split, num_entries, num_replicas, stride_part_extents,
    stride_entry, SPLITS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr, ALIGNMENT: tl.constexpr, LETS_NEXT_BEGIN: tl.constexpr,
):  # fmt: skip
    """A `shrink_tile` a program."""
    if LETS_NEXT_BEGIN:
        gdc_launch_dependents()
    shrink_tile(
        hidden_ptr, x_ptr, weights_ptr, extents_ptr, tokens_ptr, slots_ptr, replicas_ptr,
        entries_ptr, tl.program_id(0), tl.program_id(1), tl.program_id(2), in_features,
        inputs_per_split, num_entries, num_replicas, stride_part_extents, stride_entry, SPLITS,
        BLOCK_M, BLOCK_R, BLOCK_K, ALIGNMENT,
    )  # fmt: skip


@triton.jit
def _hidden(
    hidden_ptr, first_rank, rank, entry, stride_split, stride_entry, SPLITS: tl.constexpr,
    BLOCK_R: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """h[m, r] of BLOCK_R ranks from the first on, as the sum of two values of `dtype`, which keep
    16 bits of it; of float32 the first is h. Rows without an entry (−1) are 0.
    """
    r = first_rank + tl.arange(0, BLOCK_R)
    place = entry[:, None] * stride_entry + r[None, :]
    is_read = (entry >= 0)[:, None] & (r < (rank + 7) // 8 * 8)[None, :]
    h = tl.load(hidden_ptr + place, mask=is_read, other=0.0)
    for split in tl.static_range(1, SPLITS):
        h += tl.load(hidden_ptr + split * stride_split + place, mask=is_read, other=0.0)
    high = h.to(dtype)
    return high, tl.where(tl.abs(h) < float("inf"), h - high.to(tl.float32), 0.0).to(dtype)


@triton.jit
def _plus_product(
    delta, high, low, b_ptr, first_rank, rank, n, out_features, BLOCK_R: tl.constexpr
):
    """delta + Σ_r h[m, r] B'[r, n] of BLOCK_R ranks from the first on: (BLOCK_M, BLOCK_N)."""
    r = first_rank + tl.arange(0, BLOCK_R)
    is_b = (r < rank)[:, None] & (n < out_features)[None, :]
    place = r[:, None].to(tl.int64) * out_features + n[None, :]
    b = tl.load(b_ptr + place, mask=is_b, other=0.0)
    delta = tl.dot(high, b, delta, input_precision="ieee")
    if b.dtype != tl.float32:
        delta = tl.dot(low, b, delta)
    return delta


@triton.jit
def _owners(
    tokens_ptr, entries_ptr, tile_slots_ptr, tile_replicas_ptr, tile, num_entry_places,
    num_replicas, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Tokens that a tile writes, −1 for none, each one's first entry, −1 for none, and its key as
    in `keys_of`: the tile's.
    """
    place = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    has_entries = tile * BLOCK_M < num_entry_places
    token = tl.load(tokens_ptr + place)
    entry = tl.load(entries_ptr + place, mask=place < num_entry_places, other=-1)
    slot = tl.load(tile_slots_ptr + tile, mask=has_entries, other=0)
    replica = tl.load(tile_replicas_ptr + tile, mask=has_entries, other=0)
    entry = tl.where(token >= 0, entry, -1)
    key = tl.where(replica < num_replicas, slot * num_replicas + replica, -1)
    return token, entry, tl.where(entry >= 0, key, NO_KEY)


@triton.jit
def _adapted(
    base_ptr, bias_ptr, hidden_ptr, weights_ptr, vectors_ptr, extents_ptr, slots_ptr, replicas_ptr,
    scales_ptr, next_ptr, token, entry, key, part, start, n, out_features, stride_row, num_entries,
    num_replicas, stride_part_extents, stride_entry, HAS_BIAS: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, ALIGNMENT: tl.constexpr,
    VECTOR_ALIGNMENT: tl.constexpr,
):  # fmt: skip
    """(BLOCK_M, BLOCK_N) float32: outputs n of one part, which begins at `start` of a row, of one
    tile of tokens, all their entries included.

    A token may have several entries, a chain that `next_ptr` links. Each turn takes the lowest key
    that is left and, of all tokens whose next entry has that key, this one entry.
    Tokens are selected, never multiplied by a mask: 0 · NaN of one would reach another. What only
    gains and biases need is read again for them: kept, it would take registers from every adapter.
    """
    is_out = n < out_features
    is_cell = (token >= 0)[:, None] & is_out[None, :]
    cell = token[:, None].to(tl.int64) * stride_row + (start + n)[None, :]
    acc = tl.load(base_ptr + cell, mask=is_cell, other=0.0).to(tl.float32)
    if HAS_BIAS:
        acc += tl.load(bias_ptr + start + n, mask=is_out, other=0.0).to(tl.float32)[None, :]
    stride_split = num_entries * stride_entry
    hidden_ptr += part * SPLITS * stride_split
    extents_ptr += part * stride_part_extents
    lowest = tl.min(key, 0)
    while lowest < NO_KEY:
        is_row, has_extent = key == lowest, lowest >= 0
        extent_ptr = extents_ptr + lowest.to(tl.int64) * 8
        following = tl.load(next_ptr + entry, mask=is_row, other=-1)
        scale = tl.load(scales_ptr + entry, mask=is_row, other=0.0)[:, None]
        rank = tl.load(extent_ptr, mask=has_extent, other=0).to(tl.int32)
        b_at = tl.load(extent_ptr + 2, mask=has_extent, other=-1)
        gain_at = tl.load(extent_ptr + 3, mask=has_extent, other=-1)
        bias_at = tl.load(extent_ptr + 4, mask=has_extent, other=-1)
        if rank > 0:
            delta = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            for first_rank in range(0, rank, BLOCK_R):
                high, low = _hidden(
                    hidden_ptr, first_rank, rank, tl.where(is_row, entry, -1), stride_split,
                    stride_entry, SPLITS, BLOCK_R, weights_ptr.dtype.element_ty,
                )  # fmt: skip
                delta = _plus_product(
                    delta, high, low, weights_ptr + tl.multiple_of(b_at, ALIGNMENT), first_rank,
                    rank, n, out_features, BLOCK_R,
                )  # fmt: skip
            acc = tl.where(is_row[:, None], acc + scale * delta, acc)
        if gain_at >= 0:
            gain_ptr = vectors_ptr + tl.multiple_of(gain_at, VECTOR_ALIGNMENT)
            gain = tl.load(gain_ptr + n, mask=is_out, other=1.0)
            product = tl.load(base_ptr + cell, mask=is_cell, other=0.0).to(tl.float32)
            acc = tl.where(is_row[:, None], acc + scale * ((gain - 1)[None, :] * product), acc)
        if bias_at >= 0:
            own_ptr = vectors_ptr + tl.multiple_of(bias_at, VECTOR_ALIGNMENT)
            bias = tl.load(own_ptr + n, mask=is_out, other=0.0)
            if HAS_BIAS:
                bias -= tl.load(bias_ptr + start + n, mask=is_out, other=0.0).to(tl.float32)
            acc = tl.where(is_row[:, None], acc + scale * bias[None, :], acc)
        entry = tl.where(is_row, following, entry)
        key = keys_of(entry, slots_ptr, replicas_ptr, num_replicas)
        lowest = tl.min(key, 0)
    return acc


@triton.jit
def _plain_blocks(
    y_ptr, base_ptr, bias_ptr, hidden_ptr, scales_ptr, b_ptr, rank, token, entry, rows, start,
    first, num_blocks, width, num_entries, stride_entry, HAS_BIAS: tl.constexpr,
    SPLITS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Blocks of outputs from `first` on, of a tile whose rows have one adapter without gain and
    bias, or none: one loop over the blocks and all ranks of each, in which what later passes need
    is on its way.
    """
    dtype: tl.constexpr = b_ptr.dtype.element_ty
    scale = tl.load(scales_ptr + entry, mask=entry >= 0, other=0.0)[:, None]
    has_delta = (entry >= 0)[:, None] & (rank > 0)
    stride_split = num_entries * stride_entry
    high, low = _hidden(
        hidden_ptr, 0, rank, entry, stride_split, stride_entry, SPLITS, BLOCK_R, dtype
    )
    passes = tl.maximum(tl.cdiv(rank, BLOCK_R), 1)
    turn, n = 0, first + tl.arange(0, BLOCK_N)
    delta = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for _ in tl.range(0, num_blocks * passes, num_stages=STAGES):
        is_last = turn == passes - 1
        is_cell = (token >= 0)[:, None] & (n < width)[None, :] & is_last
        cell = rows + n[None, :]
        base = tl.load(base_ptr + cell, mask=is_cell, other=0.0).to(tl.float32)
        own_high, own_low = high, low
        if turn > 0:  # a branch, or its loads would take shared memory in every stage
            own_high, own_low = _hidden(
                hidden_ptr, turn * BLOCK_R, rank, entry, stride_split, stride_entry, SPLITS,
                BLOCK_R, dtype,
            )  # fmt: skip
        delta = tl.where(turn == 0, 0.0, delta)
        r = turn * BLOCK_R
        delta = _plus_product(delta, own_high, own_low, b_ptr, r, rank, n, width, BLOCK_R)
        if HAS_BIAS:
            bias = tl.load(bias_ptr + start + n, mask=n < width, other=0.0)
            base += bias.to(tl.float32)[None, :]
        y = tl.where(has_delta, base + scale * delta, base)
        tl.store(y_ptr + cell, y.to(y_ptr.dtype.element_ty), mask=is_cell)
        turn, n = tl.where(is_last, 0, turn + 1), tl.where(is_last, n + BLOCK_N, n)


@triton.jit
def _plain_gated_blocks(
    y_ptr, base_ptr, bias_ptr, hidden_ptr, scales_ptr, b_ptr_0, b_ptr_1, rank_0, rank_1, token,
    entry, rows, first, num_blocks, width, num_entries, stride_entry, IS_SILU: tl.constexpr,
    HAS_BIAS: tl.constexpr, SPLITS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """`_plain_blocks` of gate and up, which end in one value."""
    dtype: tl.constexpr = b_ptr_0.dtype.element_ty
    scale = tl.load(scales_ptr + entry, mask=entry >= 0, other=0.0)[:, None]
    is_row = (entry >= 0)[:, None]
    stride_split = num_entries * stride_entry
    up_ptr = hidden_ptr + SPLITS * stride_split.to(tl.int64)
    high_0, low_0 = _hidden(
        hidden_ptr, 0, rank_0, entry, stride_split, stride_entry, SPLITS, BLOCK_R, dtype
    )
    high_1, low_1 = _hidden(
        up_ptr, 0, rank_1, entry, stride_split, stride_entry, SPLITS, BLOCK_R, dtype
    )
    passes = tl.maximum(tl.cdiv(tl.maximum(rank_0, rank_1), BLOCK_R), 1)
    turn, n = 0, first + tl.arange(0, BLOCK_N)
    delta_0 = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    delta_1 = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for _ in tl.range(0, num_blocks * passes, num_stages=STAGES):
        is_last = turn == passes - 1
        is_cell = (token >= 0)[:, None] & (n < width)[None, :] & is_last
        gate_ptr = base_ptr + 2 * rows + n[None, :]
        gate = tl.load(gate_ptr, mask=is_cell, other=0.0).to(tl.float32)
        up = tl.load(gate_ptr + width, mask=is_cell, other=0.0).to(tl.float32)
        own_high_0, own_low_0, own_high_1, own_low_1 = high_0, low_0, high_1, low_1
        if turn > 0:
            own_high_0, own_low_0 = _hidden(
                hidden_ptr, turn * BLOCK_R, rank_0, entry, stride_split, stride_entry, SPLITS,
                BLOCK_R, dtype,
            )  # fmt: skip
            own_high_1, own_low_1 = _hidden(
                up_ptr, turn * BLOCK_R, rank_1, entry, stride_split, stride_entry, SPLITS, BLOCK_R,
                dtype,
            )  # fmt: skip
        delta_0, delta_1 = tl.where(turn == 0, 0.0, delta_0), tl.where(turn == 0, 0.0, delta_1)
        r = turn * BLOCK_R
        delta_0 = _plus_product(
            delta_0, own_high_0, own_low_0, b_ptr_0, r, rank_0, n, width, BLOCK_R
        )
        delta_1 = _plus_product(
            delta_1, own_high_1, own_low_1, b_ptr_1, r, rank_1, n, width, BLOCK_R
        )
        if HAS_BIAS:
            bias_0 = tl.load(bias_ptr + n, mask=n < width, other=0.0)
            bias_1 = tl.load(bias_ptr + width + n, mask=n < width, other=0.0)
            gate += bias_0.to(tl.float32)[None, :]
            up += bias_1.to(tl.float32)[None, :]
        gate = tl.where(is_row & (rank_0 > 0), gate + scale * delta_0, gate)
        up = tl.where(is_row & (rank_1 > 0), up + scale * delta_1, up)
        gate, up = gate.to(y_ptr.dtype.element_ty), up.to(y_ptr.dtype.element_ty)
        y = gated_value(gate.to(tl.float32), up.to(tl.float32), IS_SILU)
        tl.store(y_ptr + rows + n[None, :], y.to(y_ptr.dtype.element_ty), mask=is_cell)
        turn, n = tl.where(is_last, 0, turn + 1), tl.where(is_last, n + BLOCK_N, n)


@triton.jit
def _extent(extents_ptr, weights_ptr, part, stride_part_extents, lowest, ALIGNMENT: tl.constexpr):
    """Rank, B' and whether there is neither gain nor bias, of the extent with the key `lowest`,
    under which all entries of a tile are; NO_KEY or −1 for none.
    """
    has_extent = (lowest >= 0) & (lowest < NO_KEY)
    extent_ptr = extents_ptr + part * stride_part_extents + lowest.to(tl.int64) * 8
    rank = tl.load(extent_ptr, mask=has_extent, other=0).to(tl.int32)
    b_at = tl.load(extent_ptr + 2, mask=has_extent, other=0)
    gain_at = tl.load(extent_ptr + 3, mask=has_extent, other=-1)
    bias_at = tl.load(extent_ptr + 4, mask=has_extent, other=-1)
    b_ptr = weights_ptr + tl.multiple_of(b_at, ALIGNMENT)
    return rank, b_ptr, (gain_at < 0) & (bias_at < 0)


@batch_jit
def expand_kernel(
    y_ptr, base_ptr, bias_ptr, hidden_ptr, weights_ptr, vectors_ptr, extents_ptr, slots_ptr,
    replicas_ptr, scales_ptr, tokens_ptr, entries_ptr, next_ptr, tile_slots_ptr,
    tile_replicas_ptr, num_entry_places, num_entries, num_replicas, stride_part_extents,
    stride_entry, blocks_per_program, start_1, start_2, end, HAS_BIAS: tl.constexpr,
    SPLITS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr, ALIGNMENT: tl.constexpr, VECTOR_ALIGNMENT: tl.constexpr,
):  # fmt: skip
    """y of one tile of tokens and some blocks of outputs of one part. Parts lie side by side, up to
    three, and begin at 0, start_1 and start_2. A tile of padding ends when it has read its tokens.

    Tiles of rows with one adapter without gain and bias, or with none, which most are, go the short
    way of `_plain_blocks`; it gives the same bits.
    """
    token, entry, key = _owners(
        tokens_ptr, entries_ptr, tile_slots_ptr, tile_replicas_ptr, tl.program_id(0),
        num_entry_places, num_replicas, BLOCK_M,
    )  # fmt: skip
    if tl.max(token, 0) < 0:
        return
    outputs = blocks_per_program * BLOCK_N
    chunk_1 = tl.cdiv(start_1, outputs)
    chunk_2 = chunk_1 + tl.cdiv(start_2 - start_1, outputs)
    part = (tl.program_id(1) >= chunk_1).to(tl.int32) + (tl.program_id(1) >= chunk_2).to(tl.int32)
    start = tl.where(part == 0, 0, tl.where(part == 1, start_1, start_2))
    first_chunk = tl.where(part == 0, 0, tl.where(part == 1, chunk_1, chunk_2))
    width = tl.where(part == 0, start_1, tl.where(part == 1, start_2, end)) - start
    first = (tl.program_id(1) - first_chunk) * outputs
    num_blocks = tl.cdiv(tl.minimum(width - first, outputs), BLOCK_N)
    part = part.to(tl.int64)
    rows = token[:, None].to(tl.int64) * end + start
    lowest = tl.min(key, 0)
    following = tl.load(next_ptr + entry, mask=entry >= 0, other=-1)
    rank, b_ptr, is_plain = _extent(
        extents_ptr, weights_ptr, part, stride_part_extents, lowest, ALIGNMENT
    )
    if is_plain & (tl.max(following, 0) < 0):
        part_ptr = hidden_ptr + part * SPLITS * (num_entries * stride_entry)
        _plain_blocks(
            y_ptr, base_ptr, bias_ptr, part_ptr, scales_ptr, b_ptr, rank, token, entry, rows,
            start, first, num_blocks, width, num_entries, stride_entry, HAS_BIAS, SPLITS,
            BLOCK_M, BLOCK_R, BLOCK_N, STAGES,
        )  # fmt: skip
    else:
        for block in range(0, num_blocks):
            n = first + block * BLOCK_N + tl.arange(0, BLOCK_N)
            y = _adapted(
                base_ptr, bias_ptr, hidden_ptr, weights_ptr, vectors_ptr, extents_ptr, slots_ptr,
                replicas_ptr, scales_ptr, next_ptr, token, entry, key, part, start, n, width, end,
                num_entries, num_replicas, stride_part_extents, stride_entry, HAS_BIAS, SPLITS,
                BLOCK_M, BLOCK_R, BLOCK_N, ALIGNMENT, VECTOR_ALIGNMENT,
            )  # fmt: skip
            is_cell = (token >= 0)[:, None] & (n < width)[None, :]
            tl.store(y_ptr + rows + n[None, :], y.to(y_ptr.dtype.element_ty), mask=is_cell)


@batch_jit
def gated_expand_kernel(
    y_ptr, base_ptr, bias_ptr, hidden_ptr, weights_ptr, vectors_ptr, extents_ptr, slots_ptr,
    replicas_ptr, scales_ptr, tokens_ptr, entries_ptr, next_ptr, tile_slots_ptr,
    tile_replicas_ptr, num_entry_places, num_entries, num_replicas, stride_part_extents,
    stride_entry, blocks_per_program, width, IS_SILU: tl.constexpr, HAS_BIAS: tl.constexpr,
    SPLITS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr, ALIGNMENT: tl.constexpr, VECTOR_ALIGNMENT: tl.constexpr,
):  # fmt: skip
    """act(gate) · up of one tile of tokens and some blocks of columns: two parts of `width`, gate
    and up, both rounded as `expand_kernel` writes them, and both by its ways.
    """
    token, entry, key = _owners(
        tokens_ptr, entries_ptr, tile_slots_ptr, tile_replicas_ptr, tl.program_id(0),
        num_entry_places, num_replicas, BLOCK_M,
    )  # fmt: skip
    if tl.max(token, 0) < 0:
        return
    first = tl.program_id(1) * blocks_per_program * BLOCK_N
    num_blocks = tl.minimum(tl.cdiv(width - first, BLOCK_N), blocks_per_program)
    dtype: tl.constexpr = y_ptr.dtype.element_ty
    rows = token[:, None].to(tl.int64) * width
    one = tl.full((), 1, tl.int64)
    lowest = tl.min(key, 0)
    following = tl.load(next_ptr + entry, mask=entry >= 0, other=-1)
    rank_0, b_ptr_0, is_plain_0 = _extent(
        extents_ptr, weights_ptr, one - 1, stride_part_extents, lowest, ALIGNMENT
    )
    rank_1, b_ptr_1, is_plain_1 = _extent(
        extents_ptr, weights_ptr, one, stride_part_extents, lowest, ALIGNMENT
    )
    if is_plain_0 & is_plain_1 & (tl.max(following, 0) < 0):
        _plain_gated_blocks(
            y_ptr, base_ptr, bias_ptr, hidden_ptr, scales_ptr, b_ptr_0, b_ptr_1, rank_0, rank_1,
            token, entry, rows, first, num_blocks, width, num_entries, stride_entry, IS_SILU,
            HAS_BIAS, SPLITS, BLOCK_M, BLOCK_R, BLOCK_N, STAGES,
        )  # fmt: skip
    else:
        for block in range(0, num_blocks):
            n = first + block * BLOCK_N + tl.arange(0, BLOCK_N)
            gate = _adapted(
                base_ptr, bias_ptr, hidden_ptr, weights_ptr, vectors_ptr, extents_ptr, slots_ptr,
                replicas_ptr, scales_ptr, next_ptr, token, entry, key, one - 1, 0, n, width,
                2 * width, num_entries, num_replicas, stride_part_extents, stride_entry, HAS_BIAS,
                SPLITS, BLOCK_M, BLOCK_R, BLOCK_N, ALIGNMENT, VECTOR_ALIGNMENT,
            ).to(dtype)  # fmt: skip
            up = _adapted(
                base_ptr, bias_ptr, hidden_ptr, weights_ptr, vectors_ptr, extents_ptr, slots_ptr,
                replicas_ptr, scales_ptr, next_ptr, token, entry, key, one, width, n, width,
                2 * width, num_entries, num_replicas, stride_part_extents, stride_entry, HAS_BIAS,
                SPLITS, BLOCK_M, BLOCK_R, BLOCK_N, ALIGNMENT, VECTOR_ALIGNMENT,
            ).to(dtype)  # fmt: skip
            y = gated_value(gate.to(tl.float32), up.to(tl.float32), IS_SILU)
            is_cell = (token >= 0)[:, None] & (n < width)[None, :]
            tl.store(y_ptr + rows + n[None, :], y.to(dtype), mask=is_cell)

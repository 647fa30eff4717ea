"""The bodies of the adapter kernels; `gpu_adapters.py` says what they are for and launches them.

A Run is 8 int64: rank, then where a, b, gain and bias start (kernels/types.py). Modules that share
x are parts of one launch: their outputs lie side by side, their run tables one after another.
Unmeasured.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tiles_kernel(
    entries_ptr,
    owners_ptr,
    next_ptr,
    tokens_ptr,
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
    other_token = (tile - num_entry_tiles) * BLOCK_M + m
    token = tl.load(tokens_ptr + entry, mask=is_entry, other=-1)
    token = tl.where(tile < num_entry_tiles, token, other_token)
    is_owned = m < 0
    following = tl.full((BLOCK_M,), 2147483647, tl.int32)
    for c0 in range(0, num_entries, CHUNK):
        other = c0 + c
        others = tl.load(tokens_ptr + other, mask=other < num_entries, other=-2)
        is_same = token[:, None] == others[None, :]
        is_before = (other[None, :] < entry[:, None]) | (tile >= num_entry_tiles)
        is_owned |= tl.max((is_same & is_before).to(tl.int32), 1) > 0
        later = tl.where(is_same & (other[None, :] > entry[:, None]), other[None, :], 2147483647)
        following = tl.minimum(following, tl.min(later, 1))
    place = tile * BLOCK_M + m
    owner = tl.where(is_owned | (token >= num_tokens), -1, token)
    tl.store(owners_ptr + place, owner)
    tl.store(entries_ptr + place, tl.where(is_entry, entry, -1), mask=tile < num_entry_tiles)
    tl.store(next_ptr + entry, tl.where(following < num_entries, following, -1), mask=is_entry)


@triton.jit
def shrink_kernel(
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
    rank_blocks,
    stride_part_runs,
    stride_part,
    stride_split,
    stride_entry,
    inputs_per_split,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ALIGNMENT: tl.constexpr,
):
    """hidden[part, split, e, r] = Σ_k A[r, k] x[token_e, k] over the split's inputs k, r < rank."""
    split = tl.program_id(2)
    part, rank_block = tl.program_id(1) // rank_blocks, tl.program_id(1) % rank_blocks
    entry = tl.load(tiles_ptr + tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M))
    first = tl.max(entry, 0)
    if first < 0:
        return
    run = tl.load(slots_ptr + first).to(tl.int64) * num_replicas + tl.load(replicas_ptr + first)
    run_ptr = runs_ptr + part * stride_part_runs + run * 8
    rank = tl.load(run_ptr).to(tl.int32)
    r = rank_block * BLOCK_R + tl.arange(0, BLOCK_R)
    if rank_block * BLOCK_R >= rank:
        return
    a_ptr = weights_ptr + tl.multiple_of(tl.load(run_ptr + 1), ALIGNMENT)
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
        hidden_ptr + part.to(tl.int64) * stride_part + split.to(tl.int64) * stride_split + place,
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
def expand_kernel(
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
    stride_row,
    start_1,
    start_2,
    end,
    num_replicas,
    stride_part_runs,
    stride_part,
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

    The outputs of up to three parts lie side by side and begin at 0, start_1 and start_2.
    The entries of a tile are of one adapter, so the loop runs once, unless tokens have more: then
    every row steps along its own chain, and the rows of the lowest run that is left go together.
    Rows are selected, never multiplied by a mask.
    """
    place = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    token = tl.load(tokens_ptr + place).to(tl.int64)
    block_1 = tl.cdiv(start_1, BLOCK_N)
    block_2 = block_1 + tl.cdiv(start_2 - start_1, BLOCK_N)
    part = (tl.program_id(1) >= block_1).to(tl.int32) + (tl.program_id(1) >= block_2).to(tl.int32)
    start = tl.where(part == 0, 0, tl.where(part == 1, start_1, start_2))
    first_block = tl.where(part == 0, 0, tl.where(part == 1, block_1, block_2))
    part_end = tl.where(part == 0, start_1, tl.where(part == 1, start_2, end))
    out_features = part_end - start
    n = (tl.program_id(1) - first_block) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_out = n < out_features
    is_cell = (token >= 0)[:, None] & is_out[None, :]
    cell = token[:, None] * stride_row + (start + n)[None, :]
    product = tl.load(base_ptr + cell, mask=is_cell, other=0.0).to(tl.float32)
    b0 = tl.zeros((BLOCK_N,), tl.float32)
    if HAS_BIAS:
        b0 = tl.load(bias_ptr + start + n, mask=is_out, other=0.0).to(tl.float32)
    hidden_ptr += part.to(tl.int64) * stride_part
    runs_ptr += part * stride_part_runs
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

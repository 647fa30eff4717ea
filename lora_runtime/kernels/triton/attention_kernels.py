"""The bodies of the attention kernels; `triton/attention.py` says what they are for."""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
STAGES = tl.constexpr(5)
"""One pass ahead for the keys and values, and one more for the blocks they lie in: with the usual 3
the copies of a pass begin at the end of the one before, and nothing is done while they run."""

OF_THE_STEP = {
    "do_not_specialize": ["num_rows", "num_blocks", "num_splits", "min_keys"],
    "do_not_specialize_on_alignment": [
        "slots_ptr", "tables_ptr", "positions_ptr", "starts_ptr", "counters_ptr",
    ],
}  # fmt: skip
"""What changes from step to step must not ask for another compilation: no step waits for one."""


@triton.jit(do_not_specialize_on_alignment=OF_THE_STEP["do_not_specialize_on_alignment"])
def write_kv_kernel(
    keys_ptr,
    values_ptr,
    k_ptr,
    v_ptr,
    slots_ptr,
    width,
    head_dim,
    stride_k_token,
    stride_k_head,
    stride_v_token,
    stride_v_head,
    BLOCK: tl.constexpr,
):
    """keys[slot] = k[t] and values[slot] = v[t] of one token; a negative slot stores nothing."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + token)
    if slot < 0:
        return
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_in = i < width
    head, d = i // head_dim, i % head_dim
    k = tl.load(k_ptr + token * stride_k_token + head * stride_k_head + d, mask=is_in)
    v = tl.load(v_ptr + token * stride_v_token + head * stride_v_head + d, mask=is_in)
    tl.store(keys_ptr + slot * width + i, k, mask=is_in)
    tl.store(values_ptr + slot * width + i, v, mask=is_in)


@triton.jit
def _attend(
    acc, top, total, q, keys_ptr, values_ptr, table_ptr, query_position, begin, end,
    stride_slot, d, is_d, scale, window, softcap, HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCK_K: tl.constexpr,
    IS_MASKED: tl.constexpr,
):  # fmt: skip
    """One pass over the keys begin … end − 1 for the queries q (rows, BLOCK_D). Not masked: every
    query sees all of them, and they are whole blocks of BLOCK_K.

    Returns Σ p v, the largest score s and Σ p, with p = 2^(s − largest), s in units of ln 2. A
    query sees the keys up to query_position (rows,), the last `window` of them.
    """
    for start in tl.range(begin, end, BLOCK_K, num_stages=STAGES):
        position = start + tl.arange(0, BLOCK_K)
        is_key = (position < end) if IS_MASKED else (position >= 0)
        block = tl.load(table_ptr + position // BLOCK_SIZE, mask=is_key, other=0).to(tl.int64)
        place = (block * BLOCK_SIZE + position % BLOCK_SIZE)[:, None] * stride_slot + d[None, :]
        mask = is_key[:, None] & is_d[None, :]
        k = tl.load(keys_ptr + place, mask=mask, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * (scale * LOG2_E)
        if HAS_SOFTCAP:
            scores = softcap * LOG2_E * (1 - 2 / (tl.exp2(2 * scores / softcap) + 1))
        if IS_MASKED:
            distance = query_position[:, None] - position[None, :]
            is_seen = is_key[None, :] & (distance >= 0)
            if HAS_WINDOW:
                is_seen &= distance < window
            scores = tl.where(is_seen, scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)
        p = tl.exp2(scores - shift[:, None])
        fade = tl.exp2(top - shift)
        v = tl.load(values_ptr + place, mask=mask, other=0.0)
        acc = tl.dot(p.to(v.dtype), v, acc * fade[:, None], input_precision="ieee")
        total = total * fade + tl.sum(p, 1)
        top = new_top
    return acc, top, total


@triton.jit(**OF_THE_STEP)
def decode_kernel(
    out_ptr,
    q_ptr,
    keys_ptr,
    values_ptr,
    tables_ptr,
    positions_ptr,
    starts_ptr,
    parts_ptr,
    sums_ptr,
    counters_ptr,
    num_splits,
    min_keys,
    head_blocks,
    num_blocks,
    heads_per_group,
    head_dim,
    stride_q_token,
    stride_q_head,
    stride_out,
    stride_slot,
    stride_group,
    scale,
    window,
    softcap,
    IS_DECODE: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_JOIN: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Up to BLOCK_H query heads of one row's only token that share a key head, over one split of
    its keys.

    A row takes as many splits as its own length is worth; the programs of the others return. A
    split leaves its sums in parts (units, splits, BLOCK_H, BLOCK_D) and its largest score and total
    weight in sums (units, splits, BLOCK_H, 2), a unit being the heads of this program.
    """
    row, split = tl.program_id(0), tl.program_id(2)
    group, first_head = tl.program_id(1) // head_blocks, tl.program_id(1) % head_blocks * BLOCK_H
    token = row
    if not IS_DECODE:
        token = tl.load(starts_ptr + row)
        if tl.load(starts_ptr + row + 1) - token != 1:
            return
    h, d = tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_D)
    num_heads = tl.minimum(heads_per_group - first_head, BLOCK_H)
    is_head, is_d = h < num_heads, d < head_dim
    is_cell = is_head[:, None] & is_d[None, :]
    head = group * heads_per_group + first_head + h
    position = tl.load(positions_ptr + token)
    first = tl.maximum(position - window + 1, 0) if HAS_WINDOW else 0
    num_keys = position + 1 - first
    share = tl.cdiv(tl.maximum(tl.cdiv(num_keys, num_splits), min_keys), BLOCK_K) * BLOCK_K
    num_shares = tl.maximum(tl.cdiv(num_keys, share), 1)
    if split >= num_shares:
        return
    begin = first + split * share
    q_place = token.to(tl.int64) * stride_q_token + head[:, None] * stride_q_head + d[None, :]
    acc, top, total = _attend(
        tl.zeros((BLOCK_H, BLOCK_D), tl.float32),
        tl.full((BLOCK_H,), float("-inf"), tl.float32),
        tl.zeros((BLOCK_H,), tl.float32),
        tl.load(q_ptr + q_place, mask=is_cell, other=0.0),
        keys_ptr + group * stride_group, values_ptr + group * stride_group,
        tables_ptr + row.to(tl.int64) * num_blocks, position + h * 0,
        begin, tl.minimum(begin + share, position + 1), stride_slot, d, is_d,
        scale, window, softcap, HAS_WINDOW, HAS_SOFTCAP, BLOCK_SIZE, BLOCK_K, True,
    )  # fmt: skip
    out_ptr += token.to(tl.int64) * stride_out + (group * heads_per_group + first_head) * head_dim
    if num_shares == 1:
        y = acc / tl.where(total == 0, 1.0, total)[:, None]
        place = h[:, None] * head_dim + d[None, :]
        tl.store(out_ptr + place, y.to(out_ptr.dtype.element_ty), mask=is_cell)
        return
    unit = row * tl.num_programs(1) + tl.program_id(1)
    first_part = unit.to(tl.int64) * num_splits
    part = (first_part + split) * BLOCK_H + h
    tl.store(parts_ptr + part[:, None] * BLOCK_D + d[None, :], acc, mask=is_cell)
    tl.store(sums_ptr + part * 2, top, mask=is_head)
    tl.store(sums_ptr + part * 2 + 1, total, mask=is_head)
    tl.debug_barrier()
    if tl.atomic_add(counters_ptr + unit, 1, sem="acq_rel") == num_shares - 1:
        tl.store(counters_ptr + unit, 0)
        _join(
            out_ptr, parts_ptr, sums_ptr, first_part, num_shares, num_heads, head_dim,
            MAX_SPLITS, BLOCK_H, BLOCK_JOIN, BLOCK_D,
        )  # fmt: skip


@triton.jit
def _join(
    out_ptr, parts_ptr, sums_ptr, first_part, num_shares, num_heads, head_dim,
    MAX_SPLITS: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_JOIN: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The result of all splits of a unit: BLOCK_JOIN heads at a time, of which all splits are read
    together, since one read after another would wait for each.
    """
    s, d = tl.arange(0, MAX_SPLITS), tl.arange(0, BLOCK_D)
    for first_head in tl.range(0, num_heads, BLOCK_JOIN, num_stages=1):
        h = first_head + tl.arange(0, BLOCK_JOIN)
        is_part = (s < num_shares)[:, None] & (h < num_heads)[None, :]
        is_d = (d < head_dim)[None, None, :]
        place = (first_part + s)[:, None] * BLOCK_H + h[None, :]
        top = tl.load(sums_ptr + place * 2, mask=is_part, other=float("-inf"), cache_modifier=".cg")
        total = tl.load(sums_ptr + place * 2 + 1, mask=is_part, other=0.0, cache_modifier=".cg")
        acc = tl.load(
            parts_ptr + place[:, :, None] * BLOCK_D + d[None, None, :],
            mask=is_part[:, :, None] & is_d, other=0.0, cache_modifier=".cg",
        )  # fmt: skip
        highest = tl.max(top, 0)
        fade = tl.exp2(top - tl.where(highest == float("-inf"), 0.0, highest)[None, :])
        whole = tl.sum(total * fade, 0)
        y = tl.sum(acc * fade[:, :, None], 0) / tl.where(whole == 0, 1.0, whole)[:, None]
        is_cell = (h < num_heads)[:, None] & (d < head_dim)[None, :]
        place = h[:, None] * head_dim + d[None, :]
        tl.store(out_ptr + place, y.to(out_ptr.dtype.element_ty), mask=is_cell)


@triton.jit(**OF_THE_STEP)
def prefill_kernel(
    out_ptr,
    q_ptr,
    keys_ptr,
    values_ptr,
    tables_ptr,
    positions_ptr,
    starts_ptr,
    num_rows,
    num_blocks,
    heads_per_group,
    head_dim,
    stride_q_token,
    stride_q_head,
    stride_out,
    stride_slot,
    stride_group,
    scale,
    window,
    softcap,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """One head of up to BLOCK_Q consecutive tokens of one row that has more than one."""
    tile, head = tl.program_id(0), tl.program_id(1)
    row, begin, end, num_tiles = -1, 0, 0, 0
    for r0 in range(0, num_rows, CHUNK):
        r = r0 + tl.arange(0, CHUNK)
        low = tl.load(starts_ptr + r, mask=r < num_rows, other=0)
        high = tl.load(starts_ptr + r + 1, mask=r < num_rows, other=0)
        count = tl.where(high - low > 1, (high - low + BLOCK_Q - 1) // BLOCK_Q, 0)
        first = num_tiles + tl.cumsum(count, 0) - count
        is_here = (first <= tile) & (tile < first + count)
        row += tl.sum(tl.where(is_here, r + 1, 0), 0)
        begin += tl.sum(tl.where(is_here, low + (tile - first) * BLOCK_Q, 0), 0)
        end += tl.sum(tl.where(is_here, high, 0), 0)
        num_tiles += tl.sum(count, 0)
    if row < 0:
        return
    token = begin + tl.arange(0, BLOCK_Q)
    d = tl.arange(0, BLOCK_D)
    is_token, is_d = token < end, d < head_dim
    position = tl.load(positions_ptr + token, mask=is_token, other=-1)
    is_cell = is_token[:, None] & is_d[None, :]
    q_place = token[:, None].to(tl.int64) * stride_q_token + head * stride_q_head + d[None, :]
    group = head // heads_per_group
    first_key = 0
    if HAS_WINDOW:
        first_key = tl.maximum(tl.load(positions_ptr + begin) - window + 1, 0)
    acc = tl.zeros((BLOCK_Q, BLOCK_D), tl.float32)
    top = tl.full((BLOCK_Q,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_Q,), tl.float32)
    q = tl.load(q_ptr + q_place, mask=is_cell, other=0.0)
    keys_ptr += group * stride_group
    values_ptr += group * stride_group
    table_ptr = tables_ptr + row.to(tl.int64) * num_blocks
    if not HAS_WINDOW:  # what all queries see takes no comparing
        lowest = tl.min(tl.where(is_token, position, 2147483646), 0)
        masked_from = (lowest + 1) // BLOCK_K * BLOCK_K
        acc, top, total = _attend(
            acc, top, total, q, keys_ptr, values_ptr, table_ptr, position, 0, masked_from,
            stride_slot, d, is_d, scale, window, softcap, HAS_WINDOW, HAS_SOFTCAP, BLOCK_SIZE,
            BLOCK_K, False,
        )  # fmt: skip
        first_key = masked_from
    acc, top, total = _attend(
        acc, top, total, q, keys_ptr, values_ptr, table_ptr, position, first_key,
        tl.max(position, 0) + 1, stride_slot, d, is_d, scale, window, softcap, HAS_WINDOW,
        HAS_SOFTCAP, BLOCK_SIZE, BLOCK_K, True,
    )  # fmt: skip
    y = acc / tl.where(total == 0, 1.0, total)[:, None]
    out_place = token[:, None].to(tl.int64) * stride_out + head * head_dim + d[None, :]
    tl.store(out_ptr + out_place, y.to(out_ptr.dtype.element_ty), mask=is_cell)

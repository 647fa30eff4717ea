"""Drawing the most likely tokens first, without ordering the whole vocabulary.

The most likely CANDIDATES tokens of a row are ordered; where the draw is cut before the last of
them, which is nearly always, they are all that it depends on. A row whose cut lies further down is
drawn by bisection: the bits of −logit order the tokens from the likeliest on, and passes over the
row count and sum all tokens that are likelier than a place in that order. Now and then what is
still in question is copied together, and later passes go over that alone: each halves it.
Which rows these are is known on the device only, so the kernel is always launched; it returns at
once for the others.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_runtime.kernels.reference import cut, invert

CANDIDATES = 1024
BLOCK = 8192
NUM_WARPS = 16
WHOLE = tl.constexpr(float(1 << 40))
"""The weight of a row's most likely token. Whole numbers add up to the same in any order."""
LAST_PLACE = tl.constexpr(0x7FFFFFFF)
HALF_WAY = tl.constexpr(1 << 30)
EXPONENT_BITS = tl.constexpr(8)
"""Of a place, the highest ones: most tokens of a flat row share them, so that what is in question
is first copied together behind them, and then after every second bit."""


def draw_cut(scaled: Tensor, number: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """See `lora_runtime.kernels.draw_cut`."""
    vocab_size = scaled.shape[1]
    values, ids = _most_likely(scaled, min(CANDIDATES, vocab_size))
    probabilities = torch.softmax(scaled, dim=1).gather(1, ids)
    kept = cut(probabilities, top_k, top_p, min_p)
    token_ids = ids.gather(1, invert(kept, number))
    if vocab_size > CANDIDATES:
        num_kept = (kept > 0).sum(dim=1, keepdim=True)
        last = values.gather(1, num_kept.clamp(min=1) - 1)
        is_covered = last > values[:, -1:]
        _bisection_kernel[(len(scaled),)](
            token_ids, torch.empty_like(scaled, memory_format=torch.contiguous_format),
            scaled.contiguous(), is_covered, number.contiguous(), top_k.contiguous(),
            top_p.contiguous(), min_p.contiguous(), vocab_size, BLOCK=BLOCK,
            num_warps=NUM_WARPS,
        )  # fmt: skip
    return token_ids


def _most_likely(scaled: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The largest values of each row in order and where they are, equal ones by their place.

    Where several tie with the last value kept, which of them are kept is undefined.
    """
    ids = scaled.topk(count, dim=1, sorted=False).indices.sort(dim=1).values
    values, order = scaled.gather(1, ids).sort(dim=1, descending=True, stable=True)
    return values, ids.gather(1, order)


@triton.jit
def _place(row_ptr, i, vocab_size):
    """Where tokens i stand in the order of likelihood, the most likely at 0: the bits of −value."""
    value = tl.load(row_ptr + i, mask=i < vocab_size, other=float("-inf"))
    return (0.0 - value).to(tl.int32, bitcast=True)


@triton.jit
def _weight(place):
    """exp(value) of WHOLE parts, of a place; 0 where no number is."""
    weight = tl.exp(0.0 - place.to(tl.float32, bitcast=True)) * WHOLE
    return tl.where(weight == weight, weight, 0.0).to(tl.int64)


@triton.jit
def _above(row_ptr, vocab_size, limit, BLOCK: tl.constexpr):
    """How many tokens stand before place `limit`, and what they weigh."""
    count, weight = tl.zeros((BLOCK,), tl.int32), tl.zeros((BLOCK,), tl.int64)
    for start in range(0, vocab_size, BLOCK):
        i = start + tl.arange(0, BLOCK)
        place = _place(row_ptr, i, vocab_size)
        is_above = (place < limit) & (i < vocab_size)
        count += is_above.to(tl.int32)
        weight += tl.where(is_above, _weight(place), 0)
    return tl.sum(count, 0), tl.sum(weight, 0)


@triton.jit
def _gathered(source_ptr, target_ptr, num, low, high, BLOCK: tl.constexpr):
    """Copy the values at places low … high of `num` together, in order, perhaps to where they
    are; returns how many they are.
    """
    found = 0
    for start in range(0, num, BLOCK):
        i = start + tl.arange(0, BLOCK)
        place = _place(source_ptr, i, num)
        is_in = (place >= low) & (place <= high) & (i < num)
        at = found + tl.cumsum(is_in.to(tl.int32), 0) - 1
        value = 0.0 - place.to(tl.float32, bitcast=True)
        tl.debug_barrier()  # all of the block is read before any of it is written to
        tl.store(target_ptr + at, value, mask=is_in)
        found += tl.sum(is_in.to(tl.int32), 0)
    tl.debug_barrier()
    return found


@triton.jit
def _last_place(
    row_ptr, rest_ptr, vocab_size, max_count, max_weight, min_weight,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The last place before which fewer than `max_count` tokens of less than `max_weight` stand,
    and at which one weighs `min_weight` or more. rest (vocab_size,): room.
    """
    none = tl.full((), 0, tl.int64)
    end, count_before, weight_before = 0, 0, none  # of `end`
    for bit in range(0, EXPONENT_BITS):
        step = tl.full((), HALF_WAY, tl.int32) >> bit
        count, weight = _above(row_ptr, vocab_size, end | step, BLOCK)
        is_kept = (count < max_count) & (weight < max_weight)
        is_kept &= _weight(end | step).to(tl.float64) >= min_weight
        count_before = tl.where(is_kept, count, count_before)
        weight_before = tl.where(is_kept, weight, weight_before)
        end = tl.where(is_kept, end | step, end)
    last = end + ((tl.full((), HALF_WAY, tl.int32) >> EXPONENT_BITS) * 2 - 1)
    num = _gathered(row_ptr, rest_ptr, vocab_size, end, last, BLOCK // 8)
    count_left, weight_left = count_before, weight_before  # before what was gathered
    for bit in range(EXPONENT_BITS, 31):
        step = tl.full((), HALF_WAY, tl.int32) >> bit
        count, weight = _above(rest_ptr, num, end | step, BLOCK // 4)
        count, weight = count_left + count, weight_left + weight
        is_kept = (count < max_count) & (weight < max_weight)
        is_kept &= _weight(end | step).to(tl.float64) >= min_weight
        count_before = tl.where(is_kept, count, count_before)
        weight_before = tl.where(is_kept, weight, weight_before)
        end = tl.where(is_kept, end | step, end)
        if bit % 2 == 1:
            num = _gathered(rest_ptr, rest_ptr, num, end, end + step - 1, BLOCK // 8)
            count_left, weight_left = count_before, weight_before
    return end


@triton.jit
def _bisection_kernel(
    token_ids_ptr, rest_ptr, scaled_ptr, is_covered_ptr, number_ptr, top_k_ptr, top_p_ptr,
    min_p_ptr, vocab_size, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row, unless its token is known."""
    row = tl.program_id(0)
    if tl.load(is_covered_ptr + row):
        return
    row_ptr = scaled_ptr + row.to(tl.int64) * vocab_size
    top_k = tl.minimum(tl.load(top_k_ptr + row), vocab_size.to(tl.float32)).to(tl.int32)
    whole = _above(row_ptr, vocab_size, LAST_PLACE, BLOCK)[1].to(tl.float64)
    top_weight = tl.load(top_p_ptr + row).to(tl.float64) * whole
    min_weight = tl.load(min_p_ptr + row).to(tl.float64) * WHOLE
    rest_ptr += row.to(tl.int64) * vocab_size
    limit = tl.ceil(top_weight).to(tl.int64)
    end = _last_place(
        row_ptr, rest_ptr, vocab_size, top_k, limit, min_weight, BLOCK
    )  # at which a token would be kept
    last, num_last = -1, 0  # the last place that has a token, and how many are there
    for start in range(0, vocab_size, BLOCK):
        i = start + tl.arange(0, BLOCK)
        place = _place(row_ptr, i, vocab_size)
        place = tl.where((place <= end) & (i < vocab_size), place, -1)
        highest = tl.max(place, 0)
        here = tl.sum((place == highest).to(tl.int32), 0)
        num_last = tl.where(highest > last, here, num_last + tl.where(highest == last, here, 0))
        last = tl.maximum(last, highest)
    count, weight = _above(row_ptr, vocab_size, last, BLOCK)
    each = tl.maximum(_weight(last), 1)
    fitting = tl.ceil((top_weight - weight.to(tl.float64)) / each.to(tl.float64)).to(tl.int64)
    num_kept = tl.minimum(tl.minimum(fitting, num_last), top_k - count)
    kept = weight + num_kept * _weight(last)
    target = (tl.load(number_ptr + row) * kept.to(tl.float64)).to(tl.int64)
    target = tl.minimum(target, kept - 1)
    end = _last_place(row_ptr, rest_ptr, vocab_size, vocab_size + 1, target + 1, 0.0, BLOCK)
    weight = _above(row_ptr, vocab_size, end, BLOCK)[1]
    index = (target - weight) // tl.maximum(_weight(end), 1)
    token, seen = 0, 0
    for start in range(0, vocab_size, BLOCK):
        i = start + tl.arange(0, BLOCK)
        is_here = (_place(row_ptr, i, vocab_size) == end) & (i < vocab_size)
        nth = seen + tl.cumsum(is_here.to(tl.int32), 0) - 1
        token += tl.sum(tl.where(is_here & (nth == index), i, 0), 0)
        seen += tl.sum(is_here.to(tl.int32), 0)
    tl.store(token_ids_ptr + row, token)

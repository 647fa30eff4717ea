"""Every op in plain torch: the definition, the oracle of the fast backends, and the fall-back.

All ops here are differentiable. Accumulation is float32, or float64 for float64 inputs.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_runtime.kernels.types import (
    NO_EXTENT,
    AdapterMemory,
    AttentionMeta,
    Extent,
    HeadNorm,
    StepMeta,
)


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def apply_adapters(
    base: Tensor,
    x: Tensor,
    bias: Tensor | None,
    memory: AdapterMemory,
    extents: Tensor,
    meta: StepMeta,
) -> Tensor:
    """See `lora_runtime.kernels.apply_adapters`. One pass over the segments (adapters)."""
    dtype = _accumulator(base.dtype)
    product = base.to(dtype)
    y = product if bias is None else product + bias.to(dtype)
    for tokens, weights, extent in _segments(extents, meta):
        for delta in _deltas(product[tokens], x[tokens].to(dtype), bias, memory, extent):
            y = y.index_add(0, tokens, weights.to(dtype) * delta)
    return y.to(base.dtype)


def embed_adapters(
    base: Tensor,
    token_ids: Tensor,
    scale: float,
    memory: AdapterMemory,
    extents: Tensor,
    meta: StepMeta,
    vocab_size: int,
) -> Tensor:
    """See `lora_runtime.kernels.embed_adapters`."""
    dtype = _accumulator(base.dtype)
    embedded = base.to(dtype)
    y = embedded
    for tokens, weights, extent in _segments(extents, meta):
        ids, weights = token_ids[tokens], weights.to(dtype)
        if extent.rank > 0:
            a = _matrix(memory.weights, extent.a, extent.rank, vocab_size).to(dtype)
            b = _matrix(memory.weights, extent.b, extent.rank, base.shape[1]).to(dtype)
            y = y.index_add(0, tokens, weights * scale * (a[:, ids].T @ b))
        if extent.gain >= 0:
            gain = memory.vectors[extent.gain : extent.gain + base.shape[1]].to(dtype)
            y = y.index_add(0, tokens, weights * (gain - 1) * embedded[tokens])
        if extent.num_rows > 0:
            place, is_patched = _find_rows(memory, extent, ids)
            rows = _matrix(memory.weights, extent.rows, extent.num_rows, base.shape[1])
            patched = tokens[is_patched]
            shift = scale * rows[place[is_patched]].to(dtype) - embedded[patched]
            y = y.index_add(0, patched, weights[is_patched] * shift)
    return y.to(base.dtype)


def patch_logits(
    y: Tensor, base: Tensor, x: Tensor, memory: AdapterMemory, extents: Tensor, meta: StepMeta
) -> Tensor:
    """See `lora_runtime.kernels.patch_logits`."""
    dtype = _accumulator(base.dtype)
    for tokens, weights, extent in _segments(extents, meta):
        if extent.num_rows > 0:
            rows = _matrix(memory.weights, extent.rows, extent.num_rows, x.shape[1]).to(dtype)
            ids = _row_ids(memory, extent, y.device)
            product = base[tokens][:, ids].to(dtype)
            shift = weights.to(dtype) * (x[tokens].to(dtype) @ rows.T - product)
            changed = y[tokens].to(dtype).index_add(1, ids, shift)
            y = y.index_copy(0, tokens, changed.to(y.dtype))
    return y


def _segments(extents: Tensor, meta: StepMeta) -> Iterator[tuple[Tensor, Tensor, Extent]]:
    """Each adapter's tokens (n,), their weights (n, 1), and its run."""
    for begin, end in pairwise(meta.segment_starts.tolist()):
        extent = Extent(*extents[int(meta.slots[begin]), int(meta.replicas[begin])].tolist())
        if extent != NO_EXTENT:
            yield meta.tokens[begin:end].long(), meta.weights[begin:end, None], extent


def _deltas(
    product: Tensor, x: Tensor, bias: Tensor | None, memory: AdapterMemory, extent: Extent
) -> Iterator[Tensor]:
    """What one adapter adds to W x + bias for its tokens: low-rank, gain and bias parts."""
    dtype, out_features = product.dtype, product.shape[1]
    if extent.rank > 0:
        a = _matrix(memory.weights, extent.a, extent.rank, x.shape[1]).to(dtype)
        b = _matrix(memory.weights, extent.b, extent.rank, out_features).to(dtype)
        yield (x @ a.T) @ b
    if extent.gain >= 0:
        gain = memory.vectors[extent.gain : extent.gain + out_features].to(dtype)
        yield (gain - 1) * product
    if extent.bias >= 0:
        shift = memory.vectors[extent.bias : extent.bias + out_features].to(dtype)
        shift = shift if bias is None else shift - bias.to(dtype)
        yield shift.expand(len(x), -1)


def _matrix(weights: Tensor, offset: int, num_rows: int, width: int) -> Tensor:
    return weights[offset : offset + num_rows * width].view(num_rows, width)


def _row_ids(memory: AdapterMemory, extent: Extent, device: torch.device) -> Tensor:
    if extent.row_ids < 0:
        return torch.arange(extent.num_rows, device=device)
    return memory.indices[extent.row_ids : extent.row_ids + extent.num_rows].long()


def _find_rows(memory: AdapterMemory, extent: Extent, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Place (n,) of each vocabulary id among the replaced rows, and whether it is there."""
    replaced = _row_ids(memory, extent, ids.device)
    place = torch.searchsorted(replaced, ids.long()).clamp(max=extent.num_rows - 1)
    return place, replaced[place] == ids


def write_kv(keys: Tensor, values: Tensor, k: Tensor, v: Tensor, cache_slots: Tensor) -> None:
    """See `lora_runtime.kernels.write_kv`."""
    is_stored = cache_slots >= 0
    keys[cache_slots[is_stored]] = k[is_stored]
    values[cache_slots[is_stored]] = v[is_stored]


def paged_attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    meta: AttentionMeta,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None = None,
) -> Tensor:
    """See `lora_runtime.kernels.paged_attention`. Pads every row's keys to the longest."""
    dtype = _accumulator(q.dtype)
    num_heads, num_kv_heads = q.shape[1], keys.shape[1]
    row_keys, row_values = (_gather(cache, meta).to(dtype) for cache in (keys, values))
    query, place = _by_row(q.to(dtype), meta)
    grouped = query.unflatten(2, (num_kv_heads, num_heads // num_kv_heads))
    scores = torch.einsum("nqghd,nlgd->nghql", grouped, row_keys) * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    is_visible = _visible(place, meta, row_keys.shape[1], window)[:, None, None]
    weights = softmax_beside(scores.masked_fill(~is_visible, float("-inf")), sinks)
    weights = weights.masked_fill(~is_visible, 0.0)
    is_used = is_visible.any(dim=3)[:, 0, 0, :, None, None]
    out = torch.einsum("nghql,nlgd->nqghd", weights, row_values.masked_fill(~is_used, 0.0))
    return out.flatten(2, 3)[meta.rows.long(), place].to(q.dtype)


def softmax_beside(scores: Tensor, sinks: Tensor | None) -> Tensor:
    """softmax of scores (N, G, H / G, Q, L) over L; with sinks (H,) beside a score more of each
    head, which has no weight in the result.
    """
    if sinks is None:
        return torch.softmax(scores, dim=-1)
    own = sinks.to(scores.dtype).view(scores.shape[1], scores.shape[2], 1, 1)
    beside = torch.cat([scores, own.expand(*scores.shape[:-1], 1)], dim=-1)
    return torch.softmax(beside, dim=-1)[..., :-1]


def _gather(cache: Tensor, meta: AttentionMeta) -> Tensor:
    """(N, M · block_size, G, D): each row's cache slots in order of position."""
    offsets = torch.arange(meta.block_size, device=cache.device)
    slots = meta.block_tables.long()[:, :, None] * meta.block_size + offsets
    return cache[slots.flatten(1)]


def _by_row(q: Tensor, meta: AttentionMeta) -> tuple[Tensor, Tensor]:
    """(N, Q, H, D) padded queries, and each token's place (T,) among its row's queries."""
    rows = meta.rows.long()
    counts = torch.bincount(rows, minlength=meta.block_tables.shape[0])
    starts = counts.cumsum(0) - counts
    place = torch.arange(len(rows), device=q.device) - starts[rows]
    padded = q.new_zeros(len(counts), int(counts.max()), *q.shape[1:])
    padded[rows, place] = q
    return padded, place


def _visible(place: Tensor, meta: AttentionMeta, length: int, window: int | None) -> Tensor:
    """(N, Q, length) bool: the cache positions each padded query may see; none for padding."""
    positions = meta.positions.new_full((meta.block_tables.shape[0], int(place.max()) + 1), -1)
    positions[meta.rows.long(), place] = meta.positions
    distance = positions[:, :, None] - torch.arange(length, device=place.device)
    return (distance >= 0) if window is None else (distance >= 0) & (distance < window)


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, plus_one: bool) -> Tensor:
    """See `lora_runtime.kernels.rms_norm`."""
    dtype = _accumulator(x.dtype)
    normed = x.to(dtype)
    normed = normed * torch.rsqrt(normed.pow(2).mean(-1, keepdim=True) + eps)
    if plus_one:
        return (normed * (1 + weight.to(dtype))).to(x.dtype)
    return weight * normed.to(x.dtype)


def add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    *,
    plus_one: bool,
    branch_weight: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """See `lora_runtime.kernels.add_rms_norm`."""
    if branch_weight is not None:
        x = rms_norm(x, branch_weight, eps, plus_one=plus_one)
    total = residual + x
    return total, rms_norm(total, weight, eps, plus_one=plus_one)


def rotate(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, norm: HeadNorm | None
) -> tuple[Tensor, Tensor]:
    """See `lora_runtime.kernels.rotate`."""
    if norm is not None:
        q = rms_norm(q, norm.q_weight, norm.eps, plus_one=norm.plus_one)
        k = rms_norm(k, norm.k_weight, norm.eps, plus_one=norm.plus_one)
    return _rotated(q, cos, sin), _rotated(k, cos, sin)


def rotate_and_write(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor,
    cache_slots: Tensor,
    norm: HeadNorm | None,
) -> Tensor:
    """See `lora_runtime.kernels.rotate_and_write`."""
    q, k = rotate(q, k, cos, sin, norm)
    write_kv(keys, values, k, v, cache_slots)
    return q


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    dtype, size = _accumulator(x.dtype), cos.shape[1]
    turned = x[..., :size].to(dtype)
    first, second = turned.chunk(2, -1)
    cos, sin = (part.to(dtype)[:, None] for part in (cos, sin))
    turned = turned * cos + torch.cat([-second, first], -1) * sin
    return torch.cat([turned.to(x.dtype), x[..., size:]], -1)


def gated_activation(gate: Tensor, up: Tensor, kind: str) -> Tensor:
    """See `lora_runtime.kernels.gated_activation`."""
    dtype = _accumulator(gate.dtype)
    activation = F.silu if kind == "silu" else partial(F.gelu, approximate="tanh")
    return (activation(gate.to(dtype)) * up.to(dtype)).to(gate.dtype)


def sort_pairs(chosen: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `lora_runtime.kernels.sort_pairs`."""
    experts, order = torch.sort(chosen.flatten(), stable=True)
    places = torch.empty_like(order)
    places[order] = torch.arange(len(order), device=order.device)
    edges = torch.arange(num_experts + 1, device=order.device)
    starts = torch.searchsorted(experts, edges).int()
    return order // chosen.shape[1], experts, places.view_as(chosen), starts


def sum_pairs(y: Tensor, places: Tensor, weights: Tensor) -> Tensor:
    """See `lora_runtime.kernels.sum_pairs`."""
    dtype = _accumulator(y.dtype)
    return (y[places].to(dtype) * weights.to(dtype)[..., None]).sum(1).to(y.dtype)


def recurrent_step(
    states: Tensor,
    slots: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keep: Tensor,
    beta: Tensor | None,
    copies: Tensor | None = None,
) -> Tensor:
    """See `lora_runtime.kernels.recurrent_step`."""
    share = v.shape[1] // q.shape[1]
    q, k = (part.repeat_interleave(share, dim=1)[:, :, None] for part in (q, k))
    v = v[:, :, None]
    state = states.index_select(0, slots.clamp(min=0)) * keep[..., None, None]
    if beta is not None:
        v = (v - k @ state) * beta[..., None, None]
    state = state + k.transpose(2, 3) * v
    _store(states, slots, state)
    if copies is not None:
        copy_states(states, slots, copies)
    return torch.where(slots[:, None, None] < 0, 0, (q @ state)[:, :, 0])


def conv_step(
    histories: Tensor,
    slots: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    is_silu: bool,
    copies: Tensor | None,
) -> Tensor:
    """See `lora_runtime.kernels.conv_step`."""
    wide = histories.dtype
    weight = weight.to(wide)
    before = histories.index_select(0, slots.clamp(min=0))
    inputs = torch.cat([before, x.to(wide)[:, None]], dim=1)
    y = inputs[:, 0] * weight[:, 0]
    for tap in range(1, weight.shape[1]):
        y = y + inputs[:, tap] * weight[:, tap]
    if bias is not None:
        y = y + bias.to(wide)
    if is_silu:
        y = F.silu(y)
    _store(histories, slots, inputs[:, 1:])
    if copies is not None:
        copy_states(histories, slots, copies)
    return torch.where(slots[:, None] < 0, 0, y).to(x.dtype)


def _store(states: Tensor, slots: Tensor, new: Tensor) -> None:
    is_row = slots >= 0
    states[slots[is_row]] = new[is_row]


def copy_states(states: Tensor, slots: Tensor, copies: Tensor) -> None:
    """Write the states in `slots` to `copies`, where these are not negative."""
    is_copied = (slots >= 0) & (copies >= 0)
    states[copies[is_copied]] = states[slots[is_copied]]


def most_likely(logits: Tensor) -> Tensor:
    """See `lora_runtime.kernels.most_likely`."""
    low, high = torch.aminmax(logits, dim=1)
    is_finite = (low > float("-inf")) & (high < float("inf"))
    return torch.stack([logits.argmax(dim=1), is_finite.long()], dim=1)


def draw_cut(scaled: Tensor, number: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """See `lora_runtime.kernels.draw_cut`."""
    ordered, order = torch.sort(scaled, dim=1, descending=True, stable=True)
    kept = cut(torch.softmax(ordered, dim=1), top_k, top_p, min_p)
    return order.gather(1, invert(kept, number))


def cut(ordered: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """Probabilities (n, c), the largest first, with 0 for those that are not kept."""
    before = ordered.cumsum(dim=1) - ordered
    rank = torch.arange(ordered.shape[1], device=ordered.device)
    is_likely = ordered >= min_p * ordered[:, :1]
    is_kept = (rank < top_k) & (before < top_p) & is_likely
    return torch.where(is_kept, ordered, 0.0)


def invert(kept: Tensor, number: Tensor) -> Tensor:
    """See `lora_runtime.kernels.invert`."""
    cumulative = kept.double().cumsum(dim=1)
    total = cumulative[:, -1:]
    below = torch.nextafter(total, torch.zeros_like(total))
    place = torch.searchsorted(cumulative, torch.minimum(number * total, below), right=True)
    return place.clamp(max=kept.shape[1] - 1)  # a NaN row passes nowhere

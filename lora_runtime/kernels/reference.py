"""Every op in plain torch: the definition, the oracle of the fast backends, and the fall-back.

All ops here are differentiable. Accumulation is float32, or float64 for float64 inputs.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

from lora_runtime.kernels.types import AttentionMeta, RankPool, StepMeta


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def apply_adapters(
    base: Tensor, x: Tensor, bias: Tensor | None, pool: RankPool, runs: Tensor, meta: StepMeta
) -> Tensor:
    """See `lora_runtime.kernels.apply_adapters`. One pass over the segments (adapters)."""
    dtype = _accumulator(base.dtype)
    product = base.to(dtype)
    y = product if bias is None else product + bias.to(dtype)
    for begin, end in pairwise(meta.segment_starts.tolist()):
        tokens = meta.tokens[begin:end].long()
        run = runs[int(meta.slots[begin]), int(meta.replicas[begin])].tolist()
        for delta in _deltas(product, x, bias, pool, run, tokens):
            y = y.index_add(0, tokens, meta.weights[begin:end, None].to(dtype) * delta)
    return y.to(base.dtype)


def _deltas(
    product: Tensor, x: Tensor, bias: Tensor | None, pool: RankPool, run: list[int], tokens: Tensor
) -> Iterator[Tensor]:
    """What one adapter adds to W x + bias for its tokens: low-rank, gain and bias parts."""
    start, rank, gain_row, bias_row = run
    dtype = product.dtype
    if rank > 0:
        shrunk = x[tokens].to(dtype) @ pool.a[start : start + rank].to(dtype).T
        yield shrunk @ pool.b[start : start + rank].to(dtype)
    if gain_row >= 0:
        yield (pool.gains[gain_row].to(dtype) - 1) * product[tokens]
    if bias_row >= 0:
        shift = pool.biases[bias_row].to(dtype)
        shift = shift if bias is None else shift - bias.to(dtype)
        yield shift.expand(len(tokens), -1)


def write_kv(keys: Tensor, values: Tensor, k: Tensor, v: Tensor, slot_mapping: Tensor) -> None:
    """See `lora_runtime.kernels.write_kv`."""
    keys[slot_mapping] = k
    values[slot_mapping] = v


def paged_attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    meta: AttentionMeta,
    scale: float,
    window: int | None,
    softcap: float | None,
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
    weights = torch.softmax(scores.masked_fill(~is_visible, float("-inf")), dim=-1)
    weights = weights.masked_fill(~is_visible, 0.0)
    is_used = is_visible.any(dim=3)[:, 0, 0, :, None, None]
    out = torch.einsum("nghql,nlgd->nqghd", weights, row_values.masked_fill(~is_used, 0.0))
    return out.flatten(2, 3)[meta.rows.long(), place].to(q.dtype)


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

"""Every op in plain torch: the definition, the oracle of the fast backends, and the fall-back.

All ops here are differentiable. Accumulation is float32, or float64 for float64 inputs.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from lora_runtime.kernels.types import RankPool, StepMeta


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
        delta = _delta(product[tokens], x[tokens], bias, pool, run)
        if delta is not None:
            weight = meta.weights[begin:end, None].to(dtype)
            y = y.index_add(0, tokens, weight * delta)
    return y.to(base.dtype)


def _delta(
    product: Tensor, x: Tensor, bias: Tensor | None, pool: RankPool, run: list[int]
) -> Tensor | None:
    """What one adapter adds to Wx + bias for its tokens, or None where it does nothing."""
    start, rank, gain_row, bias_row = run
    dtype = product.dtype
    delta = None
    if rank > 0:
        shrunk = x.to(dtype) @ pool.a[start : start + rank].to(dtype).T
        delta = shrunk @ pool.b[start : start + rank].to(dtype)
    if gain_row >= 0:
        gained = (pool.gains[gain_row].to(dtype) - 1) * product
        delta = gained if delta is None else delta + gained
    if bias_row >= 0:
        shift = pool.biases[bias_row].to(dtype).expand_as(product)
        shift = shift if bias is None else shift - bias.to(dtype)
        delta = shift if delta is None else delta + shift
    return delta

"""The gain of DoRA, without making ΔW or W.

Source: arXiv:2402.09353; the factored norm is arXiv:2603.22276's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lora_runtime.adapters.config.layer_sites import ExpertRows
from lora_runtime.adapters.variants.mutated_base import Factors
from lora_runtime.base.weights import BaseWeights


def dora_gain(
    weights: BaseWeights,
    path: str,
    delta: Factors,
    magnitude: Tensor,
    expert: ExpertRows | None = None,
) -> Tensor:
    """g = m / ‖W + ΔW‖ per output row, (out,) float32; W is the serving weight, ΔW = b a.

    `expert`: of a mixture, whose rows these are.
    """
    if expert is None:
        product, squared = weights.times_transposed(path, delta.a), weights.squared_norms(path)
    else:
        own = weights.expert(path, expert.expert)[list(expert.rows)]
        product, squared = own @ delta.a.T, own.square().sum(1, dtype=torch.float64)
    norms = row_norms(squared, product, delta)
    return (magnitude.double() / norms).float()


def row_norms(squared_norms: Tensor, product: Tensor, delta: Factors) -> Tensor:
    """‖w_i + b_i a‖ per output row, (out,) float64, from ‖w_i‖² (out,) and W aᵀ (out, r).

    ‖w_i + b_i a‖² = ‖w_i‖² + 2 Σ_k b_ik (W aᵀ)_ik + b_i (a aᵀ) b_iᵀ
    """
    a, b = delta
    cross = 2 * product + b @ (a @ a.T)
    squared = squared_norms + (b * cross).sum(1, dtype=torch.float64)
    return squared.clamp_min(0).sqrt()

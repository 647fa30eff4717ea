"""The auxiliary loss of a mixture of experts, which asks for tokens spread evenly over experts.

Source: Switch Transformers, arXiv:2101.03961 §2.2; transformers 5.23, `load_balancing_loss_func`.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_runtime.base.model.adapted_linear import Routed


def balance_loss(routed: Iterable[Routed], slot: int) -> Tensor:
    """E · Σ_e Σ_k f_ke · P_e over all tokens and mixtures of the unit in `slot`, differentiable.

    f_ke is the share of tokens whose k-th choice is expert e, P_e the mean of the routers'
    softmax: it is K where all experts are alike.
    """
    parts = [
        (choice.logits[span.rows], choice.chosen[span.rows])
        for choice in routed
        for span in choice.where
        if span.slot == slot
    ]
    logits = torch.cat([own for own, _ in parts])
    chosen = torch.cat([own for _, own in parts])
    probabilities = torch.softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), 1)
    num_experts = logits.shape[1]
    shares = F.one_hot(chosen, num_experts).to(probabilities.dtype).mean(0)
    return num_experts * (shares * probabilities.mean(0)).sum()

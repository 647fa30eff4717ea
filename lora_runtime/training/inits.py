"""Where an adapter's training starts. Each init is a function of shape, rank and a generator.

Source: LoRA, arXiv:2106.09685; bounds as in PEFT (`kaiming_uniform_` with a = √5).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lora_runtime.core import LinearShape


def kaiming_uniform(
    shape: LinearShape, rank: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """A (rank, in) ~ U(±1/√in) and B (out, rank) = 0, float32: the adapter starts as no change."""
    a = torch.empty(rank, shape.in_features)
    torch.nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=generator)
    return a, torch.zeros(shape.out_features, rank)

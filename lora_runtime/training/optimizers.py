"""The optimizer of one unit: which parameters learn how fast and which decay."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from lora_runtime.training.config import UnitConfig
from lora_runtime.training.variants import TrainedModule


def create_optimizer(
    config: UnitConfig, modules: Mapping[str, TrainedModule]
) -> torch.optim.Optimizer:
    """AdamW over A, over B at `loraplus_ratio` times its rate, and over magnitudes, undecayed.

    The first group's rate is `learning_rate`. Source: AdamW arXiv:1711.05101, LoRA+
    arXiv:2402.12354.
    """
    settings: dict[str, dict[str, Any]] = {
        "a": {"lr": config.learning_rate},
        "b": {"lr": config.learning_rate * config.loraplus_ratio},
        "magnitude": {"lr": config.learning_rate, "weight_decay": 0.0},
    }
    groups = [
        {"params": [m.parameters[part] for m in modules.values() if part in m.parameters], **values}
        for part, values in settings.items()
    ]
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, weight_decay=config.weight_decay, fused=True)


def decay_starts(optimizer: torch.optim.Optimizer, modules: Mapping[str, TrainedModule]) -> None:
    """After a step: weight decay acts on A and B, of which first factors are a fixed part."""
    group_a, group_b = optimizer.param_groups[:2]
    if not group_a["weight_decay"]:
        return
    for module in modules.values():
        if module.start is not None:
            a, b = module.start
            module.a.data.sub_(group_a["lr"] * group_a["weight_decay"] * a)
            module.b.data.sub_(group_b["lr"] * group_b["weight_decay"] * b)

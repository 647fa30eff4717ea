"""The optimizer of one unit: which parameters learn how fast and which decay."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from bitsandbytes.optim.adamw import AdamW8bit, PagedAdamW, PagedAdamW8bit
from bitsandbytes.optim.optimizer import Optimizer8bit
from torch import Tensor
from torch.nn import Parameter

from lora_runtime.errors import ConfigError
from lora_runtime.training.config import OptimizerName, UnitConfig
from lora_runtime.training.trained_modules import Trained, TrainedModule

_KINDS: dict[OptimizerName, Callable[..., torch.optim.Optimizer]] = {
    "adamw": partial(torch.optim.AdamW, fused=True),
    "adamw-8bit": AdamW8bit,
    "adamw-paged": PagedAdamW,
    "adamw-paged-8bit": PagedAdamW8bit,
}
_MAPS = ("qmap1", "qmap2")
"""Constants of bitsandbytes, the same for all parameters."""


def create_optimizer(config: UnitConfig, modules: Mapping[str, Trained]) -> torch.optim.Optimizer:
    """AdamW over A, over B at `loraplus_ratio` times its rate, over whole rows of the vocabulary,
    which decay as any weight does, and over magnitudes and biases, undecayed.

    The first group's rate is `learning_rate`. Raises ConfigError for an optimizer that the modules'
    device does not have. Source: AdamW arXiv:1711.05101, LoRA+ arXiv:2402.12354, 8-bit blockwise
    states arXiv:2110.02861, paged ones arXiv:2305.14314.
    """
    settings: dict[str, dict[str, Any]] = {
        "a": {"lr": config.learning_rate},
        "b": {"lr": config.learning_rate * config.loraplus_ratio},
        "magnitude": {"lr": config.learning_rate, "weight_decay": 0.0},
        "rows": {"lr": config.learning_rate},
        "bias": {"lr": config.learning_rate, "weight_decay": 0.0},
    }
    groups = [
        {"params": [m.parameters[part] for m in modules.values() if part in m.parameters], **values}
        for part, values in settings.items()
    ]
    groups = [group for group in groups if group["params"]]
    check_optimizer(config, groups[0]["params"][0].device)
    return _KINDS[config.optimizer](groups, weight_decay=config.weight_decay)


def check_optimizer(config: UnitConfig, device: torch.device) -> None:
    """Raise ConfigError for an optimizer that the base's device does not have."""
    if "paged" in config.optimizer and device.type != "cuda":
        raise ConfigError(
            f"unit {config.name!r}: optimizer is {config.optimizer!r}, whose pages are CUDA's, and "
            f"the base is on {device.type}; use {config.optimizer.replace('-paged', '')!r}",
            field="optimizer",
        )


def saved_state(optimizer: torch.optim.Optimizer, parameter: Parameter) -> dict[str, Tensor]:
    """A parameter's optimizer state, for `restore_state`; empty before the first step."""
    state = optimizer.state.get(parameter, {})
    return {key: torch.as_tensor(value) for key, value in state.items() if key not in _MAPS}


def restore_state(
    optimizer: torch.optim.Optimizer, parameter: Parameter, saved: Mapping[str, Tensor]
) -> None:
    """Give a parameter the optimizer state that `saved_state` returned."""
    if not isinstance(optimizer, Optimizer8bit):
        optimizer.state[parameter] = {k: v.to(parameter.device) for k, v in saved.items()}
        return
    # bitsandbytes makes the buffers, which may be paged; they depend on no setting of the group
    optimizer.init_state(optimizer.param_groups[0], parameter, 0, 0)
    state = optimizer.state[parameter]
    state["step"] = int(saved["step"])
    for key in saved.keys() - {"step"}:
        state[key].copy_(saved[key])


def decay_starts(optimizer: torch.optim.Optimizer, modules: Mapping[str, Trained]) -> None:
    """Let weight decay act on the fixed first factors too, after a step.

    Parameters are the differences dA = A − A₀. AdamW decays dA; A as a whole shall decay, and A₀ is
    its fixed part, so that lr · weight_decay · A₀ is subtracted from dA; likewise for B.
    """
    group_a, group_b = optimizer.param_groups[:2]
    if not group_a["weight_decay"]:
        return
    found = [m for m in modules.values() if isinstance(m, TrainedModule) and m.start is not None]
    if not found:
        return
    for group, part in ((group_a, "a"), (group_b, "b")):
        starts = [getattr(module.start, part) for module in found]
        decayed = torch._foreach_mul(starts, group["lr"] * group["weight_decay"])
        torch._foreach_sub_([getattr(module, part).data for module in found], decayed)

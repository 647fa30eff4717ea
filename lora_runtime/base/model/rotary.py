"""Rotary frequencies fixed once, so that no row's rotation depends on the rows beside it.

transformers recomputes the frequencies of `longrope` and `dynamic` from the longest row of the
batch at every forward. Here they are fixed from the longest length the base allows.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from lora_runtime.base.model.requirement import refused_version, require_attributes

BATCH_GLOBAL_TYPES = ("longrope", "dynamic")


def fix_rotary(model: nn.Module, max_model_len: int) -> None:
    """Give every batch-global rotary module of `model` constant frequencies, in place."""
    module: Any
    for module in model.modules():
        rope_type = getattr(module, "rope_type", None)
        if isinstance(rope_type, str) and rope_type in BATCH_GLOBAL_TYPES:
            _fix(module, rope_type, max_model_len)
            module.rope_type = "default"
        elif isinstance(rope_type, dict):
            for layer_type, kind in rope_type.items():
                if kind in BATCH_GLOBAL_TYPES:
                    _fix(module, kind, max_model_len, layer_type)
                    rope_type[layer_type] = "default"


def _fix(module: Any, kind: str, max_model_len: int, layer_type: str | None = None) -> None:
    prefix = "" if layer_type is None else f"{layer_type}_"
    kwargs = {} if layer_type is None else {"layer_type": layer_type}
    if kind not in ROPE_INIT_FUNCTIONS:
        raise refused_version("ROPE_INIT_FUNCTIONS", [kind], "makes a base's rotary frequencies")
    names = ("config", f"{prefix}inv_freq", f"{prefix}attention_scaling")
    require_attributes(module, names, "fixed rotary frequencies need")
    current = getattr(module, f"{prefix}inv_freq")
    inv_freq, scaling = ROPE_INIT_FUNCTIONS[kind](
        module.config, current.device, seq_len=max_model_len, **kwargs
    )
    for name in ("inv_freq", "original_inv_freq"):
        setattr(module, f"{prefix}{name}", inv_freq.clone())
    setattr(module, f"{prefix}attention_scaling", scaling)

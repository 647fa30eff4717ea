"""Which device and which compute dtype a setting means on this machine."""

from __future__ import annotations

import torch

from lora_runtime.errors import ConfigError

NATIVE_BFLOAT16 = (8, 0)
"""The first compute capability whose tensor cores multiply bfloat16; older cards emulate it."""


def resolve_device(name: str) -> torch.device:
    """The torch device of a setting. Raises ConfigError when the machine lacks it."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            f"device {name!r} cannot be used here: {error}", field="device"
        ) from error
    return device


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """The compute dtype of a setting; `auto` is bfloat16 where it is native."""
    if name != "auto":
        return torch.bfloat16 if name == "bfloat16" else torch.float32
    return torch.bfloat16 if _is_bfloat16_native(device) else torch.float32


def _is_bfloat16_native(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= NATIVE_BFLOAT16
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()

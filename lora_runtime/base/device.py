"""Which device and which compute dtype a setting means on this machine."""

from __future__ import annotations

import os

import torch

from lora_runtime.config import CPU_DEFAULTS, DeviceDefaults, cuda_defaults
from lora_runtime.errors import ConfigError

NATIVE_BFLOAT16 = (8, 0)
"""The first compute capability whose tensor cores multiply bfloat16; older cards emulate it."""


def resolve_device(name: str) -> torch.device:
    """The torch device of a setting. Raises ConfigError (`device`) when the machine lacks it."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type != "cuda":
        return device
    if not torch.cuda.is_available():
        raise ConfigError(
            f"device is {name!r}, and torch finds no CUDA device here (`loramux doctor` says why); "
            "use cpu or auto, or mend that",
            field="device",
        )
    count = torch.cuda.device_count()
    if (device.index or 0) >= count:
        raise ConfigError(
            f"device is {name!r}, and the GPUs that this process sees are cuda:0 to "
            f"cuda:{count - 1}; use one of them (CUDA_VISIBLE_DEVICES renumbers them from 0)",
            field="device",
        )
    return device


def device_defaults(name: str) -> DeviceDefaults:
    """Defaults of settings for the device of a setting. Raises ConfigError as `resolve_device`."""
    device = resolve_device(name)
    if device.type != "cuda":
        return CPU_DEFAULTS
    return cuda_defaults(memory_bytes(device))


def memory_bytes(device: torch.device) -> int:
    """Bytes of memory that a device has in all; for the CPU those of the machine."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def check_memory(device: torch.device, num_bytes: int, field: str) -> None:
    """Raise ConfigError naming the setting `field` where it asks for more memory than there is.

    A CPU would be given it, and the process would end when it is written to.
    """
    if num_bytes > (total := memory_bytes(device)):
        raise ConfigError(
            f"{field} takes {num_bytes} bytes of memory, and {device} has {total} in all; lower it",
            field=field,
        )


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """The compute dtype of a setting; `auto` is bfloat16 where it is native."""
    if name != "auto":
        return torch.bfloat16 if name == "bfloat16" else torch.float32
    return torch.bfloat16 if _is_bfloat16_native(device) else torch.float32


def dtype_name(dtype: torch.dtype) -> str:
    """Its name in settings, records and answers: `bfloat16`."""
    return str(dtype).removeprefix("torch.")


def _is_bfloat16_native(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= NATIVE_BFLOAT16
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()

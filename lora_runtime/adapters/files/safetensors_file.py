"""An adapter's safetensors file, read once from its first byte to its last, into its tensors.

`safetensors.torch.load` wants the whole file in memory and copies its tensors out of it. Here each
tensor is filled from the file and hashed and looked at while it is in the processor's cache, so
that a load takes less from the streams that run beside it, and half of the memory.
Source: https://huggingface.co/docs/safetensors (format).
"""

from __future__ import annotations

import hashlib
from typing import NamedTuple

import torch
from torch import Tensor

from lora_runtime.adapters.files.open_folder import PlainFile
from lora_runtime.adapters.files.safetensors_header import parse_header
from lora_runtime.base.model.finite import is_finite
from lora_runtime.errors import AdapterRefused


class TensorsFile(NamedTuple):
    """Finite tensors by name, and what else the file holds."""

    tensors: dict[str, Tensor]
    metadata: dict[str, str]
    """`__metadata__`."""
    sha256: str
    """Of the whole file, in hexadecimal."""


def read_tensors(file: PlainFile) -> TensorsFile:
    """Read a file to its end. Raises AdapterRefused where it is malformed or a number not finite;
    `field` is the tensor, or the file where no tensor is to blame.
    """
    header = parse_header(file.read, file.num_bytes, file.name)
    content_hash = hashlib.sha256(header.content)
    tensors = {}
    for entry in header.entries:
        tensor = torch.empty(entry.shape, dtype=entry.dtype)
        room = tensor.view(-1).view(torch.uint8).numpy().data
        file.fill(room)
        content_hash.update(room)
        # PEFT copies float64 into float32 parameters.
        tensors[entry.name] = tensor.float() if tensor.dtype == torch.float64 else tensor
        if not is_finite(tensors[entry.name]):
            raise AdapterRefused(
                f"tensor {entry.name} holds NaN, infinity or more than float32 can hold",
                field=entry.name,
            )
    return TensorsFile(tensors, header.metadata, content_hash.hexdigest())

"""Whether the numbers of tensors are finite."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lora_runtime.errors import BaseRefused


def is_finite(tensor: Tensor) -> bool:
    """True when all values are finite: the least or the largest is not, if one is NaN or infinite.
    An eighth of the time of a mask, which a load beside running streams takes from them.
    """
    return tensor.numel() == 0 or all(map(math.isfinite, torch.aminmax(tensor)))


def require_finite(name: str, weight: Tensor) -> Tensor:
    """`weight` of a base. Raises BaseRefused where a number of it is not finite: of experts and
    vocabulary a few tokens show little, and some quantisers make another number of a NaN.
    """
    if is_finite(weight):
        return weight
    raise BaseRefused(
        f"{name} holds numbers that are not finite, or that overflow {weight.dtype}: download the "
        "checkpoint again, or choose another dtype"
    )

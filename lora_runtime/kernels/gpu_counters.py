"""Counters by which the programs of a launch find out which of them is the last."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

MAX_COUNTERS = 1 << 16


@cache
def counters(device: torch.device) -> Tensor:
    """(MAX_COUNTERS,) int32, 0 between launches. All launches of a device share them: they run on
    one stream, or one stream waits for the other. The first must not be part of a capture.
    """
    return torch.zeros(MAX_COUNTERS, dtype=torch.int32, device=device)

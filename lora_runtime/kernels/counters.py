"""Counters by which the programs of a launch find out which of them is the last."""

from __future__ import annotations

from functools import cache
from threading import get_ident

import torch
from torch import Tensor

MIN_COUNTERS = 1 << 16


def counters(device: torch.device, count: int = MIN_COUNTERS) -> Tensor:
    """At least `count` int32, 0 between launches.

    All launches of a thread on a device share them: they run on one stream, or one stream waits
    for the other. Another thread, which may run beside them, has its own. The first of a thread
    must not be part of a capture.
    """
    return _counters(device, max(MIN_COUNTERS, 1 << (count - 1).bit_length()), get_ident())


@cache
def _counters(device: torch.device, size: int, thread: int) -> Tensor:
    return torch.zeros(size, dtype=torch.int32, device=device)

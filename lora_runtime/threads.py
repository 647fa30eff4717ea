"""How many threads the ops on a CPU run in.

torch reads it from the environment, once, when it is imported; so it is chosen before. Where
OMP_NUM_THREADS is set, that holds.
"""

from __future__ import annotations

import math
import os
from collections.abc import MutableMapping
from pathlib import Path

CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")
TOPOLOGY = Path("/sys/devices/system/cpu")


def choose(environ: MutableMapping[str, str] = os.environ) -> None:
    """Unless it is set: a thread for every core that this process may use."""
    environ.setdefault("OMP_NUM_THREADS", str(num_usable_cores()))


def num_usable_cores() -> int:
    """Cores that this process may run on, threads of one core counted once, within the quota of its
    container.
    """
    processors = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    if processors is None:
        return os.cpu_count() or 1
    num_cores = len({_siblings(processor) for processor in processors})
    return max(1, math.ceil(min(num_cores, _quota())))


def _siblings(processor: int) -> str:
    """The processors of one core, as the system names them."""
    try:
        return (TOPOLOGY / f"cpu{processor}/topology/thread_siblings_list").read_text()
    except OSError:
        return str(processor)


def _quota() -> float:
    """Processors that the container may keep busy."""
    try:
        quota, period = CPU_QUOTA.read_text().split()
        return math.inf if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError):
        return math.inf

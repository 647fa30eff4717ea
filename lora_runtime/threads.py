"""How many threads the ops on a CPU run in, and how these wait for each other.

OpenMP reads both from the environment, once, when it is loaded; so they are chosen before torch is
imported. Where OMP_NUM_THREADS, OMP_WAIT_POLICY or GOMP_SPINCOUNT is set, that holds.
"""

from __future__ import annotations

import math
import os
from collections.abc import MutableMapping
from pathlib import Path

SPINS = 1000
"""Rounds that a thread looks for its next piece of work before it sleeps, some 40 µs: the ops of a
step lie closer together, two steps do not. OpenMP's own choice is 300 times as many, in which it
keeps the core from the event loop and from clients: see bench/NOTES.md."""
CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")
TOPOLOGY = Path("/sys/devices/system/cpu")


def choose(environ: MutableMapping[str, str] = os.environ) -> None:
    """Set what is not set: a thread a core that this process may use, and short waits."""
    environ.setdefault("OMP_NUM_THREADS", str(num_usable_cores()))
    if "OMP_WAIT_POLICY" not in environ:
        environ.setdefault("GOMP_SPINCOUNT", str(SPINS))


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

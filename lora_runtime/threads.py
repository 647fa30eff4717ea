"""How many threads the ops on a CPU run in.

torch reads it from the environment, once, when it is imported; so it is chosen before, and where
torch is there first it is told. Where OMP_NUM_THREADS is set, that holds.
"""

from __future__ import annotations

import math
import os
import sys
import threading
import warnings
from collections.abc import Iterator, MutableMapping
from contextlib import suppress
from pathlib import Path

OWN_GROUPS = Path("/proc/self/cgroup")
GROUPS = Path("/sys/fs/cgroup")
TOPOLOGY = Path("/sys/devices/system/cpu")
NICENESS = 5
"""Of a thread that gives way, above its process's: bench/NOTES.md has what 0 and 10 do."""


def choose(environ: MutableMapping[str, str] = os.environ) -> None:
    """Unless it is set: a thread for every core that this process may use, and no more where torch
    has been imported and computes in as many as it or its user chose.
    """
    wanted = environ.get("OMP_NUM_THREADS", "")
    # OpenMP takes a list too, of numbers for threads within threads; torch has one level.
    if (first := wanted.split(",")[0].strip()).isdecimal() and int(first) > 0:
        return
    number = num_usable_cores()
    if wanted.strip():
        warnings.warn(
            f"OMP_NUM_THREADS={wanted!r} is no number of threads: {number} are used, one for every "
            "core that this process may use",
            stacklevel=3,
        )
    environ["OMP_NUM_THREADS"] = str(number)
    torch = sys.modules.get("torch")
    # Not without need: MKL computes in the number that torch is told, whatever a tape's play asks
    # for, and steps of 32 rows take a seventh longer.
    if torch and number < torch.get_num_threads():
        torch.set_num_threads(number)


def num_usable_cores() -> int:
    """Cores that this process may run on, threads of one core counted once, within the quota of its
    container.
    """
    processors = usable_processors()
    if processors is None:
        return os.cpu_count() or 1
    num_cores = len({_siblings(processor) for processor in processors})
    return max(1, math.ceil(min(num_cores, quota())))


def give_way() -> None:
    """Let the system prefer threads that compute to this one where there are too few cores: a share
    of a third of theirs (`NICENESS`). On Linux alone a thread has a niceness of its own; elsewhere,
    and where a sandbox forbids it, nothing changes.
    """
    if sys.platform == "linux":
        own = threading.get_native_id()
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, own, os.getpriority(os.PRIO_PROCESS, own) + NICENESS)


def usable_processors() -> set[int] | None:
    """Those that this process may run on; None where the system does not say."""
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None


def _siblings(processor: int) -> str:
    """The processors of one core, as the system names them."""
    try:
        return (TOPOLOGY / f"cpu{processor}/topology/thread_siblings_list").read_text()
    except OSError:
        return str(processor)


def quota() -> float:
    """Processors that the control groups of this process may keep busy, infinite where none has a
    limit: the least of its own group's and of those above it. A container sees its own as the
    topmost. Source: https://docs.kernel.org/admin-guide/cgroup-v2.html and cgroup-v1.
    """
    return min((_quota_in(folder) for folder in _cpu_groups()), default=math.inf)


def _cpu_groups() -> Iterator[Path]:
    """Folders that may say how much processor time this process has."""
    try:
        groups = [line.split(":", 2) for line in OWN_GROUPS.read_text().splitlines()]
    except OSError:
        groups = []
    for _, controllers, path in groups:
        if controllers == "":  # version 2
            root = GROUPS
        elif "cpu" in controllers.split(","):
            root = GROUPS / "cpu"
        else:
            continue
        own = root / path.lstrip("/")
        yield own
        yield from (folder for folder in own.parents if folder.is_relative_to(root))


def _quota_in(group: Path) -> float:
    """Processors that a group may keep busy, as version 2 or version 1 writes it."""
    for files in (("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us")):
        try:
            quota, period = " ".join((group / file).read_text() for file in files).split()
            return math.inf if quota in ("max", "-1") else int(quota) / int(period)
        except (OSError, ValueError):
            continue
    return math.inf

"""What a machine may lack for a moment: no fault of the file or folder that was asked for."""

from __future__ import annotations

import errno
import resource

from lora_runtime.errors import Overloaded

SHORTAGES = {
    errno.EMFILE: "open files (ulimit -n)",
    errno.ENFILE: "open files",
    errno.ENOMEM: "memory",
}
BEYOND_US = {errno.ENOSPC, errno.EDQUOT, errno.EIO}
"""What a disk may lack, or break down with."""
MAX_OPEN_FILES = 65536


def shortage(error: BaseException) -> Overloaded | None:
    """Return what is raised in place of an error that will not come again once there is room, so
    that nothing is refused for good; None for any other error.
    """
    lacking = SHORTAGES.get(error.errno or 0) if isinstance(error, OSError) else None
    return None if lacking is None else Overloaded(f"the server has no more {lacking}")


def is_shortage(error: BaseException) -> bool:
    """True for an error of this machine, which says nothing of the files that were read: memory,
    open files, disk. On a CPU torch has no type of its own for memory.
    """
    if isinstance(error, OSError):
        return error.errno in BEYOND_US or shortage(error) is not None
    is_torchs = isinstance(error, RuntimeError) and "allocate memory" in str(error)
    return isinstance(error, MemoryError) or is_torchs or "OutOfMemory" in type(error).__name__


def allow_open_files() -> None:
    """Let the process open as many files as it may, up to MAX_OPEN_FILES. Every connection is one,
    and 1,024, which most systems begin with, are few.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = MAX_OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, MAX_OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))

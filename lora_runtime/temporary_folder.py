"""Temporary folders that are removed even when the process that made them is killed.

A process holds a lock on its folder as long as it uses it. The kernel lets go of the lock when the
process ends, however it ends: an unlocked folder is nobody's. Unlike a process's number, the lock
also tells so between containers that share a disk.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def temporary_folder(parent: Path, prefix: str = "") -> Iterator[Path]:
    """Make a folder in `parent`, which exists, and remove it when the context ends.

    Raises OSError.
    """
    folder, lock = _locked_folder(parent, prefix)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def remove_abandoned(parent: Path, prefix: str = "") -> None:
    """Remove the folders in `parent` of that prefix that no living process uses."""
    with suppress(OSError):  # no such folder, or none of ours
        for entry in os.scandir(parent):
            if entry.name.startswith(prefix):
                _remove_unlocked(Path(entry.path))


def _remove_unlocked(folder: Path) -> None:
    try:
        lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:  # gone by now, no folder, or another user's
        return
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder, ignore_errors=True)
    except OSError:  # in use
        pass
    finally:
        os.close(lock)


def _locked_folder(parent: Path, prefix: str) -> tuple[Path, int]:
    """A new folder and the descriptor that locks it. Another process may find and remove it
    before it is locked; then the next one is made."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
        with suppress(FileNotFoundError):
            lock = _opened(folder)
            fcntl.flock(lock, fcntl.LOCK_EX)
            if folder.exists():
                return folder, lock
            os.close(lock)


def _opened(folder: Path) -> int:
    """Open a folder that was just made, or leave none behind: no lock is on it yet."""
    try:
        return os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        with suppress(OSError):
            folder.rmdir()
        raise

"""An adapter's folder, held open: all of its files come from one state of one directory.

A folder may be renamed away, replaced or written to while it is read. The directory is opened
once, so that a renamed folder is still read whole; and what is written to meanwhile is found by
the inodes, sizes and times of its files, which are taken before the first byte is read and looked
at again after the last. Links are followed to files below the roots and nowhere else.

Free of tensors, so that a client can import it.
"""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from lora_runtime.adapters.files.file_names import INITIAL_FOLDERS, OPTIONAL_FILES, REQUIRED_FILES
from lora_runtime.errors import AdapterRefused, AdapterSourceRefused, LoramuxError
from lora_runtime.shortages import shortage

SETTLE_S = 0.05
"""A folder that changed less than this ago is still being written, and waited for. It is far more
than a file system's clock is coarse, and than a writer pauses between two files."""
PATIENCE_S = 2.0
"""How long a folder that changes all the time is waited for before it is refused."""

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC

Result = TypeVar("Result")
Stamp = tuple[int, ...]


def read_settled(
    folder: Path,
    read: Callable[[OpenFolder], Result],
    *,
    roots: Sequence[Path] = (),
    must_rest: bool = True,
) -> Result:
    """Return what `read` gives on one state of a folder.

    Without `must_rest` a folder is read at once, though its writer may not have finished: for
    content whose digest is known, and for a folder that the caller has just written.
    Raises AdapterSourceRefused for a folder that is missing, outside of the roots or never at
    rest, and whatever `read` raises on a folder at rest.
    """
    deadline = time.monotonic() + PATIENCE_S
    while True:
        with open_folder(folder, roots) as opened:
            if not must_rest or opened.is_at_rest():
                try:
                    result = read(opened)
                except LoramuxError:
                    if opened.is_unchanged():
                        raise
                else:
                    if opened.is_unchanged():
                        return result
        if time.monotonic() > deadline:
            raise AdapterSourceRefused(
                "the adapter's folder changes while it is read; write a new folder and rename it, "
                "or load it when it is complete",
                field="folder",
            )
        time.sleep(SETTLE_S)


@contextmanager
def open_folder(folder: Path, roots: Sequence[Path] = ()) -> Iterator[OpenFolder]:
    """Open a folder that lies below one of `roots`, to which its links are confined too.

    Without roots links may lead to the folder itself, or into its repository of a hub's cache,
    where snapshots/<revision>/ holds links into blobs/. Raises AdapterSourceRefused.
    """
    try:
        real = folder.resolve()
        allowed = tuple(root.resolve() for root in roots) or (_own_root(real),)
        directory = _open_below(allowed, real, _DIRECTORY)
    except (OSError, ValueError, RuntimeError) as error:  # a link loop is a RuntimeError
        raise shortage(error) or AdapterSourceRefused(
            f"adapter folder {folder.name!r} is missing or not a folder", field="folder"
        ) from None
    try:
        yield OpenFolder(directory, real, allowed)
    finally:
        os.close(directory)


class OpenFolder:
    """An open directory. Raises AdapterSourceRefused, naming the file, for what is no plain file
    or leads out of the roots, and AdapterRefused for a file that is too large."""

    def __init__(self, directory: int, real: Path, roots: tuple[Path, ...]) -> None:
        self._directory = directory
        self._real = real
        self._roots = roots
        self._stamps = self._stamped()
        self.names = frozenset(os.listdir(directory))

    def read(self, name: str, max_bytes: int) -> bytes:
        """Read a whole file."""
        with self.open(name) as descriptor:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise AdapterSourceRefused(f"{name} is not a regular file", field=name)
            if status.st_size > max_bytes:
                raise AdapterRefused(
                    f"{name} has {status.st_size} bytes; at most {max_bytes} are accepted",
                    field=name,
                )
            with open(descriptor, "rb", closefd=False) as file:
                content = file.read(status.st_size + 1)
        if len(content) != status.st_size:
            raise AdapterSourceRefused(f"{name} changed while it was read", field=name)
        return content

    @contextmanager
    def open(self, name: str) -> Iterator[int]:
        """Yield a descriptor of a file, following a link inside the roots."""
        try:
            descriptor = self._open(name)
        except FileNotFoundError:
            raise AdapterSourceRefused(f"{name} is missing from the folder", field=name) from None
        except OSError as error:
            raise shortage(error) or AdapterSourceRefused(
                f"{name} is a link or cannot be read: {error.strerror}", field=name
            ) from None
        try:
            yield descriptor
        finally:
            os.close(descriptor)

    @contextmanager
    def inner(self, name: str) -> Iterator[OpenFolder]:
        """Yield a sub-folder; a link is none."""
        try:
            directory = os.open(name, _DIRECTORY | os.O_NOFOLLOW, dir_fd=self._directory)
        except OSError as error:
            raise shortage(error) or AdapterSourceRefused(
                f"{name} is a link or no folder: {error.strerror}", field=name
            ) from None
        try:
            yield OpenFolder(directory, self._real / name, self._roots)
        finally:
            os.close(directory)

    def is_at_rest(self) -> bool:
        """Tell whether the folder has stayed as it is for SETTLE_S, waiting for that if need be."""
        youngest = max(max(stamp[3:]) for stamp in self._stamps.values()) / 1e9
        age = time.time() - youngest
        if abs(age) < SETTLE_S:  # a clock may have been set back
            time.sleep(SETTLE_S - max(age, 0.0))
            return self.is_unchanged()
        return True

    def is_unchanged(self) -> bool:
        """Tell whether every file is still what it was when the folder was opened."""
        return self._stamped() == self._stamps

    def _stamped(self) -> dict[str, Stamp]:
        """Inode, size and times of what may be read; links and what they lead to."""
        own = os.fstat(self._directory)
        stamps: dict[str, Stamp] = {".": (own.st_dev, own.st_ino, 0, own.st_mtime_ns)}
        inner = [f"{folder}/{name}" for folder in INITIAL_FOLDERS for name in REQUIRED_FILES]
        for name in (*REQUIRED_FILES, *OPTIONAL_FILES, *INITIAL_FOLDERS, *inner):
            for follow in (False, True):
                try:
                    found = os.stat(name, dir_fd=self._directory, follow_symlinks=follow)
                except OSError:
                    continue
                times = (found.st_mtime_ns, found.st_ctime_ns)
                place = (found.st_dev, found.st_ino, found.st_size)
                stamps[f"{name}{'/' if follow else ''}"] = (*place, *times)
        return stamps

    def _open(self, name: str) -> int:
        try:
            target = os.readlink(name, dir_fd=self._directory)
        except OSError:  # no link
            return os.open(name, _FILE, dir_fd=self._directory)
        real = Path(os.path.realpath(self._real / target))
        if not any(real.is_relative_to(root) for root in self._roots):
            raise AdapterSourceRefused(
                f"{name} is a link that leads out of the adapter's folder and of the adapter "
                "roots; put the file itself there",
                field=name,
            )
        return _open_below(self._roots, real, _FILE)


def _own_root(real: Path) -> Path:
    snapshots = next((path for path in real.parents if path.name == "snapshots"), None)
    return snapshots.parent if snapshots and (snapshots.parent / "blobs").is_dir() else real


def _open_below(roots: Sequence[Path], real: Path, flags: int) -> int:
    """Open a path without links, one part at a time, so that none can be put in its way."""
    root = next((root for root in roots if real.is_relative_to(root)), None)
    if root is None:
        raise PermissionError
    kind = os.O_NONBLOCK if root == real else os.O_DIRECTORY
    descriptor = os.open(root, os.O_RDONLY | os.O_CLOEXEC | kind)
    *folders, last = real.relative_to(root).parts or (".",)
    try:
        for part in folders:
            inner = os.open(part, _DIRECTORY | os.O_NOFOLLOW, dir_fd=descriptor)
            os.close(descriptor)
            descriptor = inner
        return os.open(last, flags | os.O_NOFOLLOW, dir_fd=descriptor)
    finally:
        os.close(descriptor)


def inner_hint(folder: Path) -> str:
    """Which folder in `folder` is an adapter's: of a training run that is its `adapter`. Links are
    not followed, and what is not there or cannot be read is passed over.
    """
    with suppress(OSError):
        for inner in sorted(folder.iterdir()):
            is_open = not (inner.is_symlink() or inner.name.startswith("."))
            if is_open and all(_is_plain_file(inner / required) for required in REQUIRED_FILES):
                return f"; its folder {inner.name!r} is one: name that"
    return ""


def _is_plain_file(path: Path) -> bool:
    with suppress(OSError):
        return stat.S_ISREG(path.lstat().st_mode)
    return False

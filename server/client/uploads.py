"""What the Python clients send of an adapter: an announcement, then its files in chunks."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeAlias

from lora_runtime.adapters.files.file_names import (
    INITIAL_FOLDERS,
    OPTIONAL_FILES,
    REQUIRED_FILES,
)
from lora_runtime.adapters.files.open_folder import OpenFolder, inner_hint, read_settled
from lora_runtime.errors import AdapterSourceRefused
from loramux.v1 import adapters_pb2

CHUNK_BYTES = 1 << 20

Progress: TypeAlias = Callable[[int, int], None]
"""Told (bytes sent, bytes in all)."""


def no_progress(num_sent: int, num_bytes: int) -> None:
    """Tell nobody."""


class Outgoing:
    """An adapter's files, measured and hashed, ready to be sent once or more."""

    def __init__(self, name: str, folder: Path, replace: bool) -> None:
        """Raises AdapterSourceRefused (field `folder`) for a folder that cannot be sent whole."""
        self._paths = _paths(folder)
        names = [path.name for path in self._paths]
        files = read_settled(
            folder,
            lambda opened: [_announced(opened, name) for name in names],
            roots=(Path("/"),),  # the caller's own files: links may lead anywhere
        )
        self._num_bytes = sum(file.num_bytes for file in files)
        self._start = adapters_pb2.UploadStart(name=name, replace=replace, files=files)

    def parts(
        self, on_progress: Progress = no_progress
    ) -> Iterator[adapters_pb2.UploadAdapterRequest]:
        """Yield the messages of one upload."""
        yield adapters_pb2.UploadAdapterRequest(start=self._start)
        num_sent = 0
        for data in self._chunks():
            yield adapters_pb2.UploadAdapterRequest(chunk={"data": data})
            num_sent += len(data)
            on_progress(num_sent, self._num_bytes)

    def _chunks(self) -> Iterator[bytes]:
        for path in self._paths:
            with path.open("rb") as file:
                while data := file.read(CHUNK_BYTES):
                    yield data


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError as error:  # a folder that may not be looked into
        raise _refused(f"{path} cannot be read: {error.strerror}") from None


def _paths(folder: Path) -> list[Path]:
    for name in REQUIRED_FILES:
        if not _is_file(folder / name):
            hint = inner_hint(folder) or ": it is no adapter in safetensors format"
            raise _refused(f"{folder} has no {name}{hint}")
    for name in INITIAL_FOLDERS:
        if (folder / name).exists():
            raise _refused(
                f"{folder} needs its {name}/, which is not sent: upload what "
                "`loramux adapters convert` makes of it, or load it from the server's own disk"
            )
    paths = [folder / name for name in (*REQUIRED_FILES, *OPTIONAL_FILES)]
    return [path for path in paths if path.is_file()]


def _announced(opened: OpenFolder, name: str) -> adapters_pb2.UploadFile:
    """Size and hash; the server refuses a file that is sent with other content later."""
    with opened.open(name) as descriptor, open(descriptor, "rb", closefd=False) as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        return adapters_pb2.UploadFile(name=name, num_bytes=file.tell(), sha256=sha256)


def _refused(why: str) -> AdapterSourceRefused:
    return AdapterSourceRefused(why, field="folder")

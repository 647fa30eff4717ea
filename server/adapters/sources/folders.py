"""From the location a client wrote to a folder that is safe to read.

Knows nothing of what the files mean. Nothing outside the operator's roots is ever opened, and no
error shows a path that the client did not write itself.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable
from pathlib import Path

from lora_runtime.adapters.files.file_names import OPTIONAL_FILES, PICKLE_SUFFIXES, REQUIRED_FILES
from lora_runtime.adapters.files.open_folder import inner_hint
from lora_runtime.errors import AdapterSourceRefused, LoramuxError
from lora_runtime.shortages import shortage

MAX_SOURCE_LENGTH = 1024


class Sources:
    """The folders adapters may be read from."""

    def __init__(self, roots: Iterable[Path]) -> None:
        """Roots are resolved once; relative sources are looked up in their order."""
        self.roots = tuple(Path(root).resolve() for root in roots)

    def resolve(self, source: str) -> Path:
        """Return the real folder of an adapter, given relative to a root or inside one.

        Blocks on the file system. Raises AdapterSourceRefused (field `source`): empty, too long,
        NUL or `..` in it, missing, outside the roots, not a folder, a file that is missing or
        leads out of the roots, or weights in pickle format only.
        """
        self._check_text(source)
        try:
            folder = self._folder(source)
            for name in REQUIRED_FILES:
                self._check_file(folder, name, source)
            for name in OPTIONAL_FILES:
                if os.path.lexists(folder / name):
                    self._check_file(folder, name, source)
        except (OSError, RuntimeError, ValueError) as error:  # a link loop is a RuntimeError
            raise shortage(error) or refused(source, "cannot be read") from None
        return folder

    def _check_text(self, source: str) -> None:
        if not source:
            raise AdapterSourceRefused("source is empty; name the adapter's folder", field="source")
        if len(source) > MAX_SOURCE_LENGTH:
            raise refused(source, f"is longer than {MAX_SOURCE_LENGTH} characters")
        if "\0" in source:
            raise refused(source, "contains a NUL character")
        if ".." in Path(source).parts:
            raise refused(source, "contains '..'; write the path without it")

    def _folder(self, source: str) -> Path:
        candidates = [(root / source).resolve() for root in self.roots]
        inside = [path for path in candidates if self._is_inside(path)]
        if not inside:
            raise refused(
                source,
                "is outside the adapter roots of this server; move it into one, or upload it",
            )
        existing = next((path for path in inside if path.exists()), None)
        if existing is None:
            hint = "" if Path(source).is_absolute() else "; it counts from a root, not from here"
            raise refused(source, f"does not exist in the adapter roots of this server{hint}")
        if not existing.is_dir():
            raise refused(source, "is not a folder")
        return existing

    def _check_file(self, folder: Path, name: str, source: str) -> None:
        path = (folder / name).resolve()
        if not self._is_inside(path):
            raise refused(source, f"has a {name} that leads out of the adapter roots")
        if not path.exists():
            raise refused(source, f"has no {name}{_pickle_hint(folder)}{inner_hint(folder)}")
        if not stat.S_ISREG(path.stat().st_mode):
            raise refused(source, f"has a {name} that is not a plain file")

    def _is_inside(self, path: Path) -> bool:
        return any(path.is_relative_to(root) for root in self.roots)


def refused(source: str, why: str) -> AdapterSourceRefused:
    """An error about a source that shows no more of it than the client wrote."""
    return AdapterSourceRefused(f"source {source[:200]!r} {why}", field="source")


def without_path(error: LoramuxError, folder: Path, source: str) -> LoramuxError:
    """Return the error with the folder's real path replaced by what the client wrote."""
    if str(folder) not in error.message:
        return error
    return type(error)(error.message.replace(str(folder), source), field=error.field)


def _pickle_hint(folder: Path) -> str:
    pickles = sorted(path.name for path in folder.iterdir() if path.name.endswith(PICKLE_SUFFIXES))
    if not pickles:
        return ""
    return f"; {pickles[0]} is a pickle file, which can run code: convert it to safetensors"

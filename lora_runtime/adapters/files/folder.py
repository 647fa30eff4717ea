"""An adapter's two files, read without trust and written whole.

The only door to safetensors for adapters. Knows bytes, JSON and tensors; knows neither PEFT's
fields nor the base. Nothing is unpickled and no module named by a file is imported.
Source: https://huggingface.co/docs/safetensors (format).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import safetensors.torch
from torch import Tensor

from lora_runtime.adapters.files.file_names import (
    CONFIG_FILE,
    INITIAL_FOLDERS,
    MAX_CONFIG_BYTES,
    MAX_PARITY_BYTES,
    MAX_TENSORS_BYTES,
    PARITY_FILE,
    PICKLE_SUFFIXES,
    TENSORS_FILE,
    content_digest,
)
from lora_runtime.adapters.files.open_folder import OpenFolder, open_folder, read_settled
from lora_runtime.adapters.files.safetensors_file import TensorsFile, read_tensors
from lora_runtime.adapters.files.safetensors_header import LENGTH_BYTES
from lora_runtime.core import ANY_FOLDER, FolderRules
from lora_runtime.errors import AdapterRefused
from lora_runtime.strict_json import parse_object
from lora_runtime.text.text_files import TEXT_FILES


@dataclass(frozen=True, slots=True)
class AdapterFiles:
    """What an adapter's two files hold, checked in form: finite tensors of known dtype and size."""

    config: dict[str, object]
    tensors: dict[str, Tensor]
    metadata: dict[str, str]
    """`__metadata__` of the safetensors file."""
    tensors_sha256: str
    """SHA-256 of the whole safetensors file, in hex."""


@dataclass(frozen=True, slots=True)
class FolderContent:
    """Everything of an adapter's folder that matters here, as it was at one moment."""

    adapter: AdapterFiles
    initial: Mapping[str, AdapterFiles]
    """Sub-folder → the adapter before training, where the config says that its init changed the
    base."""
    parity_record: bytes | None
    """The parity record."""
    text: Mapping[str, bytes]
    """Files of TEXT_FILES that are there."""


def read_folder(
    folder: Path, rules: FolderRules = ANY_FOLDER, *, max_bytes: int = MAX_TENSORS_BYTES
) -> FolderContent:
    """Read an adapter's folder, each file exactly once and all of one state of the folder.

    Raises: AdapterSourceRefused where a file is missing, not a plain file, a link out of the roots,
    or changed while others were read; AdapterRefused where its content is not what it must be, or
    not what `rules.sha256` says. `field` names the file or tensor. Messages hold no paths.
    """
    found = read_settled(
        folder,
        lambda opened: _read_files(opened, max_bytes),
        roots=rules.roots,
        must_rest=not rules.sha256,
    )
    if rules.sha256:
        _check_digest(found.hashes, rules.sha256)
    texts = found.texts
    initial = {
        name: _adapter_files(found, f"{name}/")
        for name in INITIAL_FOLDERS
        if f"{name}/{CONFIG_FILE}" in texts
    }
    return FolderContent(
        adapter=_adapter_files(found, ""),
        initial=initial,
        parity_record=texts.get(PARITY_FILE),
        text={name: texts[name] for name in TEXT_FILES if name in texts},
    )


def read_adapter(folder: Path, *, max_bytes: int = MAX_TENSORS_BYTES) -> AdapterFiles:
    """Read only the two files of a folder that nobody else writes to; see `read_folder`."""
    found = read_settled(folder, lambda opened: _read_two(opened, "", max_bytes), must_rest=False)
    return _adapter_files(found, "")


class _Found(NamedTuple):
    """Files by their names in the folder."""

    texts: dict[str, bytes]
    tensors: dict[str, TensorsFile]

    @property
    def hashes(self) -> dict[str, str]:
        """SHA-256 of each file, in hexadecimal."""
        texts = {name: hashlib.sha256(content).hexdigest() for name, content in self.texts.items()}
        return texts | {name: file.sha256 for name, file in self.tensors.items()}


def _read_files(opened: OpenFolder, max_bytes: int) -> _Found:
    found = _read_two(opened, "", max_bytes)
    start = _initial_folder(found.texts[CONFIG_FILE])
    if start in opened.names:
        with opened.inner(start) as inner:
            initial = _read_two(inner, f"{start}/", max_bytes)
        found.texts.update(initial.texts)
        found.tensors.update(initial.tensors)
    for name, limit in {PARITY_FILE: MAX_PARITY_BYTES, **TEXT_FILES}.items():
        if name in opened.names:
            found.texts[name] = opened.read(name, limit)
    return found


def _read_two(opened: OpenFolder, prefix: str, max_bytes: int) -> _Found:
    _refuse_pickle(opened.names)
    config = opened.read(CONFIG_FILE, MAX_CONFIG_BYTES)
    with opened.file(TENSORS_FILE, max_bytes) as file:
        tensors = read_tensors(file)
    return _Found({f"{prefix}{CONFIG_FILE}": config}, {f"{prefix}{TENSORS_FILE}": tensors})


def _initial_folder(config: bytes) -> str:
    """The sub-folder that the config's init would have; "" for one that left the base alone."""
    value = parse_object(config, CONFIG_FILE).get("init_lora_weights")
    name = f"{value.partition('_')[0]}_init" if isinstance(value, str) else ""
    return name if name in INITIAL_FOLDERS else ""


def _check_digest(hashes: Mapping[str, str], expected: str) -> None:
    digest = content_digest(hashes)
    if digest != expected:
        raise AdapterRefused(
            f"its files are not those that were stored: their digest is {digest[:12]!r} and was "
            f"{expected[:12]!r}; upload the adapter again",
            field="source",
        )


def _adapter_files(found: _Found, prefix: str) -> AdapterFiles:
    """Two of the files, of the folder itself or of a sub-folder in it."""
    file = found.tensors[f"{prefix}{TENSORS_FILE}"]
    return AdapterFiles(
        config=parse_object(found.texts[f"{prefix}{CONFIG_FILE}"], CONFIG_FILE),
        tensors=file.tensors,
        metadata=file.metadata,
        tensors_sha256=file.sha256,
    )


def write_adapter(
    folder: Path,
    config: Mapping[str, object],
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
) -> None:
    """Write an adapter that `read_adapter` and PEFT load; equal content gives equal bytes.

    Each file appears whole or not at all. A folder that already holds an adapter is without a
    config for the moment between the two, so that old and new are never read together.
    """
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    data = safetensors.torch.save(plain, {**metadata, "format": "pt"})
    text = json.dumps(dict(config), indent=2, allow_nan=False)
    folder.mkdir(parents=True, exist_ok=True)
    with (
        _replacing(folder / TENSORS_FILE, _with_sorted_metadata(data)),
        _replacing(folder / CONFIG_FILE, text.encode()),
    ):
        (folder / CONFIG_FILE).unlink(missing_ok=True)


def read_optional(folder: Path, name: str, max_bytes: int) -> bytes | None:
    """Read another file of an adapter's folder as strictly as the two; None when there is none."""
    with open_folder(folder) as opened:
        return opened.read(name, max_bytes) if name in opened.names else None


def write_file(folder: Path, name: str, content: bytes) -> None:
    """Write another file of an adapter's folder, whole or not at all."""
    with _replacing(folder / name, content):
        pass


@contextmanager
def _replacing(path: Path, content: bytes) -> Iterator[None]:
    """Write beside `path`; move into place when the block ends well."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        yield
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _with_sorted_metadata(data: bytes) -> bytes:
    """Sort `__metadata__`: safetensors writes it in the random order of a hash map."""
    end = LENGTH_BYTES + int.from_bytes(data[:LENGTH_BYTES], "little")
    header = json.loads(data[LENGTH_BYTES:end])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % LENGTH_BYTES)
    return len(text).to_bytes(LENGTH_BYTES, "little") + text + data[end:]


def _refuse_pickle(names: frozenset[str]) -> None:
    pickles = sorted(name for name in names if name.endswith(PICKLE_SUFFIXES))
    if TENSORS_FILE not in names and pickles:
        raise AdapterRefused(
            f"{pickles[0]} is a pickle file, which can run code and is never loaded; convert the "
            f"adapter to {TENSORS_FILE} (PEFT's save_pretrained does)",
            field=pickles[0],
        )

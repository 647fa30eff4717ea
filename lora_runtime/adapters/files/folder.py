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

import safetensors
import safetensors.torch
import torch
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
from lora_runtime.adapters.files.safetensors_header import LENGTH_BYTES, check_safetensors
from lora_runtime.base.model.finite import is_finite
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
    hashes = _hashes(found)
    if rules.sha256:
        _check_digest(hashes, rules.sha256)
    adapter = _adapter_files(found, "", hashes)
    initial = {
        name: _adapter_files(found, f"{name}/", hashes)
        for name in INITIAL_FOLDERS
        if f"{name}/{CONFIG_FILE}" in found
    }
    return FolderContent(
        adapter=adapter, initial=initial, parity_record=found.pop(PARITY_FILE, None), text=found
    )


def read_adapter(folder: Path, *, max_bytes: int = MAX_TENSORS_BYTES) -> AdapterFiles:
    """Read only the two files of a folder that nobody else writes to; see `read_folder`."""
    found = read_settled(folder, lambda opened: _read_two(opened, "", max_bytes), must_rest=False)
    return _adapter_files(found, "", _hashes(found))


def _read_files(opened: OpenFolder, max_bytes: int) -> dict[str, bytes]:
    found = _read_two(opened, "", max_bytes)
    start = _initial_folder(found[CONFIG_FILE])
    if start in opened.names:
        with opened.inner(start) as inner:
            found |= _read_two(inner, f"{start}/", max_bytes)
    for name, limit in {PARITY_FILE: MAX_PARITY_BYTES, **TEXT_FILES}.items():
        if name in opened.names:
            found[name] = opened.read(name, limit)
    return found


def _read_two(opened: OpenFolder, prefix: str, max_bytes: int) -> dict[str, bytes]:
    _refuse_pickle(opened.names)
    return {
        f"{prefix}{CONFIG_FILE}": opened.read(CONFIG_FILE, MAX_CONFIG_BYTES),
        f"{prefix}{TENSORS_FILE}": opened.read(TENSORS_FILE, max_bytes),
    }


def _initial_folder(config: bytes) -> str:
    """The sub-folder that the config's init would have; "" for one that left the base alone."""
    value = parse_object(config, CONFIG_FILE).get("init_lora_weights")
    name = f"{value.partition('_')[0]}_init" if isinstance(value, str) else ""
    return name if name in INITIAL_FOLDERS else ""


def _hashes(found: Mapping[str, bytes]) -> dict[str, str]:
    """SHA-256 of each file, in hexadecimal: of large ones a fifth of the time of a load."""
    return {name: hashlib.sha256(content).hexdigest() for name, content in found.items()}


def _check_digest(hashes: Mapping[str, str], expected: str) -> None:
    digest = content_digest(hashes)
    if digest != expected:
        raise AdapterRefused(
            f"its files are not those that were stored: their digest is {digest[:12]!r} and was "
            f"{expected[:12]!r}; upload the adapter again",
            field="source",
        )


def _adapter_files(found: dict[str, bytes], prefix: str, hashes: Mapping[str, str]) -> AdapterFiles:
    """Take the two files out of `found`, so that their bytes are freed when they are parsed."""
    config, data = found.pop(f"{prefix}{CONFIG_FILE}"), found.pop(f"{prefix}{TENSORS_FILE}")
    tensors, metadata = _load_tensors(data)
    return AdapterFiles(
        config=parse_object(config, CONFIG_FILE),
        tensors=tensors,
        metadata=metadata,
        tensors_sha256=hashes[f"{prefix}{TENSORS_FILE}"],
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


def _load_tensors(data: bytes) -> tuple[dict[str, Tensor], dict[str, str]]:
    metadata = check_safetensors(data, TENSORS_FILE)
    try:
        tensors = safetensors.torch.load(data)
    except safetensors.SafetensorError as error:
        raise AdapterRefused(f"{TENSORS_FILE} is refused: {error}", field=TENSORS_FILE) from None
    for name, tensor in tensors.items():
        if tensor.dtype == torch.float64:  # PEFT copies it into float32 parameters
            tensors[name] = tensor.float()
        if not is_finite(tensors[name]):
            raise AdapterRefused(
                f"tensor {name} holds NaN, infinity or more than float32 can hold", field=name
            )
    return tensors, metadata

"""An adapter's two files, read without trust and written whole.

The only door to safetensors for adapters. Knows bytes, JSON and tensors; knows neither PEFT's
fields nor the base. Nothing is unpickled and no module named by a file is imported.
Source: https://huggingface.co/docs/safetensors (format).
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from lora_runtime.adapters.files.safetensors_header import LENGTH_BYTES, check_safetensors
from lora_runtime.adapters.files.strict_json import parse_object
from lora_runtime.errors import AdapterRefused, AdapterSourceRefused

CONFIG_FILE = "adapter_config.json"
TENSORS_FILE = "adapter_model.safetensors"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")

MAX_CONFIG_BYTES = 1 << 20
MAX_TENSORS_BYTES = 2 << 30


@dataclass(frozen=True, slots=True)
class AdapterFiles:
    """What an adapter folder holds, checked in form: finite tensors of known dtype and size."""

    config: dict[str, object]
    tensors: dict[str, Tensor]
    metadata: dict[str, str]
    """`__metadata__` of the safetensors file."""
    tensors_sha256: str
    """SHA-256 of the whole safetensors file, in hex."""


def read_adapter(folder: Path, *, max_bytes: int = MAX_TENSORS_BYTES) -> AdapterFiles:
    """Read a folder's adapter_config.json and adapter_model.safetensors, each exactly once.

    Raises: AdapterSourceRefused where a file is missing or not a plain file, AdapterRefused where
    its content is not what it must be; `field` names the file or tensor. Messages hold no paths.
    """
    with _open_folder(folder) as directory:
        return _read_adapter(directory, max_bytes)


def read_initial_adapter(
    folder: Path, name: str, *, max_bytes: int = MAX_TENSORS_BYTES
) -> AdapterFiles | None:
    """Read the sub-folder with the adapter's state before training; None if there is none."""
    with _open_folder(folder) as directory:
        if name not in os.listdir(directory):
            return None
        try:
            flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
            inner = os.open(name, flags, dir_fd=directory)
        except OSError as error:
            raise AdapterSourceRefused(
                f"{name} is a link or no folder: {error.strerror}", field=name
            ) from None
    try:
        return _read_adapter(inner, max_bytes)
    finally:
        os.close(inner)


def _read_adapter(directory: int, max_bytes: int) -> AdapterFiles:
    _refuse_pickle(directory)
    config = _read_file(directory, CONFIG_FILE, MAX_CONFIG_BYTES)
    data = _read_file(directory, TENSORS_FILE, max_bytes)
    tensors, metadata = _load_tensors(data)
    return AdapterFiles(
        config=parse_object(config, CONFIG_FILE),
        tensors=tensors,
        metadata=metadata,
        tensors_sha256=hashlib.sha256(data).hexdigest(),
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
    with _open_folder(folder) as directory:
        return _read_file(directory, name, max_bytes) if name in os.listdir(directory) else None


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


@contextmanager
def _open_folder(folder: Path) -> Iterator[int]:
    try:
        directory = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except (OSError, ValueError):
        raise AdapterSourceRefused(
            f"adapter folder {folder.name!r} is missing or not a folder", field="folder"
        ) from None
    try:
        yield directory
    finally:
        os.close(directory)


def _refuse_pickle(directory: int) -> None:
    names = os.listdir(directory)
    pickles = sorted(name for name in names if name.endswith(PICKLE_SUFFIXES))
    if TENSORS_FILE not in names and pickles:
        raise AdapterRefused(
            f"{pickles[0]} is a pickle file, which can run code and is never loaded; convert the "
            f"adapter to {TENSORS_FILE} (PEFT's save_pretrained does)",
            field=pickles[0],
        )


def _read_file(directory: int, name: str, max_bytes: int) -> bytes:
    try:
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        descriptor = os.open(name, flags, dir_fd=directory)
        try:
            return _read_regular(descriptor, name, max_bytes)
        finally:
            os.close(descriptor)
    except FileNotFoundError:
        raise AdapterSourceRefused(f"{name} is missing from the folder", field=name) from None
    except OSError as error:
        raise AdapterSourceRefused(
            f"{name} is a link or cannot be read: {error.strerror}", field=name
        ) from None


def _read_regular(descriptor: int, name: str, max_bytes: int) -> bytes:
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        raise AdapterSourceRefused(f"{name} is not a regular file", field=name)
    if status.st_size > max_bytes:
        raise AdapterRefused(
            f"{name} has {status.st_size} bytes; at most {max_bytes} are accepted", field=name
        )
    with open(descriptor, "rb", closefd=False) as file:
        content = file.read(status.st_size + 1)
    if len(content) != status.st_size:
        raise AdapterSourceRefused(f"{name} changed while it was read", field=name)
    return content


def _load_tensors(data: bytes) -> tuple[dict[str, Tensor], dict[str, str]]:
    metadata = check_safetensors(data, TENSORS_FILE)
    try:
        tensors = safetensors.torch.load(data)
    except safetensors.SafetensorError as error:
        raise AdapterRefused(f"{TENSORS_FILE} is refused: {error}", field=TENSORS_FILE) from None
    for name, tensor in tensors.items():
        if tensor.dtype == torch.float64:  # PEFT copies it into float32 parameters
            tensors[name] = tensor.float()
        if not torch.isfinite(tensors[name]).all():
            raise AdapterRefused(
                f"tensor {name} holds NaN, infinity or more than float32 can hold", field=name
            )
    return tensors, metadata

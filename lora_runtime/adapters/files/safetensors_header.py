"""Checks a safetensors file's bytes before any tensor is made of them.

Stricter than the format: small headers, 1-D and 2-D tensors of four dtypes, no gaps, nothing
missing and nothing left over. Source: https://huggingface.co/docs/safetensors (format).
"""

from __future__ import annotations

import math
from typing import NamedTuple

from lora_runtime.errors import AdapterRefused
from lora_runtime.strict_json import parse_object

LENGTH_BYTES = 8
"""The file starts with its header's length: 8 bytes, little-endian."""
MAX_HEADER_BYTES = 4 << 20
MAX_TENSORS = 16384
MAX_NAME_LENGTH = 512
MAX_DIMENSION = 1 << 24
ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}


class _Entry(NamedTuple):
    name: str
    begin: int
    end: int


def check_safetensors(data: bytes, source: str) -> dict[str, str]:
    """Return the `__metadata__` of a well-formed file.

    Raises: AdapterRefused; `field` is the tensor, or `source` where no tensor is to blame.
    """
    header = _header(data, source)
    metadata = _metadata(header.pop("__metadata__", {}), source)
    if not 0 < len(header) <= MAX_TENSORS:
        raise AdapterRefused(
            f"{source} holds {len(header)} tensors; it must hold 1 to {MAX_TENSORS}", field=source
        )
    entries = [_entry(name, description) for name, description in header.items()]
    data_start = LENGTH_BYTES + int.from_bytes(data[:LENGTH_BYTES], "little")
    _check_layout(entries, len(data) - data_start, source)
    return metadata


def _header(data: bytes, source: str) -> dict[str, object]:
    length = int.from_bytes(data[:LENGTH_BYTES], "little")
    if len(data) < LENGTH_BYTES or length > MAX_HEADER_BYTES:
        raise AdapterRefused(
            f"{source} is not a safetensors file: no header of at most {MAX_HEADER_BYTES} bytes",
            field=source,
        )
    available = len(data) - LENGTH_BYTES
    if available < length:
        raise AdapterRefused(
            f"{source} is truncated: {length - available} bytes of its header are missing",
            field=source,
        )
    return parse_object(data[LENGTH_BYTES : LENGTH_BYTES + length], source)


def _metadata(value: object, source: str) -> dict[str, str]:
    if isinstance(value, dict) and all(isinstance(text, str) for text in value.values()):
        return value
    raise AdapterRefused(f"__metadata__ of {source} must hold strings only", field="__metadata__")


def _entry(name: str, description: object) -> _Entry:
    """Check one tensor's dtype, shape and extent in isolation."""
    if len(name) > MAX_NAME_LENGTH:
        raise _malformed(name, f"its name has {len(name)} characters")
    if not isinstance(description, dict) or set(description) != {"dtype", "shape", "data_offsets"}:
        raise _malformed(name, "its header entry is not dtype, shape and data_offsets")
    dtype, shape, offsets = (description[key] for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise _malformed(
            name, f"its dtype is {str(dtype)[:20]!r}, not one of {', '.join(ITEM_BYTES)}"
        )
    if not _are_integers(shape, 1, MAX_DIMENSION) or len(shape) > 2:
        if name.startswith("base_model.") and _are_integers(shape, 1, MAX_DIMENSION):
            raise _of_no_linear_layer(name, shape)
        raise _malformed(name, f"its shape is {str(shape)[:40]}, not one or two positive sizes")
    if not _are_integers(offsets, 0, None) or len(offsets) != 2:
        raise _malformed(name, "its data_offsets are not two positions")
    begin, end = offsets
    if end - begin != math.prod(shape) * ITEM_BYTES[dtype]:
        raise _malformed(name, f"{end - begin} bytes cannot hold {dtype} of shape {shape}")
    return _Entry(name, begin, end)


def _of_no_linear_layer(name: str, shape: list[int]) -> AdapterRefused:
    """PEFT writes tensors of three sizes and more for two entries of a config, neither served."""
    named = f"tensor {name[:120]!r} has the shape {str(shape)[:40]}"
    if ".lora_" in name:
        return AdapterRefused(
            f"{named}: it adapts a convolution, and target_modules may name linear layers, the "
            "embedding and the output layer; leave the convolution out",
            field="target_modules",
        )
    return AdapterRefused(
        f"{named}: a whole weight of experts or of a convolution, as modules_to_save saves it, "
        "which may name the embedding and the output layer alone; adapt experts by "
        "target_parameters instead",
        field="modules_to_save",
    )


def _are_integers(values: object, low: int, high: int | None) -> bool:
    return (
        isinstance(values, list)
        and len(values) > 0
        and all(type(v) is int and low <= v and (high is None or v <= high) for v in values)
    )


def _check_layout(entries: list[_Entry], available: int, source: str) -> None:
    """The tensors must fill the data exactly, without a gap or an overlap."""
    position = 0
    for entry in sorted(entries, key=lambda entry: entry.begin):
        if entry.begin != position:
            raise _malformed(entry.name, f"it starts at byte {entry.begin} instead of {position}")
        position = entry.end
        if position > available:
            raise AdapterRefused(
                f"{source} is truncated: tensor {entry.name} ends at byte {entry.end} of the "
                f"data, which has {available}",
                field=entry.name,
            )
    if position != available:
        raise AdapterRefused(
            f"{source} has {available - position} bytes after its last tensor", field=source
        )


def _malformed(name: str, reason: str) -> AdapterRefused:
    return AdapterRefused(f"tensor {name[:120]!r} is malformed: {reason}", field=name[:120])

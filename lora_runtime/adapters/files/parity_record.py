"""The parity record on disk, `loramux_parity.json`: written by the trainer, read without trust.

It is not part of an adapter's digest and PEFT ignores it: an adapter without one loads unchecked.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from lora_runtime.adapters.files.file_names import MAX_PARITY_BYTES, PARITY_FILE
from lora_runtime.adapters.files.folder import read_optional, write_file
from lora_runtime.adapters.parity import (
    NUM_POSITIONS,
    NUM_TOP,
    PUBLIC_TEXTS,
    ROW_LENGTH,
    ParityRecord,
    Position,
)
from lora_runtime.core import BaseSpec
from lora_runtime.errors import AdapterRefused, BaseMismatch
from lora_runtime.strict_json import parse_object

KEYS = {
    1: {"dtype"},
    2: {"noise", "tensors_sha256"},
    3: {"noise", "tensors_sha256", "base_dtype"},
}
"""Version → what such a record has beside what all have."""
DTYPES = ("float64", "float32", "bfloat16")
MAX_ROWS = len(PUBLIC_TEXTS)
MAX_NOISE = 2.0
"""In logits: ten times what bfloat16 moved them by on any base so far. A record of more noise would
let anything pass."""
MAX_POSITIONS = MAX_ROWS * NUM_POSITIONS
"""With ROW_LENGTH and NUM_TOP what the trainer writes, or wrote in version 1, so that no record
asks for more work than ours does."""


def write_parity_record(folder: Path, record: ParityRecord) -> None:
    """Write the parity record of an adapter, whole or not at all."""
    version = 1 if record.noise is None else 2 if record.base_dtype is None else 3
    content = {"version": version, **asdict(record)}
    for name in set.union(*KEYS.values()) - KEYS[version]:
        del content[name]
    write_file(folder, PARITY_FILE, json.dumps(content, allow_nan=False).encode())


def remove_parity_record(folder: Path) -> None:
    """Remove the parity record, if there is one: before other weights are written beside it."""
    (folder / PARITY_FILE).unlink(missing_ok=True)


def read_parity_record(folder: Path, base: BaseSpec) -> ParityRecord | None:
    """Read the parity record of an adapter for `base`; None when there is none.

    Raises: AdapterRefused where the file is not what it must be, AdapterSourceRefused where it is
    not a plain file, BaseMismatch where it was recorded on another base.
    """
    content = read_optional(folder, PARITY_FILE, MAX_PARITY_BYTES)
    return None if content is None else parse_parity_record(content, base)


def parse_parity_record(content: bytes, base: BaseSpec) -> ParityRecord:
    """Parse a record's bytes. Raises AdapterRefused and BaseMismatch as `read_parity_record`."""
    try:
        record = _parse(parse_object(content, PARITY_FILE), base)
    except ValueError as error:
        raise AdapterRefused(
            f"{PARITY_FILE} is not a parity record of this base: {error}; remove it to load the "
            "adapter without the check",
            field=PARITY_FILE,
        ) from None
    if record.base_fingerprint != base.fingerprint:
        raise BaseMismatch(
            f"{PARITY_FILE} was recorded on the base with fingerprint "
            f"{record.base_fingerprint[:12]!r}; this one, {base.name} as {base.quantization}, has "
            f"{base.fingerprint[:12]!r}: another checkpoint or another quantization; serve what "
            "the adapter was trained on",
            field=PARITY_FILE,
        )
    return record


def _parse(content: Mapping[str, Any], base: BaseSpec) -> ParityRecord:
    """Raises ValueError that says what is wrong."""
    version = content.get("version")
    if type(version) is not int or version not in KEYS:
        raise ValueError(f"version {version!r}; known are {', '.join(map(str, KEYS))}")
    _check_keys(content, {"version", "base_fingerprint", "rows", "positions"} | KEYS[version])
    longest = min(ROW_LENGTH, base.max_model_len)
    rows = [_ids(row, longest, base.vocab_size) for row in _items(content["rows"], MAX_ROWS)]
    places = _items(content["positions"], MAX_POSITIONS)
    positions = tuple(_parse_position(place, rows, base.vocab_size) for place in places)
    if {place.row for place in positions} != set(range(len(rows))):
        raise ValueError("a row in it has no recorded position")
    record = ParityRecord(
        base_fingerprint=str(content["base_fingerprint"]), rows=tuple(rows), positions=positions
    )
    if version == 1:
        return replace(record, dtype=_dtype(content, "dtype"))
    (noise,) = _floats([content["noise"]], 1)
    if not 0 <= noise <= MAX_NOISE:
        raise ValueError(f"noise {noise}; it is from 0 to {MAX_NOISE} logits")
    tensors_sha256 = content["tensors_sha256"]
    if not isinstance(tensors_sha256, str | None):
        raise ValueError(f"tensors_sha256 {tensors_sha256!r}; it is a text or null")
    record = replace(record, noise=noise, tensors_sha256=tensors_sha256)
    return record if version == 2 else replace(record, base_dtype=_dtype(content, "base_dtype"))


def _dtype(content: Mapping[str, Any], name: str) -> str:
    if content[name] not in DTYPES:
        raise ValueError(f"{name} {content[name]!r}; known are {', '.join(DTYPES)}")
    return str(content[name])


def _parse_position(
    content: Mapping[str, Any], rows: Sequence[Sequence[int]], vocab_size: int
) -> Position:
    _check_keys(content, {"row", "position", "token_ids", "base", "adapter"})
    (row,) = _ids([content["row"]], 1, len(rows))
    (position,) = _ids([content["position"]], 1, len(rows[row]))
    token_ids = _ids(content["token_ids"], NUM_TOP, vocab_size)
    base, adapter = (_floats(content[name], len(token_ids) + 1) for name in ("base", "adapter"))
    return Position(row=row, position=position, token_ids=token_ids, base=base, adapter=adapter)


def _check_keys(content: object, names: set[str]) -> None:
    if not isinstance(content, dict) or content.keys() != names:
        raise ValueError(f"an object in it must have exactly {', '.join(sorted(names))}")


def _items(value: object, longest: int) -> list[Any]:
    if not isinstance(value, list) or not 1 <= len(value) <= longest:
        raise ValueError(f"a list in it must have 1 to {longest} entries")
    return value


def _ids(value: object, longest: int, end: int) -> tuple[int, ...]:
    items = _items(value, longest)
    if not all(type(item) is int and 0 <= item < end for item in items):
        raise ValueError(f"an index in it is not an integer from 0 to {end - 1}")
    return tuple(items)


def _floats(value: object, count: int) -> tuple[float, ...]:
    items = _items(value, count)
    if len(items) != count or not all(type(item) is float for item in items):
        raise ValueError(f"a list in it must have {count} decimal numbers")
    return tuple(items)

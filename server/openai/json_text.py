"""JSON as this API writes it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

_AT_ONCE = 64
"""Items of a list that are written in one go."""

encoded = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode


def encoded_in_parts(value: Any) -> str:
    """Return the same text as `encoded`, made in short steps: between them other threads may run,
    which the encoder by itself keeps waiting for all of a long value.
    """
    return "".join(_parts(value))


def _parts(value: Any) -> Iterator[str]:
    if isinstance(value, dict) and value:
        for index, (name, item) in enumerate(value.items()):
            yield f"{',' if index else '{'}{encoded(name)}:"
            yield from _parts(item)
        yield "}"
    elif isinstance(value, list) and len(value) > _AT_ONCE:
        for start in range(0, len(value), _AT_ONCE):
            yield f"{',' if start else '['}{encoded(value[start : start + _AT_ONCE])[1:-1]}"
        yield "]"
    elif isinstance(value, list) and value:
        for index, item in enumerate(value):
            yield "," if index else "["
            yield from _parts(item)
        yield "]"
    else:
        yield encoded(value)

"""JSON objects from untrusted bytes: what two readers could understand in two ways is refused."""

from __future__ import annotations

import json
import math
from typing import Any

from lora_runtime.errors import AdapterRefused, LoramuxError


def parse_object(
    content: bytes,
    source: str,
    *,
    is_finite: bool = True,
    max_keys: int | None = None,
    refusal: type[LoramuxError] = AdapterRefused,
) -> dict[str, Any]:
    """Parse a JSON object with no key twice, no broken Unicode, no object of more than `max_keys`
    keys and, if it `is_finite`, no NaN or infinity.

    Raises `refusal` naming `source`, which the content came from.
    """

    def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
        parsed = dict(pairs)
        if len(parsed) != len(pairs):
            raise ValueError("a key appears twice")
        if max_keys is not None and len(parsed) > max_keys:
            raise ValueError(f"an object has {len(parsed)} keys, over {max_keys}")
        return parsed

    def finite(text: str) -> float:
        if not math.isfinite(value := float(text)):
            raise ValueError(f"{text[:20]} is not a finite number")
        return value

    try:
        text = content.decode()
        parsed = json.loads(
            text,
            object_pairs_hook=unique,
            parse_int=_whole,
            parse_float=finite if is_finite else None,
            parse_constant=finite if is_finite else None,
        )
        if "\\u" in text:  # UTF-8 has no half of a surrogate pair, an escape may be one
            _check_texts(parsed)
    except (ValueError, RecursionError) as error:
        raise refusal(f"{source} is not usable JSON: {error}", field=source) from None
    if not isinstance(parsed, dict):
        raise refusal(f"{source} must hold a JSON object", field=source)
    return parsed


def _whole(text: str) -> int:
    """As `int`, but in Python: other threads may run between two numbers of a million."""
    return int(text)


def _check_texts(value: object) -> None:
    """Raise UnicodeEncodeError, a ValueError, for half a surrogate pair."""
    if isinstance(value, str):
        value.encode()
    elif isinstance(value, list):
        for item in value:
            if not isinstance(item, int | float):
                _check_texts(item)
    elif isinstance(value, dict):
        for name, item in value.items():
            name.encode()
            _check_texts(item)

"""Typed values of an adapter_config.json. Each reader names its field where it refuses a value."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

from lora_runtime.config import MAX_ALPHA, MAX_RANK
from lora_runtime.errors import AdapterRefused

Config = Mapping[str, object]
Number = TypeVar("Number", int, float)


def is_neutral(value: object) -> bool:
    """True for null, false and empty, which mean the same as an absent field."""
    return value is None or value is False or (isinstance(value, str | list | dict) and not value)


def shown(value: object) -> str:
    """A value as short text for a message."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def wrong_value(field: str, value: object, expected: str) -> AdapterRefused:
    """The refusal of a value of the wrong type or range."""
    return AdapterRefused(f"{field} is {shown(value)}; it must be {expected}", field=field)


def refused(field: str, reason: str, verdict: str = "") -> AdapterRefused:
    """The refusal of what a field asks for: "<field><verdict>: <reason>"."""
    return AdapterRefused(f"{field}{verdict}: {reason}", field=field)


def is_int(value: object) -> bool:
    """True for an integer that is no boolean."""
    return isinstance(value, int) and not isinstance(value, bool)


def flag(config: Config, field: str) -> bool:
    """A boolean; absent means false."""
    value = config.get(field) or False
    if not isinstance(value, bool):
        raise wrong_value(field, value, "true or false")
    return value


def rank(value: object, field: str) -> int:
    """A rank."""
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= MAX_RANK:
        raise wrong_value(field, value, f"an integer from 1 to {MAX_RANK}")
    return value


def alpha(value: object, field: str) -> float:
    """An alpha; PEFT writes fractions and accepts negative ones."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= MAX_ALPHA:
        raise wrong_value(field, value, f"a number of at most {MAX_ALPHA:g}")
    return value


def patterns(
    config: Config, field: str, read: Callable[[object, str], Number]
) -> dict[str, Number]:
    """An object of patterns and numbers, in its order."""
    values = config.get(field) or {}
    if not isinstance(values, dict):
        raise wrong_value(field, values, "an object of patterns and numbers")
    return {pattern: read(value, field) for pattern, value in values.items()}


def names(config: Config, field: str) -> str | tuple[str, ...]:
    """One pattern, or a list of names."""
    value = config.get(field) or ()
    if isinstance(value, str):
        return value
    if isinstance(value, list | tuple) and all(isinstance(name, str) for name in value):
        return tuple(value)
    raise wrong_value(field, value, "a pattern or a list of names")


def layers(config: Config, field: str) -> tuple[int, ...]:
    """One layer index, or a list of them."""
    value = config.get(field)
    found = [] if value is None else value if isinstance(value, list) else [value]
    for layer in found:
        if not is_int(layer):
            raise wrong_value(field, layer, "a layer index or a list of them")
    return tuple(found)


def token_ids(value: object, field: str, vocab_size: int) -> tuple[int, ...]:
    """A list of token ids of the base's vocabulary."""
    if isinstance(value, list) and all(is_int(i) and 0 <= i < vocab_size for i in value):
        return tuple(value)
    raise wrong_value(field, value, f"a list of token ids from 0 to {vocab_size - 1}")

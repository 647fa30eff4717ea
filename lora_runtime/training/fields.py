"""Values of a YAML file as the typed fields of a frozen config, or an error naming the key."""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from lora_runtime.errors import ConfigError


class _UniqueKeys(yaml.SafeLoader):
    """PyYAML lets the last of two equal keys win, as no reader of the file would expect."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """The mapping. Raises ConstructorError naming a key that stands twice."""
        seen = set[str]()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value!r} stands twice; remove one", key.start_mark
                )
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


def parse_yaml(text: str) -> object:
    """The value of a YAML text in which no key stands twice. Raises ValueError."""
    try:
        return yaml.load(text, _UniqueKeys)  # a SafeLoader
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error


def nearest(name: str, valid: Sequence[str]) -> str:
    """A sentence that proposes the most similar valid name, or lists them all."""
    close = difflib.get_close_matches(name, valid, n=1)
    return f"did you mean {close[0]!r}?" if close else f"valid are {', '.join(sorted(valid))}"


def convert(value: object, hint: Any, name: str) -> Any:
    """`value` of a YAML file as the type `hint`: a frozen config, a tuple, a plain type or a union.

    Raises ConfigError naming the dotted key `name` and, for an unknown key, the nearest valid one.
    """
    kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    for kind in kinds:
        if is_dataclass(kind) and isinstance(value, dict):
            return _build(value, kind, name)
        if get_origin(kind) is tuple and isinstance(value, list):
            item_kind = get_args(kind)[0]
            return tuple(convert(v, item_kind, f"{name}[{i}]") for i, v in enumerate(value))
        if get_origin(kind) is dict and isinstance(value, dict):
            item_kind = get_args(kind)[1]
            return {str(key): convert(v, item_kind, f"{name}.{key}") for key, v in value.items()}
        if get_origin(kind) is Literal and value in get_args(kind):
            return value
        if kind in (int, str, bool) and type(value) is kind:
            return value
        if kind is NoneType and value is None:
            return None
        if kind is Path and isinstance(value, str):
            return Path(value)
        if kind is float and _is_number(value):
            return float(value)  # type: ignore[arg-type]
    rule = " or ".join(_describe(kind) for kind in kinds)
    raise ConfigError(f"{name or 'the file'} is {value!r}; it must be {rule}", field=name or None)


def convert_fields(values: dict[Any, object], kind: Any, name: str) -> dict[str, Any]:
    """The values of some fields of the frozen config `kind`. Raises ConfigError as `convert`."""
    hints = get_type_hints(kind)
    prefix = f"{name}." if name else ""
    for key in values:
        if key not in hints:
            advice = nearest(str(key), list(hints))
            raise ConfigError(f"{prefix}{key} is not a field; {advice}", field=f"{prefix}{key}")
    return {key: convert(value, hints[key], f"{prefix}{key}") for key, value in values.items()}


def _build(values: dict[Any, object], kind: Any, name: str) -> Any:
    converted = convert_fields(values, kind, name)
    for entry in fields(kind):
        if entry.name not in values and entry.default is entry.default_factory is MISSING:
            path = f"{name}.{entry.name}" if name else entry.name
            raise ConfigError(f"{path} is missing", field=path)
    return kind(**converted)


def _is_number(value: object) -> bool:
    """True for numbers and for text like 1e-4, which YAML 1.1 does not read as a number."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return False
    try:
        return math.isfinite(float(value))
    except ValueError:
        return False


def _describe(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(map(repr, get_args(kind)))
    if get_origin(kind) is tuple:
        return "a list"
    if get_origin(kind) is dict:
        return "a mapping"
    names = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
    names |= {Path: "a path", NoneType: "null"}
    return names.get(kind, "a mapping of fields")

"""Calls that are JSON objects of a name and arguments, and JSON within other text: read as far as
they go, and as rules of a grammar.

Reading moves a position on; whoever finds the text at its end raises CutShort.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from lora_runtime.text.structured_output import JSON_OPTIONS
from lora_runtime.text.tool_formats.tool_format import Call, CutShort, NoCall, Schemas

ARGUMENTS = ("arguments", "parameters")
"""Keys of a call's arguments."""

_SPACE = re.compile(r"\s*")
_STRING = re.compile(r'"(?:[^"\\]|\\.)*"', re.DOTALL)
_SCALAR = re.compile(r"[^\s,{}\[\]\"]+")
_NESTED = re.compile(r'"(?:[^"\\]|\\.)*(?:"|\\?\Z)|[{}\[\]]', re.DOTALL)


def skip(text: str, at: int) -> int:
    """The position after white space, where the text goes on."""
    found = _SPACE.match(text, at)
    assert found is not None
    if found.end() == len(text):
        raise CutShort
    return found.end()


def expect(text: str, at: int, wanted: str) -> int:
    """The position after a wanted text. Raises NoCall where another stands there."""
    if text.startswith(wanted, at):
        return at + len(wanted)
    raise CutShort if wanted.startswith(text[at:]) else NoCall


def until(text: str, at: int, end: str) -> tuple[str, int]:
    """What stands before `end`, and the position after it."""
    found = text.find(end, at)
    if found < 0:
        raise CutShort
    return text[at:found], found + len(end)


def read_arguments(text: str, at: int, call: Call) -> int:
    """Read the object that begins here as a call's arguments, as far as it goes."""
    end = _value_end(text, at)
    call.arguments = text[at:end]
    if end is None:
        raise CutShort
    return end


def read_call(text: str, at: int, calls: list[Call], *, needs_arguments: bool = False) -> int:
    """Read {"name": …, "arguments": {…}}, keys in any order, and return the position after it."""
    call, held = Call(), None
    calls.append(call)
    at = expect(text, at, "{")
    while True:
        key, at = _value(text, skip(text, at))
        at = skip(text, expect(text, skip(text, at), ":"))
        if key in ARGUMENTS and call.name and text[at] == "{":
            at = read_arguments(text, at, call)
        else:
            value, at = _value(text, at)
            if key == "name" and isinstance(value, str):
                call.name = value
            elif key in ARGUMENTS:
                held = value if isinstance(value, str) else json.dumps(value or {})
        at = skip(text, at)
        if text[at] == "}":
            break
        at = expect(text, at, ",")
    if not call.name or (needs_arguments and held is None and call.arguments is None):
        raise NoCall
    call.arguments = call.arguments or held or "{}"
    call.is_whole = True
    return at + 1


def _value_end(text: str, at: int) -> int | None:
    """Where the JSON value that begins here ends; None: the text ends before. Raises NoCall."""
    if text[at] not in '{["':
        scalar = _SCALAR.match(text, at)
        if scalar is None:
            raise NoCall
        return scalar.end() if scalar.end() < len(text) else None
    if text[at] == '"':
        string = _STRING.match(text, at)
        return None if string is None else string.end()
    depth = 0
    for found in _NESTED.finditer(text, at):
        depth += (found[0] in "{[") - (found[0] in "}]")
        if depth == 0:
            return found.end()
    return None


def _value(text: str, at: int) -> tuple[Any, int]:
    """A JSON value and the position after it."""
    end = _value_end(text, at)
    if end is None:
        raise CutShort
    try:
        return json.loads(text[at:end]), end
    except (ValueError, RecursionError):
        raise NoCall from None


def call_rules(schemas: Schemas, key: str) -> str:
    """The rule `call`: an object of a tool's name and, under `key`, its arguments."""
    rules = []
    for index, (name, schema) in enumerate(schemas.items()):
        parts = {"name": {"const": name}, key: schema or {"type": "object"}}
        whole = {
            "type": "object",
            "properties": parts,
            "required": list(parts),
            "additionalProperties": False,
            **definitions(schema),
        }
        rules.append(f"call_{index}: {json_rule(whole)}")
    names = " | ".join(f"call_{index}" for index in range(len(rules)))
    return "\n".join((f"call: {names}", *rules))


def json_rule(schema: Mapping[str, Any]) -> str:
    """The right side of a rule: JSON that a schema allows."""
    return f"%json {json.dumps({**schema, 'x-guidance': JSON_OPTIONS})}"


def definitions(schema: Mapping[str, Any] | None) -> dict[str, Any]:
    """What the parts of a schema refer to, which must stand beside any of them."""
    return {name: schema[name] for name in ("$defs", "definitions") if schema and name in schema}

"""Calls that are JSON objects of a name and arguments: read as they come, and as rules of a
grammar.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from lora_runtime.text.structured_output import JSON_OPTIONS, WHITESPACE
from lora_runtime.text.tool_formats.incoming_text import IncomingText, Waiting
from lora_runtime.text.tool_formats.tool_format import Call, NoCall, Schemas

ARGUMENTS = ("arguments", "parameters")
"""Keys of a call's arguments."""

_SCALAR = re.compile(r"[^\s,{}\[\]\"]*")
_BRACKET_OR_QUOTE = re.compile(r'["{}\[\]]')
_QUOTE_OR_ESCAPE = re.compile(r'["\\]')


def read_arguments(text: IncomingText, call: Call) -> Iterator[None]:
    """Read the object that begins here as a call's arguments, as far as it goes."""
    call.arguments = ""
    for _ in _to_value_end(text):
        call.arguments += text.taken(len(text.held))
        yield
    call.arguments += text.taken(text.seen)


def read_call(
    text: IncomingText, calls: list[Call], *, needs_arguments: bool = False
) -> Iterator[None]:
    """Read {"name": …, "arguments": {…}}, keys in any order; of a key twice the first counts."""
    call, held = Call(), None
    calls.append(call)
    yield from text.expect("{")
    while True:
        yield from text.skip()
        if text.next != '"':
            raise NoCall
        key = yield from _value(text)
        yield from text.skip()
        yield from text.expect(":")
        yield from text.skip()
        if (
            key in ARGUMENTS
            and call.name
            and text.next == "{"
            and (held, call.arguments) == (None, None)
        ):
            yield from read_arguments(text, call)
        else:
            value = yield from _value(text)
            if key == "name" and isinstance(value, str) and not call.name:
                call.name = value
            elif key in ARGUMENTS and held is None:
                held = value if isinstance(value, str) else json.dumps(value or {})
        yield from text.skip()
        if text.next == "}":
            break
        yield from text.expect(",")
    if not call.name or (needs_arguments and held is None and call.arguments is None):
        raise NoCall
    yield from text.expect("}")
    call.arguments = call.arguments or held or "{}"
    call.is_whole = True


def _to_value_end(text: IncomingText) -> Iterator[None]:
    """Move on what is seen to the end of the JSON value that begins here. Raises NoCall."""
    text.seen = text.at
    if text.next not in '{["':
        yield from _to_scalar_end(text)
        return
    depth, is_text = 0, False
    while True:
        found = (_QUOTE_OR_ESCAPE if is_text else _BRACKET_OR_QUOTE).search(text.held, text.seen)
        if found is None:
            text.seen = max(text.seen, len(text.held))
            yield
            continue
        text.seen = found.end()
        if found[0] == "\\":
            text.seen += 1  # whatever it is, it ends no text
        elif found[0] == '"':
            is_text = not is_text
        else:
            depth += 1 if found[0] in "{[" else -1
        if depth == 0 and not is_text:
            return


def _to_scalar_end(text: IncomingText) -> Iterator[None]:
    while True:
        found = _SCALAR.match(text.held, text.seen)
        assert found is not None
        text.seen = found.end()
        if text.seen < len(text.held):
            break
        yield
    if text.seen == text.at:
        raise NoCall


def _value(text: IncomingText) -> Waiting[Any]:
    """A JSON value. What is none is passed over as a whole. Raises NoCall."""
    yield from _to_value_end(text)
    try:
        value = json.loads(text.taken(text.seen), parse_constant=_no_number)
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, RecursionError):  # no JSON, infinite, or half a surrogate pair
        raise NoCall from None
    return value


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def call_rules(schemas: Schemas, key: str) -> str:
    """The rule `call`: an object of a tool's name and, under `key`, its arguments."""
    rules = []
    for index, (name, schema) in enumerate(schemas.items()):
        parts = ["{", '"name"', ":", json.dumps(name), ",", json.dumps(key), ":"]
        opening = " space ".join(map(json.dumps, parts))
        rules.append(f'call_{index}: {opening} space arguments_{index} space "}}"')
        rules.append(f"arguments_{index}: {arguments_rule(schema)}")
    names = " | ".join(f"call_{index}" for index in range(len(schemas)))
    return "\n".join((f"call: {names}", f"space: /{WHITESPACE}/", *rules))


def arguments_rule(schema: Mapping[str, Any] | None) -> str:
    """The right side of a rule: an object that a tool's schema allows. It is a document of its own,
    in which `#` is that schema.
    """
    return json_rule({**(schema or {}), "type": "object"})


def json_rule(schema: Mapping[str, Any]) -> str:
    """The right side of a rule: JSON that a schema allows."""
    return f"%json {json.dumps({**schema, 'x-guidance': JSON_OPTIONS})}"

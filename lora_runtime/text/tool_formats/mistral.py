"""Mistral: a JSON list after `[TOOL_CALLS]`, or in newer models each call after one of its own.

    [TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Ulm"}}]
    [TOOL_CALLS]weather[ARGS]{"city": "Ulm"}

Templates of both raise an error on a call's id that is not nine letters and digits.
Source: the chat templates of mistralai/Mistral-7B-Instruct-v0.3 (a space after the marker),
Mistral-Nemo-Instruct-2407 (none) and Mistral-Small-3.2-24B-Instruct-2506 (names, with a `[CALL_ID]`
before `[ARGS]` in earlier turns).
"""

from __future__ import annotations

import json
import re
import uuid

from lora_runtime.text.tool_formats.json_calls import (
    call_rules,
    expect,
    json_rule,
    read_arguments,
    read_call,
    skip,
)
from lora_runtime.text.tool_formats.tool_format import (
    Call,
    Literal,
    NoCall,
    Schemas,
    ToolFormat,
    several,
)

MARKER, ARGS, CALL_ID = "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"
_NAME = re.compile(r"[\w.-]{1,256}")


def call_id() -> str:
    """An id that Mistral's templates take."""
    return uuid.uuid4().hex[:9]


def _read(text: str, calls: list[Call], schemas: Schemas) -> int:
    at = skip(text, expect(text, 0, MARKER))
    if text[at] != "[":
        return _read_named(text, at, calls)
    at = read_call(text, skip(text, at + 1), calls)
    while text[at := skip(text, at)] == ",":
        at = read_call(text, skip(text, at + 1), calls)
    return expect(text, at, "]")


def _read_named(text: str, at: int, calls: list[Call]) -> int:
    """Read name[ARGS]{…}, where [ARGS] may be missing and [CALL_ID]… may stand before it."""
    name, at = _word(text, at)
    if text.startswith("[C", at):
        _, at = _word(text, skip(text, expect(text, at, CALL_ID)))
    if text[at] == "[":
        at = skip(text, expect(text, at, ARGS))
    if text[at] != "{":
        raise NoCall
    call = Call(name)
    calls.append(call)
    end = read_arguments(text, at, call)
    call.is_whole = True
    return end


def _word(text: str, at: int) -> tuple[str, int]:
    found = _NAME.match(text, at)
    if found is None:
        raise NoCall
    return found[0], skip(text, found.end())


def _grammar(schemas: Schemas, literal: Literal, max_calls: int) -> str:
    calls = several("call", '", "', max_calls)
    start = f'calls: {literal(MARKER)} " "? "[" {calls} "]"'
    return f"{start}\n{call_rules(schemas, 'arguments')}"


def _named_grammar(schemas: Schemas, literal: Literal, max_calls: int) -> str:
    calls, rules = [], []
    for index, (name, schema) in enumerate(schemas.items()):
        opening = f"{literal(MARKER)} {json.dumps(name)} {literal(ARGS)}"
        calls.append(f"{opening} arguments_{index}")
        rules.append(f"arguments_{index}: {json_rule(schema or {'type': 'object'})}")
    start = f"calls: {several('call', '', max_calls)}\ncall: {' | '.join(calls)}"
    return "\n".join((start, *rules))


MISTRAL = ToolFormat(
    "mistral", MARKER, (MARKER,), _read, _grammar, new_id=call_id, marks_each=False
)
MISTRAL_NAMED = ToolFormat(
    "mistral_named", MARKER, (MARKER, ARGS, CALL_ID), _read, _named_grammar, new_id=call_id
)

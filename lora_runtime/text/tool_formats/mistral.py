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
from collections.abc import Iterator

from lora_runtime.text.tool_formats.incoming_text import IncomingText, Waiting
from lora_runtime.text.tool_formats.json_calls import (
    arguments_rule,
    call_rules,
    read_arguments,
    read_call,
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


def _read(text: IncomingText, calls: list[Call], schemas: Schemas) -> Iterator[None]:
    yield from text.expect(MARKER)
    yield from text.skip()
    if text.next != "[":
        yield from _read_named(text, calls)
        return
    separator = yield from text.expect("[")
    while separator != "]":
        yield from text.skip()
        yield from read_call(text, calls)
        yield from text.skip()
        separator = yield from text.expect(",", "]")


def _read_named(text: IncomingText, calls: list[Call]) -> Iterator[None]:
    """Read name[ARGS]{…}, where [ARGS] may be missing and [CALL_ID]… may stand before it."""
    call = Call((yield from _word(text)))
    found = yield from text.expect(CALL_ID, ARGS, "{")
    if found == CALL_ID:
        yield from text.skip()
        yield from _word(text)
        found = yield from text.expect(ARGS, "{")
    if found == ARGS:
        yield from text.skip()
        yield from text.expect("{")
    text.at -= 1
    calls.append(call)
    yield from read_arguments(text, call)
    call.is_whole = True


def _word(text: IncomingText) -> Waiting[str]:
    """Read a name and the white space after it."""
    while True:
        found = _NAME.match(text.held, text.at)
        if found is None and text.at < len(text.held):
            raise NoCall
        if found is not None and found.end() < len(text.held):
            break
        yield
    word = text.taken(found.end())
    yield from text.skip()
    return word


def _grammar(schemas: Schemas, literal: Literal, max_calls: int) -> str:
    calls = several("call", '", "', max_calls)
    start = f'calls: {literal(MARKER)} " "? "[" {calls} "]"'
    return f"{start}\n{call_rules(schemas, 'arguments')}"


def _named_grammar(schemas: Schemas, literal: Literal, max_calls: int) -> str:
    calls, rules = [], []
    for index, (name, schema) in enumerate(schemas.items()):
        opening = f"{literal(MARKER)} {json.dumps(name)} {literal(ARGS)}"
        calls.append(f"{opening} arguments_{index}")
        rules.append(f"arguments_{index}: {arguments_rule(schema)}")
    start = f"calls: {several('call', '', max_calls)}\ncall: {' | '.join(calls)}"
    return "\n".join((start, *rules))


MISTRAL = ToolFormat(
    "mistral", MARKER, (MARKER,), _read, _grammar, new_id=call_id, marks_each=False
)
MISTRAL_NAMED = ToolFormat(
    "mistral_named", MARKER, (MARKER, ARGS, CALL_ID), _read, _named_grammar, new_id=call_id
)

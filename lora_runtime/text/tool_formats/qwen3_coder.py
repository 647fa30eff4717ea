"""Qwen3-Coder: a call's parameters between tags, each on lines of its own; texts without quotes.

    <tool_call>
    <function=weather>
    <parameter=city>
    Ulm
    </parameter>
    </function>
    </tool_call>

What is no text is JSON, but its template writes `True`, `False` and `None` as Python does.
Source: the chat template of Qwen/Qwen3-Coder-30B-A3B-Instruct.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from lora_runtime.errors import InvalidRequest, written
from lora_runtime.text.structured_output import MAX_BYTES
from lora_runtime.text.tool_formats.incoming_text import IncomingText
from lora_runtime.text.tool_formats.json_calls import json_rule
from lora_runtime.text.tool_formats.tool_format import (
    Call,
    Literal,
    NoCall,
    Schemas,
    ToolFormat,
    several,
)

BEGIN, END = "<tool_call>", "</tool_call>"
_AFTER_FUNCTION, _AFTER_PARAMETER = "</function>", "</parameter>"
_AS_PYTHON = {"True": "true", "False": "false", "None": "null"}
_DEFINITIONS = ("$defs", "definitions")
"""What the parts of a schema refer to, which must stand beside any of them."""
_NO_TAG = r"~/(?s:.*)<\/parameter>(?s:.*)/"
"""A text in which no parameter ends."""


def _read(text: IncomingText, calls: list[Call], schemas: Schemas) -> Iterator[None]:
    yield from text.expect(BEGIN)
    yield from text.skip()
    yield from text.expect("<function=")
    call = Call((yield from text.until(">")))
    if not call.name:
        raise NoCall
    properties = (schemas.get(call.name) or {}).get("properties")
    calls.append(call)
    arguments, separator = "{", ""
    yield from text.skip()
    while (yield from text.expect(_AFTER_FUNCTION, "<parameter=")) != _AFTER_FUNCTION:
        key = yield from text.until(">")
        value = yield from text.until(_AFTER_PARAMETER)
        schema = properties.get(key) if isinstance(properties, Mapping) else None
        call.arguments = f"{arguments}{separator}{json.dumps(key)}: {_typed(value, schema)}"
        arguments, separator = call.arguments, ", "
        yield from text.skip()
    call.arguments = f"{arguments}}}"
    call.is_whole = True
    yield from text.skip()
    yield from text.expect(END)


def _typed(value: str, schema: object) -> str:
    """The JSON of a parameter, which the model wrote as it is if it is a text."""
    value = value.removeprefix("\n").removesuffix("\n")
    if not _is_text(schema):
        try:
            return json.dumps(json.loads(_AS_PYTHON.get(value, value)), allow_nan=False)
        except (ValueError, RecursionError):  # NaN and infinity are no JSON either
            pass
    return json.dumps(value)


def _is_text(schema: object) -> bool:
    """Tell whether what a schema allows is always a text. A schema that says it in other ways than
    by its type or its values, as by a reference, has its texts in quotes.
    """
    if not isinstance(schema, Mapping):
        return False
    values = _values(schema)
    if values is not None:
        return all(isinstance(value, str) for value in values)
    return schema.get("type") == "string"


def _values(schema: Mapping[str, Any]) -> list[Any] | None:
    """The values that a schema lists; None: it lists none."""
    if "const" in schema:
        return [schema["const"]]
    values = schema.get("enum")
    return values if isinstance(values, list) else None


def _grammar(schemas: Schemas, literal: Literal, max_calls: int) -> str:
    start = several("whole", '"\\n"', max_calls)
    whole = f'{literal(BEGIN)} "\\n" call "\\n" {literal(END)}'
    calls = " | ".join(f"call_{index}" for index in range(len(schemas)))
    rules, size = [], 0
    for index, (name, schema) in enumerate(schemas.items()):
        for rule in _call_rules(f"_{index}", name, schema or {}):
            rules.append(rule)
            size += len(rule)
            if size > MAX_BYTES:  # each parameter has all definitions: it could be thousands more
                raise InvalidRequest(
                    f"messages.tools: the parameters of {name!r} need a grammar of more than "
                    f"{MAX_BYTES} bytes, which is not compiled",
                    field="messages.tools",
                )
    return "\n".join((f"calls: {start}", f"whole: {whole}", f"call: {calls}", *rules))


def _call_rules(index: str, name: str, schema: Mapping[str, Any]) -> Iterator[str]:
    """The rule `call` of one tool, and those of its parameters, in the schema's order."""
    required = {key for key in _member(name, schema, "required", list, ()) if isinstance(key, str)}
    definitions = {key: schema[key] for key in _DEFINITIONS if key in schema}
    _check_references(name, schema)
    body = []
    for number, (key, value) in enumerate(_member(name, schema, "properties", dict, {}).items()):
        place = f"{index}_{number}"
        body.append(f"parameter{place}" + ("" if key in required else "?"))
        start = json.dumps(f"<parameter={key}>\n")
        if _is_text(value):
            yield f"parameter{place}: {start} TEXT{place}"
            yield f'TEXT{place}: ({_text_rule(name, value)}) "\\n{_AFTER_PARAMETER}\\n"'
        else:
            shape = value if isinstance(value, Mapping) else {}
            yield f'parameter{place}: {start} value{place} "\\n{_AFTER_PARAMETER}\\n"'
            yield f"value{place}: {json_rule({**definitions, **shape})}"
    opening = json.dumps(f"<function={name}>\n")
    yield f'call{index}: {" ".join((opening, *body))} "{_AFTER_FUNCTION}"'


def _check_references(tool: str, schema: object) -> None:
    """Refuse what refers to other places than definitions: a parameter's rule is a document of its
    own, in which `#` is another schema. Raises InvalidRequest.
    """
    if isinstance(schema, list):
        for value in schema:
            _check_references(tool, value)
    if not isinstance(schema, Mapping):
        return
    for value in schema.values():
        _check_references(tool, value)
    where = schema.get("$ref")
    if isinstance(where, str) and not where.startswith(tuple(f"#/{key}/" for key in _DEFINITIONS)):
        raise InvalidRequest(
            f"messages.tools: the parameters of {tool!r} have $ref {written(where)}; in this "
            "format of calls it must begin with #/$defs/ or #/definitions/",
            field="messages.tools",
        )


def _text_rule(tool: str, schema: Mapping[str, Any]) -> str:
    """The texts that a schema allows, without quotes. Of `format` nothing is held."""
    values = _values(schema)
    if values is not None:
        return " | ".join(json.dumps(value) for value in values)
    least = _member(tool, schema, "minLength", int, 0)
    most = _member(tool, schema, "maxLength", int, "")
    rules = [f"/(?s:.{{{least},{most}}})/", _NO_TAG]
    if (pattern := _member(tool, schema, "pattern", str, None)) is not None:
        rules.append(_pattern_rule(pattern))
    return " & ".join(rules)


def _member(tool: str, schema: Mapping[str, Any], key: str, kind: type, default: Any) -> Any:
    """What a schema has under a key, or the default. Raises InvalidRequest for what is no schema:
    this grammar is made of it before llguidance could say so.
    """
    value = schema.get(key, default)
    if key in schema and (not isinstance(value, kind) or isinstance(value, bool)):
        raise InvalidRequest(
            f"messages.tools: the parameters of {tool!r} have {key} {written(value)}, which is no "
            "JSON schema",
            field="messages.tools",
        )
    return value


def _pattern_rule(pattern: str) -> str:
    """JSON schema's pattern matches anywhere in a text."""
    before = "" if pattern.startswith("^") else "(?s:.*)"
    is_bound = re.search(r"(?<!\\)(\\\\)*\$\Z", pattern) is not None
    inner = pattern.removeprefix("^")[: -1 if is_bound else None]
    escaped = re.sub(r"(?<!\\)((?:\\\\)*)/", r"\1\\/", inner).replace("\n", r"\n")
    return f"/{before}(?:{escaped}){'' if is_bound else '(?s:.*)'}/"


QWEN3_CODER = ToolFormat("qwen3_coder", BEGIN, (BEGIN, END), _read, _grammar)

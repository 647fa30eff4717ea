"""Llama 3.1 and later: a JSON object as the whole output, or after `<|python_tag|>`.

    {"name": "weather", "parameters": {"city": "Ulm"}}

Its template knows one call a turn. Several with `;` between, as some models write them, are read.
Source: the chat template of meta-llama/Llama-3.1-8B-Instruct.
"""

from __future__ import annotations

from collections.abc import Iterator

from lora_runtime.text.tool_formats.incoming_text import IncomingText
from lora_runtime.text.tool_formats.json_calls import call_rules, read_call
from lora_runtime.text.tool_formats.tool_format import Call, Literal, Schemas, ToolFormat

TAG = "<|python_tag|>"


def _read(text: IncomingText, calls: list[Call], schemas: Schemas) -> Iterator[None]:
    if text.next != "{":
        yield from text.expect(TAG)
        yield from text.skip()
    yield from read_call(text, calls, needs_arguments=True)
    yield from text.skip()
    while text.next == ";":
        yield from text.expect(";")
        yield from text.skip()
        yield from read_call(text, calls, needs_arguments=True)
        yield from text.skip()


def _grammar(schemas: Schemas, literal: Literal, max_calls: int) -> str:
    return f"calls: call\n{call_rules(schemas, 'parameters')}"


LLAMA3_JSON = ToolFormat("llama3_json", TAG, (TAG,), _read, _grammar, opening="{")

"""Llama 3.1 and later: a JSON object as the whole output, or after `<|python_tag|>`.

    {"name": "weather", "parameters": {"city": "Ulm"}}

Its template knows one call a turn. Several with `;` between, as some models write them, are read.
Source: the chat template of meta-llama/Llama-3.1-8B-Instruct.
"""

from __future__ import annotations

from lora_runtime.text.tool_formats.json_calls import call_rules, expect, read_call, skip
from lora_runtime.text.tool_formats.tool_format import Call, Literal, Schemas, ToolFormat

TAG = "<|python_tag|>"


def _read(text: str, calls: list[Call], schemas: Schemas) -> int:
    at = 0 if text.startswith("{") else skip(text, expect(text, 0, TAG))
    at = read_call(text, at, calls, needs_arguments=True)
    while text[skip(text, at)] == ";":
        at = read_call(text, skip(text, skip(text, at) + 1), calls, needs_arguments=True)
    return at


def _grammar(schemas: Schemas, literal: Literal, max_calls: int) -> str:
    return f"calls: call\n{call_rules(schemas, 'parameters')}"


LLAMA3_JSON = ToolFormat("llama3_json", TAG, (TAG,), _read, _grammar, opening="{")

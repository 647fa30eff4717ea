"""Hermes 2 Pro, Qwen2.5 and Qwen3: each call a JSON object between tags of its own.

    <tool_call>
    {"name": "weather", "arguments": {"city": "Ulm"}}
    </tool_call>

Source: the chat templates of NousResearch/Hermes-2-Pro-Llama-3-8B and Qwen/Qwen2.5-7B-Instruct.
"""

from __future__ import annotations

from lora_runtime.text.tool_formats.json_calls import call_rules, expect, read_call, skip
from lora_runtime.text.tool_formats.tool_format import (
    Call,
    Literal,
    Schemas,
    ToolFormat,
    several,
)

BEGIN, END = "<tool_call>", "</tool_call>"


def _read(text: str, calls: list[Call], schemas: Schemas) -> int:
    at = read_call(text, skip(text, expect(text, 0, BEGIN)), calls)
    return expect(text, skip(text, at), END)


def _grammar(schemas: Schemas, literal: Literal, max_calls: int) -> str:
    calls = several("whole", '"\\n"', max_calls)
    whole = f'{literal(BEGIN)} "\\n" call "\\n" {literal(END)}'
    return f"calls: {calls}\nwhole: {whole}\n{call_rules(schemas, 'arguments')}"


HERMES = ToolFormat("hermes", BEGIN, (BEGIN, END), _read, _grammar)

"""Hermes 2 Pro, Qwen2.5 and Qwen3: each call a JSON object between tags of its own.

    <tool_call>
    {"name": "weather", "arguments": {"city": "Ulm"}}
    </tool_call>

Source: the chat templates of NousResearch/Hermes-2-Pro-Llama-3-8B and Qwen/Qwen2.5-7B-Instruct.
"""

from __future__ import annotations

from collections.abc import Iterator

from lora_runtime.text.tool_formats.incoming_text import IncomingText
from lora_runtime.text.tool_formats.json_calls import call_rules, read_call
from lora_runtime.text.tool_formats.tool_format import (
    Call,
    Literal,
    Schemas,
    ToolFormat,
    several,
)

BEGIN, END = "<tool_call>", "</tool_call>"


def _read(text: IncomingText, calls: list[Call], schemas: Schemas) -> Iterator[None]:
    yield from text.expect(BEGIN)
    yield from text.skip()
    yield from read_call(text, calls)
    yield from text.skip()
    yield from text.expect(END)


def _grammar(schemas: Schemas, literal: Literal, max_calls: int) -> str:
    calls = several("whole", '"\\n"', max_calls)
    whole = f'{literal(BEGIN)} "\\n" call "\\n" {literal(END)}'
    return f"calls: {calls}\nwhole: {whole}\n{call_rules(schemas, 'arguments')}"


HERMES = ToolFormat("hermes", BEGIN, (BEGIN, END), _read, _grammar)

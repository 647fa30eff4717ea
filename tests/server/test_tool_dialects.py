"""Every format of calls through a whole server: a tiny random model is forced to call by the
grammar, its calls stream in parts, and go back through the chat template with an answer.
"""

from __future__ import annotations

import asyncio
import json
import re
from contextlib import asynccontextmanager

import jsonschema
import pytest
from transformers import AutoTokenizer

from lora_runtime.text.tool_calls import CallReader
from lora_runtime.text.tool_formats.catalog import FORMATS
from lora_runtime.text.tool_formats.tool_format import MAX_PARALLEL
from loramux.v1 import types_pb2
from tests.server import tiny_server
from tests.server.http_api import serving_http
from tests.server.test_structured import calls_of, deltas
from tests.server.world import serving
from tests.tiny import lengthen, tiny_checkpoint
from tests.tiny_tokenizer import write_tokenizer
from tests.tool_templates import (
    HERMES,
    LLAMA31,
    MISTRAL03,
    MISTRAL_NEMO,
    MISTRAL_SMALL32,
    QWEN3,
    QWEN3_CODER,
    QWEN25,
)

LIST, NAMED = ("[TOOL_CALLS]",), ("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]")
DIALECTS = {
    "hermes": (HERMES, "hermes", ("<tool_call>", "</tool_call>")),
    "qwen2.5": (QWEN25, "hermes", ()),
    "qwen3": (QWEN3, "hermes", ()),
    "qwen3-coder": (QWEN3_CODER, "qwen3_coder", ()),
    "llama3.1": (LLAMA31, "llama3_json", ("<|python_tag|>",)),
    "mistral-v0.3": (MISTRAL03, "mistral", LIST),
    "mistral-nemo": (MISTRAL_NEMO, "mistral", LIST),
    "mistral-small3.2": (MISTRAL_SMALL32, "mistral_named", NAMED),
}
"""Template, format, and those of the format's texts that are special tokens."""
TEXT = {"type": "string", "maxLength": 2}
SCHEMA = {
    "type": "object",
    "properties": {
        "where": {
            "type": "object",
            "properties": {"city": TEXT, "tags": {"type": "array", "items": TEXT, "maxItems": 2}},
            "required": ["city", "tags"],
            "additionalProperties": False,
        },
        "days": {"type": "integer", "minimum": 1, "maximum": 14},
        "unit": {"type": "string", "enum": ["°C", "°F"]},
        "exact": {"type": "boolean"},
        "code": {"type": "string", "pattern": "^[a-c/]+$", "maxLength": 3},
        "note": TEXT,
    },
    "required": ["where", "days", "unit", "exact", "code"],
    "additionalProperties": False,
}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "parameters": SCHEMA}},
    {"type": "function", "function": {"name": "tell-time", "parameters": {
        "type": "object", "properties": {}, "additionalProperties": False}}},
]  # fmt: skip
USER = [{"role": "user", "content": "What is the weather?"}]
FORCED = {
    "messages": USER,
    "tools": TOOLS,
    "tool_choice": "required",
    "template_variables": {"enable_thinking": False},
}
SCHEMAS = {tool["function"]["name"]: tool["function"]["parameters"] for tool in TOOLS}
ENDS = (1, 2)
"""The end tokens of the tiny base. Without them, and the end of a list, calls follow calls."""
CUT = types_pb2.FINISH_REASON_LENGTH
CALLED = types_pb2.FINISH_REASON_TOOL_CALLS


@asynccontextmanager
async def server(folder, template, special):
    """A client of a server whose base has a template, its tokenizer, and the requests it makes."""
    base = tiny_checkpoint(folder / "base")
    write_tokenizer(base, chat_template=template, more_special=special)
    lengthen(base, 4096)
    async with tiny_server.running(folder) as (client, engine):
        seen, generate = [], engine.generate
        engine.generate = lambda request: (seen.append(request), generate(request))[1]
        yield client, AutoTokenizer.from_pretrained(base), seen


async def outputs(client, **options):
    return [event async for event in client.generate(**options)]


def read(dialect, text):
    """The calls that a text has, name and arguments."""
    reader = CallReader(FORMATS[DIALECTS[dialect][1]], SCHEMAS)
    found = []
    for part in reader.push(text).calls + reader.flush().calls:
        if part.name:
            found.append([part.name, ""])
        found[-1][1] += part.arguments
    return [(name, json.loads(arguments)) for name, arguments in found]


async def goes_back(client, tokenizer, seen, dialect, events):
    """A second turn's prompt has the calls as the model made them, and their answers."""
    calls = calls_of(events)
    ids = [part.id for delta in deltas(events) for part in delta.tool_calls if part.id]
    if DIALECTS[dialect][1].startswith("mistral"):
        assert all(re.fullmatch("[a-z0-9]{9}", call_id) for call_id in ids)
    turns = [
        {"id": i, "function": {"name": tool, "arguments": json.dumps(arguments)}}
        for i, (tool, arguments) in zip(ids, calls, strict=True)
    ]
    answers = [
        {"role": "tool", "tool_call_id": i, "content": f"{n} degrees"} for n, i in enumerate(ids)
    ]
    history = [*USER, {"role": "assistant", "tool_calls": turns}, *answers]
    await outputs(client, messages=history, tools=TOOLS, max_tokens=1)
    prompt = tokenizer.decode(seen[-1].prompt_token_ids)
    turn = prompt.partition(USER[0]["content"])[2].partition("<|end_header_id|>\n\n")
    assert read(dialect, turn[2] or turn[0]) == calls
    assert all(answer["content"] in prompt for answer in answers)


@pytest.mark.parametrize("dialect", DIALECTS)
async def test_forced_calls_stream_and_go_back_with_their_answers(dialect, tmp_path):
    template, _, special = DIALECTS[dialect]
    async with server(tmp_path, template, special) as (client, tokenizer, seen):
        alone = {**FORCED, "tool_choice": "weather", "parallel_tool_calls": False}
        bias = dict.fromkeys([*ENDS, *tokenizer.convert_tokens_to_ids(["]"])], -100.0)
        several = {**FORCED, "tool_choice": "tell-time", "logit_bias": bias}
        found = await asyncio.gather(
            outputs(client, **alone, seed=0, max_tokens=700),
            outputs(client, **several, seed=1, max_tokens=1500),
        )
        only, many = found
        assert len(calls_of(only)) == 1
        assert len(calls_of(many)) == (1 if dialect == "llama3.1" else MAX_PARALLEL)
        for events in found:
            calls = calls_of(events)
            assert events[-1].finished.finish_reason == CALLED
            assert not "".join(delta.text for delta in deltas(events)).strip()
            for tool, arguments in calls:
                jsonschema.validate(arguments, SCHEMAS[tool])
            raw = [token for delta in deltas(events) for token in delta.token_ids]
            raw = raw[:-1] if raw[-1] == tokenizer.eos_token_id else raw
            assert read(dialect, tokenizer.decode(raw)) == calls  # the parts are the whole
            await goes_back(client, tokenizer, seen, dialect, events)

        whole, num_tokens = arguments_of(only), len(only)
        cut = await outputs(client, **alone, seed=0, max_tokens=num_tokens // 2)
        assert cut[-1].finished.finish_reason == CUT
        assert arguments_of(cut) and whole.startswith(arguments_of(cut))
        assert not "".join(delta.text for delta in deltas(cut))


def arguments_of(events):
    return "".join(part.arguments for delta in deltas(events) for part in delta.tool_calls)


ONE = '<tool_call>{"name": "weather", "arguments": {"days": 1}}</tool_call>'


async def test_an_output_ends_with_its_only_call(tmp_path):
    """The scripted engine repeats the prompt, in which two calls stand."""
    text = f"Well {ONE}{ONE} and more"
    async with serving(tmp_path) as world:
        options = {"messages": [{"role": "user", "content": text}], "tools": TOOLS}
        options["max_tokens"] = len(f"<user>{text}".encode())
        both = await outputs(world.client, **options)
        assert len(calls_of(both)) == 2
        events = await outputs(world.client, **options, parallel_tool_calls=False)
        assert calls_of(events) == [("weather", {"days": 1})]
        assert events[-1].finished.finish_reason == CALLED
        assert "".join(delta.text for delta in deltas(events)) == "<user>Well"
        tokens = [token for delta in deltas(events) for token in delta.token_ids]
        assert len(tokens) < len(f"<user>Well {ONE}".encode())  # its row was free at once
        assert not world.engine.stats().num_running

        async with serving_http(world.service) as api:
            chat = {**options, "model": "tiny", "parallel_tool_calls": False}
            whole = (await api.client.chat.completions.create(**chat)).choices[0]
            (call,) = whole.message.tool_calls
            assert json.loads(call.function.arguments) == {"days": 1}
            assert (whole.finish_reason, whole.message.content) == ("tool_calls", "<user>Well")
            stream = await api.client.chat.completions.create(**chat, stream=True)
            chunks = [chunk.choices[0] async for chunk in stream]
            parts = [part for chunk in chunks for part in chunk.delta.tool_calls or ()]
            assert {part.index for part in parts} == {0}
            assert "".join(part.function.arguments for part in parts) == call.function.arguments
            assert chunks[-1].finish_reason == "tool_calls"

"""Models that think before they answer: a tiny random one whose tags are tokens, on both wires."""

from __future__ import annotations

import asyncio
import json
from contextlib import asynccontextmanager

import jsonschema
import pytest
from transformers import AutoTokenizer

from loramux.server.client import AsyncClient
from loramux.v1 import types_pb2
from tests.server import tiny_server
from tests.server.access.keyring import ACME, RIVAL, gate_of
from tests.server.http_api import serving_http
from tests.server.test_structured import SCHEMA, USER, WEATHER, calls_of, deltas
from tests.tiny import lengthen, tiny_checkpoint
from tests.tiny_tokenizer import SPECIAL_TOKENS, write_tokenizer
from tests.tool_templates import QWEN3, THINKS_ALWAYS

TAGS = ("<think>", "</think>")
BEGIN, END = range(len(SPECIAL_TOKENS), len(SPECIAL_TOKENS) + 2)
SOON = {END: 4.0}
"""A bias by which a thought ends after some tokens."""
THINKS, STRAIGHT = {BEGIN: 100.0, **SOON}, {BEGIN: -100.0}


@asynccontextmanager
async def server(folder, template):
    write_tokenizer(tiny_checkpoint(folder / "base"), chat_template=template, more_special=TAGS)
    lengthen(folder / "base")
    async with (
        tiny_server.running_service(folder) as (service, engine),
        tiny_server.serving_grpc(service) as client,
        serving_http(service) as api,
    ):
        yield client, api, engine


async def answer(client, **options):
    """What was thought, what is said, and the events."""
    given = {"messages": USER, "seed": 2, "max_tokens": 600, **options}
    events = [event async for event in client.generate(**given)]
    thought, text = ("".join(getattr(d, n) for d in deltas(events)) for n in ("reasoning", "text"))
    return thought, text, events


async def test_a_form_follows_a_thought(tmp_path):
    async with server(tmp_path, QWEN3) as (client, _, _):
        form = {"structured_output": {"json_schema": SCHEMA}}
        thought, text, events = await answer(client, **form, logit_bias=THINKS)
        jsonschema.validate(json.loads(text), SCHEMA)
        usage = events[-1].finished.usage
        tokens = [token for delta in deltas(events) for token in delta.token_ids]
        assert thought and tokens[0] == BEGIN
        assert usage.reasoning_tokens == tokens.index(END) + 1 < usage.output_tokens
        for options in (
            {"logit_bias": STRAIGHT},
            {"template_variables": {"enable_thinking": False}},
        ):
            thought, text, events = await answer(client, **form, **options)
            jsonschema.validate(json.loads(text), SCHEMA)
            assert not thought and not events[-1].finished.usage.reasoning_tokens
        thought, text, events = await answer(
            client, **form, logit_bias={BEGIN: 100.0}, max_tokens=5
        )
        assert thought and not text
        assert events[-1].finished.finish_reason == types_pb2.FINISH_REASON_LENGTH

        tools = {"tools": [WEATHER], "tool_choice": "weather", "max_tokens": 1500}
        thought, text, events = await answer(client, **tools, logit_bias=THINKS)
        assert thought and not text.strip()
        for _, arguments in calls_of(events):
            jsonschema.validate(arguments, SCHEMA)
        assert events[-1].finished.finish_reason == types_pb2.FINISH_REASON_TOOL_CALLS


async def test_tenants_get_one_form_with_and_without_a_thought(tmp_path):
    """Compiled forms are remembered; each request gets the one that its thinking asks for."""
    write_tokenizer(tiny_checkpoint(tmp_path / "base"), chat_template=QWEN3, more_special=TAGS)
    lengthen(tmp_path / "base")
    form = {"structured_output": {"choice": ["yes", "no"]}}
    ways = {True: {"logit_bias": THINKS}, False: {"template_variables": {"enable_thinking": False}}}
    async with tiny_server.running(tmp_path, gate_of(tmp_path), ACME) as (acme, _):
        async with AsyncClient(acme.target, api_key=RIVAL) as rival:
            asked = [(client, thinks) for client in (acme, rival) for thinks in (True, False)] * 2
            answers = [answer(client, **form, **ways[thinks]) for client, thinks in asked]
            found = await asyncio.gather(*answers[:4]) + await asyncio.gather(*answers[4:])
    for (_, thinks), (thought, text, _) in zip(asked, found, strict=True):
        assert bool(thought) == thinks and text in ("yes", "no")


async def test_a_prompt_that_opens_the_thought(tmp_path):
    async with server(tmp_path, THINKS_ALWAYS) as (client, _, _):
        form = {"structured_output": {"choice": ["yes", "no"]}}
        thought, text, events = await answer(client, **form, logit_bias=SOON)
        assert thought and text in ("yes", "no")
        tokens = [token for delta in deltas(events) for token in delta.token_ids]
        assert tokens.count(END) == 1 and BEGIN not in tokens


async def test_thoughts_have_their_fields_in_openais_api(tmp_path):
    async with server(tmp_path, QWEN3) as (_, api, engine):
        seen, generate = [], engine.generate
        engine.generate = lambda request: (seen.append(request), generate(request))[1]
        form = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
        given = {"model": "tiny", "messages": USER, "response_format": form, "seed": 2}
        given["logit_bias"] = {str(token): bias for token, bias in THINKS.items()}
        given["max_tokens"] = 600
        whole = await api.client.chat.completions.create(**given)
        message = whole.choices[0].message
        jsonschema.validate(json.loads(message.content), SCHEMA)
        thought = message.reasoning_content
        assert thought and thought == message.reasoning
        assert whole.usage.completion_tokens_details.reasoning_tokens > 1
        stream = await api.client.chat.completions.create(**given, stream=True)
        parts = [chunk.choices[0].delta async for chunk in stream]
        assert "".join(getattr(part, "reasoning_content", "") for part in parts) == thought
        assert "".join(part.content or "" for part in parts) == message.content
        hidden = await api.client.chat.completions.create(
            **given, extra_body={"include_reasoning": False}
        )
        assert hidden.choices[0].message.content == message.content
        assert not hasattr(hidden.choices[0].message, "reasoning_content")

        call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}
        for field in ("reasoning_content", "reasoning"):
            turn = {"role": "assistant", "content": "", "tool_calls": [call], field: "qux quux"}
            tool = {"role": "tool", "tool_call_id": "c1", "content": "12"}
            await api.client.chat.completions.create(
                model="tiny", messages=[*USER, turn, tool], max_tokens=1
            )
            prompt = text_of(tmp_path, seen[-1].prompt_token_ids)
            assert "<think>\nqux quux\n</think>" in prompt


def text_of(folder, token_ids):
    return AutoTokenizer.from_pretrained(folder / "base").decode(token_ids)


@pytest.mark.parametrize("is_stream", [False, True])
async def test_thoughts_are_items_of_a_response(tmp_path, is_stream):
    async with server(tmp_path, THINKS_ALWAYS) as (_, api, _):
        text = {"format": {"type": "json_schema", "name": "x", "schema": {"type": "boolean"}}}
        given = {"model": "tiny", "input": "Hi", "text": text, "max_output_tokens": 1800}
        given["extra_body"] = {"seed": 1}
        if is_stream:
            stream = await api.client.responses.create(**given, stream=True)
            events = [event async for event in stream]
            response = events[-1].response
            told = "".join(e.delta for e in events if e.type == "response.reasoning_text.delta")
            assert told == response.output[0].content[0].text
        else:
            response = await api.client.responses.create(**given)
        reasoning, *message = response.output
        assert reasoning.type == "reasoning" and reasoning.summary == []
        assert response.usage.output_tokens_details.reasoning_tokens > 1
        if response.status == "completed":
            assert message[0].content[0].text in ("true", "false")

"""Functions in /v1/responses, by the real openai package, blocking and streaming: a tiny random
model calls them, and gets its calls back with their answers.
"""

from __future__ import annotations

import asyncio
import json
from contextlib import asynccontextmanager

import jsonschema
import openai
import pytest
from transformers import AutoTokenizer

from lora_runtime.core import FinishReason
from lora_runtime.text.tool_calls import ToolCallDelta
from loramux.server.calls import Delta, Finished, Started
from tests.server import tiny_server
from tests.server.http_api import serving_http
from tests.server.test_structured import CLOCK, SCHEMA
from tests.tiny import lengthen, tiny_checkpoint
from tests.tiny_tokenizer import write_tokenizer
from tests.tool_templates import QWEN3

WEATHER = {"type": "function", "name": "weather", "parameters": SCHEMA, "strict": None}
TOOLS = [WEATHER, {"type": "function", **CLOCK["function"], "strict": False}]
FORCED = {
    "model": "tiny",
    "input": "What is the weather?",
    "tools": TOOLS,
    "tool_choice": {"type": "function", "name": "weather"},
    "parallel_tool_calls": False,
    "extra_body": {"seed": 1, "chat_template_kwargs": {"enable_thinking": False}},
}


@asynccontextmanager
async def server(folder):
    """HTTP's API over a base whose template shows tools, and the requests of its engine."""
    write_tokenizer(tiny_checkpoint(folder / "base"), chat_template=QWEN3)
    lengthen(folder / "base")
    async with tiny_server.running_service(folder) as (service, engine):
        seen, generate = [], engine.generate
        engine.generate = lambda request: (seen.append(request), generate(request))[1]
        async with serving_http(service) as api:
            yield api, seen


async def test_a_function_is_called_and_its_answer_read(tmp_path):
    async with server(tmp_path) as (api, seen):

        def conversation():
            with openai.OpenAI(base_url=f"{api.url}/v1", api_key="none") as client:
                whole = client.responses.create(**FORCED)
                streamed = list(client.responses.create(**FORCED, stream=True))
                (call,) = whole.output
                answer = {
                    "type": "function_call_output",
                    "call_id": call.call_id,
                    "output": "12 degrees",
                }
                user = {"role": "user", "content": FORCED["input"]}
                given = FORCED | {"tool_choice": "auto", "max_output_tokens": 1}
                given["input"] = [user, *whole.output, answer]
                client.responses.create(**given)
                return whole, streamed

        whole, streamed = await asyncio.to_thread(conversation)
        (call,) = whole.output
        assert (call.type, call.name, call.status) == ("function_call", "weather", "completed")
        jsonschema.validate(json.loads(call.arguments), SCHEMA)
        assert whole.status == "completed" and whole.tools[0].name == "weather"
        assert whole.tool_choice.name == "weather" and whole.parallel_tool_calls is False
        assert whole.output_text == ""

        kinds = [event.type.removeprefix("response.") for event in streamed]
        assert [event.sequence_number for event in streamed] == [*range(len(streamed))]
        deltas = [e.delta for e in streamed if e.type.endswith("function_call_arguments.delta")]
        assert len(deltas) > 3 and "".join(deltas) == call.arguments
        assert [kind for kind in kinds if not kind.endswith(".delta")] == [
            "created", "in_progress", "output_item.added", "function_call_arguments.done",
            "output_item.done", "completed",
        ]  # fmt: skip
        added, done = (e for e in streamed if e.type.startswith("response.output_item"))
        assert (added.item.name, added.item.arguments) == ("weather", "")
        assert added.item.status == "in_progress" and added.item.call_id == done.item.call_id
        assert (
            done.item.arguments == call.arguments and done.item == streamed[-1].response.output[0]
        )

        prompt = AutoTokenizer.from_pretrained(tmp_path / "base").decode(seen[-1].prompt_token_ids)
        asked, made, told = prompt.split("<|im_start|>")[-4:-1]
        assert FORCED["input"] in asked and "12 degrees" in told
        assert json.loads(made.split("<tool_call>")[1].split("</tool_call>")[0]) == {
            "name": "weather",
            "arguments": json.loads(call.arguments),
        }


async def test_thought_text_and_calls_are_items_in_their_order(tmp_path, monkeypatch):
    async def calling(call):
        assert [tool.name for tool in call.prompt.tools] == ["weather", "clock"]
        yield Started(request_id="a", num_prompt_tokens=3)
        yield Delta(text="", reasoning="Hm", token_ids=(1,))
        yield Delta(text="", reasoning=".", token_ids=(1,))
        yield Delta(text="So", token_ids=(1,))
        yield Delta(text="", token_ids=(2,), tool_calls=(ToolCallDelta(0, "c0", "weather", "{"),))
        more = (ToolCallDelta(0, arguments="}"), ToolCallDelta(1, "c1", "clock"))
        yield Delta(text="", token_ids=(4,), tool_calls=more)
        yield Delta(text="", token_ids=(4,), tool_calls=(ToolCallDelta(1, arguments="{"),))
        yield Finished(
            finish_reason=FinishReason.LENGTH, num_prompt_tokens=3, num_output_tokens=6,
            num_reasoning_tokens=2, timing=None,
        )  # fmt: skip

    async with server(tmp_path) as (api, _):
        monkeypatch.setattr(
            "loramux.server.generation.generation.Generation.generate", lambda _, c: calling(c)
        )
        given = {"model": "tiny", "input": "Hi", "tools": TOOLS}
        whole = await api.client.responses.create(**given)
        events = [e async for e in await api.client.responses.create(**given, stream=True)]
        last = events[-1].response
        for response in (whole, last):
            assert response.status == "incomplete"
            thought, message, weather, clock = response.output
            assert thought.content[0].text == "Hm." and message.content[0].text == "So"
            assert (weather.name, weather.arguments, weather.call_id) == ("weather", "{}", "c0")
            assert (clock.name, clock.arguments, clock.call_id) == ("clock", "{", "c1")
            states = [item.status for item in response.output]
            assert states == ["completed"] * 3 + ["incomplete"]
            assert response.usage.output_tokens_details.reasoning_tokens == 2
        assert len({item.id for item in last.output}) == 4
        opened = [e.output_index for e in events if e.type == "response.output_item.added"]
        closed = [e.output_index for e in events if e.type == "response.output_item.done"]
        assert opened == closed == [0, 1, 2, 3]


REFUSED = [
    ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
    ({"tools": [{"type": "function", "function": {"name": "a"}}]}, "tools[0].name"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"tool_choice": {"type": "web_search"}}, "tool_choice.type"),
    ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0]"),
    ({"input": [{"type": "function_call", "name": "a", "arguments": "{}"}]}, "input[0].call_id"),
    ({"input": [{"type": "function_call_output", "call_id": "a"}]}, "input[0].output"),
    ({"input": [{"role": "robot", "content": ""}]}, "input[0].role"),
]


@pytest.mark.parametrize(("fields", "param"), REFUSED, ids=str)
async def test_what_is_not_served_is_refused_by_name(serve, fields, param):
    async with serve() as world, serving_http(world.service) as api:
        status, error = await api.error(
            "/v1/responses", **{"model": "tiny", "input": "hi", **fields}
        )
        assert (status, error["param"]) == (400, param), error
        assert not world.engine.seen

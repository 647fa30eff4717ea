"""Structured output and tools over gRPC: a tiny random model that keeps to its forms, and hostile
definitions beside running streams.
"""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import time

import jsonschema
import pytest
from transformers import AutoTokenizer

from lora_runtime.errors import InvalidRequest
from loramux.v1 import types_pb2
from tests.peft_adapters import write_adapter
from tests.server import tiny_server
from tests.server.http_api import serving_http
from tests.server.world import serving
from tests.tiny import lengthen, tiny_checkpoint, tiny_model
from tests.tiny_tokenizer import CHATML_TEMPLATE, write_tokenizer
from tests.tool_templates import QWEN3, QWEN25

SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 5},
        "days": {"type": "integer", "minimum": 1, "maximum": 14},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
}
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": SCHEMA}}
CLOCK = {
    "type": "function",
    "function": {
        "name": "clock",
        "description": "The time.",
        "parameters": {"type": "object", "properties": {}, "additionalProperties": False},
    },
}
USER = [{"role": "user", "content": "What is the weather?"}]
NESTED = '{"type": "array", "items": ' * 5000 + "{}" + "}" * 5000
HOSTILE = {
    "deep": {"json_schema": NESTED[: 100 << 10]},
    "long": {"json_schema": json.dumps({"description": "x" * ((8 << 20) - 4096)})},
    "enum": {"json_schema": {"enum": [f"v{i}" for i in range(200_000)]}},
    "wide": {"json_schema": {"properties": {f"p{i}": {"maxLength": 50} for i in range(4000)}}},
    "disjoint": {
        "json_schema": {"patternProperties": {f"^.*{i}.*$": {"maxLength": 3} for i in range(200)}}
    },
    "never": {"json_schema": {"$ref": "#"}},
    "unserved": {"json_schema": {"type": "array", "uniqueItems": True}},
    "repeated": {"regex": "((((a{1,100}){1,100}){1,100}){1,100})"},
    "look": {"regex": "(?=a)(?!b)c"},
    "recursive": {"grammar": "start: start"},
    "GBNF": {"grammar": 'root ::= word "ing"\nword ::= [a-z]+'},
    "product": {
        "json_schema": {
            "allOf": [
                {"anyOf": [{"properties": {f"k{i}_{j}": {}}} for j in range(12)]} for i in range(12)
            ]
        }
    },
}
HARMLESS = {
    "catastrophic elsewhere": {"regex": "(a+)+b|(a|aa)+c|(x+x+)+y"},
    "huge repetition": {"json_schema": {"type": "string", "minLength": 10**6, "maxLength": 10**9}},
    "many states": {"regex": "(.*a.{200}.*b.{200})"},
    "ambiguous": {"grammar": 'start: a\na: a a | "x" | ""'},
}
"""What takes other libraries long, and costs nothing here."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("structured")
    write_tokenizer(tiny_checkpoint(folder / "base"), chat_template=QWEN25)
    lengthen(folder / "base")
    for index in range(2):
        path = folder / "adapters" / f"a{index}"
        write_adapter(tiny_model("llama"), path, seed=index, r=2 + index)
    write_tokenizer(folder / "adapters" / "a1", chat_template=CHATML_TEMPLATE)
    return folder


def deltas(events):
    return [event.delta for event in events if event.HasField("delta")]


def calls_of(events, index=0):
    """Name and arguments of each call, which has an id of its own."""
    calls, ids = [], set()
    for part in (p for d in deltas(events) if d.index == index for p in d.tool_calls):
        if part.index == len(calls):
            assert part.name and part.id not in ids
            ids.add(part.id)
            calls.append([part.name, ""])
        assert part.index == len(calls) - 1
        calls[-1][1] += part.arguments
    return [(name, json.loads(arguments)) for name, arguments in calls]


async def test_all_kinds_over_base_and_adapters(folder):
    forms = {
        "json_schema": SCHEMA,
        "json_object": True,
        "regex": "[a-f]{2,4}(-[0-9]+)?",
        "grammar": 'start: "(" start ")" | "x"',
        "choice": ["red", "green"],
    }
    async with tiny_server.running(folder) as (client, _):
        for name in ("a0", "a1"):
            await client.load_adapter(name, name)

        async def texts(kind, adapter):
            generation = client.generate(
                messages=USER,
                adapter=adapter,
                structured_output={kind: forms[kind]},
                n=2,
                seed=3,
                max_tokens=90,
            )
            events = [event async for event in generation]
            found = ["", ""]
            for delta in deltas(events):
                found[delta.index] += delta.text
            ends = {e.finished.index: e.finished for e in events if e.HasField("finished")}
            cut = types_pb2.FINISH_REASON_LENGTH
            return [(kind, text) for i, text in enumerate(found) if ends[i].finish_reason != cut]

        jobs = [texts(kind, adapter) for kind in forms for adapter in (None, "a0", "a1")]
        finished = [one for found in await asyncio.gather(*jobs) for one in found]
    assert {kind for kind, _ in finished} >= {*forms} - {"json_object"}
    for kind, text in finished:
        if kind == "json_schema":
            jsonschema.validate(json.loads(text), SCHEMA)
        elif kind == "json_object":
            assert isinstance(json.loads(text), dict)
        elif kind == "regex":
            assert re.fullmatch(forms["regex"], text)
        elif kind == "grammar":
            assert re.fullmatch(r"\(*x\)*", text) and text.count("(") == text.count(")")
        else:
            assert text in forms["choice"]


async def test_tools_are_called_as_the_choice_says(folder):
    async with tiny_server.running(folder) as (client, _):
        for choice, allowed in (("required", {"weather", "clock"}), ("weather", {"weather"})):
            generation = client.generate(
                messages=USER, tools=[WEATHER, CLOCK], tool_choice=choice, seed=1, max_tokens=1000
            )
            events = [event async for event in generation]
            calls = calls_of(events)
            assert calls and {name for name, _ in calls} <= allowed
            for name, arguments in calls:
                jsonschema.validate(
                    arguments, SCHEMA if name == "weather" else {"maxProperties": 0}
                )
            assert not "".join(delta.text for delta in deltas(events)).strip()
            assert events[-1].finished.finish_reason == types_pb2.FINISH_REASON_TOOL_CALLS
        plain = await client.tokenize(messages=USER)
        shown = [e async for e in client.generate(messages=USER, tools=[CLOCK], max_tokens=1)]
        none = client.generate(messages=USER, tools=[CLOCK], tool_choice="none", max_tokens=1)
        hidden = [event async for event in none]
        assert hidden[0].started.prompt_tokens == len(plain) < shown[0].started.prompt_tokens


async def test_templates_get_what_transformers_gives_them(folder, tmp_path):
    """Calls of earlier turns, their answers and a variable, by the base's own template."""
    call = {"name": "weather", "arguments": '{"city": "Ulm", "days": 2}'}
    messages = [
        {"role": "system", "content": "Be brief."},
        *USER,
        {"role": "assistant", "content": "", "tool_calls": [{"id": "c1", "function": call}]},
        {"role": "tool", "content": "12 degrees", "tool_call_id": "c1", "name": "weather"},
    ]
    theirs = [dict(message) for message in messages]
    function = {"name": "weather", "arguments": json.loads(call["arguments"])}
    theirs[2]["tool_calls"] = [{"id": "c1", "type": "function", "function": function}]
    tool = {"type": "function", "function": {**WEATHER["function"], "description": ""}}
    tool["function"] = {k: tool["function"][k] for k in ("name", "description", "parameters")}
    shutil.copytree(folder / "base", tmp_path / "base")
    write_tokenizer(tmp_path / "base", chat_template=QWEN3)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base")
    expected = tokenizer.apply_chat_template(
        theirs, tools=[tool], add_generation_prompt=True, enable_thinking=False, tokenize=False
    )
    assert '"city": "Ulm"' in expected and "<think>" in expected
    async with tiny_server.running(tmp_path) as (client, engine):
        seen = []
        generate = engine.generate
        engine.generate = lambda request: (seen.append(request), generate(request))[1]
        variables = {"enable_thinking": False}
        generation = client.generate(
            messages=messages, tools=[WEATHER], template_variables=variables, max_tokens=1
        )
        await generation.text()
    assert tokenizer.decode(seen[0].prompt_token_ids) == expected


REFUSED = [
    ({"tools": [{"name": "a b"}]}, "messages.tools[0].name"),
    ({"tools": [CLOCK, CLOCK]}, "messages.tools[1].name"),
    ({"tools": [{"name": "x", "parameters": "["}]}, "messages.tools[0].parameters"),
    ({"tools": [{"name": "x", "parameters": '{"title": "\\ud800"}'}]}, "messages"),
    (
        {
            "tools": [{"name": "x", "parameters": {"properties": {"a": {"type": "nope"}}}}],
            "tool_choice": "required",
        },
        "messages.tools",
    ),
    (
        {"tools": [{"name": "x", "parameters": {"type": "array"}}]},
        "messages.tools[0].parameters",
    ),
    ({"tool_choice": "required"}, "messages.tool_choice"),
    ({"tools": [CLOCK], "tool_choice": "weather"}, "messages.tool_choice"),
    ({"template_variables": {"messages": []}}, "messages.template_variables"),
    ({"template_variables": {"eos_token": ""}}, "messages.template_variables"),
    ({"template_variables": {"chat_template": "x"}}, "messages.template_variables"),
    ({"tools": [CLOCK], "adapter": "a1"}, "messages.tools"),
    ({"structured_output": {"choice": []}}, "sampling.structured_output.choice"),
    ({"structured_output": {"json_object": False}}, "sampling.structured_output.json_object"),
    ({"structured_output": {"regex": "(?=a)"}}, "sampling.structured_output.regex"),
    (
        {"tools": [CLOCK], "tool_choice": "clock", "structured_output": {"regex": "a"}},
        "sampling.structured_output",
    ),
]
"""Options of a request, and the field that its refusal names."""


async def test_what_cannot_be_kept_is_refused_by_name(folder):
    async with tiny_server.running(folder) as (client, _):
        await client.load_adapter("a1", "a1")
        for options, field in REFUSED:
            with pytest.raises(InvalidRequest) as caught:
                await client.generate(messages=USER, max_tokens=4, **options).text()
            assert caught.value.field == field


async def test_forms_that_contradict_the_request_are_the_callers_errors(folder):
    """They show when no token is left to draw; the server is as well as before."""
    async with tiny_server.running(folder) as (client, engine):
        for options in ({"min_tokens": 1}, {"min_tokens": 3, "stop_token_ids": [5]}) * 5:
            with pytest.raises(InvalidRequest, match="no token can follow") as caught:
                await client.generate(
                    text="a", max_tokens=4, structured_output={"regex": ""}, **options
                ).text()
            assert caught.value.field == "sampling.structured_output"
        assert engine.stats().num_failed_in_a_row == 0


async def test_a_prompt_that_does_not_fit_has_no_form_compiled(serve):
    async with serve(max_model_len=100) as world:
        form = {"regex": "a+"}
        with pytest.raises(InvalidRequest, match="at most 99 fit"):
            await world.client.generate(text="a" * 100, structured_output=form).text()
        assert not world.service.generation._structures._known
        await world.client.generate(text="a" * 98, structured_output=form).text()
        assert len(world.service.generation._structures._known) == 1


async def test_hostile_definitions_are_refused_and_disturb_nobody(folder):
    async with tiny_server.running(folder) as (client, _):
        options = {"text": "The quick", "max_tokens": 1}
        await client.generate(**options, structured_output={"regex": "a"}).text()  # processes run
        gaps, refusals, is_over = [], {}, asyncio.Event()

        async def watch():
            while not is_over.is_set():
                begun = time.monotonic()
                await client.generate(text="The quick", max_tokens=8, ignore_eos=True).text()
                gaps.append(time.monotonic() - begun)

        watcher = asyncio.create_task(watch())
        await asyncio.sleep(0.2)
        for name, form in HOSTILE.items():
            begun = time.monotonic()
            with pytest.raises(InvalidRequest) as caught:
                await client.generate(**options, structured_output=form).text()
            refusals[name] = time.monotonic() - begun
            assert caught.value.field == f"sampling.structured_output.{next(iter(form))}"
        for form in HARMLESS.values():
            await client.generate(**options, structured_output=form).text()
        is_over.set()
        await watcher
    assert max(refusals.values()) < 2, refusals
    assert len(gaps) >= 3 and max(gaps) < 1, gaps


async def test_calls_stream_apart_from_the_text(tmp_path):
    """The scripted engine repeats the prompt, in which a call stands."""
    text = 'Well <tool_call>{"name": "clock", "arguments": {"zone": "é"}}</tool_call>'
    async with serving(tmp_path) as world:
        generation = world.client.generate(
            messages=[{"role": "user", "content": text}],
            tools=[CLOCK],
            max_tokens=len(f"<user>{text}".encode()),
        )
        events = [event async for event in generation]
    assert "".join(delta.text for delta in deltas(events)) == "<user>Well"
    assert calls_of(events) == [("clock", {"zone": "é"})]
    assert len([delta for delta in deltas(events) if delta.tool_calls]) > 5
    tokens = [token for delta in deltas(events) for token in delta.token_ids]
    assert bytes(tokens).decode() == f"<user>{text}"


async def test_a_call_that_is_broken_off_is_no_call_that_ended_the_output(tmp_path):
    """By a stop string within its arguments; the caller would take half of them for all."""
    text = '<tool_call>{"name": "clock", "arguments": {"zone": "Ulm"}}</tool_call>'
    async with serving(tmp_path) as world, serving_http(world.service) as api:
        for stop, arguments, reason in (
            ("Ulm", '{"zone": "', "stop"),
            ('"}}', '{"zone": "Ulm', "stop"),
            ("</tool", '{"zone": "Ulm"}', "tool_calls"),
        ):
            answer = await api.client.chat.completions.create(
                model="tiny",
                messages=[{"role": "user", "content": text}],
                tools=[CLOCK],
                max_tokens=len(f"<user>{text}"),
                n=2,
                logprobs=True,
                stop=[stop],
                temperature=1.0,
            )
            for choice in answer.choices:
                (call,) = choice.message.tool_calls
                assert (call.function.arguments, choice.finish_reason) == (arguments, reason)


async def test_in_a_form_no_calls_are_looked_for(tmp_path):
    """A form is a promise about the text; a call in it would be taken out."""
    text = '<tool_call>{"name": "clock", "arguments": {}}</tool_call>'
    prompt = f"<user>{text}"
    async with serving(tmp_path) as world:
        generation = world.client.generate(
            messages=[{"role": "user", "content": text}],
            tools=[CLOCK],
            structured_output={"regex": "(?s:.*)"},
            max_tokens=len(prompt),
        )
        events = [event async for event in generation]
    assert "".join(delta.text for delta in deltas(events)) == prompt
    assert not calls_of(events)


@pytest.mark.parametrize("name", ["auto", "none", "required"])
async def test_a_tool_may_be_named_as_a_choice_is(name, folder):
    tool = {"type": "function", "function": {"name": name, "parameters": SCHEMA}}
    async with (
        tiny_server.running_service(folder) as (service, _),
        serving_http(service) as api,
    ):
        answer = await api.client.chat.completions.create(
            model="tiny",
            messages=USER,
            tools=[CLOCK, tool],
            tool_choice={"type": "function", "function": {"name": name}},
            parallel_tool_calls=False,
            max_tokens=1000,
            seed=1,
        )
    (call,) = answer.choices[0].message.tool_calls
    assert call.function.name == name
    jsonschema.validate(json.loads(call.function.arguments), SCHEMA)

"""HTTP's API around a scripted engine, over real sockets: shapes, refusals, limits and ends."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from contextlib import asynccontextmanager

import httpx
import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai import AsyncOpenAI

from lora_runtime.core import FinishReason, StructureKind
from lora_runtime.errors import Overloaded, RequestFailed
from lora_runtime.text.tool_calls import ToolCallDelta
from loramux.server import http_connection
from loramux.server.adapters import changes
from loramux.server.calls import Delta, Finished, Started
from loramux.server.openai import body as bodies
from loramux.server.openai.json_text import encoded, encoded_in_parts
from loramux.server.openai.routes import OPERATIONS
from tests.server.access.keyring import ACME, OPERATOR, gate_of
from tests.server.http_api import Api, serving_http
from tests.server.world import until

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
HELLO = [{"role": "user", "content": "Hello"}]
MB = 1 << 20


@pytest.fixture
def api(serve):
    """`async with api() as (world, api)`: a world and its HTTP."""

    @asynccontextmanager
    async def start(max_calls: int = 100, **options):
        async with serve(**options) as world, serving_http(world.service, max_calls) as found:
            yield world, found

    return start


async def events(api: Api, path: str, **body) -> list[str]:
    """The data of each event of a stream, as bytes came."""
    answer = await api.post(path, stream=True, **body)
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    lines = answer.text.split("\n\n")
    assert lines.pop() == "" and all(line.startswith("data: ") for line in lines)
    return [line.removeprefix("data: ") for line in lines]


async def test_a_name_is_answered_by_what_it_names_and_never_by_the_base(api) -> None:
    async with api() as (world, api):
        await world.load("org/polite@v2", "p")
        for model, text in [("tiny", "hihi"), ("org/polite@v2", "pppp")]:
            answer = await api.client.completions.create(model=model, prompt="hi", max_tokens=4)
            assert answer.choices[0].text == text and answer.model == model
            assert answer.choices[0].finish_reason == "length"
            assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (2, 4)
        for model in ("absent", "Tiny", "org/polite", "../tiny", "a\n", "x" * 100_000):
            with pytest.raises(openai.NotFoundError) as caught:
                await api.client.chat.completions.create(model=model, messages=HELLO)
            assert caught.value.code == "model_not_found" and caught.value.param == "model"
            assert len(caught.value.message) < 400
            status, error = await api.error("/tokenize", prompt="hi", model=model)
            assert (status, error["param"]) == (404, "model")
        for body in ({}, {"model": ""}, {"model": None}):
            status, error = await api.error(COMPLETIONS, prompt="hi", **body)
            assert status == 400 and error["param"] == "model"
        assert len(world.engine.seen) == 2


async def test_no_path_leads_to_another_host(api) -> None:
    """A redirect would go to whatever host the request names."""
    paths = ["/metrics", "/healthz", "/readyz", "/health", *(each.path for each in OPERATIONS)]
    async with api() as (_, api):
        for path in [path.replace("{model:path}", "tiny") for path in paths]:
            for asked in (f"{path}/", f"/{path}", f"//evil{path}", f"{path}//", f"{path}/?a=b"):
                for method in ("GET", "POST"):
                    url = httpx.URL(api.url).copy_with(raw_path=asked.encode())
                    answer = await api.http.request(
                        method, url, json={}, headers={"host": "evil.example"}
                    )
                    assert answer.status_code in (404, 405), (asked, answer.status_code)
                    assert "location" not in answer.headers and "evil.ex" not in answer.text


async def test_models_are_the_base_and_its_adapters(api) -> None:
    async with api() as (world, api):
        await world.load("org/polite@v2", "p")
        base, adapter = (await api.client.models.list()).data
        assert (base.id, base.root, base.parent, base.max_model_len) == ("tiny", "tiny", None, 512)
        assert (adapter.id, adapter.parent) == ("org/polite@v2", "tiny")
        assert abs(adapter.created - time.time()) < 60
        assert await api.client.models.retrieve("org/polite@v2") == adapter
        assert await api.client.models.retrieve("tiny") == base
        with pytest.raises(openai.NotFoundError):
            await api.client.models.retrieve("absent")


async def test_what_is_doubtful_about_an_adapter_is_told_and_logged(api, monkeypatch) -> None:
    told = []
    monkeypatch.setattr(changes.logger, "warning", lambda event, **facts: told.append(facts))
    async with api() as (world, api):
        source = world.write_adapter("a", "a", notes=["it was made for another base"])
        answer = await api.post("/v1/load_lora_adapter", lora_name="a", lora_path=source)
        first, note = answer.text.splitlines()
        assert "added successfully" in first and note == "Note: it was made for another base"
    assert [facts["notes"] for facts in told] == [["it was made for another base"]]


async def test_adapters_come_and_go_as_vllm_and_its_controllers_have_it(api) -> None:
    async with api() as (world, api):
        source = world.write_adapter("a", "a")
        load = {"lora_name": "a", "lora_path": source}
        for _ in range(2):  # the second is a controller that asks again
            assert (await api.post("/v1/load_lora_adapter", **load)).status_code == 200
        other = {"lora_name": "a", "lora_path": world.write_adapter("b", "b")}
        status, error = await api.error("/v1/load_lora_adapter", **other)
        assert status == 409 and "with load_inplace" in error["message"]
        assert (await api.post("/v1/load_lora_adapter", load_inplace=True, **other)).is_success
        answer = await api.client.completions.create(model="a", prompt="hi", max_tokens=2)
        assert answer.choices[0].text == "bb"
        assert (await api.post("/v1/unload_lora_adapter", lora_name="a")).status_code == 200
        status, error = await api.error("/v1/unload_lora_adapter", lora_name="a")
        assert (status, error["code"], error["param"]) == (404, "model_not_found", "lora_name")
        status, error = await api.error("/v1/load_lora_adapter", **load | {"lora_name": "tiny"})
        assert (status, error["param"]) == (400, "lora_name")
        for path in ("/etc", "absent", ""):
            body = {"lora_name": "c", "lora_path": path}
            status, error = await api.error("/v1/load_lora_adapter", **body)
            assert (status, error["code"]) == (400, "adapter_source_refused")


async def test_a_stream_is_role_then_text_then_reason_then_usage(api) -> None:
    async with api() as (world, api):
        options = {"include_usage": True}
        *parts, last = await events(
            api, CHAT, model="tiny", messages=HELLO, max_tokens=6, stream_options=options
        )
        assert last == "[DONE]"
        role, *texts, reason, usage = map(json.loads, parts)
        assert role["choices"][0]["delta"] == {"role": "assistant", "content": ""}
        assert "".join(t["choices"][0]["delta"]["content"] for t in texts) == "<user>"
        assert reason["choices"][0]["finish_reason"] == "length"
        assert reason["choices"][0]["delta"] == {}
        assert usage["choices"] == [] and reason["usage"] is None
        assert usage["usage"] == {
            "prompt_tokens": 11,
            "completion_tokens": 6,
            "total_tokens": 17,
            "prompt_tokens_details": {"cached_tokens": 0},
        }
        assert len({part["id"] for part in (role, *texts, reason, usage)}) == 1
        assert all(part["object"] == "chat.completion.chunk" for part in texts)
        options = {"continuous_usage_stats": True}
        *parts, _ = await events(
            api, COMPLETIONS, model="tiny", prompt="ab", max_tokens=3, stream_options=options
        )
        counts = [json.loads(part)["usage"]["completion_tokens"] for part in parts]
        assert counts == [1, 2, 3, 3]


async def test_every_form_of_prompt_is_answered_in_its_place(api) -> None:
    async with api() as (_, api):
        for prompt, texts in [
            ("ab", ["aba"]),
            ([104, 105], ["hih"]),
            (["ab", "cd", "ef"], ["aba", "cdc", "efe"]),
            ([[104, 105], [97]], ["hih", "aaa"]),
        ]:
            given = {"model": "tiny", "prompt": prompt, "max_tokens": 3}
            answer = await api.client.completions.create(**given)
            assert [choice.text for choice in answer.choices] == texts
            assert [choice.index for choice in answer.choices] == list(range(len(texts)))
            found = [""] * len(texts)
            async for part in await api.client.completions.create(**given, stream=True):
                found[part.choices[0].index] += part.choices[0].text
            assert found == texts
        for prompt in ("", [], [[]], ["a", []], [1.5], [True], {"a": 1}, [["a"]], [999]):
            status, error = await api.error(COMPLETIONS, model="tiny", prompt=prompt)
            assert status == 400 and error["param"].startswith("prompt"), prompt


async def test_echo_gives_the_prompt_back_and_may_generate_nothing(api) -> None:
    async with api() as (_, api):
        given = {"model": "tiny", "echo": True}
        for prompt in ("hi", [104, 105]):
            answer = await api.client.completions.create(prompt=prompt, max_tokens=2, **given)
            assert answer.choices[0].text == "hihi"
            answer = await api.client.completions.create(prompt=prompt, max_tokens=0, **given)
            assert answer.choices[0].text == "hi" and answer.usage.completion_tokens == 0
        status, error = await api.error(COMPLETIONS, model="tiny", prompt="hi", max_tokens=0)
        assert (status, error["param"]) == (400, "max_tokens")


async def test_what_a_request_says_reaches_the_engine(api) -> None:
    async with api() as (world, api):
        await world.load("a", "a")
        await api.client.chat.completions.create(
            model="tiny",
            messages=[{"role": "user", "content": [{"type": "text", "text": "Hello"}]}],
            max_completion_tokens=7,
            temperature=0.5,
            top_p=0.9,
            seed=3,
            presence_penalty=0.25,
            frequency_penalty=0.5,
            logit_bias={"7": 2, "5": -1},
            logprobs=True,
            top_logprobs=2,
            response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": {}}},
            user="somebody",
            metadata={"a": "b"},
            store=False,
            extra_body={
                "top_k": 4,
                "min_p": 0.1,
                "min_tokens": 2,
                "repetition_penalty": 1.5,
                "stop_token_ids": [9],
                "cache_salt": "salt",
                "priority": -2,
                "adapters": [{"name": "a", "weight": 0.5}],
                "add_generation_prompt": True,
            },
        )
        (request,) = world.engine.seen
        found = request.sampling
        assert (found.max_tokens, found.min_tokens, found.top_k, found.seed) == (7, 2, 4, 3)
        assert (found.temperature, found.top_p, found.min_p) == (0.5, 0.9, 0.1)
        assert (found.presence_penalty, found.frequency_penalty) == (0.25, 0.5)
        assert found.repetition_penalty == 1.5 and found.logit_bias == ((5, -1.0), (7, 2.0))
        assert found.num_logprobs == 2 and 9 in found.stop_token_ids
        assert found.structured_output.kind is StructureKind.JSON_SCHEMA
        assert (request.cache_salt, request.priority) == ("salt", -2)
        assert [use.weight for use in request.adapters] == [0.5]
        assert request.client.startswith("ipv4:127.0.0.1:")


async def test_defaults_are_openais_for_tokens(api) -> None:
    async with api() as (_, api):
        answer = await api.client.completions.create(model="tiny", prompt="hi")
        assert answer.usage.completion_tokens == 16
        answer = await api.client.chat.completions.create(model="tiny", messages=HELLO)
        assert answer.usage.total_tokens == 512 and answer.choices[0].finish_reason == "length"


REFUSED = [
    (CHAT, {"nonsense": 1}, "nonsense"),
    (CHAT, {"tempreature": 1}, "tempreature"),
    (CHAT, {"temperature": "hot"}, "temperature"),
    (CHAT, {"temperature": True}, "temperature"),
    (CHAT, {"temperature": 101}, "temperature"),
    (CHAT, {"top_p": 0}, "top_p"),
    (CHAT, {"seed": -1}, "seed"),
    (CHAT, {"n": 0}, "n"),
    (CHAT, {"n": 10**9}, "n"),
    (CHAT, {"stop": ["a", 3]}, "stop[1]"),
    (CHAT, {"stop": [""]}, "stop[0]"),
    (CHAT, {"top_logprobs": 2}, "top_logprobs"),
    (CHAT, {"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    (CHAT, {"logprobs": True, "top_logprobs": -1}, "top_logprobs"),
    (CHAT, {"max_completion_tokens": 0}, "max_completion_tokens"),
    (CHAT, {"max_completion_tokens": 10**6}, "max_completion_tokens"),
    (CHAT, {"stream_options": {"include_usage": True}}, "stream_options"),
    (CHAT, {"guided_regex": "("}, "guided_regex"),
    (CHAT, {"guided_json": {"type": 5}}, "guided_json"),
    (CHAT, {"guided_choice": []}, "guided_choice"),
    (CHAT, {"guided_grammar": "start: ("}, "guided_grammar"),
    (CHAT, {"guided_grammar": 'root ::= "a'}, "guided_grammar"),
    (CHAT, {"structured_outputs": {"grammar": "root ::= other"}}, "structured_outputs.grammar"),
    (CHAT, {"structured_outputs": {"regex": "("}}, "structured_outputs.regex"),
    (CHAT, {"structured_outputs": {}}, "structured_outputs"),
    (CHAT, {"structured_outputs": {}, "guided_regex": "a"}, "structured_outputs"),
    (CHAT, {"structured_outputs": {}, "response_format": {"type": "json_object"}},
     "structured_outputs"),
    (CHAT, {"structured_outputs": {"json_object": False}}, "structured_outputs"),
    (CHAT, {"response_format": {"type": "text", "json_schema": {"name": "x"}}},
     "response_format.json_schema"),
    (CHAT, {"response_format": {"type": "json_object", "json_schema": {"schema": {}}}},
     "response_format.json_schema"),
    (CHAT, {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": 5}}}},
     "response_format"),
    (CHAT, {"logit_bias": {"x": 1}}, "logit_bias"),
    (CHAT, {"store": True}, "store"),
    (CHAT, {"audio": {}}, "audio"),
    (CHAT, {"functions": []}, "functions"),
    (CHAT, {"reasoning_effort": "high"}, "reasoning_effort"),
    (CHAT, {"service_tier": "flex"}, "service_tier"),
    (CHAT, {"modalities": ["text", "audio"]}, "modalities"),
    (CHAT, {"add_generation_prompt": False}, "add_generation_prompt"),
    (CHAT, {"continue_final_message": True}, "continue_final_message"),
    (CHAT, {"use_beam_search": 0}, "use_beam_search"),
    (CHAT, {"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens"),
    (CHAT, {"tool_choice": "required"}, "tool_choice"),
    (CHAT, {"adapters": [{"name": "absent"}]}, "adapters[0].name"),
    (CHAT, {"adapters": [{"name": "a", "strength": 1}]}, "adapters[0].strength"),
    (CHAT, {"guided_regex": "a", "response_format": {"type": "json_object"}}, "response_format"),
    (CHAT, {"response_format": {"type": "json_schema"}}, "response_format"),
    (CHAT, {"messages": [{"role": "user"}]}, "messages[0].content"),
    (CHAT, {"messages": [{"role": "robot", "content": ""}]}, "messages[0].role"),
    (CHAT, {"messages": []}, "messages"),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
     "messages[0].content[0].type"),
    (COMPLETIONS, {"best_of": 2}, "best_of"),
    (COMPLETIONS, {"suffix": "x"}, "suffix"),
    (COMPLETIONS, {"prompt": ["a"] * 129}, "prompt"),
    (COMPLETIONS, {"prompt": ["a"] * 65, "n": 2}, "prompt"),
    (COMPLETIONS, {"max_tokens": 10**6}, "max_tokens"),
    (COMPLETIONS, {"prompt": "x" * 100_000}, "prompt"),
    ("/v1/responses", {"previous_response_id": "resp_1"}, "previous_response_id"),
    ("/v1/responses", {"store": True}, "store"),
    ("/v1/responses", {"tools": [{"type": "web_search"}]}, "tools[0].type"),
    ("/v1/responses", {"reasoning": {"effort": "high"}}, "reasoning"),
    ("/v1/responses", {"max_output_tokens": 0}, "max_output_tokens"),
    ("/v1/responses", {"max_output_tokens": 10**6}, "max_output_tokens"),
    ("/v1/responses", {"input": "x" * 100_000}, "input"),
    ("/v1/responses", {"text": {"format": {"type": "json_object", "schema": {}}}},
     "text.format.schema"),
    ("/v1/responses", {"text": {"format": {"type": "json_schema", "schema": {"type": 5}}}},
     "text.format"),
    ("/tokenize", {"prompt": None}, "prompt"),
    ("/tokenize", {"add_special_tokens": False}, "add_special_tokens"),
    ("/detokenize", {"tokens": [1, -1]}, "tokens"),
    ("/detokenize", {"tokens": 5}, "tokens"),
    ("/v1/load_lora_adapter", {"lora_name": "a//b"}, "lora_name"),
    ("/v1/load_lora_adapter", {"lora_path": None}, "lora_path"),
]  # fmt: skip
GOOD = {
    CHAT: {"model": "tiny", "messages": HELLO},
    COMPLETIONS: {"model": "tiny", "prompt": "hi"},
    "/v1/responses": {"model": "tiny", "input": "hi"},
    "/tokenize": {"model": "tiny", "prompt": "hi"},
    "/detokenize": {"model": "tiny", "tokens": [104]},
    "/v1/load_lora_adapter": {"lora_name": "a", "lora_path": "a"},
}


async def test_what_is_not_served_is_refused_by_name(api) -> None:
    async with api() as (world, api):
        for path, fields, param in REFUSED:
            status, error = await api.error(path, **GOOD[path] | fields)
            where = (path, fields if len(str(fields)) < 200 else param, error)
            assert status == (404 if "absent" in str(fields) else 400), where
            assert error["param"] == param and error["type"] == "invalid_request_error", where
            ours = ["sampling.", "token_ids", *(["messages"] if "input" in GOOD[path] else [])]
            assert not any(name in error["message"] for name in ours), where
            is_too_long = "x" * 1000 in str(fields)
            assert (error["code"] == "context_length_exceeded") == is_too_long, where
            assert len(error["message"]) < 1100
        assert not world.engine.seen and not api.calls._tasks


MAX = {CHAT: "max_tokens", COMPLETIONS: "max_tokens", "/v1/responses": "max_output_tokens"}
# What vLLM takes besides, as its own request models have it.
OF_VLLM = {
    CHAT: {
        "allowed_token_ids": [1], "bad_words": ["x"], "best_of": 2, "chat_template": "x",
        "continue_final_message": True, "guided_decoding_backend": "xgrammar",
        "guided_whitespace_pattern": " ",
        "include_stop_str_in_output": True, "logits_processors": ["x"], "logprob_token_ids": [1],
        "mm_processor_kwargs": {}, "request_id": "x", "return_token_ids": True,
        "skip_special_tokens": False, "spaces_between_special_tokens": False,
        "structural_tag": "x", "truncate_prompt_tokens": 5, "vllm_xargs": {},
    },
    COMPLETIONS: {
        "allowed_token_ids": [1], "bad_words": ["x"], "guided_decoding_backend": "xgrammar",
        "include_stop_str_in_output": True, "prompt_embeds": "x", "return_token_ids": True,
        "skip_special_tokens": False, "truncate_prompt_tokens": 5,
    },
    "/v1/responses": {
        "ignore_eos": True, "include_stop_str_in_output": True, "logit_bias": {"5": 1},
        "presence_penalty": 1.0, "previous_input_messages": [], "request_id": "x",
        "skip_special_tokens": False, "stop": "x", "structured_outputs": {"regex": "x"},
    },
    "/tokenize": {"chat_template": "x", "mm_processor_kwargs": {}},
    "/v1/load_lora_adapter": {"base_model_name": "x", "is_3d_lora_weight": True, "lora_int_id": 1},
    "/v1/unload_lora_adapter": {"lora_int_id": 1},
}  # fmt: skip


async def test_what_vllm_has_besides_is_not_served_and_nothing_else_is_suggested(api) -> None:
    async with api() as (_, api):
        described = (await api.http.get("/openapi.json")).json()
        for path, fields in OF_VLLM.items():
            body = described["paths"][path]["post"]["requestBody"]["content"]["application/json"]
            name = body["schema"]["$ref"].rpartition("/")[2]
            properties = described["components"]["schemas"][name]["properties"]
            for field, value in fields.items():
                good = GOOD.get(path, {"lora_name": "a"})
                status, error = await api.error(path, **good | {field: value})
                assert (status, error["param"]) == (400, field), (path, error)
                assert error["message"].endswith("it is not served; leave it out"), error
                shown = properties[field]
                assert shown["description"] == "Not served." and value not in shown["enum"]
                for taken in shown["enum"]:
                    if path in (CHAT, COMPLETIONS, "/v1/responses"):
                        answer = await api.post(path, **good | {field: taken, MAX[path]: 1})
                        assert answer.status_code == 200, (path, field, taken)
        misspelt = await api.error(CHAT, **GOOD[CHAT] | {"guided_choise": ["a"]})
        assert misspelt[1]["message"].endswith("did you mean 'guided_choice'?")


async def test_fields_that_ask_for_nothing_are_taken(api) -> None:
    async with api() as (_, api):
        nothing = {
            "user": "me", "metadata": {"a": "b"}, "store": False, "service_tier": "auto",
            "parallel_tool_calls": True, "tools": None, "stop": None, "logit_bias": None,
            "modalities": ["text"], "prompt_cache_key": "k", "safety_identifier": "s",
            "verbosity": "medium", "length_penalty": 1, "use_beam_search": False, "seed": None,
            "max_tokens": 3,
        }  # fmt: skip
        assert (await api.post(CHAT, **GOOD[CHAT] | nothing)).status_code == 200


async def test_bodies_that_two_readers_could_read_differently_are_refused(api) -> None:
    async with api() as (world, api):
        good = '"model": "tiny", "max_tokens": 1'
        json_type = {"content-type": "application/json; charset=utf-8"}
        for content, status in [
            (f'{{{good}, "prompt": "hi"}}', 200),
            (f'{{{good}, "prompt": "hi", "prompt": "ho"}}', 400),
            (f'{{{good}, "prompt": "\\ud800"}}', 400),
            (f'{{{good}, "prompt": "hi", "temperature": NaN}}', 400),
            (f'{{{good}, "prompt": "hi", "temperature": 1e999}}', 400),
            (f'{{{good}, "prompt": {"[" * 100_000}{"]" * 100_000}}}', 400),
            (f'{{{good}, "prompt": "hi", "seed": {"9" * 5000}}}', 400),
            (f"{{{good}, {', '.join(f'{chr(34)}k{i}{chr(34)}: 1' for i in range(5000))}}}", 400),
            (b'{"model": "tiny", "prompt": "\xff"}', 400),
            ("[]", 400),
            ("", 400),
            ('{"model"', 400),
        ]:
            answer = await api.http.post(COMPLETIONS, content=content, headers=json_type)
            assert answer.status_code == status, (content[:100], answer.text)
            if status != 200:
                assert answer.json()["error"]["type"] == "invalid_request_error"
        for kind in ({}, {"content-type": "text/plain"}):
            answer = await api.http.post(COMPLETIONS, content=b"{}", headers=kind)
            assert answer.status_code == 415
        assert len(world.engine.seen) == 1


async def test_a_long_body_is_read_to_a_limit_and_leaves_the_loop_free(api, monkeypatch) -> None:
    async with api() as (_, api):
        body = {"model": "tiny", "prompt": "x" * (bodies.MAX_BODY_BYTES + 1)}
        status, error = await api.error(COMPLETIONS, **body)
        assert status == 413 and str(bodies.MAX_BODY_BYTES) in error["message"]
        monkeypatch.setattr(bodies, "MAX_BODIES_BYTES", 3 * MB)
        holding = asyncio.create_task(send_slowly(api, b'{"prompt": "' + b"x" * 2 * MB))
        async with asyncio.timeout(10):
            while (await api.error(COMPLETIONS, model="tiny", prompt="x" * 2 * MB))[0] != 429:
                await asyncio.sleep(0.05)
        holding.cancel()
        await asyncio.gather(holding, return_exceptions=True)
        async with asyncio.timeout(10):
            while (await api.error(COMPLETIONS, model="tiny", prompt="x" * 2 * MB))[0] != 400:
                await asyncio.sleep(0.05)


async def test_a_body_of_very_many_things_leaves_the_loop_free(api) -> None:
    """What checks them holds the interpreter: a short answer must not wait for it."""
    turn, part = {"role": "user", "content": "x"}, {"type": "text", "text": "x"}
    chat, base = {"model": "tiny", "messages": HELLO}, {"model": "tiny", "prompt": "hi"}
    bodies_of = {
        CHAT: [
            chat | {"messages": [turn] * 150_000},
            chat | {"messages": [{"role": "user", "content": [part] * 150_000}]},
        ],
        COMPLETIONS: [
            base | {"adapters": [{"name": "a"}] * 200_000},
            base | {"x" * (7 * MB): 1},
            base | {"temperature" * (MB // 2): 1},
        ],
    }
    async with api() as (_, api):
        assert (await api.post(CHAT, **chat | {"messages": [turn] * 50})).status_code == 200
        for path, asked in bodies_of.items():
            for body in asked:
                content = json.dumps(body).encode()
                task = asyncio.create_task(
                    api.http.post(
                        path, content=content, headers={"content-type": "application/json"}
                    )
                )
                worst = 0.0
                while not task.done():
                    begun = time.thread_time()
                    await asyncio.sleep(0)
                    worst = max(worst, time.thread_time() - begun)
                answer = task.result()
                assert answer.status_code == 400 and len(answer.content) < 1000
                assert worst < 0.2, (path, len(content), worst)


async def send_slowly(api: Api, content: bytes) -> None:
    """Send the beginning of a body and wait for ever."""
    reader, writer = await asyncio.open_connection("127.0.0.1", api.port)
    try:
        writer.write(head(COMPLETIONS, 4 * MB) + content)
        await writer.drain()
        await reader.read()
    finally:
        writer.close()


def head(path: str, size: int) -> bytes:
    return (
        f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        f"content-length: {size}\r\n\r\n"
    ).encode()


async def test_a_body_that_does_not_come_is_not_waited_for(api, monkeypatch) -> None:
    monkeypatch.setattr(bodies, "READ_S", 0.1)
    async with api() as (_, api):
        reader, writer = await asyncio.open_connection("127.0.0.1", api.port)
        writer.write(head(COMPLETIONS, 100) + b"{")
        assert b" 408 " in await reader.readline()
        writer.close()


CLIENT = "Content-Type: application/json\r\nContent-Length: 900\r\n\r\n{"
SLOW_ONES = {
    "nothing": "",
    "half a head": "GET /v1/models HTTP/1.1\r\nX-A: ",
    "an answer, and half a head": "GET /version HTTP/1.1\r\nHost: x\r\n\r\nGET /v1/models HT",
    "the body of what was refused": f"POST /nothing HTTP/1.1\r\nHost: x\r\n{CLIENT}",
}


@pytest.mark.parametrize("begun", SLOW_ONES.values(), ids=SLOW_ONES)
async def test_a_connection_that_sends_no_request_is_closed(api, monkeypatch, begun) -> None:
    """Also one that sends a byte now and then: anybody may open thousands."""
    monkeypatch.setattr(http_connection, "HEAD_S", 0.5)
    async with api() as (_, api):
        reader, writer = await asyncio.open_connection("127.0.0.1", api.port)
        writer.write(begun.encode())
        received = asyncio.create_task(reader.read())
        for _ in range(40):
            await asyncio.sleep(0.05)
            if received.done():
                break
            writer.write(b"x")
        assert received.done()
        await asyncio.gather(received, return_exceptions=True)
        writer.close()


async def test_a_slow_answer_is_no_idle_connection(api, monkeypatch) -> None:
    monkeypatch.setattr(http_connection, "HEAD_S", 0.2)
    async with api() as (world, api):
        world.engine.gate.clear()
        task = asyncio.create_task(api.post(COMPLETIONS, **GOOD[COMPLETIONS]))
        await asyncio.sleep(0.6)
        world.engine.gate.set()
        assert (await task).status_code == 200


async def test_a_reader_who_does_not_read_loses_its_connection_in_time(api, monkeypatch) -> None:
    monkeypatch.setattr(http_connection, "STALL_S", 0.5)
    async with api(max_model_len=15_000) as (world, api):
        body = GOOD[CHAT] | {"stream": True, "logprobs": True, "top_logprobs": 20}
        content = json.dumps(body).encode()
        _, writer = await asyncio.open_connection("127.0.0.1", api.port, limit=1 << 10)
        writer.write(head(CHAT, len(content)) + content)
        await until(lambda: bool(world.engine.running))
        await until(lambda: not world.engine.running and not api.calls._tasks)
        assert not world.engine.running and not api.calls._tasks
        writer.close()


async def test_a_slow_reader_of_one_long_answer_gets_all_of_it(api, monkeypatch) -> None:
    """More than sockets take, for several times what a stall may last."""
    monkeypatch.setattr(http_connection, "STALL_S", 0.5)
    async with api(max_model_len=8_000) as (_, api):
        body = GOOD[CHAT] | {"logprobs": True, "top_logprobs": 20, "max_tokens": 7_000}
        content = json.dumps(body).encode()
        with socket.socket() as raw:
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
            raw.setblocking(False)
            await asyncio.get_running_loop().sock_connect(raw, ("127.0.0.1", api.port))
            reader, writer = await asyncio.open_connection(sock=raw, limit=1 << 16)
            writer.write(head(CHAT, len(content)) + content)
            fields = (await reader.readuntil(b"\r\n\r\n")).decode().lower().split("\r\n")
            size = next(int(f.partition(":")[2]) for f in fields if f.startswith("content-length"))
            begun, received = time.monotonic(), 0
            while received < size:
                await asyncio.sleep(0.03)
                part = await reader.read(1 << 17)
                assert part, f"{received} of {size} bytes came"
                received += len(part)
            writer.close()
        assert time.monotonic() - begun > 1


@pytest.mark.parametrize("is_stream", [True, False])
async def test_a_closed_connection_ends_its_request(api, is_stream) -> None:
    async with api() as (world, api):
        engine = world.engine
        body = json.dumps(GOOD[COMPLETIONS] | {"max_tokens": 500, "stream": is_stream}).encode()
        engine.gate.clear()
        reader, writer = await asyncio.open_connection("127.0.0.1", api.port)
        writer.write(head(COMPLETIONS, len(body)) + body)
        await until(lambda: bool(engine.running))
        writer.close()
        await until(lambda: not engine.running)
        assert len(engine.aborted) == 1
        await until(lambda: not api.calls._tasks)
        assert world.observer.of("on_finished")[0][1] == "cancelled"


async def test_a_clients_own_timeout_ends_its_request(api) -> None:
    async with api() as (world, api):
        world.engine.gate.clear()
        with pytest.raises(openai.APITimeoutError):
            await api.client.with_options(timeout=0.2).completions.create(**GOOD[COMPLETIONS])
        await until(lambda: not world.engine.running)


async def test_an_error_in_a_stream_is_its_last_event(api) -> None:
    async with api() as (world, api):
        world.engine.failure = RequestFailed("secret of the server")
        *_, last = await events(api, CHAT, **GOOD[CHAT])
        error = json.loads(last)["error"]
        assert error["type"] == "server_error" and "secret" not in error["message"]
        with pytest.raises(openai.APIError, match="internal error"):
            async for _ in await api.client.chat.completions.create(**GOOD[CHAT], stream=True):
                pass
        with pytest.raises(openai.APIError):
            async for _ in await api.client.responses.create(model="tiny", input="a", stream=True):
                pass
        world.engine.failure = Overloaded("the pool is full")
        answer = await api.post(CHAT, **GOOD[CHAT])
        assert (answer.status_code, answer.headers["retry-after"]) == (429, "1")


async def test_one_prompt_that_fails_fails_the_request_and_frees_the_others(api) -> None:
    async with api() as (world, api):
        prompt = ["ab", "cd", [1, 2, 999]]
        for is_stream in (True, False):
            body = {"prompt": prompt, "max_tokens": 400, "stream": is_stream}
            assert (await api.error(COMPLETIONS, **GOOD[COMPLETIONS] | body))[0] == 400
            await until(lambda: not world.engine.running)


async def test_one_call_too_many_is_told_when_to_come_back(api) -> None:
    async with api(max_calls=2) as (world, api):
        world.engine.gate.clear()
        waiting = [asyncio.create_task(api.post(CHAT, **GOOD[CHAT])) for _ in range(2)]
        await until(lambda: len(world.engine.running) == 2)
        answer = await api.post(CHAT, **GOOD[CHAT])
        assert (answer.status_code, answer.headers["retry-after"]) == (429, "1")
        assert answer.json()["error"]["type"] == "rate_limit_error"
        retrying = AsyncOpenAI(base_url=f"{api.url}/v1", api_key="none", max_retries=5)
        async with retrying:
            late = asyncio.create_task(retrying.chat.completions.create(**GOOD[CHAT]))
            await asyncio.sleep(0.1)
            world.engine.gate.set()
            assert (await late).usage.total_tokens == 512
        assert all(answer.is_success for answer in await asyncio.gather(*waiting))


async def test_while_loading_and_draining_nothing_is_taken(api) -> None:
    async with api() as (_, api):
        api.service = None
        for path in (CHAT, COMPLETIONS, "/v1/responses", "/tokenize"):
            answer = await api.post(path, **GOOD[path])
            assert answer.status_code == 503 and answer.headers["retry-after"] == "5"
            assert answer.json()["error"]["code"] == "unavailable"
        assert (await api.http.get("/v1/models")).status_code == 503


async def test_a_stream_that_is_cut_at_the_end_of_the_drain_is_told_so(api) -> None:
    async with api() as (world, api):
        body = GOOD[CHAT] | {"stream": True}
        async with api.http.stream("POST", CHAT, json=body) as answer:
            lines = answer.aiter_lines()
            assert "role" in await anext(lines)
            world.engine.gate.clear()
            api.calls.cut()
            *_, last, end = [line async for line in lines]
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "unavailable"
        assert end == ""
        await until(lambda: not world.engine.running)


async def test_a_cut_before_anything_was_answered_has_a_status(api) -> None:
    async with api() as (world, api):
        world.engine.gate.clear()
        waiting = asyncio.create_task(api.error(CHAT, **GOOD[CHAT]))
        await until(lambda: bool(world.engine.running))
        api.calls.cut()
        status, error = await waiting
        assert (status, error["code"]) == (503, "unavailable")


async def test_an_adapter_unloaded_with_cancel_leaves_no_half_answer(api) -> None:
    async with api() as (world, api):
        await world.load("a", "a")
        world.engine.gate.clear()
        body = GOOD[CHAT] | {"model": "a"}
        waiting = asyncio.create_task(api.error(CHAT, **body))
        await until(lambda: bool(world.engine.running))
        unloading = asyncio.create_task(world.client.unload_adapter("a", cancel=True))
        await until(lambda: bool(world.engine._cancelled))
        world.engine.gate.set()
        assert (await waiting)[0] == 503
        await unloading


async def test_a_reader_who_does_not_read_holds_no_memory_and_no_other(api) -> None:
    async with api(max_model_len=15_000) as (world, api):
        body = GOOD[CHAT] | {"stream": True, "logprobs": True, "top_logprobs": 20}
        content = json.dumps(body).encode()
        _, writer = await asyncio.open_connection("127.0.0.1", api.port, limit=1 << 10)
        writer.write(head(CHAT, len(content)) + content)
        await until(lambda: bool(world.engine.running))
        answer = await api.client.completions.create(**GOOD[COMPLETIONS])
        assert answer.choices[0].text == "hi" * 8
        await asyncio.sleep(0.5)
        assert world.engine.running, "the engine's outputs were taken as if somebody read them"
        writer.close()
        await until(lambda: not world.engine.running)


async def test_a_request_has_its_callers_name_or_a_new_one(api) -> None:
    async with api() as (_, api):
        given = {"x-request-id": "mine-1"}
        answer = await api.http.post(CHAT, json=GOOD[CHAT], headers=given)
        assert answer.headers["x-request-id"] == "mine-1"
        assert answer.json()["id"] == "chatcmpl-mine-1"
        names = set()
        for bad in ("", "x" * 200, "a b"):
            answer = await api.http.post(CHAT, json={}, headers={"x-request-id": bad})
            assert answer.status_code == 400
            names.add(answer.headers["x-request-id"])
        assert len(names) == 3 and not names & {"", "x" * 200, "a b"}


async def test_tokens_are_shown_as_vllm_shows_them(api) -> None:
    async with api() as (_, api):
        text = {"model": "tiny", "prompt": "hé", "return_token_strs": True}
        found = (await api.post("/tokenize", **text)).json()
        assert found == {
            "count": 3, "max_model_len": 512, "tokens": [104, 195, 169],
            "token_strs": ["h", "bytes:\\xc3", "bytes:\\xa9"],
        }  # fmt: skip
        found = (await api.post("/detokenize", model="tiny", tokens=[104, 195, 169])).json()
        assert found == {"prompt": "hé"}
        found = (await api.post("/tokenize", messages=HELLO)).json()
        assert bytes(found["tokens"]) == b"<user>Hello"
        assert (await api.error("/tokenize", model="absent", prompt="a"))[0] == 404


async def test_unknown_routes_and_methods_have_openais_errors(api) -> None:
    async with api() as (_, api):
        for path, status in [("/v1/nothing", 404), ("/", 404), (CHAT, 405)]:
            answer = await api.http.get(path)
            assert answer.status_code == status
            assert answer.json()["error"]["type"] == "invalid_request_error"
        assert (await api.error("/v1/embeddings", model="tiny", input="a"))[0] == 400
        assert httpx.codes.is_success((await api.http.get("/version")).status_code)


async def test_calls_of_tools_come_in_parts_and_whole(api, monkeypatch) -> None:
    async def calling(call):
        assert [tool.name for tool in call.prompt.tools] == ["look", "ask"]
        assert call.prompt.tool_choice == "look"
        yield Started(request_id="a", num_prompt_tokens=3, notes=("mind the gap",))
        yield Delta(text="so", token_ids=(1,))
        yield Delta(text="", token_ids=(2,), tool_calls=(ToolCallDelta(0, "c0", "look", '{"a"'),))
        yield Delta(text="", token_ids=(3,), tool_calls=(ToolCallDelta(0, arguments=": 1}"),))
        yield Delta(text="", token_ids=(4,), tool_calls=(ToolCallDelta(1, "c1", "ask", "{}"),))
        yield Finished(
            finish_reason=FinishReason.STOP, num_prompt_tokens=3, num_output_tokens=4, timing=None
        )

    async with api() as (world, api):
        monkeypatch.setattr(world.service.generation, "generate", calling)
        given = GOOD[CHAT] | {
            "tools": [
                {
                    "type": "function",
                    "function": {"name": "look", "parameters": {"type": "object"}},
                },
                {"type": "function", "function": {"name": "ask"}},
            ],
            "tool_choice": {"type": "function", "function": {"name": "look"}},
        }
        answer = await api.client.chat.completions.create(**given)
        message = answer.choices[0].message
        found = [(c.id, c.function.name, c.function.arguments) for c in message.tool_calls]
        assert found == [("c0", "look", '{"a": 1}'), ("c1", "ask", "{}")]
        assert message.content == "so" and answer.notes == ["mind the gap"]
        parts = []
        async for chunk in await api.client.chat.completions.create(**given, stream=True):
            parts += chunk.choices[0].delta.tool_calls or []
        assert [(p.index, p.id, p.function.name, p.function.arguments) for p in parts] == [
            (0, "c0", "look", '{"a"'),
            (0, None, None, ": 1}"),
            (1, "c1", "ask", "{}"),
        ]


async def test_tools_are_bounded_as_a_prompt_is(api) -> None:
    tool = {"type": "function", "function": {"name": "look", "description": "x" * 600}}
    flat = {"type": "function", "name": "look", "parameters": {"x": ["y" * 600] * 1000}}
    deep: dict = {}
    for _ in range(400):
        deep = {"properties": {"a": deep}}
    nested = {"type": "function", "function": {"name": "look", "parameters": deep}}
    async with api() as (_, api):
        many = [tool | {"function": tool["function"] | {"name": f"f{n}"}} for n in range(120)]
        for path, more in (
            (CHAT, {"tools": many}),
            (CHAT, {"chat_template_kwargs": {"a": "x" * 70_000}}),
            ("/v1/responses", {"tools": [flat]}),
        ):
            status, error = await api.error(path, **GOOD[path] | more)
            assert status == 400 and "can be the" in error["message"] and error["param"] == "tools"
        for choice in ("auto", "required"):
            asked = GOOD[CHAT] | {"tools": [nested], "tool_choice": choice}
            assert (await api.post(CHAT, **asked)).status_code in (200, 400)


async def test_what_a_caller_must_know_is_in_the_answer(api) -> None:
    async with api() as (world, api):
        await world.load("quiet", "q", invocation_tokens=[1, 2, 3])
        for path in (CHAT, COMPLETIONS, "/v1/responses"):
            (note,) = (await api.post(path, **GOOD[path] | {"model": "quiet"})).json()["notes"]
            assert "was not invoked" in note


async def test_a_key_sees_its_own_adapters_and_changes_none(serve, tmp_path) -> None:
    gate = gate_of(tmp_path)
    async with (
        serve(gate=gate, api_key=OPERATOR) as world,
        serving_http(world.service, gate=gate) as api,
    ):
        for name in ("acme-a", "rival-b"):
            await world.load(name, name)
        acme = api.client.with_options(api_key=ACME)
        assert [model.id for model in (await acme.models.list()).data] == ["tiny", "acme-a"]
        await acme.completions.create(**GOOD[COMPLETIONS] | {"model": "acme-a"})
        assert world.engine.seen[-1].client == "tenant:acme"
        for ask in (
            acme.models.retrieve("rival-b"),
            acme.completions.create(**GOOD[COMPLETIONS] | {"model": "rival-b"}),
        ):
            with pytest.raises(openai.NotFoundError):
                await ask
        with pytest.raises(openai.PermissionDeniedError):
            body = {"lora_name": "acme-a"}
            await acme.post("/unload_lora_adapter", cast_to=str, body=body)
        with pytest.raises(openai.AuthenticationError):
            await api.client.models.list()
        assert len(world.engine.seen) == 1


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)  # fmt: skip


@given(JSON_VALUES, st.integers(0, 200))
def test_a_long_value_is_written_as_a_short_one_is(value, count) -> None:
    for each in (value, [value] * count, {"a": [value] * count, "b": value}):
        assert encoded_in_parts(each) == encoded(each)
        assert json.loads(encoded(each)) == each

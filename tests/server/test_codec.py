"""Requests become calls; what is not served is refused by name."""

from __future__ import annotations

import time
import tracemalloc

import pytest

from lora_runtime.core import AdapterChoice, FinishReason, StructuredOutput, StructureKind
from lora_runtime.errors import InvalidRequest, UnsupportedFeature
from lora_runtime.text.chat_prompt import ChatPrompt
from loramux.server.access.caller import ANONYMOUS
from loramux.server.calls import (
    AdapterState,
    Finished,
    PromptLimits,
    TextPrompt,
    TokenPrompt,
)
from loramux.server.fields import adapter_name
from loramux.server.rpc.codec import (
    FEATURES,
    REFUSED_FEATURES,
    decode_generate,
    decode_prompt,
    encode_event,
)
from loramux.v1.generation_pb2 import GenerateRequest, TokenizeRequest
from loramux.v1.types_pb2 import AdapterSelection, SamplingParams
from loramux.v1.types_pb2 import FinishReason as WireReason

LIMITS = PromptLimits(num_tokens=100, num_bytes=3200)


def decode(**fields: object):
    return decode_generate(GenerateRequest(**{"text": "hi", **fields}), None, LIMITS, ANONYMOUS)


def selections(**weights: float) -> list[AdapterSelection]:
    return [AdapterSelection(name=name, weight=weight) for name, weight in weights.items()]


def test_an_empty_request_has_the_documented_defaults() -> None:
    call = decode()
    assert call.prompt == TextPrompt("hi")
    assert (call.adapters, call.stop, call.ignore_eos, call.request_id) == ((), (), False, None)
    assert call.cache_salt == ""
    sampling = call.sampling
    assert (sampling.max_tokens, call.has_max_tokens, sampling.min_tokens) == (256, False, 0)
    assert (sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p) == (1, 0, 1, 0)
    assert (sampling.seed, sampling.num_logprobs, sampling.num_prompt_logprobs) == (None,) * 3
    assert (sampling.presence_penalty, sampling.frequency_penalty) == (0, 0)
    assert (sampling.repetition_penalty, sampling.logit_bias, call.num_outputs) == (1, (), 1)


def test_every_served_field_arrives() -> None:
    sampling = SamplingParams(
        max_tokens=7, min_tokens=2, temperature=0.7, top_k=5, top_p=0.9, min_p=0.1, seed=3,
        stop=["\n", "end"], stop_token_ids=[9, 8], ignore_eos=True, logprobs=0, n=4,
        presence_penalty=0.5, frequency_penalty=-2, repetition_penalty=1.5, prompt_logprobs=0,
        logit_bias={7: 2, 3: -100},
    )  # fmt: skip
    adapters = [AdapterSelection(name="a.b-c_1"), AdapterSelection(name="d", weight=-0.5)]
    call = decode(sampling=sampling, adapters=adapters, request_id="id 1", cache_salt="s ~")
    got = call.sampling
    assert (got.max_tokens, got.min_tokens, got.temperature, got.top_k) == (7, 2, 0.7, 5)
    assert (got.top_p, got.min_p, got.seed, got.num_logprobs) == (0.9, 0.1, 3, 0)
    assert got.stop_token_ids == {8, 9} and got.logit_bias == ((3, -100), (7, 2))
    assert (got.presence_penalty, got.frequency_penalty) == (0.5, -2)
    assert (got.repetition_penalty, got.num_prompt_logprobs, call.num_outputs) == (1.5, 0, 4)
    assert (call.stop, call.ignore_eos, call.has_max_tokens) == (("\n", "end"), True, True)
    assert call.adapters == (AdapterChoice("a.b-c_1", 1.0), AdapterChoice("d", -0.5))
    assert (call.request_id, call.cache_salt) == ("id 1", "s ~")


def test_the_three_kinds_of_input() -> None:
    chat = GenerateRequest()
    chat.messages.messages.add(role="user", content="hi")
    tokens = GenerateRequest(token_ids={"ids": [1, 2]})
    assert decode_generate(chat, None, LIMITS, ANONYMOUS).prompt == ChatPrompt(
        ({"role": "user", "content": "hi"},)
    )
    assert decode_generate(tokens, None, LIMITS, ANONYMOUS).prompt == TokenPrompt((1, 2))
    with pytest.raises(InvalidRequest) as caught:
        decode_generate(GenerateRequest(), None, LIMITS, ANONYMOUS)
    assert caught.value.field == "input"


def test_every_sampling_field_is_either_served_or_refused() -> None:
    fields = {f"sampling.{field.name}" for field in SamplingParams.DESCRIPTOR.fields}
    served = {name for name in FEATURES if name.startswith("sampling.")}
    refused = {name for name in REFUSED_FEATURES if name.startswith("sampling.")}
    assert served | refused == fields
    assert not served & refused


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"json_schema": "{}"}, StructuredOutput(StructureKind.JSON_SCHEMA, "{}")),
        ({"json_object": True}, StructuredOutput(StructureKind.JSON_OBJECT, "")),
        ({"regex": "a+"}, StructuredOutput(StructureKind.REGEX, "a+")),
        ({"grammar": "start: x"}, StructuredOutput(StructureKind.GRAMMAR, "start: x")),
        ({"choice": {"texts": ["a", "é"]}}, StructuredOutput(StructureKind.CHOICE, '["a", "é"]')),
    ],
)
def test_forms_are_decoded(given: dict, expected: StructuredOutput) -> None:
    assert decode(sampling={"structured_output": given}).sampling.structured_output == expected


def test_a_form_without_a_format_is_refused() -> None:
    with pytest.raises(InvalidRequest) as caught:
        decode(sampling={"structured_output": {}})
    assert caught.value.field == "sampling.structured_output"


def test_unserved_fields_may_hold_their_default() -> None:
    neutral = SamplingParams(
        presence_penalty=0, frequency_penalty=0, repetition_penalty=1, n=1, logit_bias={}
    )
    assert decode(sampling=neutral).sampling == decode().sampling


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"sampling": SamplingParams(temperature=-0.1)}, "sampling.temperature"),
        ({"sampling": SamplingParams(temperature=float("nan"))}, "sampling.temperature"),
        ({"sampling": SamplingParams(max_tokens=0)}, "sampling.max_tokens"),
        ({"sampling": SamplingParams(max_tokens=2, min_tokens=3)}, "sampling.min_tokens"),
        ({"sampling": SamplingParams(top_p=0)}, "sampling.top_p"),
        ({"sampling": SamplingParams(min_p=1.5)}, "sampling.min_p"),
        ({"sampling": SamplingParams(seed=-1)}, "sampling.seed"),
        ({"sampling": SamplingParams(logprobs=21)}, "sampling.logprobs"),
        ({"sampling": SamplingParams(prompt_logprobs=21)}, "sampling.prompt_logprobs"),
        ({"sampling": SamplingParams(presence_penalty=2.5)}, "sampling.presence_penalty"),
        ({"sampling": SamplingParams(frequency_penalty=-2.5)}, "sampling.frequency_penalty"),
        ({"sampling": SamplingParams(repetition_penalty=0)}, "sampling.repetition_penalty"),
        ({"sampling": SamplingParams(logit_bias={1: 101})}, "sampling.logit_bias"),
        ({"sampling": SamplingParams(logit_bias={1: float("nan")})}, "sampling.logit_bias"),
        (
            {"sampling": SamplingParams(logit_bias=dict.fromkeys(range(1025), 1))},
            "sampling.logit_bias",
        ),
        ({"sampling": SamplingParams(stop=["ok", ""])}, "sampling.stop[1]"),
        ({"sampling": SamplingParams(stop=["x" * 257])}, "sampling.stop[0]"),
        ({"sampling": SamplingParams(stop=["x"] * 17)}, "sampling.stop"),
        ({"adapters": [AdapterSelection()]}, "adapters[0].name"),
        ({"adapters": [AdapterSelection(name="")]}, "adapters[0].name"),
        ({"adapters": [AdapterSelection(name="../x")]}, "adapters[0].name"),
        ({"adapters": selections(a=1, b=1, c=float("nan"))}, "adapters[2].weight"),
        ({"adapters": selections(a=float("-inf"))}, "adapters[0].weight"),
        ({"adapters": selections(a=100.5)}, "adapters[0].weight"),
        ({"adapters": selections(a=1, b=-1e9)}, "adapters[1].weight"),
        ({"adapters": [*selections(a=1, b=1), *selections(a=2)]}, "adapters[2].name"),
        ({"adapters": [*selections(a=1), AdapterSelection(weight=1)]}, "adapters[1].name"),
        ({"adapters": selections(**{name: 1 for name in "abcdefghi"})}, "adapters"),
        ({"cache_salt": "a\n"}, "cache_salt"),
        ({"cache_salt": "é"}, "cache_salt"),
        ({"cache_salt": "x" * 129}, "cache_salt"),
        ({"tenant": "a\n"}, "tenant"),
        ({"tenant": "x" * 129}, "tenant"),
        ({"request_id": ""}, "request_id"),
        ({"request_id": "a\nb"}, "request_id"),
        ({"request_id": "x" * 129}, "request_id"),
    ],
)
def test_bad_values_name_their_field(fields: dict, field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        decode(**fields)
    assert caught.value.field == field
    assert field in caught.value.message
    assert not isinstance(caught.value, UnsupportedFeature)


def test_the_edges_of_what_adapters_and_salts_may_be() -> None:
    weights = {"a": 0, "b": -100, "c": 100, "d": 1e-9, "e": 1, "f": 1, "g": 1, "h": 1}
    call = decode(adapters=selections(**weights), cache_salt="x" * 128)
    assert {choice.name: choice.weight for choice in call.adapters} == weights
    assert len(call.cache_salt) == 128


@pytest.mark.parametrize(
    ("peers", "num_clients"),
    [
        (["ipv4:10.1.2.3:50000", "ipv4:10.1.2.3:50001"], 1),
        (["ipv4:10.1.2.3:50000", "ipv4:10.1.2.4:50000"], 2),
        (["ipv6:%5B2001:db8::1%5D:50000", "ipv6:[2001:db8::1]:50001"], 1),
        (["ipv6:%5B2001:db8::1%5D:50000", "ipv6:%5B2001:db8::a:2%5D:50000"], 1),
        (["ipv6:%5B2001:db8::1%5D:50000", "ipv6:%5B2001:db8:0:1::1%5D:50000"], 2),
        (["ipv6:%5Bfe80::1%25eth0%5D:5", "ipv6:%5Bfe80::2%25eth0%5D:5"], 2),
        (["ipv6:%5B::ffff:10.1.2.3%5D:5", "ipv4:10.1.2.3:6", "ipv6:%5B::ffff:10.1.2.4%5D:5"], 2),
        (["ipv6:%5Bno%5D:5", "ipv6:%5B%5D:5", "ipv4:x:5"], 3),
        (["ipv4:127.0.0.1:50000", "ipv4:127.0.0.1:50001"], 2),
        (["ipv6:%5B::1%5D:50000", "ipv6:%5B::1%5D:50001"], 2),
        (["unix:/tmp/a:1", "unix:/tmp/a:2", "unix:", ""], 4),
    ],
)
def test_a_client_is_its_tenant_or_else_its_address(peers: list[str], num_clients: int) -> None:
    request = GenerateRequest(text="Hello")
    assert (
        len({decode_generate(request, None, LIMITS, ANONYMOUS, peer).client for peer in peers})
        == num_clients
    )
    request.tenant = peers[0]
    assert {decode_generate(request, None, LIMITS, ANONYMOUS, peer).client for peer in peers} == {
        f"tenant:{peers[0]}"
    }


@pytest.mark.parametrize("priority", [-(2**31), -1, 0, 2**31 - 1])
def test_any_priority_is_served(priority: int) -> None:
    assert decode(priority=priority).priority == priority


def test_what_is_served_now_is_listed_so() -> None:
    assert {"adapters[].name", "adapters[].weight", "cache_salt"} <= set(FEATURES)
    assert not any(name.startswith(("adapters", "cache_salt")) for name in REFUSED_FEATURES)


@pytest.mark.parametrize("name", ["a", "A.b_c-1", "0" * 128, "org/name@v1.2", "a/b/c"])
def test_good_adapter_names(name: str) -> None:
    assert adapter_name(name) == name


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".a",
        "-a",
        "a b",
        "a\n",
        "\N{DIGIT ONE}\u0661",
        "x" * 129,
        "x/" * 64 + "x",
        "/a",
        "a/",
        "a//b",
        "a/../b",
        "a..b",
        "@a",
        "a/@b",
        "a/.b",
        "a:b",
        "a=b",
        "a\\b",
    ],
)
def test_bad_adapter_names(name: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        adapter_name(name)
    assert caught.value.field == "name"


@pytest.mark.parametrize("reason", [r for r in FinishReason if r is not FinishReason.ERROR])
def test_every_reason_an_output_can_end_with_has_a_wire_name(reason: FinishReason) -> None:
    event = Finished(finish_reason=reason, num_prompt_tokens=1, num_output_tokens=2, timing=None)
    message = encode_event(event).finished
    assert WireReason.Name(message.finish_reason) == f"FINISH_REASON_{reason.name}"
    assert not message.HasField("timing")


def test_every_state_has_a_wire_name() -> None:
    from loramux.v1.adapters_pb2 import AdapterState as WireState

    assert {f"ADAPTER_STATE_{state.name}" for state in AdapterState} == set(WireState.keys()) - {
        "ADAPTER_STATE_UNSPECIFIED"
    }


TOO_MUCH = {
    "text": ({"text": "é" * 1601}, "text"),
    "ids": ({"token_ids": {"ids": [1] * 101}}, "token_ids"),
    "turns": ({"messages": {"messages": [{"role": "user"}] * 101}}, "messages"),
    "a turn": ({"messages": {"messages": [{"role": "user", "content": "x" * 3201}]}}, "messages"),
    "a role": ({"messages": {"messages": [{"role": "x" * 3201}]}}, "messages"),
}


@pytest.mark.parametrize("case", TOO_MUCH)
def test_a_prompt_that_cannot_fit_is_refused_before_it_is_copied(case) -> None:
    fields, field = TOO_MUCH[case]
    with pytest.raises(InvalidRequest, match="at most") as caught:
        decode_generate(GenerateRequest(**fields), None, LIMITS, ANONYMOUS)
    assert caught.value.field == field
    if field != "token_ids":
        with pytest.raises(InvalidRequest, match="at most"):
            decode_prompt(TokenizeRequest(**fields), LIMITS)


def test_what_just_fits_is_decoded() -> None:
    assert decode(text="é" * 1600).prompt == TextPrompt("é" * 1600)
    tokens = GenerateRequest(token_ids={"ids": [1] * 100})
    assert decode_generate(tokens, None, LIMITS, ANONYMOUS).prompt == TokenPrompt((1,) * 100)


HUGE = {
    "token ids": ({"token_ids": {"ids": [5] * 8_000_000}}, "token_ids"),
    "text": ({"text": "x" * 8_000_000}, "text"),
    "turns": ({"messages": {"messages": [{}] * 2_000_000}}, "messages"),
    "stop ids": ({"sampling": {"stop_token_ids": [5] * 8_000_000}}, "sampling.stop_token_ids"),
    "adapters": ({"adapters": [{"name": "a"}] * 1_000_000}, "adapters"),
}


PROMPTS = ("token ids", "text", "turns")


@pytest.mark.parametrize("case", HUGE)
def test_a_huge_request_costs_little_more_than_its_bytes(case) -> None:
    """8 MB took 0.1 to 4 s and up to 600 MB as Python objects, on the event loop."""
    fields, field = HUGE[case]
    request = GenerateRequest(**{**({} if case in PROMPTS else {"text": "hi"}), **fields})
    tracemalloc.start()
    try:
        begun = time.process_time()
        with pytest.raises(InvalidRequest) as caught:
            decode_generate(request, None, LIMITS, ANONYMOUS)
        seconds, peak = time.process_time() - begun, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert caught.value.field == field
    assert seconds < 0.1 and peak < 20 << 20

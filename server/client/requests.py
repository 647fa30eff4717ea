"""What the Python clients send: keyword arguments become request messages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

from lora_runtime.errors import InvalidRequest, check_options
from protos.loramux.v1 import generation_pb2, types_pb2

Messages = Sequence[Mapping[str, Any]]


class Sampling(TypedDict, total=False):
    """How tokens are drawn; meanings and defaults: `SamplingParams` in types.proto."""

    max_tokens: int
    min_tokens: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    seed: int
    presence_penalty: float
    frequency_penalty: float
    repetition_penalty: float
    logit_bias: Mapping[int, float]
    stop: str | Sequence[str]
    stop_token_ids: Sequence[int]
    ignore_eos: bool
    logprobs: int
    prompt_logprobs: int
    n: int


BESIDE = ("request_id", "cache_salt", "base_text", "priority", "tenant")
"""Options that are fields of the request itself, not of its sampling."""
PROMPTS = ("text", "messages", "token_ids")
ADAPTERS = ("adapter", "adapters")


class Options(Sampling, total=False):
    """All options of a request; meanings and defaults: `GenerateRequest` in generation.proto."""

    request_id: str | None
    cache_salt: str | None
    base_text: bool
    priority: int
    tenant: str | None


def generate_request(
    text: str | None,
    messages: Messages | None,
    token_ids: Sequence[int] | None,
    adapters: Mapping[str, float],
    options: Options,
) -> generation_pb2.GenerateRequest:
    """Build a request. Raises InvalidRequest: several inputs, or a value that cannot be sent."""
    if sum(given is not None for given in (text, messages, token_ids)) > 1:
        raise InvalidRequest("give one of text, messages and token_ids", field="input")
    check_options(options, {*Options.__annotations__, *PROMPTS, *ADAPTERS})
    values: dict[str, Any] = {**options}
    if isinstance(values.get("stop"), str):
        values["stop"] = [values["stop"]]
    beside = {name: values.pop(name, None) for name in BESIDE}
    try:
        return generation_pb2.GenerateRequest(
            text=text,
            messages=_chat(messages),
            token_ids=None if token_ids is None else types_pb2.TokenIds(ids=token_ids),
            adapters=[
                types_pb2.AdapterSelection(name=name, weight=w) for name, w in adapters.items()
            ],
            sampling=types_pb2.SamplingParams(**values),
            **beside,
        )
    except (TypeError, ValueError) as error:
        raise InvalidRequest(f"a value cannot be sent: {error}") from None


def choose(adapter: str | None, adapters: Mapping[str, float] | None) -> Mapping[str, float]:
    """Return the weight of each adapter. Raises InvalidRequest where both arguments name some."""
    if adapter is not None and adapters is not None:
        raise InvalidRequest("give one of adapter and adapters", field="adapters")
    return adapters or {} if adapter is None else {adapter: 1.0}


def tokenize_request(text: str | None, messages: Messages | None) -> generation_pb2.TokenizeRequest:
    """Build a request. Raises InvalidRequest on two inputs."""
    if text is not None and messages is not None:
        raise InvalidRequest("give one of text and messages", field="input")
    return generation_pb2.TokenizeRequest(text=text, messages=_chat(messages))


def _chat(messages: Messages | None) -> types_pb2.ChatMessages | None:
    if messages is None:
        return None
    return types_pb2.ChatMessages(
        messages=[types_pb2.ChatMessage(**message) for message in messages]
    )

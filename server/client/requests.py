"""What the Python clients send: keyword arguments become request messages."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

from lora_runtime.errors import InvalidRequest, check_options, written
from loramux.v1 import generation_pb2, types_pb2

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
    structured_output: Mapping[str, Any]


BESIDE = ("request_id", "cache_salt", "base_text", "priority", "tenant")
"""Options that are fields of the request itself, not of its sampling."""
CHAT = ("tools", "tool_choice", "parallel_tool_calls", "template_variables")
"""Options that are fields of the conversation."""
PROMPTS = ("text", "messages", "token_ids")
ADAPTERS = ("adapter", "adapters")


class Options(Sampling, total=False):
    """All options of a request; meanings and defaults: `GenerateRequest` in generation.proto."""

    request_id: str | None
    cache_salt: str | None
    base_text: bool
    priority: int
    tenant: str | None
    tools: Sequence[Mapping[str, Any]]
    tool_choice: str
    parallel_tool_calls: bool
    template_variables: Mapping[str, Any]


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
    chat = {name: values.pop(name) for name in CHAT if values.get(name) is not None}
    if chat and messages is None:
        name = next(iter(chat))
        raise InvalidRequest(f"{name} is given without messages", field=name)
    if values.get("structured_output") is not None:
        values["structured_output"] = _structured_output(values["structured_output"])
    try:
        return generation_pb2.GenerateRequest(
            text=text,
            messages=_chat(messages, **chat),
            token_ids=None if token_ids is None else types_pb2.TokenIds(ids=token_ids),
            adapters=[
                types_pb2.AdapterSelection(name=name, weight=w) for name, w in adapters.items()
            ],
            sampling=_sampling(values),
            **beside,
        )
    except (TypeError, ValueError) as error:
        raise InvalidRequest(f"a value cannot be sent: {error}") from None


def _sampling(values: Mapping[str, Any]) -> types_pb2.SamplingParams:
    """Raises InvalidRequest naming the option: protobuf's own errors do not."""
    sampling = types_pb2.SamplingParams()
    for name, value in values.items():
        try:
            sampling.MergeFrom(types_pb2.SamplingParams(**{name: value}))
        except (TypeError, ValueError) as error:
            raise InvalidRequest(
                f"{name} is {written(value)}, which cannot be sent: {error}",
                field=f"sampling.{name}",
            ) from None
    return sampling


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


MODES = {
    "auto": types_pb2.TOOL_CHOICE_MODE_AUTO,
    "none": types_pb2.TOOL_CHOICE_MODE_NONE,
    "required": types_pb2.TOOL_CHOICE_MODE_REQUIRED,
}


def _chat(
    messages: Messages | None,
    tools: Sequence[Mapping[str, Any]] = (),
    tool_choice: str | None = None,
    parallel_tool_calls: bool | None = None,
    template_variables: Mapping[str, Any] | None = None,
) -> types_pb2.ChatMessages | None:
    """A conversation; calls and tools may be in the shape of OpenAI's API."""
    if messages is None:
        return None
    variables = None if template_variables is None else json.dumps(template_variables)
    return types_pb2.ChatMessages(
        messages=[types_pb2.ChatMessage(**_turn(message)) for message in messages],
        tools=[types_pb2.Tool(**_tool(tool)) for tool in tools],
        tool_choice=_tool_choice(tool_choice),
        parallel_tool_calls=parallel_tool_calls,
        template_variables=variables,
    )


def _turn(message: Mapping[str, Any]) -> dict[str, Any]:
    turn = dict(message)
    calls = turn.pop("tool_calls", None) or ()
    turn["tool_calls"] = [
        types_pb2.ToolCall(id=call.get("id", ""), **_function(call)) for call in calls
    ]
    return turn


def _function(call: Mapping[str, Any]) -> dict[str, Any]:
    function = call.get("function", call)
    return {"name": function["name"], "arguments": function.get("arguments", "{}")}


def _tool(tool: Mapping[str, Any]) -> dict[str, Any]:
    function = dict(tool.get("function", tool))
    if not isinstance(function.get("parameters"), str | None):
        function["parameters"] = json.dumps(function["parameters"])
    return function


def _tool_choice(choice: str | None) -> types_pb2.ToolChoice | None:
    if choice is None:
        return None
    if choice in MODES:
        return types_pb2.ToolChoice(mode=MODES[choice])
    return types_pb2.ToolChoice(name=choice)


def _structured_output(given: Mapping[str, Any]) -> types_pb2.StructuredOutput:
    """One of the message's fields; a schema may be a mapping, and choice is a list of texts."""
    values = dict(given)
    if isinstance(values.get("json_schema"), Mapping):
        values["json_schema"] = json.dumps(values["json_schema"])
    if "choice" in values:
        values["choice"] = types_pb2.Choices(texts=values["choice"])
    if len(values) != 1:
        field = "sampling.structured_output"
        raise InvalidRequest(f"{field} has {', '.join(values) or 'nothing'}; give one", field=field)
    try:
        return types_pb2.StructuredOutput(**values)
    except (TypeError, ValueError) as error:
        raise InvalidRequest(f"structured_output cannot be sent: {error}") from None

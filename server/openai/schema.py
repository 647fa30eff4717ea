"""What HTTP's API takes: pydantic models of its requests, from which /openapi.json is made too.

Every field is in one of three lists: a model's own fields are used; INERT ones ask for nothing
that changes an answer; of AS_DEFAULT ones only the value written there is taken, which asks for
what happens anyway, and where none is written none is taken. Any other is refused by its name, and
null is as good as absent. What OpenAI or vLLM has and this server has not stands in AS_DEFAULT: who
writes such a name has not misspelt another.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, TypeAlias, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, FailFast, Field, ValidationError

from lora_runtime.errors import InvalidRequest, UnsupportedFeature

MAX_CHOICES = 128
"""Prompts of one request, times outputs of each."""
MAX_TOOLS = 128
MAX_BIASED = 4096
_SHOWN = 80
"""Characters of a wrong value in the message about it."""

T = TypeVar("T")
Request = TypeVar("Request", bound="RequestModel")


class _FailFast(FailFast):
    """In a union, types are hashed."""

    __hash__ = object.__hash__


Items: TypeAlias = Annotated[list[T], _FailFast()]
"""A list of which the first wrong item is reported, and not each of a million."""


def _small(value: object) -> object:
    if isinstance(value, dict) and len(value) > MAX_BIASED:
        raise ValueError(f"has {len(value)} tokens; at most {MAX_BIASED} are taken")
    return value


class Model(BaseModel):
    """An object that knows its fields, and types as JSON has them."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class RequestModel(Model):
    """The body of a request."""

    INERT: ClassVar[frozenset[str]] = frozenset()
    """Fields without effect: they ask for nothing that changes an answer."""
    AS_DEFAULT: ClassVar[Mapping[str, tuple[Any, ...]]] = {}
    """Field → the values of it that ask for what happens anyway."""


def parse_request(model: type[Request], body: Mapping[str, Any]) -> Request:
    """Return a request's model. Raises InvalidRequest or UnsupportedFeature naming the field."""
    given = {name: value for name, value in body.items() if value is not None}
    for name in given.keys() - model.model_fields.keys() - model.INERT:
        if name not in model.AS_DEFAULT:
            close = difflib.get_close_matches(name[:_SHOWN], model.model_fields, n=1)
            advice = f"did you mean {close[0]!r}?" if close else "leave it out"
            raise InvalidRequest(
                f"{name[:_SHOWN]} is no field of this request; {advice}", field=name[:_SHOWN]
            )
        if not any(_is_same(given[name], value) for value in model.AS_DEFAULT[name]):
            raise UnsupportedFeature(
                f"{name} is {_shown(given[name])}: it is not served; leave it out", field=name
            )
    try:
        return model.model_validate(
            {name: value for name, value in given.items() if name in model.model_fields}
        )
    except ValidationError as error:
        raise _refused(error, given) from None


def _is_same(given: object, value: object) -> bool:
    return given == value and isinstance(given, bool) == isinstance(value, bool)


def _refused(error: ValidationError, body: Mapping[str, Any]) -> InvalidRequest:
    """Of a validation's errors the one that leads deepest into the body: of a union's branches that
    is the one that was meant.
    """
    errors = error.errors(include_url=False, include_context=False)
    found = [(_located(each, body), each) for each in errors]
    (path, value), worst = max(found, key=lambda pair: len(pair[0][0]))
    name = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)[1:]
    if worst["type"] == "missing":
        return InvalidRequest(f"{name} is missing", field=name)
    if worst["type"] == "extra_forbidden":
        return InvalidRequest(f"{name[:200]} is not known; leave it out", field=name)
    problem = worst["msg"].removeprefix("Value error, ")
    return InvalidRequest(f"{name} is {_shown(value)}: {problem}", field=name)


def _located(error: Mapping[str, Any], body: Mapping[str, Any]) -> tuple[list[int | str], Any]:
    """The path of an error in the body, without the names of a union's branches, and what is there;
    None where it is missing.
    """
    path: list[int | str] = []
    value: Any = body
    for part in error["loc"]:
        is_missing = error["type"] == "missing" and part == error["loc"][-1]
        is_key = isinstance(value, dict) and (part in value or is_missing)
        is_index = isinstance(value, list) and isinstance(part, int) and part < len(value)
        if is_key or is_index:
            path.append(part)
            value = None if is_missing else value[part]
    return path, value


def _shown(value: object) -> str:
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else "a list"
    text = repr(value[: _SHOWN + 1] if isinstance(value, str) else value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def _refused_always(*names: str) -> dict[str, tuple[Any, ...]]:
    return dict.fromkeys(names, ())


class WeightedAdapter(Model):
    """One of several adapters that act on a request."""

    name: str
    weight: float = 1.0


class StreamOptions(Model):
    """What a stream shows beside the text."""

    include_usage: bool = False
    """A last chunk has the usage and no choice."""
    continuous_usage_stats: bool = False
    """Every chunk has the usage so far."""
    include_obfuscation: Literal[False] = False


class JsonSchema(Model):
    """A schema, as response_format has it."""

    name: str = ""
    description: str | None = None
    schema_: dict[str, Any] = Field(default_factory=dict, alias="schema")
    strict: bool | None = None


class ResponseFormat(Model):
    """What an output must look like."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class StructuredOutputs(Model):
    """What an output must look like, in vLLM's words; exactly one of them."""

    json_: dict[str, Any] | str | None = Field(default=None, alias="json")
    json_object: bool | None = None
    regex: str | None = None
    choice: Items[str] | None = None
    grammar: str | None = None


class SampledRequest(RequestModel):
    """What completions and chats have in common."""

    model: str = Field(min_length=1)
    max_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    n: int = Field(default=1, ge=1, le=MAX_CHOICES)
    seed: int | None = None
    stop: str | Items[str] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Annotated[dict[str, float], BeforeValidator(_small)] | None = None
    response_format: ResponseFormat | None = None

    adapters: Items[WeightedAdapter] | None = None
    base_text: bool = False
    top_k: int = 0
    min_p: float = 0.0
    min_tokens: int = 0
    repetition_penalty: float = 1.0
    stop_token_ids: Items[int] | None = None
    ignore_eos: bool = False
    cache_salt: str = ""
    priority: int = 0
    prompt_logprobs: int | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: Items[str] | None = None
    guided_grammar: str | None = None

    INERT = frozenset({"user", "metadata"})
    AS_DEFAULT: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "use_beam_search": (False,),
        "length_penalty": (1.0,),
        "bad_words": ([],),
        "include_stop_str_in_output": (False,),
        "skip_special_tokens": (True,),
        "spaces_between_special_tokens": (True,),
        "add_special_tokens": (True,),
        "return_token_ids": (False,),
        "return_tokens_as_token_ids": (False,),
        **_refused_always(
            "allowed_token_ids", "ec_transfer_params", "guided_decoding_backend",
            "guided_whitespace_pattern", "kv_transfer_params", "logits_processors",
            "logprob_token_ids", "repetition_detection", "request_id", "stream_interval",
            "structural_tag", "truncate_prompt_tokens", "truncation_side", "vllm_xargs",
            "watermarking",
        ),
    }  # fmt: skip


class CompletionRequest(SampledRequest):
    """POST /v1/completions."""

    prompt: Any = Field(
        json_schema_extra={
            "anyOf": [
                {"type": "string"},
                {"type": "array", "items": {"type": "string"}},
                {"type": "array", "items": {"type": "integer"}},
                {"type": "array", "items": {"type": "array", "items": {"type": "integer"}}},
            ]
        }
    )
    """A text, token ids, or a list of either."""
    echo: bool = False
    logprobs: int | None = None
    best_of: int | None = None

    AS_DEFAULT = {
        **SampledRequest.AS_DEFAULT,
        "suffix": ("",),
        **_refused_always("prompt_embeds"),
    }


class TextPart(Model):
    """A part of a message."""

    type: Literal["text", "input_text", "output_text"]
    text: str
    annotations: list[Any] = Field(default_factory=list, max_length=0)
    logprobs: list[Any] = Field(default_factory=list, max_length=0)


class CalledFunction(Model):
    """The function that the assistant called."""

    name: str
    arguments: str = ""


class CalledTool(Model):
    """A call that a turn of the assistant made."""

    id: str = ""
    type: Literal["function"] = "function"
    function: CalledFunction
    index: int | None = None


class Message(Model):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Items[TextPart] | None = None
    name: str | None = None
    tool_calls: Items[CalledTool] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    """Another name of `reasoning_content`."""
    refusal: Literal[None] = None
    audio: Literal[None] = None
    function_call: Literal[None] = None
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None


class ToolFunction(Model):
    """What the assistant may call."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ToolDefinition(Model):
    """A tool: a function."""

    type: Literal["function"]
    function: ToolFunction


class ChosenFunction(Model):
    """The name of a function."""

    name: str


class ChosenTool(Model):
    """The tool that is to be called."""

    type: Literal["function"]
    function: ChosenFunction


class ChatRequest(SampledRequest):
    """POST /v1/chat/completions."""

    messages: Items[Message] = Field(min_length=1)
    max_completion_tokens: int | None = None
    logprobs: bool = False
    top_logprobs: int = 0
    tools: Annotated[Items[ToolDefinition], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | ChosenTool | None = None
    parallel_tool_calls: bool = True
    include_reasoning: bool = True
    """False: what the model thinks is not shown."""
    chat_template_kwargs: dict[str, Any] | None = None

    INERT = SampledRequest.INERT | {
        "safety_identifier", "prompt_cache_key", "prompt_cache_retention"
    }  # fmt: skip
    AS_DEFAULT = {
        **SampledRequest.AS_DEFAULT,
        "add_special_tokens": (False,),
        "add_generation_prompt": (True,),
        "continue_final_message": (False,),
        "echo": (False,),
        "store": (False,),
        "service_tier": ("auto", "default"),
        "modalities": (["text"],),
        "verbosity": ("medium",),
        **_refused_always(
            "audio", "best_of", "chat_template", "documents", "function_call", "functions",
            "media_io_kwargs", "mm_processor_kwargs", "moderation",
            "prediction", "prompt_cache_options", "reasoning_effort", "thinking_token_budget",
            "web_search_options",
        ),
    }  # fmt: skip


class InputMessage(Model):
    """A message of a Responses request."""

    type: Literal["message"]
    role: Literal["system", "developer", "user", "assistant"]
    content: str | Items[TextPart]
    id: str | None = None
    status: str | None = None
    phase: Literal["commentary", "final_answer"] | None = None


class FunctionCall(Model):
    """A call of a function that the assistant made, as a response had it."""

    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str
    id: str | None = None
    status: str | None = None
    namespace: Literal[None] = None
    caller: Literal[None] = None
    async_: Literal[None, False] = Field(default=None, alias="async")


class FunctionCallOutput(Model):
    """What a function answered."""

    type: Literal["function_call_output"]
    call_id: str
    output: str | Items[TextPart]
    name: str | None = None
    id: str | None = None
    status: str | None = None
    namespace: Literal[None] = None
    caller: Literal[None] = None


class ReasoningText(Model):
    """A part of what was thought."""

    type: Literal["reasoning_text"]
    text: str


class Reasoning(Model):
    """What the assistant thought, as a response had it."""

    type: Literal["reasoning"]
    content: Items[ReasoningText] | None = None
    summary: Annotated[list[Any], Field(max_length=0)] | None = None
    encrypted_content: Literal[None] = None
    id: str | None = None
    status: str | None = None


def _as_message(item: object) -> object:
    """An item without a type is a message."""
    return {"type": "message", **item} if isinstance(item, dict) else item


InputItem: TypeAlias = Annotated[
    Annotated[
        InputMessage | FunctionCall | FunctionCallOutput | Reasoning, Field(discriminator="type")
    ],
    BeforeValidator(_as_message),
]


class FunctionTool(Model):
    """A tool of a Responses request, which writes a function flat."""

    type: Literal["function"]
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ChosenFunctionTool(Model):
    """The tool that is to be called."""

    type: Literal["function"]
    name: str


class SchemaFormat(Model):
    """What a response must look like; the Responses API writes a schema flat."""

    type: Literal["text", "json_object", "json_schema"]
    name: str = ""
    description: str | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool | None = None


class TextOptions(Model):
    """How the text of a response looks."""

    format: SchemaFormat | None = None
    verbosity: Literal["medium"] | None = None


class ResponsesRequest(RequestModel):
    """POST /v1/responses."""

    model: str = Field(min_length=1)
    input: str | Annotated[Items[InputItem], Field(min_length=1)]
    instructions: str | None = None
    max_output_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    stream: bool = False
    text: TextOptions | None = None
    tools: Annotated[Items[FunctionTool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | ChosenFunctionTool | None = None
    parallel_tool_calls: bool = True
    chat_template_kwargs: dict[str, Any] | None = None
    metadata: dict[str, str] | None = None

    adapters: Items[WeightedAdapter] | None = None
    base_text: bool = False
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    cache_salt: str = ""
    priority: int = 0

    INERT = frozenset({"user", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"})
    AS_DEFAULT = {
        "background": (False,),
        "include": ([],),
        "service_tier": ("auto", "default"),
        "store": (False,),
        "stream_options": ({}, {"include_obfuscation": False}),
        "top_logprobs": (0,),
        "truncation": ("disabled",),
        "reasoning": ({},),
        "presence_penalty": (0.0,),
        "frequency_penalty": (0.0,),
        "repetition_penalty": (1.0,),
        "ignore_eos": (False,),
        "include_stop_str_in_output": (False,),
        "skip_special_tokens": (True,),
        "enable_response_messages": (False,),
        **_refused_always(
            "background_options", "chat_template", "context_management", "conversation",
            "kv_transfer_params", "logit_bias", "max_tool_calls",
            "media_io_kwargs", "mm_processor_kwargs", "moderation", "previous_input_messages",
            "previous_response_id", "prompt", "prompt_cache_options", "request_id", "stop",
            "structured_outputs", "vllm_xargs",
        ),
    }  # fmt: skip


class TokenizeRequest(RequestModel):
    """POST /tokenize: a text, or a conversation."""

    model: str | None = None
    prompt: str | None = None
    messages: Items[Message] | None = None
    tools: Annotated[Items[ToolDefinition], Field(max_length=MAX_TOOLS)] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_special_tokens: bool | None = None
    """Of a text true, of a conversation false: its template has them."""
    return_token_strs: bool = False

    AS_DEFAULT = {
        "add_generation_prompt": (True,),
        "continue_final_message": (False,),
        **_refused_always("chat_template", "media_io_kwargs", "mm_processor_kwargs"),
    }


class DetokenizeRequest(RequestModel):
    """POST /detokenize."""

    model: str | None = None
    tokens: Any = Field(json_schema_extra={"type": "array", "items": {"type": "integer"}})


class LoadAdapterRequest(RequestModel):
    """POST /v1/load_lora_adapter."""

    lora_name: str
    lora_path: str
    load_inplace: bool = False
    """The name may hold other content, which is replaced."""

    AS_DEFAULT = {
        "is_3d_lora_weight": (False,),
        **_refused_always("base_model_name", "lora_int_id"),
    }


class UnloadAdapterRequest(RequestModel):
    """POST /v1/unload_lora_adapter."""

    lora_name: str

    AS_DEFAULT = _refused_always("lora_int_id")

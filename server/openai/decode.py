"""From a request's model to the service's words; pure functions."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from lora_runtime.core import (
    MAX_STOP_TOKEN_IDS,
    AdapterChoice,
    SamplingParams,
    StructuredOutput,
    StructureKind,
    is_whole,
)
from lora_runtime.engine.request_rules import check_choices, check_count, check_stops, logit_bias
from lora_runtime.errors import (
    InvalidRequest,
    LoramuxError,
    UnsupportedFeature,
)
from lora_runtime.text.chat_prompt import ChatPrompt, Tool, ToolMode
from loramux.server.calls import GenerateCall, Prompt, PromptLimits, TextPrompt, TokenPrompt
from loramux.server.fields import (
    MAX_NAME_LENGTH,
    adapter_name,
    check_bytes,
    check_tokens,
    not_loaded,
    printable,
)
from loramux.server.openai.boundary import Exchange
from loramux.server.openai.schema import (
    MAX_CHOICES,
    CalledFunction,
    CalledTool,
    ChatRequest,
    ChosenFunctionTool,
    ChosenTool,
    CompletionRequest,
    FunctionCall,
    FunctionCallOutput,
    FunctionTool,
    InputItem,
    InputMessage,
    Message,
    Reasoning,
    ResponsesRequest,
    SampledRequest,
    SchemaFormat,
    StreamOptions,
    StructuredOutputs,
    TextPart,
    ToolFunction,
    WeightedAdapter,
    parse_request,
)

COMPLETION_TOKENS = 16
"""What a completion has at most where max_tokens is absent, as in OpenAI's API."""
ALL_THAT_FITS = 2**31 - 1

AnyFunction = ToolFunction | FunctionTool
ToolChoice = str | ChosenTool | ChosenFunctionTool | None


def completion_calls(exchange: Exchange) -> tuple[CompletionRequest, list[GenerateCall]]:
    """Translate a completion: one call for each of its prompts."""
    request = parse_request(CompletionRequest, exchange.body)
    if request.best_of not in (None, request.n):
        raise UnsupportedFeature(
            f"best_of is {request.best_of} and n is {request.n}: choosing among more outputs is "
            "not served; leave best_of out",
            field="best_of",
        )
    prompts = _prompts(request.prompt, exchange.service.prompts.limits)
    if len(prompts) * request.n > MAX_CHOICES:
        raise InvalidRequest(
            f"prompt and n ask for {len(prompts)} x {request.n} outputs; at most {MAX_CHOICES} "
            "are made for one request",
            field="prompt",
        )
    most = exchange.caller.limits.max_requests
    if most is not None and len(prompts) * request.n > max(1, most):
        raise InvalidRequest(
            f"prompt and n ask for {len(prompts)} x {request.n} outputs; each counts as a request, "
            f"and tenant {exchange.caller.tenant!r} may have {most}",
            field="prompt",
        )
    if request.max_tokens == 0 and not request.echo:
        raise InvalidRequest("max_tokens is 0: ask for one or set echo", field="max_tokens")
    given = {
        "max_tokens": COMPLETION_TOKENS if request.max_tokens is None else request.max_tokens or 1,
        "num_logprobs": request.logprobs,
        "num_prompt_logprobs": _most(
            request.prompt_logprobs, request.logprobs if request.echo else None
        ),
    }
    return request, [
        _call(request, exchange, prompt, given, request.max_tokens is not None, index)
        for index, prompt in enumerate(prompts)
    ]


def chat_call(exchange: Exchange) -> tuple[ChatRequest, GenerateCall]:
    """Translate a chat."""
    request = parse_request(ChatRequest, exchange.body)
    if request.top_logprobs and not request.logprobs:
        raise InvalidRequest(
            f"top_logprobs is {request.top_logprobs} without logprobs; set logprobs to true",
            field="top_logprobs",
        )
    tools = [each.function for each in request.tools or ()]
    wanted = request.max_completion_tokens
    if wanted is not None and request.max_tokens not in (None, wanted):
        raise InvalidRequest(
            f"max_tokens is {request.max_tokens} and max_completion_tokens is {wanted}; give one",
            field="max_tokens",
        )
    wanted = request.max_tokens if wanted is None else wanted
    given = {
        "max_tokens": ALL_THAT_FITS if wanted is None else wanted,
        "num_logprobs": request.top_logprobs if request.logprobs else None,
        "num_prompt_logprobs": request.prompt_logprobs,
    }
    prompt = chat_prompt(
        request.messages,
        exchange.service.prompts.limits,
        tools,
        _tool_choice(request.tool_choice, tools),
        request.chat_template_kwargs,
        parallel_tool_calls=request.parallel_tool_calls,
    )
    with named_as_given(names_given(request)):
        return request, _call(request, exchange, prompt, given, wanted is not None)


def names_given(request: SampledRequest | ResponsesRequest) -> dict[str, str]:
    """Fields of our own calls → the fields of a request that say the same, where these are others
    than in the calls, or it has a choice of them.
    """
    names = {} if request.adapters else {"adapters[0].name": "model"}
    if (form := _given_form(request)) is not None:
        own = "sampling.structured_output"
        names |= {own: form.field, f"{own}.{form.kind}": form.field}
    if isinstance(request, ResponsesRequest):
        names |= {"sampling.max_tokens": "max_output_tokens", "messages": "input"}
    elif isinstance(request, ChatRequest):
        names["sampling.logprobs"] = "top_logprobs"
        if request.max_completion_tokens is not None:
            names["sampling.max_tokens"] = "max_completion_tokens"
    return names


@contextmanager
def named_as_given(names: Mapping[str, str]) -> Iterator[None]:
    """Raise errors about fields of our own calls as errors about those of the request."""
    try:
        yield
    except LoramuxError as error:
        if (own := error.field or "") in names:
            if error.message.startswith(f"{own} "):
                error.message = names[own] + error.message.removeprefix(own)
                error.args = (error.message,)
            error.field = names[own]
        raise


def responses_call(exchange: Exchange) -> tuple[ResponsesRequest, GenerateCall]:
    """Translate a request of the Responses API into a chat."""
    request = parse_request(ResponsesRequest, exchange.body)
    if isinstance(request.input, str):
        messages = [Message(role="user", content=request.input)]
    else:
        messages = _messages(request.input)
    if request.instructions is not None:
        messages.insert(0, Message(role="system", content=request.instructions))
    tools = request.tools or []
    prompt = chat_prompt(
        messages,
        exchange.service.prompts.limits,
        tools,
        _tool_choice(request.tool_choice, tools),
        request.chat_template_kwargs,
        parallel_tool_calls=request.parallel_tool_calls,
        field="input",
    )
    wanted = request.max_output_tokens
    with named_as_given(names_given(request)):
        sampling = SamplingParams(
            max_tokens=ALL_THAT_FITS if wanted is None else wanted,
            temperature=request.temperature,
            top_p=request.top_p,
            top_k=request.top_k,
            min_p=request.min_p,
            seed=request.seed,
            structured_output=_form(request),
        )
    return request, GenerateCall(
        caller=exchange.caller,
        prompt=prompt,
        adapters=adapters(request.model, request.adapters, exchange),
        uses_base_text=request.base_text,
        sampling=sampling,
        has_max_tokens=wanted is not None,
        request_id=exchange.request_id,
        client=exchange.client,
        priority=_priority(request.priority),
        cache_salt=printable(request.cache_salt, "cache_salt"),
    )


def chat_prompt(
    messages: Sequence[Message],
    limits: PromptLimits,
    tools: Sequence[AnyFunction] = (),
    tool_choice: ToolMode | str = ToolMode.AUTO,
    template_variables: dict[str, Any] | None = None,
    *,
    parallel_tool_calls: bool = True,
    field: str = "messages",
) -> ChatPrompt:
    """Translate a conversation. Raises InvalidRequest where it is so large that it cannot fit."""
    check_tokens(len(messages), field, limits)
    turns = tuple(_turn(message, f"{field}[{i}]") for i, message in enumerate(messages))
    check_bytes(sum(len(str(value).encode()) for t in turns for value in t.values()), field, limits)
    given = [[t.name, t.description, t.parameters] for t in tools], template_variables
    check_bytes(_num_bytes(given), "tools", limits)
    return ChatPrompt(
        messages=turns,
        tools=tuple(Tool(t.name, t.description or "", t.parameters, bool(t.strict)) for t in tools),
        tool_choice=tool_choice,
        parallel_tool_calls=parallel_tool_calls,
        template_variables=template_variables or {},
    )


def adapters(
    model: str, added: Sequence[WeightedAdapter] | None, exchange: Exchange
) -> tuple[AdapterChoice, ...]:
    """Return the adapters that a request names, as its model or beside the base.

    A name that is not the base's is an adapter's, or nobody's: the base never answers for it.
    Raises InvalidRequest naming the field.
    """
    if model == exchange.service.facts.base_name:
        check_count(len(added or ()))
        choices = tuple(
            AdapterChoice(adapter_name(each.name, f"adapters[{index}].name"), each.weight)
            for index, each in enumerate(added or ())
        )
        check_choices(choices)
        return choices
    if added:
        raise InvalidRequest(
            f"adapters is given beside model {model[:128]!r}; name the base "
            f"{exchange.service.facts.base_name!r} as model, and every adapter in adapters",
            field="adapters",
        )
    return (AdapterChoice(model_adapter(model)),)


def model_adapter(model: str) -> str:
    """Return the adapter's name that a model's is. Raises AdapterNotFound (field `model`) for what
    no adapter can be called: nothing is looked for under it, on demand neither.
    """
    try:
        return adapter_name(model)
    except InvalidRequest:
        raise not_loaded(model[:MAX_NAME_LENGTH], "model") from None


def token_ids(value: Any, field: str, limits: PromptLimits) -> TokenPrompt:
    """Return a list of token ids as a prompt. Raises InvalidRequest naming `field`."""
    if not isinstance(value, list):
        raise InvalidRequest(f"{field} must be a list of token ids", field=field)
    check_tokens(len(value), field, limits)
    for index, token_id in enumerate(value):
        if not is_whole(token_id):
            raise InvalidRequest(
                f"{field}[{index}] is {token_id!r:.80}; it must be a token id", field=field
            )
    return TokenPrompt(tuple(value))


def text_prompt(text: str, field: str, limits: PromptLimits) -> TextPrompt:
    """Return a text as a prompt. Raises InvalidRequest where it cannot fit."""
    check_bytes(len(text.encode()), field, limits)
    return TextPrompt(text)


def _call(
    request: SampledRequest,
    exchange: Exchange,
    prompt: Prompt,
    given: dict[str, Any],
    has_max_tokens: bool,
    index: int = 0,
) -> GenerateCall:
    if request.stream_options not in (None, StreamOptions()) and not request.stream:
        raise InvalidRequest(
            "stream_options is given without stream; leave it out, or set stream to true",
            field="stream_options",
        )
    stop = [request.stop] if isinstance(request.stop, str) else request.stop or []
    check_stops(stop)
    stop_token_ids = request.stop_token_ids or []
    if len(stop_token_ids) > MAX_STOP_TOKEN_IDS:  # before a set is made of them
        raise InvalidRequest(
            f"stop_token_ids has {len(stop_token_ids)} ids; at most {MAX_STOP_TOKEN_IDS} are "
            "allowed, the end tokens included",
            field="stop_token_ids",
        )
    names = (
        "temperature", "top_p", "top_k", "min_p", "min_tokens", "seed",
        "presence_penalty", "frequency_penalty", "repetition_penalty",
    )  # fmt: skip
    sampling = SamplingParams(
        **{name: getattr(request, name) for name in names},
        **given,
        stop_token_ids=frozenset(stop_token_ids),
        logit_bias=_logit_bias(request.logit_bias or {}),
        structured_output=_form(request),
    )
    request_id = exchange.request_id if index == 0 else f"{exchange.request_id[:120]}-{index}"
    return GenerateCall(
        caller=exchange.caller,
        prompt=prompt,
        adapters=adapters(request.model, request.adapters, exchange),
        uses_base_text=request.base_text,
        sampling=sampling,
        num_outputs=request.n,
        has_max_tokens=has_max_tokens,
        stop=tuple(stop),
        ignore_eos=request.ignore_eos,
        request_id=request_id,
        client=exchange.client,
        priority=_priority(request.priority),
        cache_salt=printable(request.cache_salt, "cache_salt"),
    )


def _prompts(value: Any, limits: PromptLimits) -> list[Prompt]:
    """The prompts of a completion, in each of the four forms that OpenAI's API has."""
    if isinstance(value, str):
        return [text_prompt(value, "prompt", limits)]
    if not isinstance(value, list) or not value:
        raise InvalidRequest(
            "prompt must be a text, token ids, or a list of either, and not empty", field="prompt"
        )
    if is_whole(value[0]):
        return [token_ids(value, "prompt", limits)]
    if len(value) > MAX_CHOICES:
        raise InvalidRequest(
            f"prompt has {len(value)} prompts; at most {MAX_CHOICES} are taken at once",
            field="prompt",
        )
    return [
        text_prompt(each, f"prompt[{index}]", limits)
        if isinstance(each, str)
        else token_ids(each, f"prompt[{index}]", limits)
        for index, each in enumerate(value)
    ]


def _num_bytes(value: object) -> int:
    """Bytes of a JSON value without its punctuation. Counted here and not in C, so that other
    threads run meanwhile, and without recursion, as it may be nested deeper than Python calls.
    """
    num_bytes, left = 0, [value]
    while left:
        part = left.pop()
        if isinstance(part, dict):
            left += [*part, *part.values()]
        elif isinstance(part, list | tuple):
            left += part
        else:
            num_bytes += len(part.encode()) if isinstance(part, str) else 1
    return num_bytes


def _turn(message: Message, field: str) -> dict[str, Any]:
    """One turn in the shape that templates know: OpenAI's, with its content as one text."""
    content = message.content
    if content is None and not (message.role == "assistant" and message.tool_calls):
        raise InvalidRequest(f"{field}.content is missing", field=f"{field}.content")
    turn: dict[str, Any] = {"role": message.role, "content": _text(content)}
    if message.name is not None:
        turn["name"] = message.name
    if (thought := message.reasoning_content or message.reasoning) is not None:
        turn["reasoning_content"] = thought
    if message.tool_call_id is not None:
        turn["tool_call_id"] = message.tool_call_id
    if message.tool_calls:
        turn["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.function.name, "arguments": call.function.arguments},
            }
            for call in message.tool_calls
        ]
    return turn


def _text(content: str | Iterable[TextPart] | None) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    return "\n".join(part.text for part in content)


def _messages(items: Sequence[InputItem]) -> list[Message]:
    """The turns of a Responses request, which writes what one turn of the assistant thought, said
    and called as items of their own.
    """
    turns: list[Message] = []
    for item in items:
        last = turns[-1] if turns and turns[-1].role == "assistant" else None
        match item:
            case InputMessage(role="assistant"):
                is_thought = last is not None and not (last.content or last.tool_calls)
                more = {"content": _text(item.content)}
                _add(turns, last if is_thought else None, more)
            case InputMessage():
                turns.append(Message(role=item.role, content=item.content))
            case Reasoning():
                thought = "\n".join(part.text for part in item.content or ())
                turns.append(Message(role="assistant", content="", reasoning_content=thought))
            case FunctionCall():
                function = CalledFunction(name=item.name, arguments=item.arguments)
                called = list((last and last.tool_calls) or ())
                called.append(CalledTool(id=item.call_id, function=function))
                _add(turns, last, {"tool_calls": called})
            case FunctionCallOutput():
                output = _text(item.output)
                turns.append(Message(role="tool", content=output, tool_call_id=item.call_id))
    return turns


def _add(turns: list[Message], last: Message | None, more: dict[str, Any]) -> None:
    """Add to the last turn of the assistant, or begin one."""
    if last is None:
        turns.append(Message(role="assistant", content="").model_copy(update=more))
    else:
        turns[-1] = last.model_copy(update=more)


def _tool_choice(choice: ToolChoice, tools: Sequence[AnyFunction]) -> ToolMode | str:
    if isinstance(choice, ChosenTool):
        return choice.function.name
    if isinstance(choice, ChosenFunctionTool):
        return choice.name
    if choice is None:
        return ToolMode.AUTO
    if choice == "required" and not tools:
        raise InvalidRequest("tool_choice is 'required' without tools", field="tool_choice")
    return ToolMode(choice)


@dataclass(frozen=True, slots=True)
class _GivenForm:
    """What an output must look like, as a request has it."""

    field: str
    """Which says so."""
    kind: StructureKind
    value: Any
    """The schema, expression, grammar or choices."""


def _form(request: SampledRequest | ResponsesRequest) -> StructuredOutput | None:
    """What an output must look like, for the service."""
    given = _given_form(request)
    if given is None:
        return None
    is_text = isinstance(given.value, str)
    return StructuredOutput(given.kind, given.value if is_text else json.dumps(given.value))


def _given_form(request: SampledRequest | ResponsesRequest) -> _GivenForm | None:
    """Read, and not yet written as a text, which may be long. Raises InvalidRequest where several
    fields ask for a form.
    """
    if isinstance(request, ResponsesRequest):
        flat = request.text.format if request.text else None
        return None if flat is None else _by_type("text.format", flat, "text.format.schema")
    found = [*_guided(request), *_structured(request.structured_outputs)]
    if (form := _response_format(request)) is not None:
        found.append(form)
    if len(found) > 1:
        names = [form.field for form in found]
        raise InvalidRequest(f"{' and '.join(names)} are given; give one", field=names[1])
    return found[0] if found else None


def _guided(request: SampledRequest) -> Iterator[_GivenForm]:
    """vLLM's older words."""
    for field, kind, value in (
        ("guided_json", StructureKind.JSON_SCHEMA, request.guided_json),
        ("guided_regex", StructureKind.REGEX, request.guided_regex),
        ("guided_choice", StructureKind.CHOICE, request.guided_choice),
        ("guided_grammar", StructureKind.GRAMMAR, request.guided_grammar),
    ):
        if value is not None:
            yield _GivenForm(field, kind, value)


def _structured(given: StructuredOutputs | None) -> Iterator[_GivenForm]:
    """And its newer ones."""
    if given is None:
        return
    words = [
        ("json", StructureKind.JSON_SCHEMA, given.json_),
        ("regex", StructureKind.REGEX, given.regex),
        ("choice", StructureKind.CHOICE, given.choice),
        ("grammar", StructureKind.GRAMMAR, given.grammar),
        ("json_object", StructureKind.JSON_OBJECT, "" if given.json_object else None),
    ]
    if all(value is None for _, _, value in words):
        raise InvalidRequest(
            "structured_outputs has none of json, json_object, regex, choice and grammar; give "
            "one, or leave it out",
            field="structured_outputs",
        )
    for word, kind, value in words:
        if value is not None:
            yield _GivenForm(f"structured_outputs.{word}", kind, value)


def _response_format(request: SampledRequest) -> _GivenForm | None:
    given = request.response_format
    if given is None:
        return None
    if given.type == "json_schema" and given.json_schema is None:
        raise InvalidRequest("response_format.json_schema is missing", field="response_format")
    schema = (given.json_schema.schema_ or {}) if given.json_schema else None
    flat = SchemaFormat(type=given.type, schema=schema)
    return _by_type("response_format", flat, "response_format.json_schema")


def _by_type(field: str, given: SchemaFormat, schema_field: str) -> _GivenForm | None:
    if given.type != "json_schema" and given.schema_ is not None:
        raise InvalidRequest(
            f"{schema_field} is given beside the type {given.type!r}; the type of a schema is "
            "'json_schema'",
            field=schema_field,
        )
    if given.type == "text":
        return None
    if given.type == "json_object":
        return _GivenForm(field, StructureKind.JSON_OBJECT, "")
    return _GivenForm(field, StructureKind.JSON_SCHEMA, given.schema_ or {})


def _logit_bias(given: dict[str, float]) -> tuple[tuple[int, float], ...]:
    for name in given:
        if not (name.isascii() and name.isdecimal() and len(name) < 10):
            raise InvalidRequest(
                f"logit_bias has the key {name[:80]!r}; keys are token ids", field="logit_bias"
            )
    found = {int(name): bias for name, bias in given.items()}
    if len(found) < len(given):
        raise InvalidRequest("logit_bias names a token twice", field="logit_bias")
    return logit_bias(found)


def _most(*numbers: int | None) -> int | None:
    return max((number for number in numbers if number is not None), default=None)


def _priority(priority: int) -> int:
    if not -(2**31) <= priority < 2**31:
        raise InvalidRequest(
            f"priority is {priority}; it must be a number of 32 bits", field="priority"
        )
    return priority

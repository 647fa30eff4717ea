"""A base and its adapters in this process: prompts in, finished texts out. No server, no asyncio.

    with LLM("smollm2-135m", adapters={"support": "adapters/support"}) as llm:
        question = [{"role": "user", "content": "My order is late."}]
        answers = llm.generate([question] * 2, adapter=["support", None], max_tokens=20)
        texts = [answer.text for answer in answers]

The engine runs on the caller's thread, and all prompts of a call share its steps.
"""

from __future__ import annotations

import asyncio
import threading
import uuid
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, TypeAlias, TypeVar

from lora_runtime.base.device import device_defaults
from lora_runtime.config import (
    BaseConfig,
    DtypeName,
    EngineConfig,
    Quantization,
)
from lora_runtime.core import (
    AdapterChoice,
    FinishReason,
    Request,
    SamplingParams,
    StepOutput,
    StructuredOutput,
    TokenLogprob,
    is_whole,
)
from lora_runtime.engine.client import EngineInfo, LoadedAdapter
from lora_runtime.engine.engine import Engine, current_device, load_engine
from lora_runtime.engine.request_rules import (
    check_choices,
    check_num_outputs,
    check_stops,
    logit_bias,
    params_of_outputs,
    request_notes,
    shared_side,
    uses,
    with_ends,
)
from lora_runtime.errors import (
    AdapterExists,
    AdapterNotFound,
    ConfigError,
    InvalidRequest,
    LoramuxError,
    Overloaded,
    PromptTooLong,
    Unavailable,
    check_options,
    written,
)
from lora_runtime.settings import checked
from lora_runtime.text.chat_output import (
    AS_TEMPLATES_SAY,
    PLAIN,
    AnswerParts,
    chat_answer,
    template_of,
)
from lora_runtime.text.chat_prompt import ChatPrompt, Tool, ToolMode, shown_tools
from lora_runtime.text.detokenizer import Detokenizer
from lora_runtime.text.messages import Message
from lora_runtime.text.output_text import OutputText
from lora_runtime.text.structure_compiler import StructureCompiler
from lora_runtime.text.text_side import TextSide
from lora_runtime.text.text_workers import TextWorkers
from lora_runtime.text.tokenizer import Tokenizer
from lora_runtime.text.tool_calls import ToolCallDelta

Prompt: TypeAlias = str | Sequence[int] | Sequence[Message]
"""A text, token ids, or a conversation: messages of `role` and `content`."""
Choice: TypeAlias = str | Mapping[str, float] | None
"""An adapter's name, several names with their weights, or None for the base."""
Form: TypeAlias = StructuredOutput | Mapping[str, Any] | None
"""What an output must look like, also as `StructuredOutput.of` reads it; None: no form."""
CHOICE_RULE = "a name, a mapping of names to weights, None, or a list with one of these a prompt"
_Asked: TypeAlias = str | list[int] | ChatPrompt
FORM_RULE = "a StructuredOutput, a mapping of one entry, None, or a list with one of these a prompt"

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call of a tool."""

    id: str
    """Names the call for its answer."""
    name: str
    arguments: str
    """The text of a JSON object; cut short where `max_tokens` ended the answer."""

    def as_message(self) -> dict[str, Any]:
        """As a message's `tool_calls` have it."""
        function = {"name": self.name, "arguments": self.arguments}
        return {"id": self.id, "type": "function", "function": function}


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """The answer to one prompt."""

    text: str = ""
    reasoning: str = ""
    """What was thought before, where the chat template knows tags for that."""
    tool_calls: tuple[ToolCall, ...] = ()
    token_ids: tuple[int, ...] = ()
    """Token ids of the answer, with the end token if one ended it."""
    finish_reason: FinishReason = FinishReason.ERROR
    logprobs: tuple[TokenLogprob, ...] = ()
    """One for each token, where they were asked for."""
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    """One for each token of the prompt after the first, where they were asked for."""
    num_cached_tokens: int = field(default=0, compare=False)
    """Leading tokens of the prompt that an earlier request had left in the prefix cache. The answer
    is the same without, so two answers are equal whatever it is."""
    others: tuple[Completion, ...] = ()
    """The further answers to the prompt, where `n` asks for several."""
    notes: tuple[str, ...] = ()
    """What the caller should know: adapters that were not invoked."""
    error: LoramuxError | None = None
    """Why it was refused or failed; None unless `finish_reason` is `error`."""


class LLM:
    """One base, its adapters by name, and an engine over them. Calls from several threads wait for
    each other.
    """

    def __init__(
        self,
        base: str | Path | None = None,
        *,
        adapters: Mapping[str, str | Path] | None = None,
        quantization: Quantization | None = None,
        dtype: DtypeName | None = None,
        device: str | None = None,
        config: EngineConfig | None = None,
        on_progress: Callable[[str], None] | None = None,
    ) -> None:
        """Load a base (a catalog name, local folder, GGUF file or hub id) and adapters.

        `adapters`: name → folder. What is None is as BaseConfig has it. `config`: all settings of
        the engine, beside which `base`, `quantization`, `dtype` and `device` must be None.
        `on_progress` is told what is being done.
        Raises BaseRefused, ConfigError, and as `load`.
        """
        named = adapters or {}
        if not isinstance(named, Mapping):
            raise ConfigError(
                f"adapters is {adapters!r}; it must be a mapping of names to folders, as in "
                "{'support': 'adapters/support'}",
                field="adapters",
            )
        self._engine: Engine | None = None
        self._adapters: dict[str, _Named] = {}
        self._lock = threading.RLock()
        settings = {"model": base, "quantization": quantization, "dtype": dtype, "device": device}
        config = _config(settings, config)
        self._engine = load_engine(config, on_progress)
        loaded = self._engine.base
        self._tokenizer = Tokenizer.load(loaded.folder)
        self._own_text = TextWorkers(loaded.folder, loaded.spec.vocab_size)
        self._structures = StructureCompiler(
            partial(self._tokenizer.vocabulary, loaded.spec.vocab_size)
        )
        try:
            for name, folder in named.items():
                self.load(name, folder)
        except BaseException:
            self.close()
            raise

    @property
    def info(self) -> EngineInfo:
        return self._running().info

    @property
    def adapters(self) -> Mapping[str, LoadedAdapter]:
        """Name → loaded adapter."""
        found = self._adapters.copy()  # another thread may load or unload one
        return {name: named.loaded for name, named in found.items()}

    def load(self, name: str, folder: str | Path) -> LoadedAdapter:
        """Load an adapter's folder under a name.

        Raises AdapterRefused and its kinds, AdapterExists for a name in use, AdapterTooLarge,
        Overloaded where host memory has no room for it, and InvalidRequest for what is no name or
        no path.
        """
        if not isinstance(name, str) or not name:
            raise InvalidRequest(f"name is {written(name)}; it must be a text", field="name")
        if not isinstance(folder, str | Path) or not str(folder):
            raise InvalidRequest(
                f"folder is {written(folder)}; it must be the path of the adapter's folder",
                field="folder",
            )
        with self._lock:
            engine = self._running()
            if name in self._adapters:
                raise AdapterExists(f"adapter {name!r} is loaded; unload it first", field="name")
            with current_device(engine.base.device):
                loaded = engine.load_adapter(Path(folder))
            try:
                self._adapters[name] = _Named(loaded, self._own_side(loaded))
            except BaseException:
                engine.drop_adapter(loaded.digest)
                raise
            return loaded

    def unload(self, name: str) -> None:
        """Forget an adapter. Raises AdapterNotFound."""
        with self._lock:
            engine, named = self._running(), self._named(name, "name")
            del self._adapters[name]
            engine.drop_adapter(named.loaded.digest)

    def generate(
        self,
        prompts: Iterable[Prompt],
        *,
        adapter: Choice | Sequence[Choice] = None,
        stop: Sequence[str] = (),
        ignore_eos: bool = False,
        n: int = 1,
        return_errors: bool = False,
        structured_output: Form | Sequence[Form] = None,
        tools: Sequence[Mapping[str, Any]] = (),
        tool_choice: str = ToolMode.AUTO,
        parallel_tool_calls: bool = True,
        template_variables: Mapping[str, Any] | None = None,
        **sampling: Any,
    ) -> list[Completion]:
        """Complete all prompts together; return what they gave, in their order.

        A prompt is a conversation, a list of messages of `role` and `content`, which the chat
        template writes out; or a text or token ids, continued as they stand. An adapter that was
        trained on chats wants a conversation.
        `adapter`: one for all prompts, or one for each of them. `stop`: texts that end an output,
        and are not part of it. `n`: independent outputs for each prompt; those after the first are
        its Completion's `others`. `structured_output`: the form that outputs must have, as
        StructuredOutput or as `StructuredOutput.of` reads it; one for all prompts, or one for each
        of them. `tools`: what conversations may call, in the shape of OpenAI's API; `tool_choice`:
        `auto`, `none`, `required` or a tool's name; without `parallel_tool_calls` an answer ends
        with its first call; `template_variables`: what the template sees besides, as
        `{"enable_thinking": False}`. `sampling`: fields of SamplingParams, as `temperature=0.0`,
        with `logit_bias` as a mapping of token ids to numbers; without `max_tokens` an output has
        256 tokens at most, or as many as fit. What a request may say is what a server takes:
        `engine/request_rules.py`.
        Raises InvalidRequest, AdapterNotFound, or what ended one of the prompts; with
        `return_errors` that is in its Completion instead, and the other prompts are answered. A
        mistake in what holds for all prompts is raised.
        """
        prompts = _listed(prompts)
        _check_options(stop, ignore_eos, sampling)
        check_num_outputs(n)
        if "logit_bias" in sampling:
            sampling["logit_bias"] = logit_bias(sampling["logit_bias"])
        forms = _forms(prompts, structured_output)
        chat = _chat(tools, tool_choice, parallel_tool_calls, template_variables or {})
        with self._lock:
            device = self._running().base.device
            choices = _choices(prompts, adapter)
            outputs: list[list[_Row] | LoramuxError] = []
            for index, (prompt, choice, form) in enumerate(
                zip(prompts, choices, forms, strict=True)
            ):
                try:
                    own = {**sampling, "structured_output": _form(form)}
                    asked = _asked(prompt, chat)
                    first = self._row(asked, choice, tuple(stop), ignore_eos, own)
                    outputs.append([first, *self._others(first, n)])
                except LoramuxError as error:
                    if not return_errors:
                        error.add_note(f"prompts[{index}]")
                        raise
                    outputs.append(error)
            with current_device(device):
                self._run([row for rows in outputs if isinstance(rows, list) for row in rows])
        found = [_completion(rows) for rows in outputs]
        everyone = [each for one in found for each in (one, *one.others)]
        failed = next((each.error for each in everyone if each.error is not None), None)
        if failed is not None and not return_errors:
            raise failed
        return found

    def close(self) -> None:
        """Free the base, the adapters and the processes that ran adapters' own text."""
        with self._lock:
            self._engine = None
            self._adapters.clear()
            self._own_text.close()
            self._structures.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _running(self) -> Engine:
        if self._engine is None:
            raise Unavailable("the LLM is closed")
        return self._engine

    def _named(self, name: str, field: str) -> _Named:
        if name not in self._adapters:
            known = ", ".join(map(repr, self._adapters)) or "none"
            raise AdapterNotFound(f"adapter {name!r} is not loaded; loaded: {known}", field=field)
        return self._adapters[name]

    def _own_side(self, loaded: LoadedAdapter) -> TextSide | None:
        if not loaded.text_files:
            return None
        side, _ = _awaited(self._own_text.read(loaded.text_files, loaded.facts.text_sha256))
        return side

    def _row(
        self,
        prompt: _Asked,
        choice: Choice,
        stop: tuple[str, ...],
        ignore_eos: bool,
        sampling: Mapping[str, Any],
    ) -> _Row:
        """The request of one prompt, and what makes text of its tokens."""
        chosen = _chosen(choice)
        named = {one.name: self._named(one.name, "adapter") for one in chosen}
        side = shared_side({name: one.side for name, one in named.items()}, field="adapter")
        token_ids = self._encode(prompt, side)
        num_layers = max((one.loaded.facts.num_layers for one in named.values()), default=0)
        room = self.info.token_limit(num_layers) - len(token_ids)
        if room < 1:
            raise PromptTooLong(
                f"the prompt has {len(token_ids)} tokens; at most {room + len(token_ids) - 1} fit",
                field="prompts",
            )
        params = SamplingParams(
            **{"max_tokens": min(room, SamplingParams().max_tokens), **sampling}
        )
        ends = () if ignore_eos else (side or self._tokenizer).eos_token_ids
        params = with_ends(params, ends, self.info.base.vocab_size)
        answer = PLAIN
        if isinstance(prompt, ChatPrompt):
            answer = chat_answer(prompt, token_ids, self._tokenizer, side, AS_TEMPLATES_SAY)
        answer, form = answer.with_form(params.structured_output)
        structure = None
        params = replace(params, structured_output=form)
        if form is not None:
            with answer.naming_tools():
                structure = _awaited(self._structures.compile(form, side, answer.thinking))
        request = Request(
            request_id=uuid.uuid4().hex,
            prompt_token_ids=tuple(token_ids),
            sampling=params,
            structure=structure,
            adapters=uses([named[one.name].loaded.digest for one in chosen], chosen),
        )
        facts = {name: one.loaded.facts for name, one in named.items()}
        decoder = answer.decoder(self._tokenizer, side)

        def text() -> OutputText:
            detokenizer = Detokenizer(decoder, request.prompt_token_ids, stop)
            return OutputText(detokenizer, params.stop_token_ids, answer.reader())

        notes = (*request_notes(facts, token_ids), *answer.notes)
        return _Row(request, text(), text, notes=notes)

    def _others(self, first: _Row, num_outputs: int) -> list[_Row]:
        """Further outputs of the prompt of `first`."""
        params = params_of_outputs(first.request.sampling, num_outputs)[1:]
        requests = [
            replace(first.request, request_id=uuid.uuid4().hex, sampling=sampling)
            for sampling in params
        ]
        return [
            _Row(request, first.new_text(), first.new_text, notes=first.notes)
            for request in requests
        ]

    def _encode(self, prompt: _Asked, side: TextSide | None) -> Sequence[int]:
        """A prompt's tokens, as an adapter's own text side makes them or as the base does."""
        if isinstance(prompt, ChatPrompt):
            return self._rendered(prompt, side)
        if isinstance(prompt, list):
            return self._checked(prompt)
        if side is not None and side.tokenizer is not None:
            return _awaited(self._own_text.encode(side, prompt))
        return self._tokenizer.encode(prompt)

    def _rendered(self, chat: ChatPrompt, side: TextSide | None) -> Sequence[int]:
        messages, variables = chat.messages, chat.template_variables
        tools = shown_tools(chat, template_of(chat, self._tokenizer, side))
        if side is None or not side.renders_chats:
            return self._tokenizer.apply_chat_template(messages, tools=tools, variables=variables)
        rendered = _awaited(self._own_text.render(side, messages, tools, variables))
        return rendered if isinstance(rendered, list) else self._tokenizer.encode_rendered(rendered)

    def _checked(self, token_ids: list[int]) -> list[int]:
        vocab_size = self.info.base.vocab_size
        wrong = next((token for token in token_ids if not 0 <= token < vocab_size), None)
        if wrong is not None:
            raise InvalidRequest(
                f"a prompt holds token id {written(wrong)}; ids must be between 0 and "
                f"{vocab_size - 1}",
                field="prompts",
            )
        return token_ids

    def _run(self, rows: Sequence[_Row]) -> None:
        """Run the rows to their end. Whatever interrupts this frees what they hold."""
        engine, waiting = self._running(), list(reversed(rows))
        running: dict[str, _Row] = {}
        try:
            while waiting or running:
                while waiting:
                    row = waiting.pop()
                    try:
                        engine.add_request(row.request)
                        running[row.request.request_id] = row
                    except LoramuxError as error:
                        if isinstance(error, Overloaded) and running:
                            waiting.append(row)  # the queue is full; steps will make room
                            break
                        row.fail(error)
                for output in engine.step():
                    taker = running.get(output.request_id)
                    if taker is None:
                        continue  # its step was in flight when a stop string ended it
                    taker.take(output)
                    if taker.reason is not None:
                        del running[output.request_id]
                        engine.abort(output.request_id)  # a stop string: the engine does not know
                engine.collect()
        finally:
            for request_id in running:
                engine.abort(request_id)


class _Named(NamedTuple):
    """A loaded adapter and its text."""

    loaded: LoadedAdapter
    side: TextSide | None
    """The adapter's own text side; None: the base's."""


@dataclass(slots=True)
class _Row:
    """A prompt on its way."""

    request: Request
    text: OutputText
    new_text: Callable[[], OutputText]
    """What makes text of another output of the prompt."""
    notes: tuple[str, ...] = ()
    parts: list[AnswerParts] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    num_cached_tokens: int = 0
    reason: FinishReason | None = None
    error: LoramuxError | None = None

    def take(self, output: StepOutput) -> None:
        """Keep what a step gave."""
        self.parts.append(self.text.push(output))
        self.token_ids += output.token_ids
        self.logprobs += output.logprobs
        self.prompt_logprobs = output.prompt_logprobs or self.prompt_logprobs
        self.num_cached_tokens = max(self.num_cached_tokens, output.num_cached_tokens)
        self.reason, self.error = self.text.finish_reason, output.error

    def fail(self, error: LoramuxError) -> None:
        """End it before its first step."""
        self.reason, self.error = FinishReason.ERROR, error


def _completion(rows: list[_Row] | LoramuxError) -> Completion:
    if isinstance(rows, LoramuxError):
        return Completion(error=rows)
    row, *others = rows
    return Completion(
        text="".join(part.text for part in row.parts),
        reasoning="".join(part.reasoning for part in row.parts),
        tool_calls=_calls([call for part in row.parts for call in part.tool_calls]),
        token_ids=tuple(row.token_ids),
        finish_reason=row.reason or FinishReason.ERROR,
        logprobs=tuple(row.logprobs),
        prompt_logprobs=row.prompt_logprobs,
        num_cached_tokens=row.num_cached_tokens,
        others=tuple(_completion([other]) for other in others),
        notes=row.notes,
        error=row.error,
    )


def _calls(parts: Sequence[ToolCallDelta]) -> tuple[ToolCall, ...]:
    """Calls from their parts, of which the first of each has the name."""
    return tuple(
        ToolCall(
            first.id,
            first.name,
            "".join(part.arguments for part in parts if part.index == first.index),
        )
        for first in parts
        if first.name
    )


def _asked(prompt: Prompt, chat: ChatPrompt) -> _Asked:
    """A prompt as it is read: a text, token ids, or `chat` with messages. Raises InvalidRequest."""
    if isinstance(prompt, str):
        asked: _Asked = prompt
    else:
        is_list = isinstance(prompt, Sequence) and not isinstance(prompt, bytes | bytearray)
        members = list(prompt) if is_list else [None]
        messages = [message for message in members if isinstance(message, Mapping)]
        if all(map(is_whole, members)):
            asked = [token for token in members if isinstance(token, int)]
        elif len(messages) == len(members):
            return replace(chat, messages=tuple(messages))
        else:
            raise InvalidRequest(
                f"a prompt is {written(prompt)}; it must be a text, token ids, or messages of role "
                "and content",
                field="prompts",
            )
    for name in ("tools", "template_variables"):
        if getattr(chat, name):
            raise InvalidRequest(
                f"{name} is given with a prompt that is no conversation; send messages", field=name
            )
    return asked


def _tool(tool: object) -> Tool:
    """A tool in the shape of OpenAI's API. Raises InvalidRequest."""
    function = tool.get("function", tool) if isinstance(tool, Mapping) else None
    given = dict(function) if isinstance(function, Mapping) else {}
    name, parameters = given.get("name"), given.get("parameters")
    if not isinstance(name, str) or not isinstance(parameters, Mapping | None):
        raise InvalidRequest(
            f"tools has {written(tool)}; each must be a mapping of type and function, and a "
            "function has name, description and parameters",
            field="tools",
        )
    description, strict = given.get("description") or "", bool(given.get("strict"))
    return Tool(name, description, parameters, strict)


def _chat(
    tools: object, tool_choice: object, parallel_tool_calls: object, variables: object
) -> ChatPrompt:
    """What conversations have beside their messages. Raises InvalidRequest."""
    if isinstance(tools, str | Mapping) or not isinstance(tools, Iterable):
        raise InvalidRequest(f"tools is {written(tools)}; it must be a list", field="tools")
    if not isinstance(tool_choice, str):
        raise InvalidRequest(
            f"tool_choice is {written(tool_choice)}; it must be 'auto', 'none', 'required' or a "
            "tool's name",
            field="tool_choice",
        )
    if not isinstance(variables, Mapping):
        raise InvalidRequest(
            f"template_variables is {written(variables)}; it must be a mapping",
            field="template_variables",
        )
    return ChatPrompt(
        messages=(),
        tools=tuple(map(_tool, tools)),
        tool_choice=ToolMode(tool_choice) if tool_choice in list(ToolMode) else tool_choice,
        parallel_tool_calls=bool(parallel_tool_calls),
        template_variables=variables,
    )


def _choices(prompts: Sequence[Prompt], adapter: Choice | Sequence[Choice]) -> Sequence[Choice]:
    """The adapters of each prompt. Raises InvalidRequest."""
    if adapter is None or isinstance(adapter, str | Mapping):
        return [adapter] * len(prompts)
    if not isinstance(adapter, Sequence):
        raise InvalidRequest(
            f"adapter is {written(adapter)}; it must be {CHOICE_RULE}", field="adapter"
        )
    return _one_each(prompts, adapter, "adapter")


def _forms(prompts: Sequence[Prompt], given: object) -> Sequence[object]:
    """The form of each prompt's outputs; one for all is read here, as it is wrong for all. Raises
    InvalidRequest.
    """
    if isinstance(given, Sequence) and not isinstance(given, str | bytes | bytearray):
        return _one_each(prompts, given, "sampling.structured_output")
    return [_form(given)] * len(prompts)


def _one_each(prompts: Sequence[Prompt], given: Sequence[T], name: str) -> Sequence[T]:
    if len(given) != len(prompts):
        raise InvalidRequest(
            f"{name} has {len(given)} entries for {len(prompts)} prompts; give one for all, or "
            "one for each",
            field=name,
        )
    return given


def _form(form: object) -> StructuredOutput | None:
    """The form of one prompt's outputs. Raises InvalidRequest."""
    if isinstance(form, Mapping):
        return StructuredOutput.of(form)
    if form is not None and not isinstance(form, StructuredOutput):
        raise InvalidRequest(
            f"sampling.structured_output is {written(form)}; it must be {FORM_RULE}",
            field="sampling.structured_output",
        )
    return form


def _chosen(choice: Choice) -> tuple[AdapterChoice, ...]:
    """The adapters of one prompt. Raises InvalidRequest."""
    if choice is not None and not isinstance(choice, str | Mapping):
        raise InvalidRequest(
            f"adapter is {written(choice)}; it must be {CHOICE_RULE}", field="adapter"
        )
    weights = {choice: 1.0} if isinstance(choice, str) else choice or {}
    chosen = tuple(AdapterChoice(name, weight) for name, weight in weights.items())
    check_choices(chosen)
    return chosen


def _listed(prompts: Iterable[Prompt]) -> list[Prompt]:
    """The prompts of a call. Raises InvalidRequest for what is one prompt, or none."""
    if isinstance(prompts, str | bytes | Mapping) or not isinstance(prompts, Iterable):
        raise InvalidRequest(
            f"prompts is {written(prompts)}; it must be a list of prompts, [prompt] for one of "
            "them",
            field="prompts",
        )
    return list(prompts)


def _check_options(stop: Sequence[str], ignore_eos: bool, sampling: Mapping[str, Any]) -> None:
    """Refuse what holds for no prompt. Raises InvalidRequest."""
    if isinstance(stop, str) or not isinstance(stop, Sequence):
        raise InvalidRequest(f"stop is {written(stop)}; it must be a list of texts", field="stop")
    check_stops(stop)
    if not isinstance(ignore_eos, bool):
        raise InvalidRequest(
            f"ignore_eos is {written(ignore_eos)}; it must be True or False", field="ignore_eos"
        )
    check_options(sampling, SamplingParams.__dataclass_fields__)


def _awaited(work: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine to its end, also where this thread runs an event loop, as a notebook does."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, work).result()


def _config(settings: Mapping[str, object], whole: EngineConfig | None) -> EngineConfig:
    """Settings for a device, of its own size, or the whole that was given. Raises ConfigError."""
    given = {name: value for name, value in settings.items() if value is not None}
    if whole is not None:
        for name in given:
            argument = "base" if name == "model" else name
            raise ConfigError(
                f"{argument} stands beside config, which has it too; leave it out and write "
                f"config.base.{name}",
                field=argument,
            )
        return whole
    if "model" in given:
        given["model"] = str(given["model"])
    base = checked(given, BaseConfig)
    return checked({"base": base, **device_defaults(base.device).by_part()}, EngineConfig)

"""The answer to a chat: how it thinks and calls tools, its form, and its text read apart."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import NamedTuple

from lora_runtime.core import FinishReason, StructuredOutput
from lora_runtime.errors import InvalidRequest, UnsupportedFeature
from lora_runtime.text.chat_prompt import ChatPrompt, Tool, ToolMode
from lora_runtime.text.text_side import TextSide
from lora_runtime.text.thinking import PROMPT_END, Thinking, ThoughtReader, tags_of, thinking_of
from lora_runtime.text.tokenizer import TokenDecoder, Tokenizer
from lora_runtime.text.tool_calls import CallReader, ToolCallDelta
from lora_runtime.text.tool_formats.catalog import FORMATS, format_of
from lora_runtime.text.tool_formats.tool_format import MAX_PARALLEL, Schemas, ToolFormat

UNKNOWN_FORMAT = (
    "the chat template writes calls of tools in no format that is known here: calls are left in "
    "the text; --tool-call-parser can name one"
)
AUTO = "auto"
"""What the chat template says."""


@dataclass(frozen=True, slots=True)
class Parsers:
    """How an operator wants answers read."""

    tool_calls: str = AUTO
    """A format's name, or `auto` or `none`."""
    reasoning: str = AUTO
    """`auto` or `none`."""


AS_TEMPLATES_SAY = Parsers()


@dataclass(frozen=True, slots=True)
class ToolUse:
    """How the outputs of a chat call its tools."""

    format: ToolFormat
    schemas: Schemas
    special_ids: Mapping[str, int]
    """Texts of the format that are special tokens."""
    required: tuple[str, ...]
    """Tools of which one has to be called; empty: calls are the model's choice."""
    strict: frozenset[str]
    """Tools whose arguments are held to their schema though calls are the model's choice."""
    max_calls: int | None
    """None: as many as the model makes."""

    @property
    def form(self) -> StructuredOutput | None:
        """What an output must look like that has to call tools, or may call strict ones. Raises
        InvalidRequest for schemas of which no grammar can be made.
        """
        try:
            return self._form
        except RecursionError:
            raise InvalidRequest(
                "messages.tools: their parameters are nested too deep for a grammar",
                field="messages.tools",
            ) from None

    @property
    def _form(self) -> StructuredOutput | None:
        max_calls = self.max_calls or MAX_PARALLEL
        if self.required:
            wanted = {name: self.schemas[name] for name in self.required}
            return self.format.form(wanted, self.special_ids, max_calls)
        if not self.strict:
            return None
        held = {name: s if name in self.strict else None for name, s in self.schemas.items()}
        return self.format.free_form(held, self.special_ids, max_calls)


@dataclass(frozen=True, slots=True)
class ChatAnswer:
    """What the outputs of a chat are made of beside text."""

    tools: ToolUse | None = None
    thinking: Thinking | None = None
    added: tuple[tuple[int, str, bool], ...] = ()
    """The added tokens of the tokenizer in use, each (id, text, whether it is special)."""
    notes: tuple[str, ...] = ()
    """What the caller should know."""

    def with_form(
        self, wanted: StructuredOutput | None
    ) -> tuple[ChatAnswer, StructuredOutput | None]:
        """The answer and the form of what is said: the one that is asked for, in which no calls are
        looked for, or that the tools want. Raises InvalidRequest for both.
        """
        if wanted is None:
            return self, None if self.tools is None else self.tools.form
        if self.tools is not None and self.tools.required:
            raise InvalidRequest(
                "sampling.structured_output stands beside a choice of tools that asks for a call, "
                "which has a form of its own; send one of them",
                field="sampling.structured_output",
            )
        return replace(self, tools=None), wanted

    @contextmanager
    def naming_tools(self) -> Iterator[None]:
        """While the form is compiled: what is refused of one that the tools want is theirs."""
        try:
            yield
        except (InvalidRequest, UnsupportedFeature) as error:
            field = error.field or ""
            if self.tools is None or not field.startswith("sampling.structured_output"):
                raise
            message = error.message.replace(field, "messages.tools: the form of their calls", 1)
            raise type(error)(message, field="messages.tools") from None

    def decoder(self, tokenizer: Tokenizer, side: TextSide | None) -> TokenDecoder | Tokenizer:
        """A decoder that shows those special tokens by which the text is read apart."""
        shown = set(self.tools.special_ids.values()) if self.tools else set()
        if self.thinking is not None:
            shown.update(self.thinking.special_ids.values())
        if not shown:
            return tokenizer.with_added(side.added if side else None)
        return tokenizer.with_added(
            (index, text, is_special and index not in shown)
            for index, text, is_special in self.added
        )

    def reader(self) -> AnswerReader:
        """What reads one output."""
        return AnswerReader(self)


PLAIN = ChatAnswer()
"""Of prompts that are no chats: all is text."""


def chat_answer(
    prompt: ChatPrompt,
    token_ids: Sequence[int],
    tokenizer: Tokenizer,
    side: TextSide | None,
    parsers: Parsers,
) -> ChatAnswer:
    """What the answers to a chat may be made of. `token_ids`: of the rendered prompt.

    Raises InvalidRequest naming the field where a call is asked for and there is no known format
    for it, or where a tool is strict and its calls cannot be told from text.
    """
    template = template_of(prompt, tokenizer, side)
    tags = tags_of(template) if parsers.reasoning == AUTO else None
    if not prompt.has_tools and tags is None:
        return PLAIN
    added = side.added if side is not None and side.added is not None else tokenizer.added_tokens
    special_ids = {text: index for index, text, is_special in added if is_special}
    tools = thinking = None
    if prompt.has_tools:
        tools = _tool_use(prompt, template, special_ids, parsers.tool_calls)
    if tags is not None:
        bytes_of = tokenizer.token_reader(side.added if side else None)
        prompt_end = b"".join(map(bytes_of, token_ids[-PROMPT_END:])).decode(errors="replace")
        thinking = thinking_of(tags, prompt_end, special_ids)
    notes = (UNKNOWN_FORMAT,) if prompt.has_tools and tools is None else ()
    return ChatAnswer(tools, thinking, added, notes)


def _tool_use(
    prompt: ChatPrompt, template: str | None, special_ids: Mapping[str, int], parser: str
) -> ToolUse | None:
    found = FORMATS.get(parser)
    if parser == AUTO and template is not None:
        found = format_of(template)
    choice = prompt.tool_choice
    if found is None and choice is not ToolMode.AUTO:
        raise InvalidRequest(
            f"messages.tool_choice asks for a call; {UNKNOWN_FORMAT}",
            field="messages.tool_choice",
        )
    if choice is ToolMode.AUTO:
        _check_strict(prompt.tools, found)
    if found is None:
        return None
    schemas = {tool.name: tool.parameters for tool in prompt.tools}
    wanted = tuple(schemas) if isinstance(choice, ToolMode) else (choice,)
    return ToolUse(
        format=found,
        schemas=schemas,
        special_ids={text: special_ids[text] for text in found.hidden if text in special_ids},
        required=() if choice is ToolMode.AUTO else wanted,
        strict=frozenset(tool.name for tool in prompt.tools if tool.strict),
        max_calls=None if prompt.parallel_tool_calls else 1,
    )


def _check_strict(tools: Sequence[Tool], format: ToolFormat | None) -> None:
    """Refuse strict tools where calls are the model's choice and cannot be told from text."""
    if format is not None and not format.opening:
        return
    why = (
        UNKNOWN_FORMAT if format is None else f"calls in {format.name} have no marker of their own"
    )
    for index, tool in enumerate(tools):
        if tool.strict:
            field = f"messages.tools[{index}].strict"
            raise InvalidRequest(
                f"{field} is true and cannot be kept: {why}. Arguments are held to their schema "
                "where messages.tool_choice asks for a call; leave it out",
                field=field,
            )


def template_of(prompt: ChatPrompt, tokenizer: Tokenizer, side: TextSide | None) -> str | None:
    """Return the template that renders a chat."""
    if side is not None and side.renders_chats:
        return side.template
    return tokenizer.chat_template(has_tools=prompt.has_tools)


class AnswerParts(NamedTuple):
    """What more of an output's text gives."""

    reasoning: str
    text: str
    tool_calls: tuple[ToolCallDelta, ...]


class AnswerReader:
    """Reads the text of one output apart. `num_reasoning_tokens` counts those of the thought and of
    its tags.
    """

    def __init__(self, answer: ChatAnswer) -> None:
        self.num_reasoning_tokens = 0
        self._thoughts = ThoughtReader(answer.thinking)
        self._calls: CallReader | None = None
        if (use := answer.tools) is not None:
            self._calls = CallReader(use.format, use.schemas, use.max_calls)
        self._has_thought = False

    @property
    def is_over(self) -> bool:
        """True once the calls that may be made are made."""
        return self._calls is not None and self._calls.is_over

    def reason(self, reason: FinishReason) -> FinishReason:
        """Why the output ended: for its calls, if it ended of itself, has some, and did not break
        one off, as a stop string may.
        """
        calls = self._calls
        has_calls = calls is not None and calls.num_calls > 0 and calls.are_whole
        is_called = reason is FinishReason.STOP and has_calls
        return FinishReason.TOOL_CALLS if is_called else reason

    def push(self, text: str, num_tokens: int, *, is_last: bool) -> AnswerParts:
        """Take more text, which is that of `num_tokens` tokens; give what is certain by now."""
        was_thinking = self._thoughts.is_thinking
        read = [self._thoughts.push(text)]
        self.num_reasoning_tokens += num_tokens if was_thinking else 0
        if is_last:
            read.append(self._thoughts.flush())
        reasoning = "".join(thought for thought, _ in read)
        said = "".join(said for _, said in read)
        self._has_thought = self._has_thought or bool(reasoning)
        if (said or is_last) and not self._has_thought:
            self.num_reasoning_tokens = 0  # what might have begun a thought has not
        if self._calls is None:
            return AnswerParts(reasoning, said, ())
        parsed = [self._calls.push(said)]
        if is_last:
            parsed.append(self._calls.flush())
        calls = tuple(part for one in parsed for part in one.calls)
        return AnswerParts(reasoning, "".join(one.text for one in parsed), calls)

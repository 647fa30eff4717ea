"""The tools of a chat: what its template is shown, and how its outputs call them."""

from __future__ import annotations

import re
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from lora_runtime.core import FinishReason, StructuredOutput
from lora_runtime.errors import InvalidRequest
from lora_runtime.text.text_side import TextSide
from lora_runtime.text.tokenizer import TokenDecoder, Tokenizer
from lora_runtime.text.tool_calls import (
    FORMATS,
    CallPart,
    CallReader,
    Schemas,
    ToolFormat,
    format_of,
    shows_tools,
)
from server.calls import ChatPrompt, Delta, Prompt, Tool, ToolCallDelta, ToolMode

MAX_TOOLS = 128
_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}", re.ASCII)
UNKNOWN_FORMAT = (
    "the chat template writes calls of tools in no format that is known here: calls are left in "
    "the text; --tool-call-parser can name one"
)


def shown_tools(prompt: ChatPrompt, template: str | None) -> list[dict[str, Any]]:
    """Return what the template is shown of a chat's tools, in the shape of OpenAI's API.

    Raises InvalidRequest naming the field: tools without a name, a name twice, a choice that is
    none of them, or a template that would not show them.
    """
    _check_tools(prompt)
    if not prompt.tools or prompt.tool_choice == ToolMode.NONE:
        return []
    if template is not None and not shows_tools(template):
        raise InvalidRequest(
            "messages.tools is set; the chat template shows no tools. Use a model or an adapter "
            "whose template does, or leave them out",
            field="messages.tools",
        )
    return [_shown(tool) for tool in prompt.tools]


def _shown(tool: Tool) -> dict[str, Any]:
    parameters = tool.parameters or {"type": "object", "properties": {}}
    function = {
        "name": tool.name,
        "description": tool.description,
        "parameters": dict(parameters),
    }
    return {"type": "function", "function": function}


def _check_tools(prompt: ChatPrompt) -> None:
    if len(prompt.tools) > MAX_TOOLS:
        raise InvalidRequest(
            f"messages.tools has {len(prompt.tools)} tools; at most {MAX_TOOLS} are shown",
            field="messages.tools",
        )
    names: set[str] = set()
    for index, tool in enumerate(prompt.tools):
        field = f"messages.tools[{index}].name"
        if not _NAME.fullmatch(tool.name):
            raise InvalidRequest(
                f"{field} is {tool.name[:64]!r}; it must be 1 to 64 letters, digits, '_' and '-'",
                field=field,
            )
        if tool.name in names:
            raise InvalidRequest(f"{field} is {tool.name!r} once more", field=field)
        names.add(tool.name)
    choice = prompt.tool_choice
    if choice == ToolMode.REQUIRED and not prompt.tools:
        raise InvalidRequest(
            "messages.tool_choice asks for a tool, and messages.tools is empty",
            field="messages.tool_choice",
        )
    if not isinstance(choice, ToolMode) and choice not in names:
        raise InvalidRequest(
            f"messages.tool_choice is {choice[:64]!r}, which is none of messages.tools",
            field="messages.tool_choice",
        )


@dataclass(frozen=True, slots=True)
class ToolUse:
    """How the outputs of one chat call its tools."""

    format: ToolFormat
    schemas: Schemas
    special_ids: Mapping[str, int]
    """Texts of the format that are special tokens: they are shown in the output's text."""
    added: tuple[tuple[int, str, bool], ...]
    """The added tokens of the tokenizer in use, each (id, text, whether it is special)."""
    required: tuple[str, ...]
    """Tools of which one has to be called; empty: calls are the model's choice."""

    @property
    def form(self) -> StructuredOutput | None:
        """What an output must look like that has to call tools."""
        if not self.required:
            return None
        wanted = {name: self.schemas[name] for name in self.required}
        return self.format.form(wanted, self.special_ids)

    def decoder(self, tokenizer: Tokenizer) -> TokenDecoder | Tokenizer:
        """A decoder that shows the format's own tokens."""
        shown = self.special_ids.values()
        return tokenizer.with_added(
            (index, text, is_special and index not in shown)
            for index, text, is_special in self.added
        )


def tool_use(
    prompt: Prompt, tokenizer: Tokenizer, side: TextSide | None, parser: str
) -> ToolUse | None:
    """How a prompt's outputs call its tools; None where they do not, or in no known format.

    parser: a format's name, `auto` for the one that the template says, or `none`. Raises
    InvalidRequest (field `messages.tool_choice`) where a call is asked for in no known format.
    """
    if not isinstance(prompt, ChatPrompt) or not has_tools(prompt):
        return None
    template = template_of(prompt, tokenizer, side)
    named = FORMATS.get(parser)
    found = named or (format_of(template) if parser == "auto" and template is not None else None)
    choice = prompt.tool_choice
    if found is None:
        if choice != ToolMode.AUTO:
            raise InvalidRequest(
                f"messages.tool_choice asks for a call; {UNKNOWN_FORMAT}",
                field="messages.tool_choice",
            )
        return None
    schemas = {tool.name: tool.parameters for tool in prompt.tools}
    required = () if choice == ToolMode.AUTO else tuple(schemas)
    added = side.added if side is not None and side.added is not None else tokenizer.added_tokens
    return ToolUse(
        format=found,
        schemas=schemas,
        special_ids={t: i for i, t, is_special in added if is_special and t in found.hidden},
        added=added,
        required=required if isinstance(choice, ToolMode) else (choice,),
    )


def has_tools(prompt: ChatPrompt) -> bool:
    """Tell whether a chat's template is shown tools."""
    return bool(prompt.tools) and prompt.tool_choice != ToolMode.NONE


def template_of(prompt: ChatPrompt, tokenizer: Tokenizer, side: TextSide | None) -> str | None:
    """Return the template that renders a chat."""
    if side is not None and side.renders_chats:
        return side.template
    return tokenizer.chat_template(has_tools=has_tools(prompt))


class CalledTools:
    """The calls of one output while its text comes."""

    def __init__(self, use: ToolUse | None) -> None:
        self._reader = None if use is None else CallReader(use.format, use.schemas)

    def reason(self, reason: FinishReason) -> FinishReason:
        """Why the output ended: for its calls, if it ended of itself and has some."""
        has_calls = self._reader is not None and self._reader.num_calls > 0
        is_called = reason is FinishReason.STOP and has_calls
        return FinishReason.TOOL_CALLS if is_called else reason

    def taken_out(self, delta: Delta | None, index: int, *, is_last: bool) -> Delta | None:
        """A delta with what is calls apart from its text."""
        if self._reader is None:
            return delta
        read = [self._reader.push("" if delta is None else delta.text)]
        if is_last:
            read.append(self._reader.flush())
        text = "".join(parsed.text for parsed in read)
        calls = tuple(_delta(part) for parsed in read for part in parsed.calls)
        if delta is None and not text and not calls:
            return None
        whole = Delta(text="", token_ids=(), index=index) if delta is None else delta
        return replace(whole, text=text, tool_calls=calls)


def _delta(part: CallPart) -> ToolCallDelta:
    call_id = f"call_{uuid.uuid4().hex[:24]}" if part.name else ""
    return ToolCallDelta(part.number, call_id, part.name, part.arguments)

"""A conversation that asks for its next turn, and the tools that this turn may call."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, ClassVar

from lora_runtime.errors import InvalidRequest, written
from lora_runtime.text.tool_formats.catalog import shows_tools

MAX_TOOLS = 128
_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}", re.ASCII)


@dataclass(frozen=True, slots=True)
class Tool:
    """What the assistant may call."""

    name: str
    description: str = ""
    parameters: Mapping[str, Any] | None = None
    """JSON schema of an object; None: any object."""
    strict: bool = False
    """Arguments are held to the schema under ToolMode.AUTO too."""


class ToolMode(StrEnum):
    """Whether tools are called."""

    AUTO = "auto"
    NONE = "none"
    REQUIRED = "required"


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    """A conversation for a chat template: mappings with `role` and `content`, and where they apply
    `name`, `reasoning_content`, `tool_call_id` and `tool_calls` in the shape of OpenAI's API.
    """

    field: ClassVar[str] = "messages"
    messages: tuple[Mapping[str, Any], ...]
    tools: tuple[Tool, ...] = ()
    tool_choice: ToolMode | str = ToolMode.AUTO
    """A ToolMode, or the name of the tool that is to be called, which may be that of a mode."""
    parallel_tool_calls: bool = True
    """False: an output ends with its first call."""
    template_variables: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """What the template sees beside messages and tools, such as `enable_thinking`."""

    @property
    def is_empty(self) -> bool:
        return not self.messages

    @property
    def has_tools(self) -> bool:
        """True where the template is shown tools."""
        return bool(self.tools) and self.tool_choice is not ToolMode.NONE


def shown_tools(prompt: ChatPrompt, template: str | None) -> list[dict[str, Any]]:
    """Return what the template is shown of a chat's tools, in the shape of OpenAI's API.

    Raises InvalidRequest naming the field: tools without a name, a name twice, a choice that is
    none of them, or a template that would not show them.
    """
    _check_tools(prompt.tools)
    _check_choice(prompt.tool_choice, {tool.name for tool in prompt.tools})
    if not prompt.has_tools:
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


def _check_tools(tools: Sequence[Tool]) -> None:
    if len(tools) > MAX_TOOLS:
        raise InvalidRequest(
            f"messages.tools has {len(tools)} tools; at most {MAX_TOOLS} are shown",
            field="messages.tools",
        )
    names: set[str] = set()
    for index, tool in enumerate(tools):
        where = f"messages.tools[{index}].name"
        if not _NAME.fullmatch(tool.name):
            raise InvalidRequest(
                f"{where} is {tool.name[:64]!r}; it must be 1 to 64 letters, digits, '_' and '-'",
                field=where,
            )
        if tool.name in names:
            raise InvalidRequest(f"{where} is {tool.name!r} once more", field=where)
        names.add(tool.name)
        kind = (tool.parameters or {}).get("type", "object")
        if "object" not in (kind if isinstance(kind, list) else [kind]):
            where = f"messages.tools[{index}].parameters"
            raise InvalidRequest(
                f"{where} has the type {written(kind)}; arguments are an object", field=where
            )


def _check_choice(choice: ToolMode | str, names: set[str]) -> None:
    if choice is ToolMode.REQUIRED and not names:
        raise InvalidRequest(
            "messages.tool_choice asks for a tool, and messages.tools is empty",
            field="messages.tool_choice",
        )
    if not isinstance(choice, ToolMode) and choice not in names:
        raise InvalidRequest(
            f"messages.tool_choice is {choice[:64]!r}; no tool of the request has this name",
            field="messages.tool_choice",
        )

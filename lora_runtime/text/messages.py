"""What a chat template is given: messages, tools and variables, each checked before any runs."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from lora_runtime.errors import InvalidRequest

ROLES = frozenset({"system", "developer", "user", "assistant", "tool"})
"""Roles a message may have; the base's template may accept fewer."""
TEXTS = ("role", "content", "name", "tool_call_id", "reasoning_content")
"""Keys of a message whose values are texts."""
RESERVED = frozenset(
    {
        "messages",
        "raise_exception",
        "strftime_now",
        *inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters,
        *inspect.signature(render_jinja_template).parameters,
    }
)
"""Variables that a request may not set: what the template gets from elsewhere, and the options of
those who render it."""

Message = Mapping[str, Any]


def check_messages(messages: Sequence[Message]) -> None:
    """Raise InvalidRequest (field `messages`) for messages that are given to no template.

    Each has `role` and `content`, texts. A turn of the assistant may have `tool_calls` instead of a
    content or beside it, and `reasoning_content`, what it thought before; a turn of role tool the
    `tool_call_id` that it answers; and any a `name`.
    """
    if not messages:
        raise _refused("messages is empty; send at least one")
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        wanted = {"role", "content"}
        if message.get("role") == "assistant" and message.get("tool_calls"):
            wanted = {"role"}
        unknown = set(message) - {*TEXTS, "tool_calls"}
        if unknown or not wanted <= set(message):
            found = ", ".join(sorted(map(str, message))) or "nothing"
            raise _refused(
                f"{where} has {found}; it must have role and content, and may have name, "
                "tool_calls, tool_call_id and reasoning_content"
            )
        if not all(isinstance(message[name], str) for name in TEXTS if name in message):
            raise _refused(f"{where}: {', '.join(TEXTS[:-1])} and {TEXTS[-1]} must be strings")
        role = message["role"]
        if role not in ROLES:
            known = ", ".join(sorted(ROLES))
            raise _refused(f"{where}.role is {role!r}; known are {known}")
        for name in ("tool_calls", "reasoning_content"):
            if name in message and role != "assistant":
                raise _refused(
                    f"{where} has {name} and role {role}; only the assistant calls tools and thinks"
                )
        if "tool_call_id" in message and role != "tool":
            raise _refused(f"{where} has tool_call_id and role {role}; only a tool answers a call")


def check_plain_messages(messages: Sequence[Message]) -> None:
    """Raise InvalidRequest (field `messages`) for messages with more than role and content."""
    for index, message in enumerate(messages):
        if set(message) != {"role", "content"}:
            found = ", ".join(sorted(map(str, message))) or "nothing"
            raise _refused(f"messages[{index}] has {found}; it must have exactly role and content")
    check_messages(messages)


def as_templates_want(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Checked messages as the templates of today's models read them: every turn has a content, and
    a call's arguments are a mapping, not its text. Raises as `check_messages`.
    """
    check_messages(messages)
    found = []
    for index, message in enumerate(messages):
        turn = {"content": "", **message}
        calls = turn.pop("tool_calls", None)
        if calls:
            where = f"messages[{index}].tool_calls"
            if not isinstance(calls, list | tuple):
                raise _refused(f"{where} must be a list")
            turn["tool_calls"] = [_call(call, f"{where}[{i}]") for i, call in enumerate(calls)]
        found.append(turn)
    return found


def _call(call: Any, where: str) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise _refused(f"{where} must have a function with a name and arguments")
    arguments = function.get("arguments", "{}")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except (ValueError, RecursionError) as error:
            raise _refused(f"{where}: arguments are no JSON: {error}") from None
    if not isinstance(arguments, Mapping):
        raise _refused(f"{where}: arguments must be a JSON object")
    name = function["name"]
    return {**call, "type": "function", "function": {"name": name, "arguments": dict(arguments)}}


def check_variables(variables: Mapping[str, Any], special: Mapping[str, Any]) -> None:
    """Raise InvalidRequest (field `messages.template_variables`) for a variable that the server
    sets itself. special: the tokenizer's special tokens, which templates know by name.
    """
    for name in variables:
        if name in RESERVED or name in special:
            raise InvalidRequest(
                f"messages.template_variables sets {name!r}, which the server sets itself; leave "
                "it out",
                field="messages.template_variables",
            )


def _refused(message: str) -> InvalidRequest:
    return InvalidRequest(message, field="messages")

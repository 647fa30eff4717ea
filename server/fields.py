"""What a field may hold on any wire: names of adapters, printable text, and the size of prompts."""

from __future__ import annotations

import re

from lora_runtime.errors import AdapterNotFound, InvalidRequest, PromptTooLong
from loramux.server.calls import PromptLimits

MAX_VALUES = 1 << 20
"""Numbers and other values of one request: 128 prompts of 8,192 token ids each."""
MAX_TEXTS = 1 << 17
"""Texts of one request, the keys of objects among them."""
MAX_PARTS = 1 << 14
"""Lists, objects and messages of one request, such as turns of a conversation and parts of them.
What checks them cannot be interrupted; a hundred thousand would hold up every stream for seconds.
"""
MAX_NAME_LENGTH = 128
"""Characters of an adapter's name."""

_NAME = re.compile(
    rf"(?=.{{1,{MAX_NAME_LENGTH}}}\Z)"
    r"[A-Za-z0-9][A-Za-z0-9._@-]*(/[A-Za-z0-9][A-Za-z0-9._@-]*)*",
    re.ASCII,
)
_PRINTABLE = re.compile(r"[ -~]{0,128}")


def check_tokens(num_given: int, field: str, limits: PromptLimits) -> None:
    """Raise PromptTooLong for a prompt of more tokens or turns than can fit."""
    if num_given > limits.num_tokens:
        what = "turns" if field == "messages" else "tokens"
        raise PromptTooLong(
            f"{field} has {num_given} {what}; at most {limits.num_tokens} fit", field=field
        )


def check_bytes(num_bytes: int, field: str, limits: PromptLimits) -> None:
    """Raise PromptTooLong for a prompt of more bytes than can be the tokens that fit."""
    if num_bytes > limits.num_bytes:
        raise PromptTooLong(
            f"{field} has {num_bytes} bytes; at most {limits.num_bytes} can be the "
            f"{limits.num_tokens} tokens that fit",
            field=field,
        )


def adapter_name(name: str, field: str = "name") -> str:
    """Return a well-formed adapter name, such as `polite` or `org/polite@v2`; as a path it would
    lead nowhere else. Raises InvalidRequest naming `field`.
    """
    if not name:
        raise InvalidRequest(f"{field} is empty; name an adapter", field=field)
    if not _NAME.fullmatch(name) or ".." in name:
        raise InvalidRequest(
            f"{field} is {name[:MAX_NAME_LENGTH]!r}; use up to {MAX_NAME_LENGTH} letters, digits, "
            "'.', '_', '-' and '@', in parts between single '/', each with a letter or digit "
            "first, and no '..'",
            field=field,
        )
    return name


def not_loaded(name: str, field: str) -> AdapterNotFound:
    """What asking for a name that nothing is loaded under gets."""
    return AdapterNotFound(
        f"adapter {name!r} is not loaded; GET /v1/models, ListAdapters and `loramux adapters list` "
        "show what is",
        field=field,
    )


def printable(text: str, field: str) -> str:
    """Return a short text for logs and headers. Raises InvalidRequest naming `field`."""
    if not _PRINTABLE.fullmatch(text):
        raise InvalidRequest(f"{field} must be at most 128 printable ASCII characters", field=field)
    return text

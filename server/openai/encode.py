"""From events to the parts of an answer: token texts, log probabilities, usage, finish reasons."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from lora_runtime.core import FinishReason, TokenLogprob
from lora_runtime.errors import Unavailable
from lora_runtime.text.tool_calls import ToolCallDelta
from loramux.server.calls import Finished

TokenReader = Callable[[int], bytes]
"""From a token id to the bytes of the token."""
Positions = Sequence[tuple[int, TokenLogprob | None]]
"""Tokens and their log probabilities; the first token of a prompt has none."""


@dataclass(slots=True)
class Usage:
    """Tokens read and made for one request, of all its prompts and outputs."""

    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    """Of the prompts' tokens those found in the prefix cache as each prompt's first output began:
    what its other outputs find, that one has computed."""
    num_output_tokens: int = 0
    num_reasoning_tokens: int = 0

    def body(self) -> dict[str, Any]:
        """As OpenAI's API has it."""
        body: dict[str, Any] = {
            "prompt_tokens": self.num_prompt_tokens,
            "completion_tokens": self.num_output_tokens,
            "total_tokens": self.num_prompt_tokens + self.num_output_tokens,
            "prompt_tokens_details": {"cached_tokens": self.num_cached_tokens},
        }
        if self.num_reasoning_tokens:
            details = {"reasoning_tokens": self.num_reasoning_tokens}
            body["completion_tokens_details"] = details
        return body


def finish_reason(event: Finished) -> str:
    """Return why an output ended. Raises Unavailable where the server ended it early: what there is
    of the output must not pass for the whole.
    """
    if event.finish_reason is FinishReason.CANCELLED:
        raise Unavailable("the server ended the request early: its adapter was unloaded")
    return event.finish_reason.value


def token_text(token: bytes) -> str:
    r"""Return a token for a reader: its text, or `bytes:\xe2\x82` for a part of a character."""
    try:
        return token.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token)


def completion_logprobs(
    positions: Positions, read: TokenReader, num_top: int, offset: int
) -> dict[str, Any]:
    """Return log probabilities as completions have them; the first token begins at `offset`."""
    body: dict[str, list[Any]] = {
        "text_offset": [], "token_logprobs": [], "tokens": [], "top_logprobs": []
    }  # fmt: skip
    for token_id, logprob in positions:
        text = token_text(read(token_id))
        body["text_offset"].append(offset)
        body["tokens"].append(text)
        body["token_logprobs"].append(None if logprob is None else logprob.logprob)
        top: dict[str, float] | None = None
        if logprob is not None:
            top = {}
            for other, value in [*logprob.top[:num_top], (token_id, logprob.logprob)]:
                top.setdefault(token_text(read(other)), value)
        body["top_logprobs"].append(top)
        offset += len(text)
    return body


def chat_logprobs(positions: Positions, read: TokenReader) -> dict[str, Any]:
    """Return log probabilities as chats have them."""
    content = [
        {
            **_chat_token(token_id, logprob.logprob, read),
            "top_logprobs": [_chat_token(other, value, read) for other, value in logprob.top],
        }
        for token_id, logprob in positions
        if logprob is not None
    ]
    return {"content": content, "refusal": None}


def prompt_logprobs(
    token_ids: Sequence[int], logprobs: Sequence[TokenLogprob], read: TokenReader, num_top: int
) -> list[dict[str, Any] | None]:
    """Return a prompt's log probabilities as vLLM does: for each token but the first, those of the
    most likely tokens and its own, by token id.
    """
    found: list[dict[str, Any] | None] = [None]
    for token_id, logprob in zip(token_ids[1:], logprobs, strict=True):
        top: dict[str, Any] = {
            str(other): {"logprob": value, "rank": rank, "decoded_token": token_text(read(other))}
            for rank, (other, value) in enumerate(logprob.top[:num_top], start=1)
        }
        own = {"logprob": logprob.logprob, "rank": None}
        top.setdefault(str(token_id), own | {"decoded_token": token_text(read(token_id))})
        found.append(top)
    return found


def tool_call_parts(calls: Iterable[ToolCallDelta]) -> list[dict[str, Any]]:
    """Return parts of calls of tools as a stream of a chat has them."""
    parts = []
    for call in calls:
        function: dict[str, str] = {"arguments": call.arguments}
        part: dict[str, Any] = {"index": call.index}
        if call.id:
            part |= {"id": call.id, "type": "function"}
            function = {"name": call.name, **function}
        parts.append({**part, "function": function})
    return parts


def _chat_token(token_id: int, logprob: float, read: TokenReader) -> dict[str, Any]:
    token = read(token_id)
    return {"token": token_text(token), "logprob": logprob, "bytes": list(token)}

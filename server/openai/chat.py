"""POST /v1/chat/completions: the next turn of a conversation, tools included."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

from loramux.server.calls import Delta, Event, Finished, PromptLogprobs, Started
from loramux.server.openai import encode
from loramux.server.openai.boundary import Exchange
from loramux.server.openai.choices import Chunk, stream_choices
from loramux.server.openai.decode import chat_call, named_as_given, names_given
from loramux.server.openai.events import Numbered, generate
from loramux.server.openai.schema import ChatRequest

REASONING = ("reasoning_content", "reasoning")
"""The field of what was thought: its name at DeepSeek and SGLang, and vLLM's, which had the other
before.
"""


async def chat(exchange: Exchange) -> None:
    """Answer a request for a chat completion."""
    request, call = await exchange.run(chat_call, exchange)
    turn = _Turn(request, exchange)
    with named_as_given(names_given(request)):
        async with aclosing(generate(exchange.service.generation, [call])) as events:
            if request.stream:
                await _stream(turn, events)
            else:
                async for _, event in events:
                    for part in await _parts(turn, event):
                        turn.keep(part)
                is_long = request.prompt_logprobs is not None
                await exchange.answer.json(turn.whole(), is_long=is_long)


async def _stream(turn: _Turn, events: AsyncIterator[Numbered]) -> None:
    async def chunks(_: int, event: Event) -> list[Chunk]:
        return [turn.chunk(part) for part in await _parts(turn, event)]

    answer, options = turn.exchange.answer, turn.request.stream_options
    await stream_choices(answer, events, chunks, turn.head, turn.usage, options)


async def _parts(turn: _Turn, event: Event) -> list[dict[str, Any]]:
    """Those of a prompt's log probabilities, which may be many, off the event loop."""
    if isinstance(event, PromptLogprobs):
        return await turn.exchange.long_work.run(turn.parts, event)
    return turn.parts(event)


class _Turn:
    """The state of one request: its parts of choices, and what they add up to."""

    def __init__(self, request: ChatRequest, exchange: Exchange) -> None:
        self.request = request
        self.exchange = exchange
        self.usage = encode.Usage()
        self.prompt_logprobs: list[dict[str, Any] | None] | None = None
        self.head: dict[str, Any] = {
            "id": f"chatcmpl-{exchange.request_id}",
            "object": "chat.completion.chunk" if request.stream else "chat.completion",
            "created": int(time.time()),
            "model": request.model,
        }
        self._read: encode.TokenReader = bytes
        self._token_ids: tuple[int, ...] = ()
        self._choices: dict[int, dict[str, Any]] = {}

    def parts(self, event: Event) -> list[dict[str, Any]]:
        """Return what an event adds to choices."""
        match event:
            case Started():
                self.usage.num_prompt_tokens = event.num_prompt_tokens
                self.usage.num_cached_tokens = event.num_cached_tokens
                self._token_ids = event.prompt_token_ids
                if event.notes:
                    self.head["notes"] = list(event.notes)
                if self.request.logprobs or self.request.prompt_logprobs is not None:
                    self._read = self.exchange.service.prompts.token_reader(event.side)
                role = {"role": "assistant", "content": ""}
                return [_part(index, role) for index in range(self.request.n)]
            case PromptLogprobs():
                self.prompt_logprobs = encode.prompt_logprobs(
                    self._token_ids, event.logprobs, self._read, self.request.prompt_logprobs or 0
                )
            case Delta():
                self.usage.num_output_tokens += len(event.token_ids)
                return self._more(event)
            case Finished():
                self.usage.num_reasoning_tokens += event.num_reasoning_tokens
                return [_part(event.index, {}, reason=encode.finish_reason(event))]
        return []

    def chunk(self, part: dict[str, Any]) -> Chunk:
        """Return the chunk of a stream that has one part; the last of a choice has the prompt's."""
        if self.prompt_logprobs is None or not part["finish_reason"]:
            return {"choices": [part]}, False
        return {"choices": [part], "prompt_logprobs": self.prompt_logprobs}, True

    def keep(self, part: dict[str, Any]) -> None:
        """Add a part to the whole answer."""
        choice = self._choices.setdefault(
            part["index"],
            {
                "index": part["index"],
                "message": {"role": "assistant", "content": "", "refusal": None},
                "logprobs": None,
                "finish_reason": None,
            },
        )
        delta, message = part["delta"], choice["message"]
        for name in ("content", *REASONING):
            if name in delta:
                message[name] = message.get(name, "") + delta[name]
        for call in delta.get("tool_calls", ()):
            _add_call(message.setdefault("tool_calls", []), call)
        if part["logprobs"] and choice["logprobs"]:
            choice["logprobs"]["content"] += part["logprobs"]["content"]
        elif part["logprobs"]:
            choice["logprobs"] = part["logprobs"]
        choice["finish_reason"] = part["finish_reason"]

    def whole(self) -> dict[str, Any]:
        """Return the whole answer."""
        choices = [self._choices[index] for index in sorted(self._choices)]
        for choice in choices:
            message = choice["message"]
            if message.get("tool_calls") and not message["content"]:
                message["content"] = None
        body = self.head | {"choices": choices, "usage": self.usage.body()}
        if self.prompt_logprobs is not None:
            body["prompt_logprobs"] = self.prompt_logprobs
        return body

    def _more(self, event: Delta) -> list[dict[str, Any]]:
        delta: dict[str, Any] = {}
        if event.reasoning and self.request.include_reasoning:
            delta |= {name: event.reasoning for name in REASONING}
        if event.text:
            delta["content"] = event.text
        if event.tool_calls:
            delta["tool_calls"] = encode.tool_call_parts(event.tool_calls)
        logprobs = None
        if event.logprobs:
            positions = list(zip(event.token_ids, event.logprobs, strict=True))
            logprobs = encode.chat_logprobs(positions, self._read)
        return [_part(event.index, delta, logprobs)] if delta or logprobs else []


def _part(
    index: int,
    delta: dict[str, Any],
    logprobs: dict[str, Any] | None = None,
    reason: str | None = None,
) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}


def _add_call(calls: list[dict[str, Any]], part: dict[str, Any]) -> None:
    """Add a part of a tool's call to a message's calls; its first part has the id and the name."""
    while len(calls) <= part["index"]:
        calls.append({"id": "", "type": "function", "function": {"name": "", "arguments": ""}})
    call = calls[part["index"]]
    call["id"] = part.get("id", call["id"])
    call["function"]["name"] += part["function"].get("name", "")
    call["function"]["arguments"] += part["function"]["arguments"]

"""POST /v1/completions: texts continued, several at once if asked for, with echo and log
probabilities.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from loramux.server.calls import Delta, Event, Finished, PromptLogprobs, Started, TextPrompt
from loramux.server.openai import encode
from loramux.server.openai.boundary import Exchange
from loramux.server.openai.choices import Chunk, stream_choices
from loramux.server.openai.decode import completion_calls, named_as_given, names_given
from loramux.server.openai.events import Numbered, generate
from loramux.server.openai.schema import CompletionRequest


async def complete(exchange: Exchange) -> None:
    """Answer a request for completions."""
    request, calls = await exchange.run(completion_calls, exchange)
    prompts = [call.prompt.text if isinstance(call.prompt, TextPrompt) else None for call in calls]
    completion = _Completion(request, exchange, prompts)
    with named_as_given(names_given(request)):
        async with aclosing(generate(exchange.service.generation, calls)) as events:
            if request.stream:
                await _stream(completion, events)
            else:
                async for number, event in events:
                    for part in await _parts(completion, number, event):
                        completion.keep(part)
                await exchange.answer.json(completion.whole(), is_long=completion.is_long)


async def _stream(completion: _Completion, events: AsyncIterator[Numbered]) -> None:
    async def chunks(number: int, event: Event) -> list[Chunk]:
        is_long = completion.is_long and not isinstance(event, Delta)
        parts = await _parts(completion, number, event)
        return [({"choices": [part]}, is_long) for part in parts]

    answer, options = completion.exchange.answer, completion.request.stream_options
    await stream_choices(answer, events, chunks, completion.head, completion.usage, options)


async def _parts(completion: _Completion, number: int, event: Event) -> list[dict[str, Any]]:
    """Those of a prompt's log probabilities, perhaps hundreds of thousands, off the event loop."""
    if isinstance(event, PromptLogprobs):
        return await completion.exchange.long_work.run(completion.parts, number, event)
    return completion.parts(number, event)


@dataclass(slots=True)
class _Prompt:
    """What is known of one of the prompts."""

    text: str | None
    token_ids: tuple[int, ...] = ()
    read: encode.TokenReader = field(default=bytes)
    logprobs: list[dict[str, Any] | None] | None = None


class _Completion:
    """The state of one request: its parts of choices, and what they add up to."""

    def __init__(
        self, request: CompletionRequest, exchange: Exchange, prompts: list[str | None]
    ) -> None:
        self.request = request
        self.exchange = exchange
        self.usage = encode.Usage()
        self.is_long = request.prompt_logprobs is not None or (
            request.echo and request.logprobs is not None
        )
        """The answer has log probabilities of prompts."""
        self.head: dict[str, Any] = {
            "id": f"cmpl-{exchange.request_id}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": request.model,
        }
        self._prompts = [_Prompt(text) for text in prompts]
        self._num_characters = [0] * (len(prompts) * request.n)
        """Of the texts of the tokens of each choice, to tell where the next begins."""
        self._choices: dict[int, dict[str, Any]] = {}

    def parts(self, number: int, event: Event) -> list[dict[str, Any]]:
        """Return what an event of a prompt's call adds to choices."""
        prompt = self._prompts[number]
        first = number * self.request.n
        wants_logprobs = self.request.echo and self.request.logprobs is not None
        match event:
            case Started():
                self.usage.num_prompt_tokens += event.num_prompt_tokens
                self.usage.num_cached_tokens += event.num_cached_tokens
                self._begin(prompt, event)
                self._note(event)
                if self.request.echo and not wants_logprobs:
                    return self._echoes(prompt, first, None)
            case PromptLogprobs():
                num_top = self.request.prompt_logprobs
                if num_top is not None:
                    prompt.logprobs = encode.prompt_logprobs(
                        prompt.token_ids, event.logprobs, prompt.read, num_top
                    )
                if wants_logprobs:
                    return self._echoes(prompt, first, event)
            case Delta() if self.request.max_tokens != 0:
                self.usage.num_output_tokens += len(event.token_ids)
                if event.text or event.logprobs:
                    return [self._part(prompt, first + event.index, event)]
            case Finished():
                reason = "length" if self.request.max_tokens == 0 else encode.finish_reason(event)
                part = _choice(first + event.index, "", None, reason)
                if prompt.logprobs is not None:
                    part["prompt_logprobs"] = prompt.logprobs
                return [part]
        return []

    def keep(self, part: dict[str, Any]) -> None:
        """Add a part to the whole answer."""
        choice = self._choices.setdefault(part["index"], _choice(part["index"], "", None, None))
        choice["text"] += part["text"]
        choice["finish_reason"] = part["finish_reason"]
        if "prompt_logprobs" in part:
            choice["prompt_logprobs"] = part["prompt_logprobs"]
        if part["logprobs"] and choice["logprobs"]:
            for name, values in part["logprobs"].items():
                choice["logprobs"][name] += values
        elif part["logprobs"]:
            choice["logprobs"] = part["logprobs"]

    def whole(self) -> dict[str, Any]:
        """Return the whole answer."""
        choices = [self._choices[index] for index in sorted(self._choices)]
        return self.head | {"choices": choices, "usage": self.usage.body()}

    def _begin(self, prompt: _Prompt, event: Started) -> None:
        prompts, request = self.exchange.service.prompts, self.request
        prompt.token_ids = event.prompt_token_ids
        if request.logprobs is not None or request.prompt_logprobs is not None:
            prompt.read = prompts.token_reader(event.side)
        if request.echo and prompt.text is None:
            prompt.text = prompts.detokenize(event.prompt_token_ids)

    def _note(self, event: Started) -> None:
        if event.notes:
            self.head.setdefault("notes", []).extend(event.notes)

    def _echoes(
        self, prompt: _Prompt, first: int, event: PromptLogprobs | None
    ) -> list[dict[str, Any]]:
        parts = []
        for index in range(first, first + self.request.n):
            logprobs = None
            if event is not None:
                positions = list(zip(prompt.token_ids, (None, *event.logprobs), strict=True))
                logprobs = self._logprobs(index, prompt, positions)
            parts.append(_choice(index, prompt.text or "", logprobs, None))
        return parts

    def _part(self, prompt: _Prompt, index: int, event: Delta) -> dict[str, Any]:
        logprobs = None
        if event.logprobs:
            positions = list(zip(event.token_ids, event.logprobs, strict=True))
            logprobs = self._logprobs(index, prompt, positions)
        return _choice(index, event.text, logprobs, None)

    def _logprobs(self, index: int, prompt: _Prompt, positions: encode.Positions) -> dict[str, Any]:
        offset = self._num_characters[index]
        body = encode.completion_logprobs(
            positions, prompt.read, self.request.logprobs or 0, offset
        )
        self._num_characters[index] = offset + sum(map(len, body["tokens"]))
        return body


def _choice(
    index: int, text: str, logprobs: dict[str, Any] | None, reason: str | None
) -> dict[str, Any]:
    return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}

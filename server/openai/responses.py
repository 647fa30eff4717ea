"""POST /v1/responses as far as text and functions go: what is thought, said and called in answer to
a conversation. Nothing is stored.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing
from typing import Any

from lora_runtime.core import FinishReason
from loramux.server.calls import Delta, Event, Finished, Started
from loramux.server.openai import encode
from loramux.server.openai.boundary import Exchange
from loramux.server.openai.decode import named_as_given, names_given, responses_call
from loramux.server.openai.events import Numbered, generate
from loramux.server.openai.response_items import Output, Told
from loramux.server.openai.schema import ResponsesRequest


async def respond(exchange: Exchange) -> None:
    """Answer a request of the Responses API."""
    request, call = await exchange.run(responses_call, exchange)
    response = _Response(request, exchange)
    with named_as_given(names_given(request)):
        async with aclosing(generate(exchange.service.generation, [call])) as events:
            if request.stream:
                await _stream(response, events)
            else:
                async for _, event in events:
                    for _told in response.take(event):
                        pass
                await exchange.answer.json(response.body())


async def _stream(response: _Response, events: AsyncIterator[Numbered]) -> None:
    answer, number = response.exchange.answer, 0
    async for _, event in events:
        if isinstance(event, Started):
            await answer.begin_events()
        for name, values in response.take(event):
            kind = f"response.{name}"
            await answer.event({"type": kind, "sequence_number": number, **values}, kind)
            number += 1
    await answer.end_events()


class _Response:
    """The state of one response."""

    def __init__(self, request: ResponsesRequest, exchange: Exchange) -> None:
        self.exchange = exchange
        self._request = request
        self._status = "in_progress"
        self._output = Output(exchange.request_id)
        self._usage = encode.Usage()
        self._notes: list[str] = []
        self._created_at = int(time.time())

    def take(self, event: Event) -> Iterator[Told]:
        """Add what an event says, and give the events of a stream that say it."""
        match event:
            case Started():
                self._usage.num_prompt_tokens = event.num_prompt_tokens
                self._usage.num_cached_tokens = event.num_cached_tokens
                self._notes = list(event.notes)
                for name in ("created", "in_progress"):
                    yield name, {"response": self.body()}
            case Delta():
                self._usage.num_output_tokens += len(event.token_ids)
                yield from self._output.take(event)
            case Finished():
                self._usage.num_reasoning_tokens = event.num_reasoning_tokens
                is_cut = encode.finish_reason(event) == "length"
                self._status = "incomplete" if is_cut else "completed"
                is_called = event.finish_reason is FinishReason.TOOL_CALLS
                yield from self._output.finish(self._status, is_called=is_called)
                yield self._status, {"response": self.body()}

    def body(self) -> dict[str, Any]:
        """Return the response as it is now."""
        request, is_over = self._request, self._status != "in_progress"
        return {
            "id": f"resp_{self.exchange.request_id}",
            "object": "response",
            "created_at": self._created_at,
            "status": self._status,
            "background": False,
            "error": None,
            "incomplete_details": (
                {"reason": "max_output_tokens"} if self._status == "incomplete" else None
            ),
            "instructions": request.instructions,
            "max_output_tokens": request.max_output_tokens,
            "metadata": request.metadata or {},
            "model": request.model,
            "output": self._output.bodies() if is_over else [],
            "parallel_tool_calls": request.parallel_tool_calls,
            "previous_response_id": None,
            "store": False,
            "temperature": request.temperature,
            "text": {"format": {"type": "text"}} if request.text is None else _text(request),
            "tool_choice": _choice(request),
            "tools": [tool.model_dump() for tool in request.tools or ()],
            "top_p": request.top_p,
            "truncation": "disabled",
            "usage": _usage(self._usage) if is_over else None,
            **({"notes": self._notes} if self._notes else {}),
        }


def _choice(request: ResponsesRequest) -> Any:
    choice = request.tool_choice or "auto"
    return choice if isinstance(choice, str) else choice.model_dump()


def _text(request: ResponsesRequest) -> dict[str, Any]:
    assert request.text is not None
    given = request.text.model_dump(by_alias=True, exclude_none=True)
    return {"format": {"type": "text"}, **given}


def _usage(usage: encode.Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.num_prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.num_cached_tokens},
        "output_tokens": usage.num_output_tokens,
        "output_tokens_details": {"reasoning_tokens": usage.num_reasoning_tokens},
        "total_tokens": usage.num_prompt_tokens + usage.num_output_tokens,
    }

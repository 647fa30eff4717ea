"""POST /v1/responses as far as text goes: one message in answer to messages, nothing stored."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

from server.calls import Delta, Finished, Started
from server.openai import encode
from server.openai.boundary import Exchange
from server.openai.decode import responses_call
from server.openai.events import Numbered, field_is_model, generate
from server.openai.schema import ResponsesRequest


async def respond(exchange: Exchange) -> None:
    """Answer a request of the Responses API."""
    request, call = await exchange.run(responses_call, exchange)
    response = _Response(request, exchange)
    with field_is_model(not request.adapters):
        async with aclosing(generate(exchange.service.generation, [call])) as events:
            if request.stream:
                await _stream(response, events)
            else:
                async for _, event in events:
                    if isinstance(event, Started | Delta | Finished):
                        response.take(event)
                await exchange.answer.json(response.body())


async def _stream(response: _Response, events: AsyncIterator[Numbered]) -> None:
    answer, number = response.exchange.answer, 0

    async def send(kind: str, **values: Any) -> None:
        nonlocal number
        await answer.event({"type": kind, "sequence_number": number, **values}, kind)
        number += 1

    async for _, event in events:
        match event:
            case Started():
                response.take(event)
                await answer.begin_events()
                for kind in ("response.created", "response.in_progress"):
                    await send(kind, response=response.body())
                item = response.message() | {"content": []}
                await send("response.output_item.added", output_index=0, item=item)
                await send("response.content_part.added", **response.place, part=_part(""))
            case Delta():
                response.take(event)
                if event.text:
                    text = {"delta": event.text, "logprobs": []}
                    await send("response.output_text.delta", **response.place, **text)
            case Finished():
                response.take(event)
                text = {"text": response.text, "logprobs": []}
                await send("response.output_text.done", **response.place, **text)
                part = _part(response.text)
                await send("response.content_part.done", **response.place, part=part)
                item = response.message()
                await send("response.output_item.done", output_index=0, item=item)
                await send(f"response.{response.status}", response=response.body())
    await answer.end_events()


class _Response:
    """The state of one response."""

    def __init__(self, request: ResponsesRequest, exchange: Exchange) -> None:
        self.exchange = exchange
        self.status = "in_progress"
        self.text = ""
        self._request = request
        self._usage = encode.Usage()
        self._notes: list[str] = []
        self._created_at = int(time.time())
        self._item_id = f"msg_{exchange.request_id}"
        self.place = {"item_id": self._item_id, "output_index": 0, "content_index": 0}

    def take(self, event: Started | Delta | Finished) -> None:
        """Add what an event says."""
        match event:
            case Started():
                self._usage.num_prompt_tokens = event.num_prompt_tokens
                self._notes = list(event.notes)
            case Delta():
                self._usage.num_output_tokens += len(event.token_ids)
                self.text += event.text
            case Finished():
                is_cut = encode.finish_reason(event) == "length"
                self.status = "incomplete" if is_cut else "completed"

    def message(self) -> dict[str, Any]:
        """Return the one item of the output."""
        return {
            "type": "message",
            "id": self._item_id,
            "status": self.status,
            "role": "assistant",
            "content": [_part(self.text)],
        }

    def body(self) -> dict[str, Any]:
        """Return the response as it is now."""
        request, is_over = self._request, self.status != "in_progress"
        return {
            "id": f"resp_{self.exchange.request_id}",
            "object": "response",
            "created_at": self._created_at,
            "status": self.status,
            "background": False,
            "error": None,
            "incomplete_details": (
                {"reason": "max_output_tokens"} if self.status == "incomplete" else None
            ),
            "instructions": request.instructions,
            "max_output_tokens": request.max_output_tokens,
            "metadata": request.metadata or {},
            "model": request.model,
            "output": [self.message()] if is_over else [],
            "parallel_tool_calls": True,
            "previous_response_id": None,
            "store": False,
            "temperature": request.temperature,
            "text": {"format": {"type": "text"}} if request.text is None else _text(request),
            "tool_choice": "auto",
            "tools": [],
            "top_p": request.top_p,
            "truncation": "disabled",
            "usage": _usage(self._usage) if is_over else None,
            **({"notes": self._notes} if self._notes else {}),
        }


def _part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _text(request: ResponsesRequest) -> dict[str, Any]:
    assert request.text is not None
    given = request.text.model_dump(by_alias=True, exclude_none=True)
    return {"format": {"type": "text"}, **given}


def _usage(usage: encode.Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.num_prompt_tokens,
        "input_tokens_details": {"cached_tokens": 0},
        "output_tokens": usage.num_output_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage.num_prompt_tokens + usage.num_output_tokens,
    }

"""What is kept of one request for a request, from its call to its end, and who is told then."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Protocol

from lora_runtime.core import FinishReason
from loramux.server.calls import Delta, Event, Finished, GenerateCall, Started
from loramux.server.observability.calls import trace_headers


@dataclass(slots=True)
class RequestRecord:
    """A generation seen from outside. It holds no text but in `call`, which stays in memory."""

    call: GenerateCall
    base_name: str
    trace_headers: Mapping[str, str]
    """`traceparent` and `tracestate` as the caller sent them."""
    began_at_s: float
    """Seconds since 1970."""
    request_id: str = ""
    """Empty for a request that was refused and that its caller gave no name."""
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    """Of the prompt, found in the prefix cache as the first output began."""
    num_output_tokens: int = 0
    """Of all outputs together."""
    first_token_s: float | None = None
    """Seconds from the call to the first token."""
    outputs: list[tuple[Finished, float]] = field(default_factory=list)
    """One for each complete output, and the seconds from the call to its end."""
    seconds: float = 0.0
    error: BaseException | None = None
    trace_id: str = ""
    """Of the request's span, 32 hexadecimal digits; empty without traces."""

    @property
    def model(self) -> str:
        """What answers, as callers of a model would name it."""
        return "+".join(self.adapters) or self.base_name

    @property
    def tenant(self) -> str:
        """The tenant's name, or the address that stands for it."""
        return self.call.caller.tenant or self.call.client.removeprefix("tenant:")

    @property
    def adapters(self) -> tuple[str, ...]:
        return tuple(choice.name for choice in self.call.adapters)

    @property
    def reasons(self) -> tuple[str, ...]:
        """Why each output ended, or the whole request if it ended early."""
        if self.is_failed:
            return (FinishReason.ERROR.value,)
        if len(self.outputs) < self.call.num_outputs:
            return (FinishReason.CANCELLED.value,)
        return tuple(finished.finish_reason.value for finished, _ in self.outputs)

    @property
    def is_failed(self) -> bool:
        """It ended by an error; that its caller left is none."""
        return isinstance(self.error, Exception) and not isinstance(
            self.error, asyncio.CancelledError
        )


class RequestWatcher(Protocol):
    """Told of each request once, when it has ended; must be quick and raise nothing."""

    def on_ended(self, record: RequestRecord) -> None:
        """The request has ended, well or not."""


async def watched(
    call: GenerateCall,
    base_name: str,
    events: AsyncGenerator[Event, None],
    watchers: Sequence[RequestWatcher],
) -> AsyncGenerator[Event, None]:
    """Pass a request's events on; tell the watchers when it has ended."""
    begun = time.monotonic()
    headers = trace_headers.get({})
    record = RequestRecord(call, base_name, headers, time.time(), call.request_id or "")
    try:
        async with aclosing(events):
            async for event in events:
                if type(event) is Delta:
                    record.num_output_tokens += len(event.token_ids)
                    if record.first_token_s is None:
                        record.first_token_s = time.monotonic() - begun
                elif type(event) is Started:
                    record.request_id = event.request_id
                    record.num_prompt_tokens = event.num_prompt_tokens
                    record.num_cached_tokens = event.num_cached_tokens
                elif type(event) is Finished:
                    record.outputs.append((event, time.monotonic() - begun))
                yield event
    except BaseException as error:
        record.error = error
        raise
    finally:
        record.seconds = time.monotonic() - begun
        for watcher in watchers:
            watcher.on_ended(record)

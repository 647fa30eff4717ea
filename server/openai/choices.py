"""The stream of an answer that consists of choices: chunks under one head, then the usage."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from typing import Any

from loramux.server.calls import Event
from loramux.server.openai.boundary import Answer
from loramux.server.openai.encode import Usage
from loramux.server.openai.events import Numbered
from loramux.server.openai.schema import StreamOptions

Chunk = tuple[dict[str, Any], bool]
"""What a chunk has beside the head, and whether it is long."""


async def stream_choices(
    answer: Answer,
    events: AsyncIterator[Numbered],
    chunks: Callable[[int, Event], Awaitable[Iterable[Chunk]]],
    head: dict[str, Any],
    usage: Usage,
    options: StreamOptions | None,
) -> None:
    """Send the chunks that each event gives. The stream begins with the first event, so that what
    is refused before has a status. `head` and `usage` are read when they are sent.
    """
    is_begun = False
    async for number, event in events:
        if not is_begun:
            await answer.begin_events()
            is_begun = True
        for chunk, is_long in await chunks(number, event):
            body = head | chunk
            if options and options.continuous_usage_stats:
                body["usage"] = usage.body()
            elif options and options.include_usage:
                body["usage"] = None
            await answer.event(body, is_long=is_long)
    if options and options.include_usage:
        await answer.event(head | {"choices": [], "usage": usage.body()})
    await answer.end_events("[DONE]")

"""The outputs of one call as one stream: a call that asks for several has a request for each."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

from loramux.server.calls import Event, PromptLogprobs, Started

Events = AsyncGenerator[Event, None]


async def merged(streams: Sequence[Events], has_prompt_logprobs: bool) -> Events:
    """Yield the events of all streams as they come: one Started, then, if the call has them, the
    PromptLogprobs that one stream gives, then the rest.

    All streams begin in the order in which they are given, before anything that is started later on
    this event loop. An error of one is raised. They are all closed when this ends, however it does.
    """
    queue: asyncio.Queue[Event | Exception | None] = asyncio.Queue()
    tasks = [asyncio.create_task(_put_all(stream, queue)) for stream in streams]
    try:
        async for event in _in_order(_taken(queue, len(tasks)), has_prompt_logprobs):
            yield event
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _put_all(stream: Events, queue: asyncio.Queue[Event | Exception | None]) -> None:
    try:
        async with aclosing(stream):
            async for event in stream:
                queue.put_nowait(event)
    except Exception as error:
        queue.put_nowait(error)
    else:
        queue.put_nowait(None)


async def _taken(queue: asyncio.Queue[Event | Exception | None], num_streams: int) -> Events:
    """What was put, until all streams have ended or one has failed."""
    while num_streams > 0:
        event = await queue.get()
        if isinstance(event, Exception):
            raise event
        if event is None:
            num_streams -= 1
        else:
            yield event


async def _in_order(events: Events, has_prompt_logprobs: bool) -> Events:
    """Leave out all Started but the first, and hold back what would come before PromptLogprobs."""
    is_started, is_holding = False, has_prompt_logprobs
    held: list[Event] = []
    async for event in events:
        if isinstance(event, Started):
            if not is_started:
                yield event
            is_started = True
        elif isinstance(event, PromptLogprobs):
            is_holding = False
            for each in (event, *held):
                yield each
        elif is_holding:
            held.append(event)
        else:
            yield event
    if is_holding:  # the output that was to bring them ended before its first token
        for each in held:
            yield each

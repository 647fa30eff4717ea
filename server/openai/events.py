"""The events of one HTTP request, which may be several calls of the service: one per prompt."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

from loramux.server.calls import Event, GenerateCall, Started
from loramux.server.generation.generation import Generation

MAX_HELD = 64
"""Events of several calls that wait for the caller's connection; the engine's wait behind them."""

Numbered = tuple[int, Event]
"""The number of a call, and one of its events."""


async def generate(
    generation: Generation, calls: Sequence[GenerateCall]
) -> AsyncGenerator[Numbered, None]:
    """Stream the events of all calls as they come, but first each call's Started, in their order:
    what is refused is refused before anything is answered. The first failure ends all.
    """
    if len(calls) == 1:
        async with aclosing(generation.generate(calls[0])) as events:
            async for event in events:
                yield 0, event
        return
    async with aclosing(_merged(generation, calls)) as merged:
        started: dict[int, Started] = {}
        held: list[Numbered] = []
        async for index, event in merged:
            if len(started) == len(calls):
                yield index, event
                continue
            if isinstance(event, Started):
                started[index] = event
            else:
                held.append((index, event))
            if len(started) == len(calls):
                for number in range(len(calls)):
                    yield number, started[number]
                for each in held:
                    yield each


async def _merged(
    generation: Generation, calls: Sequence[GenerateCall]
) -> AsyncGenerator[Numbered, None]:
    queue: asyncio.Queue[Numbered | BaseException | None] = asyncio.Queue(MAX_HELD)

    async def pump(index: int, call: GenerateCall) -> None:
        try:
            async with aclosing(generation.generate(call)) as events:
                async for event in events:
                    await queue.put((index, event))
            await queue.put(None)
        except Exception as error:
            await queue.put(error)

    tasks = [asyncio.create_task(pump(index, call)) for index, call in enumerate(calls)]
    try:
        num_running = len(tasks)
        while num_running:
            found = await queue.get()
            if isinstance(found, BaseException):
                raise found
            if found is None:
                num_running -= 1
            else:
                yield found
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

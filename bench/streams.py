"""Streams that run beside what a benchmark measures, and what they notice of it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Collection
from typing import Any

from loramux.server.client import AsyncClient


async def decode(client: AsyncClient, gaps: list[float], **request: Any) -> None:
    """One answer of 400 tokens after another, until cancelled; notes the seconds between two of its
    tokens, by the client's clock.
    """
    while True:
        last = None
        async for event in client.generate(**request, max_tokens=400, ignore_eos=True):
            if not event.delta.token_ids:
                continue
            now = time.perf_counter()
            if last is not None:
                gaps.append(now - last)
            last = now


async def end(streams: Collection[asyncio.Task[None]]) -> None:
    """Cancel them. Raises what ended one of them before: the load was not there all the time."""
    for stream in streams:
        if stream.done():
            stream.result()
        stream.cancel()
    await asyncio.gather(*streams, return_exceptions=True)

"""Which contents keep their place in the device pool, because a name is pinned to them."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from lora_runtime.engine.client import EngineClient
from loramux.server.calls import AdapterRecord


class Pins:
    """Counts the names that pin each content; the engine knows of a content's first and last."""

    def __init__(self, engine: EngineClient) -> None:
        self._engine = engine
        self._pins: Counter[str] = Counter()
        """Names that pin each content, by digest."""

    @asynccontextmanager
    async def pinned(self, digest: str, is_pinned: bool) -> AsyncIterator[None]:
        """Pin a content for one name, if it is to be pinned; no longer where the context fails."""
        if not is_pinned:
            yield
            return
        self._pins[digest] += 1
        try:
            await self._engine.pin_adapter(digest)
            yield
        except BaseException:
            await self._drop(digest)
            raise

    async def drop(self, record: AdapterRecord) -> None:
        """Take the pin of a name off its record and its content."""
        record.is_pinned = False
        await self._drop(record.digest)

    async def _drop(self, digest: str) -> None:
        self._pins[digest] -= 1
        if not self._pins[digest]:
            del self._pins[digest]
            await self._engine.pin_adapter(digest, is_pinned=False)

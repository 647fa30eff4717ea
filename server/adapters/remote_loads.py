"""Loads of adapters that lie elsewhere: their names meanwhile, and how a fetch is ended.

A tenant has one fetch a name at a time, and waits for no other's. A caller who goes away ends its
fetch, and an unload of the name ends all that are for it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from weakref import WeakValueDictionary

from lora_runtime.errors import AdapterNotFound
from loramux.server.adapters.registry import Registry
from loramux.server.adapters.sources.location import Location
from loramux.server.adapters.sources.remote import Fetched, RemoteSources


class RemoteLoads:
    """The fetches that are running, by the name that each is for."""

    def __init__(self, remote: RemoteSources, registry: Registry) -> None:
        self._remote, self._registry = remote, registry
        self._running: dict[str, set[asyncio.Timeout]] = {}
        self._locks: WeakValueDictionary[tuple[str, str], asyncio.Lock] = WeakValueDictionary()
        """By tenant and name."""

    @asynccontextmanager
    async def fetched(
        self, name: str, location: Location, *, tenant: str = "", is_on_demand: bool = False
    ) -> AsyncIterator[Fetched]:
        """Yield the files for a name, which shows DOWNLOADING meanwhile if it holds nothing;
        `tenant` fetches them.

        Raises as `RemoteSources.fetch`, and AdapterNotFound when the name is unloaded meanwhile.
        """
        lock = self._locks.setdefault((tenant, name), asyncio.Lock())
        ending = asyncio.timeout(None)
        self._running.setdefault(name, set()).add(ending)
        try:
            async with AsyncExitStack() as held:
                async with ending:
                    await held.enter_async_context(lock)
                    show = self._registry.downloading(
                        name, location.text, is_on_demand=is_on_demand
                    )
                    fetch = self._remote.fetch(location, held.enter_context(show), tenant=tenant)
                    fetched = await held.enter_async_context(fetch)
                self._forget(name, ending)
                yield fetched
        except TimeoutError:
            if not ending.expired():
                raise
            raise AdapterNotFound(
                f"adapter {name!r} was unloaded while it was being fetched", field="name"
            ) from None
        finally:
            self._forget(name, ending)

    def end(self, name: str) -> bool:
        """End the fetches for a name; False if there are none."""
        for ending in self._running.get(name, ()):
            ending.reschedule(asyncio.get_running_loop().time())
        return name in self._running

    def _forget(self, name: str, ending: asyncio.Timeout) -> None:
        running = self._running.get(name, set())
        running.discard(ending)
        if not running:
            self._running.pop(name, None)

"""Adapters that are loaded when a request first names them.

The operator says which names may be looked for, and where: PATTERN=SOURCE, with {name} in the
source. All requests of a tenant that wait for a name wait for one load. What cannot be loaded is
remembered for some seconds, so that a name that is asked for again and again costs little.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from fnmatch import fnmatchcase
from typing import TypeAlias

import structlog

from lora_runtime.errors import (
    AdapterExists,
    AdapterNotFound,
    AdapterSourceRefused,
    LoramuxError,
    Overloaded,
    Unavailable,
)
from loramux.server.access.audit import audited
from loramux.server.access.caller import Caller
from loramux.server.access.places import TenantPlaces
from loramux.server.adapters.loads import Loads
from loramux.server.adapters.registry import Registry
from loramux.server.adapters.sources.location import PLACE

REMEMBERED_S = 10.0
MAX_REMEMBERED = 4096
MAX_LOADING = 32

TenantsName: TypeAlias = tuple[str, str]
"""A tenant and the name that its requests ask for. Tenants wait for no load of one another: it may
be one that waits for its own tenant's places.
"""

logger = structlog.get_logger(__name__)


def _matches(name: str, pattern: str) -> bool:
    """As of file names, and only `@` and `/` of the pattern match these: a revision or a folder is
    the operator's to choose, for on a hub anybody may propose one.
    """
    is_as_deep = all(name.count(mark) == pattern.count(mark) for mark in "@/")
    return is_as_deep and fnmatchcase(name, pattern)


class OnDemand:
    """Which names are loaded when a request names them, and those loads. What is loaded so is of
    every tenant whose requests use it: see `shares.py`.
    """

    def __init__(self, sources: Mapping[str, str], registry: Registry, loads: Loads) -> None:
        """`sources`: pattern of names (* ? [abc], none of them for `/` or `@`) → source; the first
        that matches counts.
        """
        self._sources, self._registry, self._loads = dict(sources), registry, loads
        self._places = TenantPlaces("adapters", "are being loaded on demand", MAX_LOADING)
        self._loading: dict[TenantsName, asyncio.Task[None]] = {}
        self._failed: OrderedDict[TenantsName, tuple[float, LoramuxError]] = OrderedDict()
        """Until when it is not tried again, and why."""

    async def ensure(self, names: Sequence[str], caller: Caller, deadline: float | None) -> None:
        """Load what is not known yet and may be; what may not is left to who asks next.

        `caller`: who asks; only names that there may be for it are looked for, and the audit log
        has it with the loads that it began. `deadline`, by time.monotonic, ends the waiting and not
        the load. Raises what the load raises, Unavailable after the deadline, AdapterNotFound where
        its source has nothing, and Overloaded where the caller's tenant has too many adapters; the
        field names the request's adapter.
        """
        for index, name in enumerate(names):
            if self._sources and caller.sees(name):
                try:
                    await self._had(caller, name, deadline)
                except LoramuxError as error:
                    raise type(error)(
                        error.message,
                        field=f"adapters[{index}].name",
                        retry_after_s=error.retry_after_s,
                    ) from None

    async def _had(self, caller: Caller, name: str, deadline: float | None) -> None:
        """Load a name if it is not known, and let it count as the caller's tenant's."""
        if not self._registry.is_known(name):
            source = self._source(name)
            if source is not None:
                await self._loaded(caller, name, source, deadline)
        record = self._registry.held(name)
        if record is not None and record.is_on_demand and caller.tenant not in record.tenants:
            await self._loads.claim(caller, record)

    def _source(self, name: str) -> str | None:
        for pattern, source in self._sources.items():
            if _matches(name, pattern):
                return source.replace(PLACE, name)
        return None

    async def _loaded(self, caller: Caller, name: str, source: str, deadline: float | None) -> None:
        key = caller.tenant, name
        until, failure = self._failed.get(key, (0.0, None))
        if failure is not None and time.monotonic() < until:
            raise type(failure)(failure.message)
        task = self._loading.get(key)
        if task is None:
            held = ExitStack()
            held.enter_context(self._places.taken(caller.tenant))
            task = self._loading[key] = asyncio.create_task(self._try(caller, name, source))
            task.add_done_callback(lambda done: self._end(key, done, held))
        left_s = None if deadline is None else deadline - time.monotonic()
        try:
            async with asyncio.timeout(left_s):
                await asyncio.shield(task)
        except TimeoutError:
            raise Unavailable(f"adapter {name!r} is being loaded; try again later") from None

    async def _try(self, caller: Caller, name: str, source: str) -> None:
        """Load a name for the caller that asked first. What goes wrong is raised, and remembered
        unless it is the server's load.
        """
        try:
            with audited(caller, "load on demand", adapter=name, source=source):
                await self._loads.load_on_demand(caller, name, source)
        except AdapterExists:  # an operator was faster, or another tenant
            return
        except LoramuxError as error:
            failure = error
            if isinstance(error, AdapterSourceRefused):
                failure = AdapterNotFound(
                    f"adapter {name!r} is not loaded, and cannot be on demand: {error.message}"
                )
            if not isinstance(error, Overloaded):
                self._remember((caller.tenant, name), failure)
            raise failure from None
        except Exception as error:
            logger.exception("adapter could not be loaded on demand", adapter=name)
            failure = Unavailable(
                f"adapter {name!r} could not be loaded; the server's log says why"
            )
            self._remember((caller.tenant, name), failure)
            raise failure from error

    def _end(self, key: TenantsName, task: asyncio.Task[None], held: ExitStack) -> None:
        del self._loading[key]
        held.close()
        if not task.cancelled():
            task.exception()  # seen: those who waited may all have gone

    def _remember(self, key: TenantsName, failure: LoramuxError) -> None:
        self._failed[key] = time.monotonic() + REMEMBERED_S, failure
        self._failed.move_to_end(key)
        while len(self._failed) > MAX_REMEMBERED:
            self._failed.popitem(last=False)

    def forget(self, name: str) -> None:
        """Try a name anew at the next request."""
        for key in [key for key in self._failed if key[1] == name]:
            del self._failed[key]

    async def close(self) -> None:
        """End the loads that are running."""
        tasks = list(self._loading.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

"""Adapters that are loaded when a request first names them.

The operator says which names may be looked for, and where: PATTERN=SOURCE, with {name} in the
source. All requests that wait for a name wait for one load. What cannot be loaded is remembered for
some seconds, so that a name that is asked for again and again costs little.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable, Coroutine, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, TypeAlias

import structlog

from lora_runtime.errors import (
    AdapterExists,
    AdapterNotFound,
    AdapterSourceRefused,
    LoramuxError,
    Overloaded,
    Unavailable,
)
from server.access.audit import audited
from server.access.caller import Caller
from server.adapters.registry import Registry
from server.adapters.sources.location import PLACE

REMEMBERED_S = 10.0
MAX_REMEMBERED = 4096
MAX_LOADING = 32

Load: TypeAlias = Callable[[str, str], Coroutine[Any, Any, object]]
"""Loads a source under a name."""
logger = structlog.get_logger(__name__)


def _matches(name: str, pattern: str) -> bool:
    """As of file names, and only `@` and `/` of the pattern match these: a revision or a folder is
    the operator's to choose, for on a hub anybody may propose one.
    """
    is_as_deep = all(name.count(mark) == pattern.count(mark) for mark in "@/")
    return is_as_deep and fnmatchcase(name, pattern)


class OnDemand:
    """Which names are loaded when a request names them, and those loads."""

    def __init__(self, sources: Mapping[str, str], registry: Registry, load: Load) -> None:
        """`sources`: pattern of names (* ? [abc], none of them for `/` or `@`) → source; the first
        that matches counts.
        """
        self._sources, self._registry, self._load = dict(sources), registry, load
        self._loading: dict[str, asyncio.Task[None]] = {}
        self._failed: OrderedDict[str, tuple[float, LoramuxError]] = OrderedDict()
        """Name → until when it is not tried again, and why."""

    async def ensure(self, names: Sequence[str], caller: Caller, deadline: float | None) -> None:
        """Load what is not known yet and may be; what may not is left to who asks next.

        `caller`: who asks; only names that there may be for it are looked for, and the audit log
        has it with the loads that it began. `deadline`, by time.monotonic, ends the waiting and not
        the load. Raises what the load raises, Unavailable after the deadline, and AdapterNotFound
        where its source has nothing; the field names the request's adapter.
        """
        for index, name in enumerate(names):
            if self._sources and caller.sees(name) and not self._registry.is_known(name):
                source = self._source(name)
                if source is not None:
                    field = f"adapters[{index}].name"
                    await self._loaded(caller, name, source, deadline, field)

    def _source(self, name: str) -> str | None:
        for pattern, source in self._sources.items():
            if _matches(name, pattern):
                return source.replace(PLACE, name)
        return None

    async def _loaded(
        self, caller: Caller, name: str, source: str, deadline: float | None, field: str
    ) -> None:
        until, failure = self._failed.get(name, (0.0, None))
        if failure is not None and time.monotonic() < until:
            raise type(failure)(failure.message, field=field)
        task = self._loading.get(name)
        if task is None:
            if len(self._loading) >= MAX_LOADING:
                raise Overloaded(
                    f"{len(self._loading)} adapters are being loaded on demand; try again later",
                    field=field,
                )
            task = self._loading[name] = asyncio.create_task(self._try(caller, name, source))
            task.add_done_callback(lambda done: self._end(name, done))
        left_s = None if deadline is None else deadline - time.monotonic()
        try:
            async with asyncio.timeout(left_s):
                await asyncio.shield(task)
        except TimeoutError:
            raise Unavailable(
                f"adapter {name!r} is being loaded; try again later", field=field
            ) from None
        except LoramuxError as error:
            raise type(error)(error.message, field=field) from None

    async def _try(self, caller: Caller, name: str, source: str) -> None:
        """Load a name for the caller that asked first. What goes wrong is raised, and remembered
        unless it is the server's load.
        """
        try:
            with audited(caller, "load on demand", adapter=name, source=source):
                await self._load(name, source)
        except AdapterExists:  # an operator was faster
            return
        except LoramuxError as error:
            failure = error
            if isinstance(error, AdapterSourceRefused):
                failure = AdapterNotFound(
                    f"adapter {name!r} is not loaded, and cannot be on demand: {error.message}"
                )
            if not isinstance(error, Overloaded):
                self._remember(name, failure)
            raise failure from None
        except Exception as error:
            logger.exception("adapter could not be loaded on demand", adapter=name)
            failure = Unavailable(
                f"adapter {name!r} could not be loaded; the server's log says why"
            )
            self._remember(name, failure)
            raise failure from error

    def _end(self, name: str, task: asyncio.Task[None]) -> None:
        del self._loading[name]
        if not task.cancelled():
            task.exception()  # seen: those who waited may all have gone

    def _remember(self, name: str, failure: LoramuxError) -> None:
        self._failed[name] = time.monotonic() + REMEMBERED_S, failure
        self._failed.move_to_end(name)
        while len(self._failed) > MAX_REMEMBERED:
            self._failed.popitem(last=False)

    def forget(self, name: str) -> None:
        """Try a name anew at the next request."""
        self._failed.pop(name, None)

    async def close(self) -> None:
        """End the loads that are running."""
        tasks = list(self._loading.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

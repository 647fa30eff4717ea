"""How the content of adapter names comes and goes while requests run: loads, rollbacks, unloads,
and what a restart brings back.

The engine reads the files. What is begun is finished even when its caller goes away; changes of one
name wait for one another.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias
from weakref import WeakValueDictionary

import structlog

from lora_runtime.adapters.host_cache import HostMemoryFull
from lora_runtime.core import ANY_FOLDER, FolderRules
from lora_runtime.engine.client import EngineClient, LoadedAdapter
from lora_runtime.errors import AdapterNotFound, LoramuxError
from loramux.server.adapters.background import BackgroundTasks
from loramux.server.adapters.names import Content, KeptName
from loramux.server.adapters.pins import Pins
from loramux.server.adapters.reading import (
    Resolve,
    Review,
    Reviewed,
    new_record,
    no_review,
    public_reason,
    read_again,
    reviewed_content,
)
from loramux.server.adapters.registry import Registry
from loramux.server.adapters.sources import without_path
from loramux.server.calls import AdapterRecord, AdapterState
from loramux.server.observability.observers import AdapterObserver

NUM_RESTORED_AT_ONCE = 4

Settle: TypeAlias = Callable[[], Awaitable[None]]
"""Puts new content where its source says that it is, before the name is kept."""
logger = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class _New:
    """What a name is to hold; see `NameChanges.load`."""

    source: str
    replace: bool
    review: Review
    rules: FolderRules
    settle: Settle | None
    pin: bool | None
    is_on_demand: bool
    tenant: str | None

    @property
    def tenants(self) -> dict[str, float]:
        """See `AdapterRecord.tenants`."""
        return {} if self.tenant is None else {self.tenant: time.monotonic()}


class NameChanges:
    """Changes what the names of a registry point to."""

    def __init__(self, engine: EngineClient, registry: Registry, observer: AdapterObserver) -> None:
        self._engine = engine
        self._registry = registry
        self._observer = observer
        self._pins = Pins(engine)
        self._tasks = BackgroundTasks()
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    async def load(
        self,
        name: str,
        folder: Path,
        *,
        source: str,
        replace: bool = False,
        review: Review = no_review,
        rules: FolderRules = ANY_FOLDER,
        settle: Settle | None = None,
        pin: bool | None = None,
        is_on_demand: bool = False,
        tenant: str | None = None,
    ) -> tuple[AdapterRecord, bool]:
        """Load a folder under a name; return its record and whether it held this content before.

        Other content under a known name is refused unless `replace`; then the name is swapped at
        once and the old content stays for a rollback, in the place of the one kept before, which
        leaves when its last request ends. The same content from another source is read from there
        after a restart, but for ANY_FOLDER: that is the operator's, who may not name it again.
        `review` adds to its notes, and `settle` is awaited before the name points to it. `pin`: it
        keeps its place in the device pool, or no longer; None: as it is, and not where it is new.
        `tenant`: whom it is charged to; None: nobody.
        Raises AdapterExists, InvalidRequest (the base's name), Overloaded (too many names) and
        whatever the engine and those two raise; nothing has changed then.
        """
        self._registry.check_name(name)
        new = _New(source, replace, review, rules, settle, pin, is_on_demand, tenant)
        record, is_same = await self._tasks.finish(self._load(name, folder, new))
        return self._registry.seen([record])[0], is_same

    async def restore(
        self, resolve: Resolve, review: Review = no_review, *, coming: Collection[str] = ()
    ) -> None:
        """Load what the names held when they were kept last. A content that cannot be found any
        more, or has become another, leaves its name FAILED; it stays kept until it is unloaded.
        That is no error of the names in `coming`, which are loaded anew right after.
        """
        room = asyncio.Semaphore(NUM_RESTORED_AT_ONCE)

        async def restore_one(name: str) -> None:
            async with room, self._lock(name):
                kept, record = self._registry.kept(name), self._registry.find(name)
                if kept and record and record.state is AdapterState.REGISTERED:
                    await self._restore(kept, record, resolve, review, name in coming)

        names = self._registry.kept_names()
        await self._tasks.finish(_all_done([self._tasks.start(restore_one(n)) for n in names]))

    async def rollback(self, name: str) -> AdapterRecord:
        """Swap a name's content and its former one, at once; running requests end on theirs. A pin
        ends.

        A name that could not be loaded again after a restart gets its former content too; what it
        held is kept as the former one, and may come back at the next restart. Raises
        AdapterNotFound (field `name`): not loaded, or without a former content.
        """
        return self._registry.seen([await self._tasks.finish(self._rollback(name))])[0]

    async def unload(self, name: str, *, cancel: bool = False, wait: bool = False) -> AdapterRecord:
        """Take a name away at once, its former content too; its memory is freed when its requests
        ended or, with `cancel`, were ended. `wait` returns only then. A name that could not be
        loaded, now or again after a restart, is forgotten. Raises AdapterNotFound."""
        record, drain = await self._tasks.finish(self._unload(name, cancel))
        if wait:
            await asyncio.shield(drain)
        return record

    async def make_room(self, full: HostMemoryFull, loader: str | None) -> bool:
        """Free one adapter on demand for an adapter that is charged to the tenant `loader`, None
        for nobody; see `shares.py`. True when its memory is free, False where none may go.
        """
        while (found := self._registry.making_room(full, loader)) is not None:
            if await self._give_up(*found):
                return True
        return False

    async def give_up_unused(self, tenant: str) -> bool:
        """Let a tenant give up the adapter on demand that it has not used for the longest time;
        False where it has none that nobody is using.
        """
        record = self._registry.least_used(tenant)
        if record is not None:
            await self._give_up(record, tenant)
        return record is not None

    async def _give_up(self, record: AdapterRecord, tenant: str) -> bool:
        """Charge an adapter to a tenant no longer; unload it, and return True, if that was the
        last. Whoever else looks for one meanwhile finds another, as this is nobody's any more.
        """
        del record.tenants[tenant]
        if record.tenants:
            return False
        with suppress(AdapterNotFound):  # it has just been unloaded
            await self.unload(record.name, wait=True)
        return True

    async def close(self) -> None:
        """Stop background work; the engine, closed before, has freed the adapters."""
        await self._tasks.close()
        await self._registry.close()

    async def _load(self, name: str, folder: Path, new: _New) -> tuple[AdapterRecord, bool]:
        """Read an adapter and let its name point to it; the record, and whether it held it already.

        The name is written to the disk before it changes here: what a caller was told survives a
        restart. Until then every failure gives the new content up.
        """
        async with self._lock(name):
            begun = time.monotonic()
            loaded = await self._read(name, folder, new)
            held, is_same = self._registry.held(name), self._registry.holds(name, loaded)
            is_pinned = bool(held and is_same and held.is_pinned) if new.pin is None else new.pin
            reviewed: Reviewed = None, ()
            try:
                if not new.replace:
                    self._registry.check_replaces_nothing(name, loaded)
                if not is_same:
                    reviewed = await reviewed_content(name, folder, new.source, loaded, new.review)
                if new.settle is not None:
                    await new.settle()
                async with self._pins.pinned(loaded.digest, is_pinned):
                    await self._keep_new(name, loaded, new, is_pinned)
            except BaseException as error:
                await self._undo(name, loaded, error)
                raise
            if held is not None and held.is_pinned:
                await self._pins.drop(held)
            if held is not None and is_same:
                await self._engine.unload_adapter(loaded.digest)  # the name has its reference
                held.source = held.source if new.rules == ANY_FOLDER else new.source
                held.is_pinned = is_pinned
                self._registry.charge(held, new.tenants, is_on_demand=new.is_on_demand)
                return held, True
            record = new_record(name, new.source, loaded, reviewed)
            record.is_pinned, record.is_on_demand = is_pinned, new.is_on_demand
            record.tenants = new.tenants
            oldest = self._registry.point(record)
            if oldest is not None:
                self._drain(oldest, cancel=False)
            seconds = time.monotonic() - begun
            self._observer.on_adapter_loaded(name, loaded.digest, loaded.nbytes, seconds)
            _log("replaced" if held else "loaded", record, seconds=round(seconds, 3))
            return record, False

    async def _keep_new(self, name: str, loaded: LoadedAdapter, new: _New, is_pinned: bool) -> None:
        """Keep on the disk that a name holds new content, where it is to be kept."""
        held = self._registry.held(name)
        is_kept = self._registry.holds(name, loaded) and not (held and held.is_on_demand)
        if not new.is_on_demand and not (is_kept and new.rules == ANY_FOLDER):
            content = Content.of(loaded, new.source)
            await self._registry.keep(
                KeptName(name, content, self._registry.former_of(name, loaded), is_pinned)
            )

    async def _undo(self, name: str, loaded: LoadedAdapter, error: BaseException) -> None:
        """Undo the reading of a content that its name does not get."""
        record = self._registry.find(name)
        if record is not None and record.state is AdapterState.VERIFYING:
            self._registry.fail(record, public_reason(error))
        await self._engine.unload_adapter(loaded.digest)

    async def _restore(
        self,
        kept: KeptName,
        record: AdapterRecord,
        resolve: Resolve,
        review: Review,
        is_coming: bool,
    ) -> None:
        """Read a name's content again after a restart; if that fails, its record says why."""
        begun, record.state = time.monotonic(), AdapterState.VERIFYING
        try:
            restored = await read_again(self._engine, kept.name, kept.content, resolve, review)
        except Exception as error:
            self._registry.fail(record, public_reason(error))
            if not is_coming:
                logger.error(
                    "adapter not restored",
                    adapter=kept.name,
                    source=record.source,
                    digest=kept.content.digest,
                    error=record.error,
                    exc_info=None if isinstance(error, LoramuxError) else error,
                )
            record.former, _ = await self._restore_former(kept, resolve, review)
            return
        restored.former, lost = await self._restore_former(kept, resolve, review)
        restored.notes += lost
        if kept.is_pinned:
            await self._pin_again(restored)
        self._registry.put(restored)
        seconds = time.monotonic() - begun
        assert restored.loaded is not None
        self._observer.on_adapter_loaded(
            kept.name, restored.digest, restored.loaded.nbytes, seconds
        )
        _log("restored", restored, seconds=round(seconds, 3))

    async def _pin_again(self, record: AdapterRecord) -> None:
        try:
            async with self._pins.pinned(record.digest, True):
                record.is_pinned = True
        except LoramuxError as error:
            record.notes += (f"it is not pinned any more: {error.message}",)

    async def _restore_former(
        self, kept: KeptName, resolve: Resolve, review: Review
    ) -> tuple[AdapterRecord | None, tuple[str, ...]]:
        """The former content of a name, or why there is none to go back to any more."""
        if kept.former is None:
            return None, ()
        try:
            return await read_again(self._engine, kept.name, kept.former, resolve, review), ()
        except Exception as error:
            return None, (f"its former content cannot be brought back: {public_reason(error)}",)

    async def _rollback(self, name: str) -> AdapterRecord:
        """Swap a name's content and its former one, on the disk first."""
        async with self._lock(name):
            held = self._registry.find(name)
            record = held.former if held is not None else None
            if held is None or record is None:
                held = self._registry.resolve(name)
            former, kept = self._registry.content(record), self._registry.kept(name)
            if record is None or former is None:
                raise AdapterNotFound(
                    f"adapter {name!r} has no former content to go back to", field="name"
                )
            given_up = self._registry.content(held) or (kept.content if kept else None)
            await self._registry.keep(KeptName(name, former, given_up))
            if held.is_pinned:
                await self._pins.drop(held)
            self._registry.put(record)
            held.former = None
            record.former = held if held.loaded is not None else None
            record.loaded_at_s = time.time()
            assert record.loaded is not None
            self._observer.on_adapter_loaded(name, record.digest, record.loaded.nbytes, 0.0)
            _log("rolled back", record)
            return record

    async def _read(self, name: str, folder: Path, new: _New) -> LoadedAdapter:
        """Let the engine read a folder; a new name shows VERIFYING meanwhile, FAILED after."""
        record = self._registry.verifying(name, new.source, is_on_demand=new.is_on_demand)
        try:
            return await self._engine.load_adapter(folder, new.rules)
        except LoramuxError as error:
            public = without_path(error, folder, new.source)
            self._registry.fail(record, public.message)
            raise public from None
        except Exception as error:
            logger.exception("adapter could not be read", adapter=name)
            self._registry.fail(record, public_reason(error))
            raise

    async def _unload(self, name: str, cancel: bool) -> tuple[AdapterRecord, asyncio.Task[None]]:
        """Forget a name, on the disk first; the task ends when its memory is free."""
        async with self._lock(name):
            registry = self._registry
            is_forgotten = registry.kept(name) or name in registry.failures()
            record = registry.get(name) if is_forgotten else registry.resolve(name)
            await self._registry.forget(name)
            if record.is_pinned:
                await self._pins.drop(record)
            self._registry.remove(record)
            _log("unloaded", record)
            if record.loaded is not None:
                self._observer.on_adapter_unloaded(name)
            former, record.former = record.former, None
            drains = [
                self._drain(r, cancel=cancel)
                for r in (record, former)
                if r is not None and r.loaded is not None
            ]
            return record, self._tasks.start(_all_done(drains))

    def _drain(self, record: AdapterRecord, *, cancel: bool) -> asyncio.Task[None]:
        self._registry.begin_draining(record)
        return self._tasks.start(self._release(record, cancel))

    async def _release(self, record: AdapterRecord, cancel: bool) -> None:
        try:
            # Other names may hold the same content: what was asked of them goes on.
            ending = tuple(record.request_ids) if cancel else ()
            await self._engine.unload_adapter(record.digest, ending=ending)
        except Exception:
            logger.exception("adapter was not freed", adapter=record.name, digest=record.digest)
            raise
        finally:
            self._registry.end_draining(record)

    def _lock(self, name: str) -> asyncio.Lock:
        return self._locks.setdefault(name, asyncio.Lock())


def _log(what: str, record: AdapterRecord, **facts: Any) -> None:
    if record.former is not None:
        facts["former_digest"] = record.former.digest
    size = record.loaded.nbytes if record.loaded else 0
    log = logger.info
    if record.notes:
        facts["notes"], log = list(record.notes), logger.warning
    log(
        f"adapter {what}",
        adapter=record.name,
        digest=record.digest,
        source=record.source,
        bytes=size,
        **facts,
    )


async def _all_done(tasks: Sequence[asyncio.Task[None]]) -> None:
    await asyncio.gather(*tasks)

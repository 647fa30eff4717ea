"""Names of adapters: which content each points to, and how it comes and goes while requests run.

Knows no wire format and no files; the engine reads them. One asyncio event loop owns a registry.
A load or unload, once begun, is finished even when its caller goes away. With a NameStore every
change is kept there first, and then made.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Collection,
    Coroutine,
    Iterable,
    Iterator,
    Sequence,
)
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from dataclasses import replace as replace_fields
from pathlib import Path
from typing import Any, Protocol, TypeAlias, TypeVar
from weakref import WeakValueDictionary

import structlog

from lora_runtime.core import ANY_FOLDER, FolderRules
from lora_runtime.engine.client import EngineClient, LoadedAdapter
from lora_runtime.engine.worker_pool import WorkerPool
from lora_runtime.errors import (
    AdapterExists,
    AdapterNotFound,
    AdapterRefused,
    InvalidRequest,
    LoramuxError,
    Overloaded,
    Unavailable,
)
from lora_runtime.text.text_side import TextSide
from server.adapters.names import Content, KeptName, NameStore
from server.adapters.sources import without_path
from server.adapters.sources.location import stored_digest
from server.calls import AdapterRecord, AdapterState

MAX_FAILED_RECORDS = 64
"""Names that never held anything and could not be loaded; older ones are forgotten."""
MAX_NAMES = 16_384
"""Names that point to something or are being loaded. Contents are bounded by memory, names of one
content are not: each is a record, a row on the disk and a label of the metrics.
"""
MAX_WAITING_WRITES = 1024
NUM_RESTORED_AT_ONCE = 4

Reviewed: TypeAlias = tuple[TextSide | None, tuple[str, ...]]
Review: TypeAlias = Callable[[LoadedAdapter], Awaitable[Reviewed]]
"""Judges new content beside its tensors: gives its text side and notes, or raises."""
Settle: TypeAlias = Callable[[], Awaitable[None]]
"""Puts new content where its source says that it is, before the name is kept."""
Resolve: TypeAlias = Callable[[str, str], Awaitable[tuple[Path, FolderRules]]]
"""From a name and its source to the folder and what must hold of it."""

Sees: TypeAlias = Callable[[str], bool]
"""Tells whether a name may exist for a caller. What does not is looked up as what is not there: the
same work and the same error.
"""

T = TypeVar("T")
logger = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class _New:
    """What a name is to hold; see `Registry.load`."""

    source: str
    replace: bool
    review: Review
    rules: FolderRules
    settle: Settle | None
    pin: bool | None
    is_on_demand: bool


def sees_all(name: str) -> bool:
    """Hide nothing."""
    return True


async def no_review(loaded: LoadedAdapter) -> Reviewed:
    """Take new content as it is."""
    return None, ()


class AdapterObserver(Protocol):
    """Told when adapters come and go; for metrics."""

    def on_adapter_loaded(self, name: str, digest: str, nbytes: int, seconds: float) -> None:
        """A name points to new content, read and checked in `seconds`."""

    def on_adapter_unloaded(self, name: str) -> None:
        """A name is gone; its last requests may still run."""


class Registry:
    """Adapter names of one server."""

    def __init__(
        self,
        *,
        engine: EngineClient,
        observer: AdapterObserver,
        base_name: str,
        names: NameStore | None = None,
    ) -> None:
        """Without `names` a restart forgets them."""
        self._engine = engine
        self._names = names
        self._kept = {kept.name: kept for kept in names.all()} if names else {}
        self._writer = WorkerPool("names", num_threads=1, max_waiting=MAX_WAITING_WRITES)
        self._observer = observer
        self._base_name = base_name
        self._records: dict[str, AdapterRecord] = {
            kept.name: AdapterRecord(
                name=kept.name, source=kept.content.source, state=AdapterState.REGISTERED
            )
            for kept in self._kept.values()
        }
        self._draining: set[AdapterRecord] = set()
        self._pins: Counter[str] = Counter()
        """Names that pin each content, by digest."""
        self._wanted: Counter[str] = Counter()
        """Requests that are about to use a name."""
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._tasks: set[asyncio.Task[Any]] = set()

    def resolve(self, name: str, *, field: str = "name", sees: Sees = sees_all) -> AdapterRecord:
        """Return the loaded adapter of that name.

        Raises AdapterNotFound naming `field`, or Unavailable while it is loaded after a restart.
        """
        record = self._find(name, sees)
        if record is not None and record.state is AdapterState.LOADED:
            return record
        if record is None or name not in self._kept:
            raise AdapterNotFound(f"adapter {name!r} is not loaded", field=field)
        if record.state is AdapterState.FAILED:
            raise AdapterNotFound(
                f"adapter {name!r} could not be loaded again: {record.error}", field=field
            )
        raise Unavailable(f"adapter {name!r} is being loaded again; try again later", field=field)

    @contextmanager
    def in_flight(self, records: Sequence[AdapterRecord]) -> Iterator[None]:
        """Count a request under each of its adapters while it runs."""
        for record in records:
            record.num_in_flight += 1
            record.last_used_at_s = time.monotonic()
        try:
            yield
        finally:
            for record in records:
                record.num_in_flight -= 1

    @contextmanager
    def wanted(self, names: Iterable[str]) -> Iterator[None]:
        """Let no adapter of these names make room for others while the context lasts."""
        names = Counter(names)
        self._wanted += names
        try:
            yield
        finally:
            self._wanted -= names  # and forget who is not wanted

    def get(self, name: str, *, sees: Sees = sees_all) -> AdapterRecord:
        """Return the record of a name, failed or loading too. Raises AdapterNotFound."""
        record = self._find(name, sees)
        if record is None:
            raise AdapterNotFound(f"adapter {name!r} is not known", field="name")
        return self._seen([record])[0]

    def records(self) -> list[AdapterRecord]:
        """Return every record by name; a draining one may share its name with its successor."""
        found = self._seen([*self._records.values(), *self._draining])
        return sorted(found, key=lambda record: record.name)

    def _seen(self, records: list[AdapterRecord]) -> list[AdapterRecord]:
        """Note in each record where its weights are now."""
        resident = set(self._engine.stats().resident_adapters)
        for record in records:
            record.is_resident = record.is_pinned or record.digest in resident
        return records

    def holds_source(self, name: str, text: str) -> bool:
        """Tell whether a name holds what came from a source elsewhere, without its digest."""
        held = self._held(name)
        return held is not None and held.source.partition("#")[0] == text

    def is_known(self, name: str) -> bool:
        """Tell whether a name holds an adapter, or held one before a restart."""
        return self._held(name) is not None or name in self._kept

    @contextmanager
    def downloading(
        self, name: str, source: str, *, shows_failure: bool = True
    ) -> Iterator[Callable[[int, int], None]]:
        """Show a name that holds nothing as DOWNLOADING while the context lasts; the callable notes
        the bytes that have come, and those that are to come in all. What is raised is shown as
        FAILED; a caller who goes away leaves the name as it was.
        """
        before = self._records.get(name)
        record = AdapterRecord(name=name, source=source, state=AdapterState.DOWNLOADING)
        if before is None or before.state is AdapterState.FAILED:
            self._records[name] = record
            record.former = before.former if before is not None else None

        def note(num_bytes: int, total: int) -> None:
            record.num_downloaded_bytes, record.num_bytes_to_download = num_bytes, total

        try:
            yield note
        except BaseException as error:
            if self._records.get(name) is record:
                if shows_failure and isinstance(error, LoramuxError):
                    self._fail(record, error.message)
                elif before is not None:
                    self._records[name] = before
                else:
                    del self._records[name]
            raise

    async def unload_unused(self) -> bool:
        """Unload what a request once asked for and none has used for the longest time, if there is
        such; True when its memory is free.
        """
        may_go = [
            record
            for record in self._records.values()
            if record.is_on_demand and not record.is_pinned and record.num_in_flight == 0
            if record.state is AdapterState.LOADED and not self._wanted[record.name]
        ]
        if not may_go:
            return False
        oldest = min(may_go, key=lambda record: record.last_used_at_s)
        oldest.is_on_demand = False  # whoever else looks for one meanwhile finds another
        with suppress(AdapterNotFound):  # it has just been unloaded
            await self.unload(oldest.name, wait=True)
        return True

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
    ) -> tuple[AdapterRecord, bool]:
        """Load a folder under a name; return its record and whether it held this content before.

        Other content under a known name is refused unless `replace`; then the name is swapped at
        once and the old content stays for a rollback, in the place of the one kept before, which
        leaves when its last request ends. The same content from another source is read from there
        after a restart, but for ANY_FOLDER: that is the operator's, who may not name it again.
        `review` adds to its notes, and `settle` is awaited before the name points to it. `pin`: it
        keeps its place in the device pool, or no longer; None: as it is, and not where it is new.
        Raises AdapterExists, InvalidRequest (the base's name), Overloaded (too many names) and
        whatever the engine and those two raise; nothing has changed then.
        """
        self.check_name(name)
        new = _New(source, replace, review, rules, settle, pin, is_on_demand)
        record, is_same = await self._finish(self._load(name, folder, new))
        return self._seen([record])[0], is_same

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
                kept, record = self._kept.get(name), self._records.get(name)
                if kept and record and record.state is AdapterState.REGISTERED:
                    await self._restore(kept, record, resolve, review, name in coming)

        await self._finish(_all_done([self._spawn(restore_one(name)) for name in self._kept]))

    def holders(self) -> dict[str, tuple[str, ...]]:
        """Contents of the upload store, by digest, that names hold or would go back to; the names
        are sorted. Other folders' names may be among the digests.
        """
        found: dict[str, set[str]] = {}
        for name, record in self._records.items():
            sources = [record.source, record.former.source if record.former else ""]
            kept = self._kept.get(name)
            sources += [c.source for c in (kept.content, kept.former) if c] if kept else []
            for source in sources:
                found.setdefault(stored_digest(source), set()).add(name)
        return {digest: tuple(sorted(names)) for digest, names in found.items()}

    def check_name(self, name: str) -> None:
        """Raise InvalidRequest (field `name`) for the base's name, Overloaded for a further name
        beside MAX_NAMES.
        """
        if name == self._base_name:
            raise InvalidRequest(f"{name!r} is the name of the base; choose another", field="name")
        if name not in self._records and len(self._records) >= MAX_NAMES:
            raise Overloaded(
                f"{len(self._records)} names of adapters are known, and no more are allowed; "
                "unload some first",
                field="name",
            )

    async def rollback(self, name: str) -> AdapterRecord:
        """Swap a name's content and its former one, at once; running requests end on theirs. A pin
        ends.

        A name that could not be loaded again after a restart gets its former content too; what it
        held is kept as the former one, and may come back at the next restart. Raises
        AdapterNotFound (field `name`): not loaded, or without a former content.
        """
        return self._seen([await self._finish(self._rollback(name))])[0]

    async def unload(self, name: str, *, cancel: bool = False, wait: bool = False) -> AdapterRecord:
        """Take a name away at once, its former content too; its memory is freed when its requests
        ended or, with `cancel`, were ended. `wait` returns only then. A name that could not be
        loaded again after a restart is forgotten. Raises AdapterNotFound."""
        record, drain = await self._finish(self._unload(name, cancel))
        if wait:
            await asyncio.shield(drain)
        return record

    async def close(self) -> None:
        """Stop background work; the engine, closed before, has freed the adapters."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._names is not None:
            await self._writer.run(self._names.close)

    async def _load(self, name: str, folder: Path, new: _New) -> tuple[AdapterRecord, bool]:
        """Read an adapter and let its name point to it; the record, and whether it held it already.

        The name is written to the disk before it changes here: what a caller was told survives a
        restart. Until then every failure gives the new content up.
        """
        async with self._lock(name):
            begun = time.monotonic()
            loaded = await self._read(name, folder, new.source, new.rules)
            held, is_same = self._held(name), self._holds(name, loaded)
            is_pinned = bool(held and is_same and held.is_pinned) if new.pin is None else new.pin
            reviewed: Reviewed = None, ()
            try:
                if not new.replace:
                    self._check_replaces_nothing(name, loaded)
                if not is_same:
                    reviewed = await self._reviewed(name, folder, new.source, loaded, new.review)
                if new.settle is not None:
                    await new.settle()
                async with self._pinned(loaded.digest, is_pinned):
                    await self._keep_new(name, loaded, new, is_pinned)
            except BaseException as error:
                await self._give_up(name, loaded, error)
                raise
            if held is not None and held.is_pinned:
                await self._unpin(held)
            if held is not None and is_same:
                await self._engine.unload_adapter(loaded.digest)  # the name has its reference
                held.source = held.source if new.rules == ANY_FOLDER else new.source
                held.is_pinned, held.is_on_demand = (
                    is_pinned,
                    held.is_on_demand and new.is_on_demand,
                )
                return held, True
            record = _record(name, new.source, loaded, reviewed)
            record.is_pinned, record.is_on_demand = is_pinned, new.is_on_demand
            self._point(name, record)
            seconds = time.monotonic() - begun
            self._observer.on_adapter_loaded(name, loaded.digest, loaded.nbytes, seconds)
            self._log("replaced" if held else "loaded", record, seconds=round(seconds, 3))
            return record, False

    async def _keep_new(self, name: str, loaded: LoadedAdapter, new: _New, is_pinned: bool) -> None:
        """Keep on the disk that a name holds new content, where it is to be kept."""
        held = self._held(name)
        is_kept = self._holds(name, loaded) and not (held and held.is_on_demand)
        if not new.is_on_demand and not (is_kept and new.rules == ANY_FOLDER):
            content = Content.of(loaded, new.source)
            await self._keep(KeptName(name, content, self._former_of(name, loaded), is_pinned))

    @asynccontextmanager
    async def _pinned(self, digest: str, is_pinned: bool) -> AsyncIterator[None]:
        """Pin a content for one name, if it is to be pinned; no longer where the context fails."""
        if not is_pinned:
            yield
            return
        self._pins[digest] += 1
        try:
            await self._engine.pin_adapter(digest)
            yield
        except BaseException:
            await self._drop_pin(digest)
            raise

    async def _unpin(self, record: AdapterRecord) -> None:
        record.is_pinned = False
        await self._drop_pin(record.digest)

    async def _drop_pin(self, digest: str) -> None:
        self._pins[digest] -= 1
        if not self._pins[digest]:
            del self._pins[digest]
            await self._engine.pin_adapter(digest, is_pinned=False)

    def _point(self, name: str, record: AdapterRecord) -> None:
        """Let a name point to new content, with what it held as the former one; where it held
        nothing after a restart, its former one stays."""
        before, self._records[name] = self._records[name], record
        oldest, before.former = before.former, None
        if before.loaded is not None:
            record.former = before
        elif oldest is not None and oldest.loaded != record.loaded:
            record.former, oldest = oldest, None
        if oldest is not None:
            self._drain(oldest, cancel=False)

    def _former_of(self, name: str, loaded: LoadedAdapter) -> Content | None:
        """The content to keep as the former one of a name that gets `loaded`; see `_point`.

        Content that could not be loaded again is kept if there is no other: it may come back.
        """
        record, kept = self._records[name], self._kept.get(name)
        if record.loaded is not None and record.loaded != loaded:
            return self._content(record)
        if kept is None:
            return None
        if kept.content.is_of(loaded):
            return kept.former
        former = record.former
        return kept.content if former is None or former.loaded == loaded else self._content(former)

    def _check_replaces_nothing(self, name: str, loaded: LoadedAdapter) -> None:
        held, kept = self._held(name), self._kept.get(name)
        if held is not None and held.loaded != loaded:
            raise AdapterExists(
                f"adapter {name!r} holds other content; load it with replace", field="name"
            )
        if held is None and kept is not None and not kept.content.is_of(loaded):
            raise AdapterExists(
                f"adapter {name!r} held other content, {kept.content.digest[:12]}, which could not "
                "be loaded again; load this with replace, or unload the name first",
                field="name",
            )

    async def _give_up(self, name: str, loaded: LoadedAdapter, error: BaseException) -> None:
        """Undo the reading of a content that its name does not get."""
        record = self._records.get(name)
        if record is not None and record.state is AdapterState.VERIFYING:
            self._fail(record, _public(error))
        await self._engine.unload_adapter(loaded.digest)

    async def _keep(self, kept: KeptName) -> None:
        if self._names is not None and self._kept.get(kept.name) != kept:
            await self._writer.run(self._names.put, kept)
            self._kept[kept.name] = kept

    def _content(self, record: AdapterRecord | None) -> Content | None:
        if record is None or record.loaded is None:
            return None
        return Content.of(record.loaded, record.source)

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
            restored = await self._read_again(kept.name, kept.content, resolve, review)
        except Exception as error:
            self._fail(record, _public(error))
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
        self._records[kept.name] = restored
        seconds = time.monotonic() - begun
        assert restored.loaded is not None
        self._observer.on_adapter_loaded(
            kept.name, restored.digest, restored.loaded.nbytes, seconds
        )
        self._log("restored", restored, seconds=round(seconds, 3))

    async def _pin_again(self, record: AdapterRecord) -> None:
        try:
            async with self._pinned(record.digest, True):
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
            return await self._read_again(kept.name, kept.former, resolve, review), ()
        except Exception as error:
            return None, (f"its former content cannot be brought back: {_public(error)}",)

    async def _read_again(
        self, name: str, content: Content, resolve: Resolve, review: Review
    ) -> AdapterRecord:
        """Load what a source holds. Raises AdapterRefused when that is another content by now."""
        folder, rules = await resolve(name, content.source)
        try:
            loaded = await self._engine.load_adapter(folder, rules)
        except LoramuxError as error:
            raise without_path(error, folder, content.source) from None
        try:
            if not content.is_of(loaded):
                raise _changed(content, loaded)
            reviewed = await self._reviewed(name, folder, content.source, loaded, review)
        except BaseException:
            await self._engine.unload_adapter(loaded.digest)
            raise
        return _record(name, content.source, loaded, reviewed)

    async def _rollback(self, name: str) -> AdapterRecord:
        """Swap a name's content and its former one, on the disk first."""
        async with self._lock(name):
            held = self._records.get(name)
            record = held.former if held is not None else None
            if held is None or record is None:
                held = self.resolve(name)
            former, kept = self._content(record), self._kept.get(name)
            if record is None or former is None:
                raise AdapterNotFound(
                    f"adapter {name!r} has no former content to go back to", field="name"
                )
            given_up = self._content(held) or (kept.content if kept else None)
            await self._keep(KeptName(name, former, given_up))
            if held.is_pinned:
                await self._unpin(held)
            self._records[name], held.former = record, None
            record.former = held if held.loaded is not None else None
            record.loaded_at_s = time.time()
            assert record.loaded is not None
            self._observer.on_adapter_loaded(name, record.digest, record.loaded.nbytes, 0.0)
            self._log("rolled back", record)
            return record

    async def _read(
        self, name: str, folder: Path, source: str, rules: FolderRules
    ) -> LoadedAdapter:
        """Let the engine read a folder; a new name shows VERIFYING meanwhile, FAILED after."""
        record = AdapterRecord(name=name, source=source, state=AdapterState.VERIFYING)
        if self._held(name) is None:
            if (before := self._records.get(name)) is not None:
                record.former, before.former = before.former, None
            self._records[name] = record
        try:
            return await self._engine.load_adapter(folder, rules)
        except LoramuxError as error:
            public = without_path(error, folder, source)
            self._fail(record, public.message)
            raise public from None
        except Exception as error:
            logger.exception("adapter could not be read", adapter=name)
            self._fail(record, _public(error))
            raise

    async def _reviewed(
        self, name: str, folder: Path, source: str, loaded: LoadedAdapter, review: Review
    ) -> Reviewed:
        """Review new content; what is raised shows no path that the client did not write."""
        try:
            return await review(loaded)
        except LoramuxError as error:
            raise without_path(error, folder, source) from None
        except Exception:
            logger.exception("adapter could not be reviewed", adapter=name)
            raise

    def _log(self, what: str, record: AdapterRecord, **facts: Any) -> None:
        if record.former is not None:
            facts["former_digest"] = record.former.digest
        size = record.loaded.nbytes if record.loaded else 0
        logger.info(
            f"adapter {what}",
            adapter=record.name,
            digest=record.digest,
            source=record.source,
            bytes=size,
            **facts,
        )

    def _fail(self, record: AdapterRecord, error: str) -> None:
        record.state, record.error = AdapterState.FAILED, error
        failed = [
            name
            for name, r in self._records.items()
            if r.state is AdapterState.FAILED and name not in self._kept
        ]
        for name in failed[:-MAX_FAILED_RECORDS]:
            del self._records[name]

    async def _unload(self, name: str, cancel: bool) -> tuple[AdapterRecord, asyncio.Task[None]]:
        """Forget a name, on the disk first; the task ends when its memory is free."""
        async with self._lock(name):
            record = self.get(name) if name in self._kept else self.resolve(name)
            if self._names is not None:
                await self._writer.run(self._names.delete, name)
                self._kept.pop(name, None)
            if record.is_pinned:
                await self._unpin(record)
            del self._records[name]
            self._log("unloaded", record)
            if record.loaded is not None:
                self._observer.on_adapter_unloaded(name)
            former, record.former = record.former, None
            drains = [
                self._drain(r, cancel=cancel)
                for r in (record, former)
                if r is not None and r.loaded is not None
            ]
            return record, self._spawn(_all_done(drains))

    def _drain(self, record: AdapterRecord, *, cancel: bool) -> asyncio.Task[None]:
        record.state = AdapterState.DRAINING
        self._draining.add(record)
        return self._spawn(self._release(record, cancel))

    async def _release(self, record: AdapterRecord, cancel: bool) -> None:
        try:
            await self._engine.unload_adapter(record.digest, cancel=cancel)
        except Exception:
            logger.exception("adapter was not freed", adapter=record.name, digest=record.digest)
            raise
        finally:
            self._draining.discard(record)

    def _holds(self, name: str, loaded: LoadedAdapter) -> bool:
        held = self._held(name)
        return held is not None and held.loaded == loaded

    def _find(self, name: str, sees: Sees) -> AdapterRecord | None:
        is_seen, record = sees(name), self._records.get(name)
        return record if is_seen else None

    def _held(self, name: str) -> AdapterRecord | None:
        record = self._records.get(name)
        return record if record is not None and record.state is AdapterState.LOADED else None

    def _lock(self, name: str) -> asyncio.Lock:
        return self._locks.setdefault(name, asyncio.Lock())

    async def _finish(self, work: Coroutine[Any, Any, T]) -> T:
        return await asyncio.shield(self._spawn(work))

    def _spawn(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._reap)
        return task

    def _reap(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # seen: a caller that went away leaves it behind


def _record(name: str, source: str, loaded: LoadedAdapter, reviewed: Reviewed) -> AdapterRecord:
    """The record of a name that points to this content from now on."""
    text, notes = reviewed
    return AdapterRecord(
        name=name,
        source=source,
        state=AdapterState.LOADED,
        loaded=replace_fields(loaded, text_files={}),  # read by now, and large
        text=text,
        loaded_at_s=time.time(),
        notes=(*loaded.facts.notes, *notes),
    )


def _changed(content: Content, loaded: LoadedAdapter) -> AdapterRefused:
    now, then = f"{loaded.digest[:12]} now", content.digest[:12]
    if loaded.digest == content.digest:
        now, then = "other text files now", "content"
    return AdapterRefused(
        f"source {content.source!r} holds {now}, not the {then} that the name held; load it with "
        "replace to take it",
        field="source",
    )


def _public(error: BaseException) -> str:
    """What callers may read of why an adapter is not there."""
    if isinstance(error, LoramuxError):
        return error.message
    return "the server could not read it; its log says why"


async def _all_done(tasks: Sequence[asyncio.Task[None]]) -> None:
    await asyncio.gather(*tasks)

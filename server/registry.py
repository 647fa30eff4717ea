"""Names of adapters: which content each points to, and how it comes and goes while requests run.

Knows no wire format and no files; the engine reads them. One asyncio event loop owns a registry.
A load or unload, once begun, is finished even when its caller goes away.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace as replace_fields
from pathlib import Path
from typing import Any, Protocol, TypeAlias, TypeVar
from weakref import WeakValueDictionary

import structlog

from lora_runtime.core import ANY_FOLDER, FolderRules
from lora_runtime.engine.client import EngineClient, LoadedAdapter
from lora_runtime.errors import AdapterExists, AdapterNotFound, InvalidRequest, LoramuxError
from lora_runtime.text.text_side import TextSide
from server.calls import AdapterRecord, AdapterState
from server.sources import without_path

MAX_FAILED_RECORDS = 64
UNREADABLE = "the server could not read it; its log says why"

Reviewed: TypeAlias = tuple[TextSide | None, tuple[str, ...]]
Review: TypeAlias = Callable[[LoadedAdapter], Awaitable[Reviewed]]
"""Judges new content beside its tensors: gives its text side and notes, or raises."""

T = TypeVar("T")
logger = structlog.get_logger(__name__)


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
    """Adapter names of one server, in memory."""

    def __init__(self, *, engine: EngineClient, observer: AdapterObserver, base_name: str) -> None:
        self._engine = engine
        self._observer = observer
        self._base_name = base_name
        self._records: dict[str, AdapterRecord] = {}
        self._draining: set[AdapterRecord] = set()
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._tasks: set[asyncio.Task[Any]] = set()

    def resolve(self, name: str, *, field: str = "name") -> AdapterRecord:
        """Return the loaded adapter of that name. Raises AdapterNotFound naming `field`."""
        record = self._records.get(name)
        if record is None or record.state is not AdapterState.LOADED:
            raise AdapterNotFound(f"adapter {name!r} is not loaded", field=field)
        return record

    @contextmanager
    def in_flight(self, records: Sequence[AdapterRecord]) -> Iterator[None]:
        """Count a request under each of its adapters while it runs."""
        for record in records:
            record.num_in_flight += 1
        try:
            yield
        finally:
            for record in records:
                record.num_in_flight -= 1

    def get(self, name: str) -> AdapterRecord:
        """Return the record of a name, failed or loading too. Raises AdapterNotFound."""
        record = self._records.get(name)
        if record is None:
            raise AdapterNotFound(f"adapter {name!r} is not known", field="name")
        return record

    def records(self) -> list[AdapterRecord]:
        """Return every record by name; a draining one may share its name with its successor."""
        return sorted([*self._records.values(), *self._draining], key=lambda record: record.name)

    async def load(
        self,
        name: str,
        folder: Path,
        *,
        source: str,
        replace: bool = False,
        review: Review = no_review,
        rules: FolderRules = ANY_FOLDER,
    ) -> tuple[AdapterRecord, bool]:
        """Load a folder under a name; return its record and whether it held this content before.

        Other content under a known name is refused unless `replace`; then the name is swapped at
        once and the old content stays for a rollback, in the place of the one kept before, which
        leaves when its last request ends. `review` adds to its notes.
        Raises AdapterExists, InvalidRequest (the base's name) and whatever the engine raises.
        """
        self.check_name(name)
        return await self._finish(self._load(name, folder, source, replace, review, rules))

    def check_name(self, name: str) -> None:
        """Raise InvalidRequest (field `name`) for the base's name."""
        if name == self._base_name:
            raise InvalidRequest(f"{name!r} is the name of the base; choose another", field="name")

    async def rollback(self, name: str) -> AdapterRecord:
        """Swap a name's content and its former one, at once; running requests end on theirs.

        Raises AdapterNotFound (field `name`): not loaded, or without a former content.
        """
        return await self._finish(self._rollback(name))

    async def unload(self, name: str, *, cancel: bool = False, wait: bool = False) -> AdapterRecord:
        """Take a name away at once, its former content too; its memory is freed when its requests
        ended or, with `cancel`, were ended. `wait` returns only then. Raises AdapterNotFound."""
        record, drain = await self._finish(self._unload(name, cancel))
        if wait:
            await asyncio.shield(drain)
        return record

    async def close(self) -> None:
        """Stop background work; the engine, closed before, has freed the adapters."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _load(
        self,
        name: str,
        folder: Path,
        source: str,
        replace: bool,
        review: Review,
        rules: FolderRules,
    ) -> tuple[AdapterRecord, bool]:
        async with self._lock(name):
            begun = time.monotonic()
            loaded = await self._read(name, folder, source, rules)
            held = self._held(name)
            if held is not None and held.loaded == loaded:
                await self._engine.unload_adapter(loaded.digest)  # the name has its reference
                return held, True
            if held is not None and not replace:
                await self._engine.unload_adapter(loaded.digest)
                raise AdapterExists(
                    f"adapter {name!r} holds other content; load it with replace", field="name"
                )
            text, notes = await self._reviewed(name, folder, source, loaded, review)
            record = self._install(name, source, loaded, text, notes)
            self._observer.on_adapter_loaded(
                name, loaded.digest, loaded.nbytes, time.monotonic() - begun
            )
            if held is not None:
                record.former, oldest, held.former = held, held.former, None
                if oldest is not None:
                    self._drain(oldest, cancel=False)
            return record, False

    async def _rollback(self, name: str) -> AdapterRecord:
        async with self._lock(name):
            held = self.resolve(name)
            record = held.former
            if record is None:
                raise AdapterNotFound(
                    f"adapter {name!r} has no former content to go back to", field="name"
                )
            self._records[name], record.former, held.former = record, held, None
            record.loaded_at_s = time.time()
            assert record.loaded is not None
            self._observer.on_adapter_loaded(name, record.digest, record.loaded.nbytes, 0.0)
            return record

    async def _read(
        self, name: str, folder: Path, source: str, rules: FolderRules
    ) -> LoadedAdapter:
        """Let the engine read a folder; a new name shows VERIFYING meanwhile, FAILED after."""
        record = AdapterRecord(name=name, source=source, state=AdapterState.VERIFYING)
        if self._held(name) is None:
            self._records[name] = record
        try:
            return await self._engine.load_adapter(folder, rules)
        except LoramuxError as error:
            public = without_path(error, folder, source)
            self._fail(record, public.message)
            raise public from None
        except Exception:
            logger.exception("adapter could not be read", adapter=name)
            self._fail(record, UNREADABLE)
            raise

    async def _reviewed(
        self, name: str, folder: Path, source: str, loaded: LoadedAdapter, review: Review
    ) -> Reviewed:
        """Review new content; what is raised leaves no reference and no half-made record."""
        try:
            return await review(loaded)
        except LoramuxError as error:
            public = without_path(error, folder, source)
            await self._take_back(name, loaded, public.message)
            raise public from None
        except Exception:
            logger.exception("adapter could not be reviewed", adapter=name)
            await self._take_back(name, loaded, UNREADABLE)
            raise

    async def _take_back(self, name: str, loaded: LoadedAdapter, error: str) -> None:
        record = self._records.get(name)
        if record is not None and record.state is AdapterState.VERIFYING:
            self._fail(record, error)
        await self._engine.unload_adapter(loaded.digest)

    def _fail(self, record: AdapterRecord, error: str) -> None:
        record.state, record.error = AdapterState.FAILED, error
        failed = [name for name, r in self._records.items() if r.state is AdapterState.FAILED]
        for name in failed[:-MAX_FAILED_RECORDS]:
            del self._records[name]

    async def _unload(self, name: str, cancel: bool) -> tuple[AdapterRecord, asyncio.Task[None]]:
        async with self._lock(name):
            record = self.resolve(name)
            del self._records[name]
            self._observer.on_adapter_unloaded(name)
            former, record.former = record.former, None
            drains = [self._drain(r, cancel=cancel) for r in (record, former) if r is not None]
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

    def _held(self, name: str) -> AdapterRecord | None:
        record = self._records.get(name)
        return record if record is not None and record.state is AdapterState.LOADED else None

    def _install(
        self,
        name: str,
        source: str,
        loaded: LoadedAdapter,
        text: TextSide | None,
        notes: tuple[str, ...],
    ) -> AdapterRecord:
        self._records[name] = AdapterRecord(
            name=name,
            source=source,
            state=AdapterState.LOADED,
            loaded=replace_fields(loaded, text_files={}),  # read by now, and large
            text=text,
            loaded_at_s=time.time(),
            notes=(*loaded.notes, *notes),
        )
        return self._records[name]

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


async def _all_done(tasks: Sequence[asyncio.Task[None]]) -> None:
    await asyncio.gather(*tasks)

"""Names of adapters: which content each points to, now, before, and after a restart.

Knows no wire format and no files, and changes nothing of the engine: `changes.py` does. One asyncio
event loop owns a registry. With a NameStore every change is kept there first, and then made here.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeAlias

from lora_runtime.adapters.host_cache import HostMemoryFull
from lora_runtime.engine.client import EngineClient, LoadedAdapter
from lora_runtime.engine.worker_pool import WorkerPool
from lora_runtime.errors import (
    AdapterExists,
    AdapterNotFound,
    InvalidRequest,
    LoramuxError,
    Overloaded,
    Unavailable,
)
from loramux.server.access.caller import Caller
from loramux.server.adapters.names import Content, KeptName, NameStore
from loramux.server.adapters.shares import givers
from loramux.server.adapters.sources.location import stored_digest
from loramux.server.calls import AdapterRecord, AdapterState
from loramux.server.fields import not_loaded

MAX_FAILED_RECORDS = 64
"""Names that never held anything and could not be loaded; older ones are forgotten."""
MAX_NAMES = 16_384
"""Names that point to something or are being loaded. Contents are bounded by memory, names of one
content are not: each is a record, a row on the disk and a label of the metrics.
"""
MAX_WAITING_WRITES = 1024

Sees: TypeAlias = Callable[[str], bool]
"""Tells whether a name may exist for a caller. What does not is looked up as what is not there: the
same work and the same error.
"""


def sees_all(name: str) -> bool:
    """Hide nothing."""
    return True


class Registry:
    """Adapter names of one server."""

    def __init__(
        self, engine: EngineClient, base_name: str, names: NameStore | None = None
    ) -> None:
        """Without `names` a restart forgets them."""
        self._engine = engine
        self._names = names
        self._kept = {kept.name: kept for kept in names.all()} if names else {}
        self._writer = WorkerPool("names", num_threads=1, max_waiting=MAX_WAITING_WRITES)
        self._base_name = base_name
        self._records: dict[str, AdapterRecord] = {
            kept.name: AdapterRecord(
                name=kept.name, source=kept.content.source, state=AdapterState.REGISTERED
            )
            for kept in self._kept.values()
        }
        self._draining: set[AdapterRecord] = set()
        self._wanted: Counter[str] = Counter()
        """Requests that are about to use a name."""
        self._weights: dict[str, float] = {}
        """Of the tenants, as they last asked."""

    def resolve(self, name: str, *, field: str = "name", sees: Sees = sees_all) -> AdapterRecord:
        """Return the loaded adapter of that name.

        Raises AdapterNotFound naming `field`, or Unavailable while it is loaded after a restart.
        """
        record = self._find(name, sees)
        if record is not None and record.state is AdapterState.LOADED:
            return record
        if record is None or name not in self._kept:
            raise not_loaded(name, field)
        if record.state is AdapterState.FAILED:
            raise AdapterNotFound(
                f"adapter {name!r} could not be loaded again: {record.error}", field=field
            )
        raise Unavailable(f"adapter {name!r} is being loaded again; try again later", field=field)

    @contextmanager
    def in_flight(
        self, records: Sequence[AdapterRecord], request_ids: Collection[str], tenant: str = ""
    ) -> Iterator[None]:
        """Count a tenant's call under each of its adapters while its requests to the engine run."""
        for record in records:
            record.num_in_flight += 1
            record.request_ids.update(request_ids)
            if record.is_on_demand:
                record.tenants[tenant] = time.monotonic()
        try:
            yield
        finally:
            for record in records:
                record.num_in_flight -= 1
                record.request_ids.difference_update(request_ids)

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
        return self.seen([record])[0]

    def records(self) -> list[AdapterRecord]:
        """Return every record by name; a draining one may share its name with its successor."""
        found = self.seen([*self._records.values(), *self._draining])
        return sorted(found, key=lambda record: record.name)

    def seen(self, records: list[AdapterRecord]) -> list[AdapterRecord]:
        """Note in each record where its weights are now."""
        resident = set(self._engine.stats().resident_adapters)
        for record in records:
            record.is_resident = record.is_pinned or record.digest in resident
        return records

    def holds_source(self, name: str, text: str) -> bool:
        """Tell whether a name holds what came from a source elsewhere, without its digest."""
        held = self.held(name)
        return held is not None and held.source.partition("#")[0] == text

    def is_known(self, name: str) -> bool:
        """Tell whether a name holds an adapter, or held one before a restart."""
        return self.held(name) is not None or name in self._kept

    def find(self, name: str) -> AdapterRecord | None:
        """Return the record of a name, whatever its state; None where there is none."""
        return self._records.get(name)

    def held(self, name: str) -> AdapterRecord | None:
        """Return the loaded adapter of a name; None where there is none."""
        record = self._records.get(name)
        return record if record is not None and record.state is AdapterState.LOADED else None

    def holds(self, name: str, loaded: LoadedAdapter) -> bool:
        """Tell whether a name points to this content."""
        held = self.held(name)
        return held is not None and held.loaded == loaded

    def kept(self, name: str) -> KeptName | None:
        """Return what is kept of a name over a restart."""
        return self._kept.get(name)

    def kept_names(self) -> list[str]:
        """Return all names that are kept over a restart."""
        return list(self._kept)

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

    def weigh(self, tenant: str, weight: float) -> None:
        """Note the weight by which a tenant shares what all share."""
        self._weights[tenant] = weight

    def names_of(self, caller: Caller) -> tuple[set[str], set[str]]:
        """Return the names that count as a caller's tenant's: those that it holds for now, and
        those on demand that nobody is using, which it may give up. It holds what requests of its
        own brought or used, and of what operators loaded all that the caller may see.
        """
        held: set[str] = set()
        spare: set[str] = set()
        for record in [*self._records.values(), *self._draining]:
            if record.state is AdapterState.FAILED or not caller.sees(record.name):
                continue
            if not record.is_on_demand:
                held.add(record.name)
            elif caller.tenant in record.tenants:
                (spare if self._may_go(record) else held).add(record.name)
        return held, spare - held

    def least_used(self, tenant: str) -> AdapterRecord | None:
        """Return what requests of a tenant once asked for and have not used for the longest time,
        if there is something that nobody is using.
        """
        may_go = [r for r in self._records.values() if tenant in r.tenants and self._may_go(r)]
        return min(may_go, key=lambda record: record.tenants[tenant], default=None)

    def making_room(
        self, full: HostMemoryFull, loader: str | None
    ) -> tuple[AdapterRecord, str] | None:
        """Return what makes room in host memory, and the tenant that gives it up; see `givers`.
        None where nothing may go.
        """
        records = [*self._records.values(), *self._draining]
        for tenant in givers(records, full, loader, self._weights):
            if (record := self.least_used(tenant)) is not None:
                return record, tenant
        return None

    def _may_go(self, record: AdapterRecord) -> bool:
        """Tell whether a record may make room for another."""
        is_used = record.num_in_flight > 0 or self._wanted[record.name] > 0
        is_held = record.is_pinned or not record.is_on_demand
        return record.state is AdapterState.LOADED and not is_used and not is_held

    @contextmanager
    def downloading(
        self, name: str, source: str, *, is_on_demand: bool = False
    ) -> Iterator[Callable[[int, int], None]]:
        """Show a name that holds nothing as DOWNLOADING while the context lasts; the callable notes
        the bytes that have come, and those that are to come in all. What is raised is shown as
        FAILED, unless it `is_on_demand`; a caller who goes away leaves the name as it was.
        """
        before = self._records.get(name)
        record = AdapterRecord(
            name=name,
            source=source,
            state=AdapterState.DOWNLOADING,
            is_on_demand=is_on_demand,
        )
        if before is None or before.state is AdapterState.FAILED:
            self._records[name] = record
            record.former = before.former if before is not None else None

        def note(num_bytes: int, total: int) -> None:
            record.num_downloaded_bytes, record.num_bytes_to_download = num_bytes, total

        try:
            yield note
        except BaseException as error:
            if self._records.get(name) is record:
                if not is_on_demand and isinstance(error, LoramuxError):
                    self.fail(record, error.message)
                elif before is not None:
                    self._records[name] = before
                else:
                    del self._records[name]
            raise

    def verifying(self, name: str, source: str, *, is_on_demand: bool = False) -> AdapterRecord:
        """Return the record of content that is being read; a name that holds nothing shows it."""
        record = AdapterRecord(
            name=name, source=source, state=AdapterState.VERIFYING, is_on_demand=is_on_demand
        )
        if self.held(name) is None:
            if (before := self._records.get(name)) is not None:
                record.former, before.former = before.former, None
            self._records[name] = record
        return record

    def fail(self, record: AdapterRecord, error: str) -> None:
        """Note why a record is not there; names that never held anything are forgotten in time.
        What was to be loaded on demand is forgotten at once: who asked is told, and others' notes
        stay.
        """
        record.state, record.error = AdapterState.FAILED, error
        if record.is_on_demand and self._records.get(record.name) is record:
            del self._records[record.name]
        for name in self.failures()[:-MAX_FAILED_RECORDS]:
            del self._records[name]

    def failures(self) -> list[str]:
        """Return the names that hold nothing and only show why, the oldest first."""
        return [
            name
            for name, record in self._records.items()
            if record.state is AdapterState.FAILED and name not in self._kept
        ]

    def charge(self, held: AdapterRecord, tenants: dict[str, float], *, is_on_demand: bool) -> None:
        """Charge content that is loaded once more to these tenants too; what an operator loads is
        no longer on demand, and charged to them alone.
        """
        if is_on_demand:
            held.tenants |= tenants if held.is_on_demand else {}
        else:
            held.tenants, held.is_on_demand = tenants, False

    def put(self, record: AdapterRecord) -> None:
        """Let the record's name point to it."""
        self._records[record.name] = record

    def point(self, record: AdapterRecord) -> AdapterRecord | None:
        """Let a name point to new content, with what it held as the former one; where it held
        nothing after a restart, its former one stays; it is charged to whom the new one is. Return
        the content that has to go, if one has.
        """
        before, self._records[record.name] = self._records[record.name], record
        oldest, before.former = before.former, None
        if before.loaded is not None:
            record.former = before
        elif oldest is not None and oldest.loaded != record.loaded:
            record.former, oldest = oldest, None
        if record.former is not None:
            record.former.tenants = dict(record.tenants)
            record.former.is_on_demand = record.is_on_demand
        return oldest

    def remove(self, record: AdapterRecord) -> None:
        """Take a name away."""
        del self._records[record.name]

    def begin_draining(self, record: AdapterRecord) -> None:
        """Show a record that no name points to any more."""
        record.state = AdapterState.DRAINING
        self._draining.add(record)

    def end_draining(self, record: AdapterRecord) -> None:
        """Show it no longer: its memory is free."""
        self._draining.discard(record)

    def former_of(self, name: str, loaded: LoadedAdapter) -> Content | None:
        """The content to keep as the former one of a name that gets `loaded`; see `_point`.

        Content that could not be loaded again is kept if there is no other: it may come back.
        """
        record, kept = self._records[name], self._kept.get(name)
        if record.loaded is not None and record.loaded != loaded:
            return self.content(record)
        if kept is None:
            return None
        if kept.content.is_of(loaded):
            return kept.former
        former = record.former
        return kept.content if former is None or former.loaded == loaded else self.content(former)

    def check_replaces_nothing(self, name: str, loaded: LoadedAdapter) -> None:
        """Raise AdapterExists for a name that holds other content, or held it before a restart."""
        held, kept = self.held(name), self._kept.get(name)
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

    def content(self, record: AdapterRecord | None) -> Content | None:
        """Return what is to be kept of a record; None where it holds nothing."""
        if record is None or record.loaded is None:
            return None
        return Content.of(record.loaded, record.source)

    async def keep(self, kept: KeptName) -> None:
        """Keep what a name holds over a restart. Raises Overloaded when the disk is full."""
        if self._names is not None and self._kept.get(kept.name) != kept:
            await self._writer.run(self._names.put, kept)
            self._kept[kept.name] = kept

    async def forget(self, name: str) -> None:
        """Keep a name no longer over a restart. Raises Overloaded when the disk is full."""
        if self._names is not None:
            await self._writer.run(self._names.delete, name)
            self._kept.pop(name, None)

    async def close(self) -> None:
        """Close what keeps the names."""
        if self._names is not None:
            await self._writer.run(self._names.close)

    def _find(self, name: str, sees: Sees) -> AdapterRecord | None:
        is_seen, record = sees(name), self._records.get(name)
        return record if is_seen else None

"""From a source to the content that a name holds: read where it lies, fetched, or uploaded."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import structlog

from lora_runtime.adapters.host_cache import HostMemoryFull
from lora_runtime.core import ANY_FOLDER, FolderRules
from lora_runtime.engine.client import LoadedAdapter
from lora_runtime.engine.worker_pool import WorkerPool
from lora_runtime.errors import AdapterSourceRefused, LoramuxError, Overloaded, Unavailable
from lora_runtime.text.text_side import TextSide
from lora_runtime.text.text_workers import OwnText
from loramux.server.access.audit import MAX_LOGGED
from loramux.server.access.caller import ANONYMOUS, Caller
from loramux.server.access.places import TenantPlaces
from loramux.server.access.quotas import Quotas
from loramux.server.adapters.changes import NameChanges, Settle
from loramux.server.adapters.registry import Registry
from loramux.server.adapters.remote_loads import RemoteLoads
from loramux.server.adapters.sources import Sources
from loramux.server.adapters.sources.location import Location, is_remote, parse, pinned
from loramux.server.adapters.sources.remote import Fetched, RemoteSources
from loramux.server.adapters.uploads import AdapterStore, Upload, to_the_end
from loramux.server.calls import AdapterRecord, UploadCall

SERVER = ANONYMOUS
"""For whom a server loads what its own settings name, and what it held before a restart."""
MAX_READS = 4
"""Adapters that are read at once. The engine has two threads for that, and a queue in which whoever
asks for many would stand before all others."""
MAX_WAITING_READS = 256
NUM_DISK_THREADS = 2
MAX_WAITING_DISK = 256

logger = structlog.get_logger(__name__)


class Loads:
    """Loads adapters for whoever may have them; who may is asked before."""

    def __init__(
        self,
        *,
        registry: Registry,
        changes: NameChanges,
        own_text: OwnText,
        sources: Sources,
        store: AdapterStore,
        remote: RemoteSources,
        quotas: Quotas,
    ) -> None:
        self._quotas = quotas
        self._registry = registry
        self._changes = changes
        self._own_text = own_text
        self._sources = sources
        self._store = store
        self._remote = remote
        self._remote_loads = RemoteLoads(remote, registry)
        self._reads = TenantPlaces(
            "adapters", "are being read", MAX_READS, max_waiting=MAX_WAITING_READS
        )
        self._disk = WorkerPool(
            "the disk", num_threads=NUM_DISK_THREADS, max_waiting=MAX_WAITING_DISK
        )

    def allowed(self, source: str) -> Location | None:
        """Take a client's source apart; None is a folder. Raises as `RemoteSources.check`."""
        return self._remote.check(source) if is_remote(source) else None

    def end_fetch(self, name: str) -> bool:
        """End the fetches for a name; False if there are none."""
        return self._remote_loads.end(name)

    async def load_folder(
        self,
        caller: Caller,
        name: str,
        source: str,
        *,
        replace: bool,
        pin: bool,
        is_on_demand: bool = False,
    ) -> tuple[AdapterRecord, bool]:
        """Load a folder that a client may name; see `Sources.resolve`."""
        folder, rules = await self._resolve(source)
        with self._store.in_use(rules.sha256):
            return await self._load(
                name, folder, source, replace, rules, caller, pin=pin, is_on_demand=is_on_demand
            )

    async def load_remote(
        self,
        caller: Caller,
        name: str,
        location: Location,
        *,
        replace: bool,
        pin: bool | None,
        is_on_demand: bool = False,
    ) -> tuple[AdapterRecord, bool]:
        """Fetch an adapter and load it; once it is there, the load is finished in any case."""
        self._registry.check_name(name)
        fetch = self._remote_loads.fetched(
            name, location, tenant=caller.tenant, is_on_demand=is_on_demand
        )
        async with fetch as fetched:
            source = pinned(location.text, fetched.digest)
            folder, rules, settle = await self._fetched_folder(fetched)
            work = self._load(
                name,
                folder,
                source,
                replace,
                rules,
                caller,
                settle,
                pin=pin,
                is_on_demand=is_on_demand,
            )
            return await to_the_end(work)

    async def load_upload(self, caller: Caller, call: UploadCall, upload: Upload) -> AdapterRecord:
        """Load what was received, and keep it in the store."""
        with self._store.in_use(upload.digest):
            record, _ = await self._load(
                call.name,
                upload.folder,
                upload.digest,
                call.replace,
                FolderRules(sha256=upload.digest),
                caller,
                lambda: self._store.keep(upload),
            )
        return record

    async def preload(self, name: str, source: Path | str) -> None:
        """Load a source that the operator named, wherever it lies, in place of what the name held.

        What is elsewhere and cannot be fetched now is no error where the name holds what was
        fetched from there before. Raises as `load_remote` and `NameChanges.load`.
        """
        if isinstance(source, Path):
            path = str(source.absolute())
            await self._load(name, source, path, True, ANY_FOLDER, SERVER, pin=None)
            return
        location = parse(source)
        try:
            await self.load_remote(SERVER, name, location, replace=True, pin=None)
        except Unavailable as error:
            if not self._registry.holds_source(name, location.text):
                raise
            logger.warning("adapter not fetched again", adapter=name, error=error.message)

    async def restore(self, preloaded: Mapping[str, Path | str]) -> None:
        """Load again what the names held before a restart; see `NameChanges.restore`. `preloaded`:
        what the operator names for `preload`, so that it is read wherever it lies.
        """

        async def resolve(name: str, source: str) -> tuple[Path, FolderRules]:
            named = preloaded.get(name)
            if isinstance(named, Path) and source == str(named.absolute()):
                return named, ANY_FOLDER
            if is_remote(source):
                return await self._resolve_fetched(source, is_allowed=named is not None)
            try:
                return await self._resolve(source)
            except AdapterSourceRefused as error:
                raise _with_advice(error, name, source) from None

        await self._changes.restore(resolve, self._review, coming=preloaded.keys())

    async def load_on_demand(self, caller: Caller, name: str, source: str) -> None:
        """Load what a caller's request asked for, from where the operator says that it may be."""
        with refusals_logged(name, source), self.counted(caller, name):
            if is_remote(source):
                await self.load_remote(
                    caller, name, parse(source), replace=False, pin=False, is_on_demand=True
                )
            else:
                await self.load_folder(
                    caller, name, source, replace=False, pin=False, is_on_demand=True
                )

    async def claim(self, caller: Caller, record: AdapterRecord) -> None:
        """Let an adapter that is loaded on demand count as the caller's tenant's too. Raises as
        `counted`.
        """
        with self.counted(caller, record.name):
            await self._make_place(caller)
            self._registry.weigh(caller.tenant, caller.limits.weight)
            self._registry.charge(record, {caller.tenant: time.monotonic()}, is_on_demand=True)

    @contextmanager
    def counted(self, caller: Caller, name: str) -> Iterator[None]:
        """Count a name that is about to be loaded among its tenant's adapters. Raises Overloaded
        for one too many, if nothing on demand may make place for it.
        """
        held, _ = self._names_of(caller)
        with self._quotas.adapter(caller, name, held):
            yield

    async def _make_place(self, caller: Caller) -> None:
        """Let a tenant that holds too many names give up those on demand that it has not used for
        the longest time. Raises Overloaded where there are none.
        """
        while True:
            held, spare = self._names_of(caller)
            try:
                return self._quotas.check_adapters(caller, held | spare)
            except Overloaded:
                if not await self._changes.give_up_unused(caller.tenant):
                    raise

    def _names_of(self, caller: Caller) -> tuple[set[str], set[str]]:
        if caller.limits.max_adapters is None:
            return set(), set()
        return self._registry.names_of(caller)

    async def _fetched_folder(self, fetched: Fetched) -> tuple[Path, FolderRules, Settle | None]:
        upload = fetched.upload
        if upload is None:
            return *await self._resolve(fetched.digest), None
        rules = FolderRules(sha256=fetched.digest)
        return upload.folder, rules, lambda: self._store.keep(upload)

    async def _resolve_fetched(self, source: str, *, is_allowed: bool) -> tuple[Path, FolderRules]:
        """The store's folder of what was fetched once; it is fetched again if it is not there."""
        location = parse(source)
        if not await self._store.has(location.pin):
            if not is_allowed:
                self._remote.check(source)
            async with self._remote.fetch(location) as fetched:
                if fetched.upload is not None:
                    await self._store.keep(fetched.upload)
        return await self._resolve(location.pin)

    async def _resolve(self, source: str) -> tuple[Path, FolderRules]:
        """From a client-given source to its folder and what must hold of it."""
        folder = await self._disk.run(self._sources.resolve, source)
        return folder, FolderRules(roots=self._sources.roots, sha256=self._store.digest_of(folder))

    async def _load(
        self,
        name: str,
        folder: Path,
        source: str,
        replace: bool,
        rules: FolderRules,
        caller: Caller,
        settle: Settle | None = None,
        *,
        pin: bool | None = None,
        is_on_demand: bool = False,
    ) -> tuple[AdapterRecord, bool]:
        """See `NameChanges.load`; adapters loaded on demand make place among the caller's tenant's
        names, and room in host memory. What the operators of the whole server load is charged to
        nobody.
        """
        tenant = caller.tenant if is_on_demand or not caller.is_over_all else None
        self._registry.weigh(caller.tenant, caller.limits.weight)
        await self._make_place(caller)
        while True:
            try:
                async with self._reads.waited_for(caller.tenant):
                    return await self._changes.load(
                        name,
                        folder,
                        source=source,
                        replace=replace,
                        review=self._review,
                        rules=rules,
                        settle=settle,
                        pin=pin,
                        is_on_demand=is_on_demand,
                        tenant=tenant,
                    )
            except HostMemoryFull as full:
                if not await self._changes.make_room(full, tenant):
                    raise Overloaded(
                        full.message + _nothing_goes(tenant), field=full.field
                    ) from None

    async def _review(self, loaded: LoadedAdapter) -> tuple[TextSide | None, tuple[str, ...]]:
        """Read an adapter's own text files. Raises AdapterRefused."""
        if not loaded.text_files:
            return None, ()
        return await self._own_text.read(loaded.text_files, loaded.facts.text_sha256)


def _nothing_goes(tenant: str | None) -> str:
    """Why no adapter on demand makes room, for who loads."""
    if not tenant:
        return ""
    return (
        f"; of those on demand all are in use, or other tenants' within their shares of that "
        f"memory, and tenant {tenant!r} has none that is unused: try again later"
    )


@contextmanager
def refusals_logged(name: str, source: str) -> Iterator[None]:
    """Log why an adapter is not loaded; what is loaded the registry logs."""
    source = source[:MAX_LOGGED]  # what a client wrote, of any length
    try:
        yield
    except LoramuxError as error:
        logger.warning("adapter refused", adapter=name, source=source, error=error.message)
        raise
    except asyncio.CancelledError:
        logger.info("adapter load left by its caller", adapter=name, source=source)
        raise


def _with_advice(error: AdapterSourceRefused, name: str, source: str) -> AdapterSourceRefused:
    """Add advice to an error after a restart, which does not find a folder of --adapter."""
    if not Path(source).is_absolute():
        return error
    advice = f"start with --adapter {name}=PATH or its folder below --adapter-roots, or unload it"
    return AdapterSourceRefused(f"{error.message}: {advice}", field=error.field)

"""Fetches adapters from elsewhere into the server's store, by the operator's allow-list.

What is fetched is an upload that the server makes itself: sizes are known and bounded before a byte
is asked for, files lie in a temporary folder until the adapter is loaded, and the store keeps them
by content. A place that hangs, breaks off or lies costs a place among the fetches for a bounded
time, and nothing else.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import ParamSpec, TypeAlias, TypeVar

from lora_runtime.adapters.files.file_names import OPTIONAL_FILES, REQUIRED_FILES
from lora_runtime.engine.worker_pool import WorkerPool
from lora_runtime.errors import Unavailable
from loramux.server.access.places import TenantPlaces
from loramux.server.adapters.sources.buckets import Buckets
from loramux.server.adapters.sources.folders import refused
from loramux.server.adapters.sources.https import WebServers
from loramux.server.adapters.sources.hub import Hub
from loramux.server.adapters.sources.location import Location, check_allowed, named_addresses, parse
from loramux.server.adapters.sources.transfer import (
    MAX_PART_BYTES,
    Network,
    Places,
    Reader,
    RemoteFile,
    RemoteFolder,
    TransferFailed,
)
from loramux.server.adapters.uploads import AdapterStore, Upload
from loramux.server.calls import UploadCall, UploadFile

NUM_ATTEMPTS = 3
PAUSE_S = 1.0
"""Between the first two attempts; twice as long before the third."""
MAX_FETCHES = 8
MAX_WAITING_FETCHES = 64
MAX_KNOWN_VERSIONS = 4096
NAMES = (*REQUIRED_FILES, *OPTIONAL_FILES)

OnProgress: TypeAlias = Callable[[int, int], None]
"""Takes the bytes fetched so far, and those to fetch in all."""
P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class FetchLimits:
    """How long a fetch may take."""

    idle_s: float = 30.0
    """Without a byte, or an answer."""
    total_s: float = 1800.0
    """In all, attempts and pauses together."""
    pause_s: float = PAUSE_S


@dataclass(frozen=True, slots=True)
class Fetched:
    """An adapter's files on this machine while the fetch's context lasts."""

    digest: str
    """Of its files; the store's name for them."""
    upload: Upload | None
    """Not in the store yet; None: the store has them."""


@dataclass(frozen=True, slots=True)
class _Fetch:
    """What is fetched, for whom, and who is told how far it is."""

    location: Location
    tenant: str
    on_progress: OnProgress


class RemoteSources:
    """Where adapters may be fetched from, and the fetching."""

    def __init__(
        self,
        store: AdapterStore,
        prefixes: Iterable[str] = (),
        *,
        named: Iterable[str] = (),
        networks: Iterable[Network] = (),
        limits: FetchLimits | None = None,
        places: Places | None = None,
    ) -> None:
        """`prefixes`: of the sources that clients may name; `named`: sources that the operator
        names beside them. `networks`: that `https` may reach although they are not public.
        `places`: for tests.
        """
        self._store, self._prefixes = store, tuple(prefixes)
        self._limits = limits or FetchLimits()
        addresses = named_addresses((*self._prefixes, *named))
        self._places = places or _places(self._limits.idle_s, tuple(networks), addresses)
        self._threads: dict[str, WorkerPool] = {}
        """By tenant: a hung read of an ended fetch keeps its thread a while, and threads are
        started when they are needed only.
        """
        self._fetches = TenantPlaces(
            "adapters", "are being fetched", MAX_FETCHES, max_waiting=MAX_WAITING_FETCHES
        )
        self._known: OrderedDict[str, str] = OrderedDict()
        """Version of a remote folder → digest of its files, least recently used first."""

    def check(self, source: str) -> Location:
        """Take a client's source apart. Raises AdapterSourceRefused, also for one that the operator
        does not allow.
        """
        location = parse(source)
        check_allowed(location, self._prefixes)
        return location

    @asynccontextmanager
    async def fetch(
        self,
        location: Location,
        on_progress: OnProgress = lambda done, total: None,
        *,
        tenant: str = "",
    ) -> AsyncIterator[Fetched]:
        """Yield an adapter's files; without any network where its digest is given and known.
        `tenant`: who fetches; all share the places for fetches.

        Raises AdapterSourceRefused (missing, forbidden, too large, another content than pinned),
        Unavailable after three attempts or too long a time, and Overloaded where the store is full
        or too many fetches of the tenant wait.
        """
        async with AsyncExitStack() as held:
            if location.pin and await self._store.has(location.pin):
                held.enter_context(self._store.in_use(location.pin))
                yield Fetched(location.pin, None)
                return
            yield await self._fetched(_Fetch(location, tenant, on_progress), held)

    async def _fetched(self, fetch: _Fetch, held: AsyncExitStack) -> Fetched:
        location, total_s = fetch.location, self._limits.total_s
        try:
            async with asyncio.timeout(total_s), self._fetches.waited_for(fetch.tenant):
                return await self._tried(fetch, held)
        except TimeoutError:
            raise Unavailable(
                f"source {location.text[:200]!r} was not fetched within {total_s:.0f} s; try again "
                "later, or raise --adapter-fetch-timeout-s",
                field="source",
            ) from None

    async def _tried(self, fetch: _Fetch, held: AsyncExitStack) -> Fetched:
        """Attempts until one succeeds; what it fetched exists until `held` is closed."""
        pause_s, why = self._limits.pause_s, ""
        for attempt in range(NUM_ATTEMPTS):
            if attempt:
                await asyncio.sleep(pause_s * 2 ** (attempt - 1))
            try:
                return await held.enter_async_context(self._attempt(fetch))
            except TransferFailed as error:
                why = str(error)
        raise Unavailable(
            f"source {fetch.location.text[:200]!r} could not be fetched in {NUM_ATTEMPTS} "
            f"attempts: {why}; try again later",
            field="source",
        )

    @asynccontextmanager
    async def _attempt(self, fetch: _Fetch) -> AsyncIterator[Fetched]:
        location = fetch.location
        folder = await self._list(fetch)
        self._check(location, folder.files)
        known = self._known.get(folder.version, "")
        if known and await self._store.has(known):
            _check_pin(location, known)
            with self._store.in_use(known):
                yield Fetched(known, None)
            return
        files = tuple(UploadFile(name=f.name, num_bytes=f.num_bytes) for f in folder.files)
        call = UploadCall(name=location.text, files=files)
        async with (
            aclosing(self._parts(fetch, folder)) as parts,
            self._store.receive(call, parts, tenant=fetch.tenant, may_idle=True) as upload,
        ):
            for file in folder.files:
                if file.sha256 and upload.hashes[file.name] != file.sha256:
                    raise TransferFailed(f"its {file.name} came with another SHA-256 than it has")
            again = await self._list(fetch)
            if (again.files, again.version) != (folder.files, folder.version):
                raise TransferFailed("it changed while it was fetched")
            _check_pin(location, upload.digest)
            self._remember(folder.version, upload.digest)
            yield Fetched(upload.digest, upload)

    def _check(self, location: Location, files: tuple[RemoteFile, ...]) -> None:
        names = [file.name for file in files]
        for name in REQUIRED_FILES:
            if name not in names:
                raise refused(location.text, f"has no {name}")
        num_bytes = sum(file.num_bytes for file in files)
        if num_bytes > self._store.max_upload_bytes:
            raise refused(
                location.text,
                f"has {num_bytes} bytes; this server takes {self._store.max_upload_bytes} at most "
                "(--max-upload-bytes)",
            )

    async def _parts(self, fetch: _Fetch, folder: RemoteFolder) -> AsyncGenerator[bytes, None]:
        """The bytes of all files, one after another, exactly as many as were announced."""
        total, done = sum(file.num_bytes for file in folder.files), 0
        fetch.on_progress(done, total)
        for file in folder.files:
            async for part in self._parts_of(fetch, folder, file):
                done += len(part)
                fetch.on_progress(done, total)
                yield part

    async def _parts_of(
        self, fetch: _Fetch, folder: RemoteFolder, file: RemoteFile
    ) -> AsyncGenerator[bytes, None]:
        idle_s, opened = self._limits.idle_s, _Opened()
        try:
            reader = await self._step(fetch, idle_s, opened.open, folder, file)
            num_left = file.num_bytes
            while num_left:
                part = await self._step(fetch, idle_s, reader.read, min(num_left, MAX_PART_BYTES))
                if not part:
                    raise TransferFailed(
                        f"its {file.name} ended after {file.num_bytes - num_left} of "
                        f"{file.num_bytes} bytes"
                    )
                num_left -= len(part)
                yield part
        finally:
            opened.close()

    async def _list(self, fetch: _Fetch) -> RemoteFolder:
        location, idle_s = fetch.location, self._limits.idle_s
        list_folder = self._places[location.scheme].list_folder
        return await self._step(fetch, len(NAMES) * idle_s, list_folder, location, NAMES)

    async def _step(
        self,
        fetch: _Fetch,
        idle_s: float,
        function: Callable[P, T],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> T:
        """One blocking call of a place. Raises TransferFailed when it takes too long."""
        threads = self._threads.get(fetch.tenant)
        if threads is None:
            threads = self._threads[fetch.tenant] = WorkerPool(
                "adapter sources", num_threads=2 * MAX_FETCHES, max_waiting=2 * MAX_FETCHES
            )
        try:
            async with asyncio.timeout(idle_s):
                return await threads.run(function, *args, **kwargs)
        except TimeoutError:
            raise TransferFailed(f"nothing came for {idle_s:g} s") from None

    def _remember(self, version: str, digest: str) -> None:
        if version:
            self._known[version] = digest
            self._known.move_to_end(version)
            while len(self._known) > MAX_KNOWN_VERSIONS:
                self._known.popitem(last=False)


class _Opened:
    """A reader that is closed even when its opening ends later than who wanted it."""

    def __init__(self) -> None:
        self._reader: Reader | None = None
        self._is_over = False

    def open(self, folder: RemoteFolder, file: RemoteFile) -> Reader:
        """Open a file, on a thread of its own."""
        self._reader = folder.open(file)
        if self._is_over:
            self._reader.close()
        return self._reader

    def close(self) -> None:
        """Close what is open, or is going to be."""
        self._is_over = True
        if self._reader is not None:
            self._reader.close()


def _check_pin(location: Location, digest: str) -> None:
    if location.pin and location.pin != digest:
        raise refused(
            location.text, f"holds {digest[:12]}… by now, not the {location.pin[:12]}… asked for"
        )


def _places(idle_s: float, networks: tuple[Network, ...], addresses: frozenset[str]) -> Places:
    web = WebServers(idle_s, networks, addresses)
    return {"hf": Hub(idle_s, web), "s3": Buckets(idle_s), "gs": Buckets(idle_s), "https": web}

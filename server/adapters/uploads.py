"""Uploaded adapters: received whole or not at all, and kept by content in the server's own store.

Knows files and bytes, and neither the wire nor what the files mean. An upload is written in a
temporary folder, and becomes part of the store only after it was loaded.
"""

from __future__ import annotations

import asyncio
import errno
import hashlib
import os
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import BinaryIO, ParamSpec, TypeVar

from lora_runtime.adapters.files.file_names import (
    OPTIONAL_FILES,
    REQUIRED_FILES,
    content_digest,
)
from lora_runtime.engine.worker_pool import WorkerPool
from lora_runtime.errors import AdapterInUse, AdapterNotFound, InvalidRequest, Overloaded
from lora_runtime.shortages import shortage
from lora_runtime.temporary_folder import remove_abandoned, temporary_folder
from loramux.server.access.places import TenantPlaces
from loramux.server.calls import StoredAdapter, UploadCall, UploadFile

MAX_RUNNING_UPLOADS = 16
MAX_STORE_BYTES = 100 << 30
IDLE_S = 30.0
"""An upload that sends nothing for so long is ended: it holds one of the places above."""
MIN_BYTES_PER_S = 16 << 10
"""One that sends less, a byte now and then or empty chunks, is ended too, IDLE_S later."""
NUM_DISK_THREADS = 4
FULL = (errno.ENOSPC, errno.EDQUOT)

P = ParamSpec("P")
T = TypeVar("T")


class AdapterStore:
    """Adapters that clients sent, one folder a content: `root`/<SHA-256 of its files>.

    What was stored stays until it is deleted, so that it can be loaded again by that name.
    """

    def __init__(
        self, folder: Path, max_upload_bytes: int, max_bytes: int = MAX_STORE_BYTES
    ) -> None:
        """`max_upload_bytes`: of all files of one upload; `max_bytes`: of all that is stored.
        Removes what killed servers left of theirs; another server, of another base, may be using
        the folder.
        """
        self.root = folder / "adapters"
        self._incoming = folder / "incoming"
        remove_abandoned(self._incoming)
        self.max_bytes = max_bytes
        self.max_upload_bytes = max_upload_bytes
        self._running = TenantPlaces("uploads", "are running already", MAX_RUNNING_UPLOADS)
        self._num_announced = 0
        """Bytes of the uploads that are running."""
        self._in_use: Counter[str] = Counter()
        self._disk = WorkerPool(
            "uploads", num_threads=NUM_DISK_THREADS, max_waiting=2 * MAX_RUNNING_UPLOADS
        )

    @asynccontextmanager
    async def receive(
        self,
        call: UploadCall,
        data: AsyncIterator[bytes],
        *,
        tenant: str = "",
        may_idle: bool = False,
    ) -> AsyncIterator[Upload]:
        """Yield a complete upload of a tenant, whose `folder` exists until the context ends. Parts
        may be IDLE_S apart, unless it `may_idle`, having a limit of its own.

        Raises InvalidRequest naming the field: a file that is not one of an adapter's, missing or
        named twice, too many bytes announced, more or fewer sent, another SHA-256. Raises
        Overloaded when disk or store is full, or too many uploads are running.
        """
        self._check(call)
        num_bytes = sum(file.num_bytes for file in call.files)
        with self._running.taken(tenant):
            self._num_announced += num_bytes
            try:
                await self._check_room()
                async with self._received_in_folder(call, data, may_idle) as upload:
                    yield upload
            finally:
                self._num_announced -= num_bytes

    @asynccontextmanager
    async def _received_in_folder(
        self, call: UploadCall, data: AsyncIterator[bytes], may_idle: bool
    ) -> AsyncIterator[Upload]:
        opened = ExitStack()
        try:
            folder = await self._in_thread(self._new_folder, opened)
            yield await self._received(call, data, folder, may_idle)
        except OSError as error:
            if error.errno not in FULL:
                raise
            raise Overloaded("the adapter store of this server is full; try again later") from error
        finally:
            await self._in_thread(opened.close)

    def digest_of(self, folder: Path) -> str:
        """Return the digest that a stored folder's files must have, "" for any other folder."""
        return folder.name if folder.parent == self.root.resolve() else ""

    async def has(self, digest: str) -> bool:
        """Tell whether the store holds a content."""
        return await self._in_thread((self.root / digest).is_dir)

    @contextmanager
    def in_use(self, digest: str) -> Iterator[None]:
        """Keep a content from being deleted while the context lasts; "" is none."""
        self._in_use[digest] += 1
        try:
            yield
        finally:
            self._in_use[digest] -= 1

    async def stored(self) -> list[StoredAdapter]:
        """Return what the store holds, by digest."""
        return await self._in_thread(self._scan)

    async def find(self, digest: str) -> StoredAdapter:
        """Return one content. Raises AdapterNotFound (field `source`)."""
        found = next((stored for stored in await self.stored() if stored.source == digest), None)
        if found is None:
            raise AdapterNotFound(f"{digest[:128]!r} is not in the store", field="source")
        return found

    async def delete(self, stored: StoredAdapter) -> None:
        """Delete a content. Raises AdapterInUse (field `source`) while it is being loaded.

        It leaves the store before anything is awaited, so that what a caller has just made sure of
        still holds.
        """
        if self._in_use[stored.source]:
            raise AdapterInUse(f"{stored.source} is being loaded; try again later", field="source")
        opened = ExitStack()
        try:
            trash = self._new_folder(opened)
            with suppress(FileNotFoundError):  # another call has just deleted it
                os.rename(self.root / stored.source, trash)
        finally:
            await self._in_thread(opened.close)

    async def _check_room(self) -> None:
        num_stored = sum(stored.num_bytes for stored in await self.stored())
        if num_stored + self._num_announced > self.max_bytes:
            raise Overloaded(
                f"the adapter store would have {num_stored + self._num_announced} bytes and may "
                f"have {self.max_bytes}; delete stored adapters that nobody needs"
            )

    def _scan(self) -> list[StoredAdapter]:
        found = []
        for folder in sorted(self.root.iterdir()) if self.root.is_dir() else ():
            with suppress(FileNotFoundError, NotADirectoryError):  # it has just been deleted
                num_bytes = sum(entry.stat().st_size for entry in os.scandir(folder))
                at = folder.stat().st_mtime
                found.append(StoredAdapter(source=folder.name, num_bytes=num_bytes, stored_at_s=at))
        return found

    async def keep(self, upload: Upload) -> None:
        """Move an upload into the store, at once.

        Content that is there already stays if it is whole, and else makes room.
        """
        await self._in_thread(self._move, upload)

    async def _received(
        self, call: UploadCall, data: AsyncIterator[bytes], folder: Path, may_idle: bool
    ) -> Upload:
        upload = Upload(call.files, folder)
        pace = _Pace()
        following = partial(anext, data, None) if may_idle else partial(_next_part, data, pace)
        while (part := await following()) is not None:
            await self._in_thread(upload.write, part)
        await self._in_thread(upload.finish)
        return upload

    async def _in_thread(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return await to_the_end(self._disk.run(function, *args, **kwargs))
        except OSError as error:
            raise shortage(error) or error from None

    def _check(self, call: UploadCall) -> None:
        names = [file.name for file in call.files]
        for index, name in enumerate(names):
            if name not in (*REQUIRED_FILES, *OPTIONAL_FILES):
                allowed = ", ".join((*REQUIRED_FILES, *OPTIONAL_FILES))
                raise _refused(f"{name[:100]!r} is no file of an adapter; send {allowed}", index)
            if name in names[:index]:
                raise _refused(f"{name} is announced twice", index)
        for name in REQUIRED_FILES:
            if name not in names:
                raise InvalidRequest(f"{name} is not announced; send it too", field="start.files")
        num_bytes = sum(file.num_bytes for file in call.files)
        if num_bytes > self.max_upload_bytes:
            raise InvalidRequest(
                f"the files have {num_bytes} bytes; this server takes {self.max_upload_bytes} at "
                "most",
                field="start.files",
            )

    def _new_folder(self, opened: ExitStack) -> Path:
        self._incoming.mkdir(parents=True, exist_ok=True)
        self.root.mkdir(exist_ok=True)
        return opened.enter_context(temporary_folder(self._incoming))

    def _move(self, upload: Upload) -> None:
        target = self.root / upload.digest
        if target.is_dir() and _digest_on_disk(target) != upload.digest:
            with temporary_folder(self._incoming) as damaged:
                os.rename(target, damaged)
        try:
            os.rename(upload.folder, target)
        except OSError:
            if not target.is_dir():
                raise
        _sync(self.root)


class Upload:
    """The files of one upload, written in their order below `folder`."""

    def __init__(self, files: tuple[UploadFile, ...], folder: Path) -> None:
        self.folder = folder
        self._files = files
        self._index = 0
        self._num_written = 0
        self._hash = hashlib.sha256()
        self.hashes: dict[str, str] = {}
        """SHA-256 of each file that is whole."""

    @property
    def digest(self) -> str:
        """See `content_digest`."""
        return content_digest(self.hashes)

    def write(self, data: bytes) -> None:
        """Append to the current file. Raises InvalidRequest where it was announced shorter."""
        self._end_full_files()
        if not data:
            return
        if self._index == len(self._files):
            raise InvalidRequest("more bytes were sent than announced", field="chunk.data")
        file = self._files[self._index]
        self._num_written += len(data)
        if self._num_written > file.num_bytes:
            raise InvalidRequest(
                f"{file.name} is longer than the {file.num_bytes} bytes announced; a chunk holds "
                "bytes of one file only",
                field="chunk.data",
            )
        self._hash.update(data)
        with self._open(file) as stream:
            stream.write(data)

    def finish(self) -> None:
        """Check that everything has come. Raises InvalidRequest."""
        self._end_full_files()
        if self._index < len(self._files):
            file = self._files[self._index]
            raise InvalidRequest(
                f"the upload ended after {self._num_written} of {file.num_bytes} bytes of "
                f"{file.name}",
                field="chunk.data",
            )

    def _end_full_files(self) -> None:
        while (
            self._index < len(self._files)
            and self._num_written == self._files[self._index].num_bytes
        ):
            self._end_file(self._files[self._index])
            self._index, self._num_written, self._hash = self._index + 1, 0, hashlib.sha256()

    def _end_file(self, file: UploadFile) -> None:
        found = self._hash.hexdigest()
        if file.sha256 and file.sha256 != found:
            raise InvalidRequest(
                f"{file.name} came with SHA-256 {found}, not {file.sha256}; send it again",
                field=f"start.files[{self._index}].sha256",
            )
        with self._open(file) as stream:
            os.fsync(stream.fileno())
        self.hashes[file.name] = found

    def _open(self, file: UploadFile) -> BinaryIO:
        return (self.folder / file.name).open("ab")


async def _next_part(data: AsyncIterator[bytes], pace: _Pace) -> bytes | None:
    try:
        async with asyncio.timeout(pace.left_s()):
            part = await anext(data, None)
    except TimeoutError:
        raise InvalidRequest(
            f"nothing came for {IDLE_S:.0f} s, or less than {MIN_BYTES_PER_S} bytes a second; send "
            "the whole adapter again",
            field="chunk.data",
        ) from None
    pace.num_bytes += len(part or b"")
    return part


class _Pace:
    """How fast the bytes of one upload come."""

    def __init__(self) -> None:
        self._begun = time.monotonic()
        self.num_bytes = 0

    def left_s(self) -> float:
        """Seconds that the next part may take. Raises TimeoutError when there are none: parts that
        are there already come without a wait, which no timeout sees.
        """
        end = self._begun + IDLE_S + self.num_bytes / MIN_BYTES_PER_S
        if (left := end - time.monotonic()) <= 0:
            raise TimeoutError
        return min(left, IDLE_S)


def _digest_on_disk(folder: Path) -> str:
    hashes = {}
    for path in folder.iterdir():
        if path.is_file():
            with path.open("rb") as file:
                hashes[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return content_digest(hashes)


def _sync(folder: Path) -> None:
    """Make a rename in `folder` outlast a loss of power."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


async def to_the_end(work: Awaitable[T]) -> T:
    """Await work that a cancellation of the caller must not interrupt; it is raised afterwards."""
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait([task])
        if not task.cancelled():
            task.exception()  # seen: the cancellation stands in its place
        raise


def _refused(why: str, index: int) -> InvalidRequest:
    return InvalidRequest(why, field=f"start.files[{index}].name")

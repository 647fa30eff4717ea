"""Runs adapters' own text in processes that are killed and replaced when they take too much.

Callers are on an asyncio event loop, which never waits for a process: threads of this module do.
A text side that used up its limits on a short prompt is refused for a while without being run; a
long prompt that does so is refused alone. No side is run more than once at a time, and only so many
wait for it, so that one adapter never keeps the processes, or the server, from the others.
"""

from __future__ import annotations

import asyncio
import json
import os
import selectors
import subprocess
import sys
import tempfile
import time
import weakref
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import PriorityQueue
from typing import Any, Protocol, TypeAlias

from lora_runtime.errors import AdapterRefused, InvalidRequest, Overloaded, Unavailable
from lora_runtime.shortages import shortage
from lora_runtime.temporary_folder import remove_abandoned, temporary_folder
from lora_runtime.text.text_side import TextSide

NUM_LOADING = 2
NUM_RENDERING = 4
"""Processes at most, of about 70 and 60 MB; one starts when all that run are at work."""
RENDERING_S = 5.0
"""Wall-clock time of one piece of work; its processor time is limited in the process."""
LOADING_S = 60.0
STARTING_S = 60.0
PENALTY_S = 60.0
"""How long a text side that used up its limits is refused."""
LONG_PROMPT = 1 << 16
"""Characters from which it is the prompt, and not the text side, that takes too much."""
CHARACTERS_PER_MESSAGE = 64
"""Characters that a message costs beside its own, because templates go over all messages."""
MAX_WAITING = 256
MAX_WAITING_PER_SIDE = 128
MAX_REMEMBERED = 1024
MAX_MESSAGE = 300
"""Characters of a template's own complaint that are passed on."""
FOLDER_PREFIX = "loramux-text-"
"""Beginning of the names of temporary folders that hold text files while they are read."""
LENGTH_BYTES = 4
MAX_REPLY_BYTES = 256 << 20
ENVIRONMENT = ("HOME", "LANG", "LD_LIBRARY_PATH", "PATH", "SYSTEMROOT", "TMPDIR", "TZ")
"""All that a process sees of this one's environment."""

TRIAL_CHAT = ({"role": "user", "content": "Hello"},)
"""The conversation that an adapter's own chat template must render when it is loaded."""


Reading: TypeAlias = tuple[TextSide | None, tuple[str, ...]]
"""An adapter's text side, None for the base's, and notes on it."""


class LimitExceeded(Exception):
    """The process took too long or too much memory, and was killed."""


class OwnText(Protocol):
    """Reads and runs the text sides that adapters bring."""

    async def read(self, files: Mapping[str, bytes], sha256: str = "") -> Reading:
        """Judge an adapter's text files; give its text side, None for the base's, and notes.

        `sha256`: a digest of the files, under which the answer is remembered.
        Raises AdapterRefused naming the file.
        """
        ...

    async def render(
        self, side: TextSide, messages: Sequence[Mapping[str, str]]
    ) -> str | list[int]:
        """Render a conversation; token ids where the side has a tokenizer of its own, else text.

        Raises InvalidRequest (field `messages`) for what the template refuses or takes too long
        or too much memory for, and Overloaded.
        """
        ...

    async def encode(self, side: TextSide, text: str) -> list[int]:
        """Token ids of a plain text by the side's own tokenizer. Raises as `render`."""
        ...

    def close(self) -> None:
        """End the processes."""
        ...


class TextWorkers:
    """An `OwnText` of one base. Processes start when they are first needed."""

    def __init__(self, base_folder: Path, vocab_size: int) -> None:
        """Removes what killed processes left of the text files they were reading."""
        remove_abandoned(Path(tempfile.gettempdir()), FOLDER_PREFIX)
        self._base_folder = base_folder
        self._vocab_size = vocab_size
        self._loading = _Pool("loading", NUM_LOADING)
        self._rendering = _Pool("rendering", NUM_RENDERING)
        self._locks: weakref.WeakValueDictionary[str, asyncio.Lock] = weakref.WeakValueDictionary()
        self._sides: weakref.WeakValueDictionary[str, TextSide] = weakref.WeakValueDictionary()
        """Adapters of one text share it: a tokenizer may have megabytes."""
        self._read_before: dict[str, tuple[weakref.ref[TextSide] | None, tuple[str, ...]]] = {}
        self._refused_until: dict[str, float] = {}
        self._waiting: Counter[str] = Counter()
        """Callers of a side that wait for their turn."""

    async def read(self, files: Mapping[str, bytes], sha256: str = "") -> Reading:
        if (known := self._remembered(sha256)) is not None:
            return known
        try:
            reply = await self._loading.run(lambda process: self._read(process, files))
        except LimitExceeded:
            raise AdapterRefused(
                f"its text files take more time or memory to read than {LOADING_S:g} s and the "
                "server's limits",
                field=next(iter(files)),
            ) from None
        if "refused" in reply:
            raise AdapterRefused(reply["refused"], field=reply.get("field"))
        notes = list(reply["notes"])
        side = None if reply["side"] is None else TextSide.from_json(reply["side"])
        if side is not None:
            side = self._sides.setdefault(side.key, side)
        if side is not None and side.is_own_template and side.template is not None:
            notes += await self._trial(side)
        held = None if side is None else weakref.ref(side)
        self._read_before[sha256] = (held, tuple(notes))
        while len(self._read_before) > MAX_REMEMBERED:
            del self._read_before[next(iter(self._read_before))]
        return side, tuple(notes)

    def _remembered(self, sha256: str) -> Reading | None:
        """The reading of files with this digest, if an adapter has it or if they are the base's."""
        if not sha256 or sha256 not in self._read_before:
            return None
        held, notes = self._read_before[sha256]
        if held is None:
            return None, notes
        side = held()
        return None if side is None else (side, notes)

    async def render(
        self, side: TextSide, messages: Sequence[Mapping[str, str]]
    ) -> str | list[int]:
        if side.template is None:
            raise InvalidRequest(
                "neither the adapter nor the base has a chat template; send text or token ids "
                "instead",
                field="messages",
            )
        request = {"op": "render", "key": side.key, "messages": [dict(m) for m in messages]}
        size = sum(CHARACTERS_PER_MESSAGE + sum(map(len, m.values())) for m in messages)
        reply = await self._run(side, request, "messages", "chat template", size)
        return self._checked(reply["ids"], "messages") if "ids" in reply else str(reply["text"])

    async def encode(self, side: TextSide, text: str) -> list[int]:
        request = {"op": "encode", "key": side.key, "text": text}
        reply = await self._run(side, request, "text", "tokenizer", len(text))
        return self._checked(reply["ids"], "text")

    def close(self) -> None:
        self._loading.close()
        self._rendering.close()

    async def _trial(self, side: TextSide) -> list[str]:
        """Note on a template that refuses one plain message; one without bounds is refused."""
        try:
            await self.render(side, TRIAL_CHAT)
        except InvalidRequest as error:
            if side.key in self._refused_until:
                raise AdapterRefused(error.message, field="chat_template") from None
            return [f"its own template failed a trial: {error.message[:MAX_MESSAGE]}"]
        return []

    async def _run(
        self, side: TextSide, request: dict[str, Any], field: str, what: str, size: int
    ) -> dict[str, Any]:
        """Do one piece of work for a side, after the others that wait for it.

        Raises InvalidRequest if the side refuses the request, or used up its limits: then for a
        while at once.
        """
        lock = await self._turn(side)
        if time.monotonic() < self._refused_until.get(side.key, 0.0):
            lock.release()
            raise _spent(field, what, is_long=False)
        self._refused_until.pop(side.key, None)
        is_long = size >= LONG_PROMPT
        work = asyncio.ensure_future(self._once(side, request, lock, is_long))
        work.add_done_callback(_seen)
        try:
            reply = await asyncio.shield(work)  # a caller that goes away does not end the work
        except LimitExceeded:
            raise _spent(field, what, is_long=is_long) from None
        if "refused" in reply:
            raise InvalidRequest(
                f"the adapter's {what} refuses the {field}: {reply['refused'][:MAX_MESSAGE]}",
                field=field,
            )
        return reply

    async def _turn(self, side: TextSide) -> asyncio.Lock:
        """The side's lock, acquired. Raises Overloaded."""
        lock = self._locks.setdefault(side.key, asyncio.Lock())
        if self._waiting[side.key] >= MAX_WAITING_PER_SIDE:
            raise Overloaded("too many texts wait for this adapter's own text; try again later")
        self._waiting[side.key] += 1
        try:
            await lock.acquire()
        finally:
            self._waiting[side.key] -= 1
            if not self._waiting[side.key]:
                del self._waiting[side.key]
        return lock

    async def _once(
        self, side: TextSide, request: dict[str, Any], lock: asyncio.Lock, is_long: bool
    ) -> dict[str, Any]:
        """Run one request of a side and release the side's lock when it is really over."""
        try:
            return await self._rendering.run(lambda process: process.ask(request, side))
        except LimitExceeded:
            if not is_long:
                self._refuse(side)
            raise
        finally:
            lock.release()

    def _refuse(self, side: TextSide) -> None:
        now = time.monotonic()
        kept = {key: until for key, until in self._refused_until.items() if until > now}
        self._refused_until = {**kept, side.key: now + PENALTY_S}

    def _checked(self, ids: list[int], field: str) -> list[int]:
        beyond = next((index for index in ids if not 0 <= index < self._vocab_size), None)
        if beyond is not None:
            raise InvalidRequest(
                f"{field} holds the token {beyond} of the adapter's tokenizer; the base has "
                f"{self._vocab_size} tokens",
                field=field,
            )
        return ids

    def _read(self, process: _Process, files: Mapping[str, bytes]) -> dict[str, Any]:
        with temporary_folder(Path(tempfile.gettempdir()), FOLDER_PREFIX) as folder:
            (folder / "own").mkdir()
            (folder / "work").mkdir()
            for file, content in files.items():
                (folder / "own" / file).write_bytes(content)
            request = {
                "op": "read",
                "folder": str(folder),
                "base": str(self._base_folder),
                "vocab_size": self._vocab_size,
            }
            return process.exchange(request, LOADING_S)


def _seen(work: asyncio.Future[Any]) -> None:
    """Look at a failure whose caller has gone, so that asyncio does not report it as lost."""
    if not work.cancelled():
        work.exception()


def _spent(field: str, what: str, *, is_long: bool) -> InvalidRequest:
    end = "Send less" if is_long else f"It is not run for {PENALTY_S:g} s. Send token ids"
    return InvalidRequest(
        f"the adapter's {what} takes more time or memory than the {RENDERING_S:g} s and 512 MiB "
        f"that it may. {end}, or load it without its own text",
        field=field,
    )


class _Pool:
    """Some processes of one kind, each with a thread that waits for it."""

    def __init__(self, kind: str, count: int) -> None:
        self._threads = ThreadPoolExecutor(count, thread_name_prefix=f"text-{kind}")
        self._processes = [_Process(kind) for _ in range(count)]
        self._idle: PriorityQueue[tuple[bool, int]] = PriorityQueue()
        """Indices; those that have to be started come last."""
        for index in range(count):
            self._idle.put((True, index))
        self._num_waiting = 0

    async def run(self, work: Any) -> dict[str, Any]:
        """Give `work` an idle process in a thread. Raises LimitExceeded, Overloaded."""
        if self._num_waiting >= MAX_WAITING:
            raise Overloaded("too many texts wait for adapters' own templates; try again later")
        self._num_waiting += 1
        try:
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._threads, self._with_process, work)
        finally:
            self._num_waiting -= 1

    def close(self) -> None:
        """Kill the processes; what waits for one ends with Unavailable, and so do the threads."""
        for process in self._processes:
            process.stop()
        self._threads.shutdown(wait=True, cancel_futures=True)
        for process in self._processes:
            process.discard()

    def _with_process(self, work: Any) -> dict[str, Any]:
        _, index = self._idle.get()
        process = self._processes[index]
        try:
            reply: dict[str, Any] = work(process)
        except OSError as error:
            raise shortage(error) or error from None
        finally:
            self._idle.put((not process.is_running, index))
        return reply


class _Process:
    """One process, started when it is first asked and again after it was killed."""

    def __init__(self, kind: str) -> None:
        self._kind = kind
        self._running: subprocess.Popen[bytes] | None = None
        self._is_closed = False

    @property
    def is_running(self) -> bool:
        return self._running is not None

    def ask(self, request: dict[str, Any], side: TextSide) -> dict[str, Any]:
        """Ask about a text side, sending it first where the process does not have it."""
        reply = self.exchange(request, RENDERING_S)
        if "is_unknown" not in reply:
            return reply
        opened = self.exchange({"op": "open", **side.to_json()}, LOADING_S)
        return opened if "refused" in opened else self.exchange(request, RENDERING_S)

    def exchange(self, request: dict[str, Any], seconds: float) -> dict[str, Any]:
        """Send a request and wait for its reply. Raises LimitExceeded, Unavailable."""
        if self._is_closed:
            raise Unavailable("the server is shutting down")
        try:
            running = self._started()
            reply = _talk(running, request, time.monotonic() + seconds)
        except LimitExceeded:
            self.discard()
            if self._is_closed:
                raise Unavailable("the server is shutting down") from None
            raise
        if "is_over" in reply:  # memory ran out: what it holds now is not to be trusted
            self.discard()
            raise LimitExceeded
        return reply

    def _started(self) -> subprocess.Popen[bytes]:
        if self._running is not None and self._running.poll() is not None:
            self.discard()
        if self._running is None:
            self._running = _start(self._kind)
            if self._is_closed:
                self._running.kill()
            _talk(self._running, {"op": "open", **NOTHING}, time.monotonic() + STARTING_S)
        return self._running

    def stop(self) -> None:
        """Kill the process for good, whatever it does; from any thread."""
        self._is_closed = True
        running = self._running
        if running is not None:
            running.kill()

    def discard(self) -> None:
        """Kill the process and forget it; from the thread that asks it."""
        running, self._running = self._running, None
        if running is not None:
            running.kill()
            running.__exit__(None, None, None)  # closes its pipes and waits for it


NOTHING: dict[str, Any] = {"key": "", "template": None, "variables": {}, "tokenizer": None}
"""A text side of nothing: opening it shows that a process has started."""


def _start(kind: str) -> subprocess.Popen[bytes]:
    """Start a worker process, which sees little of this one's environment."""
    root = str(Path(__file__).parents[2])
    environment = {name: os.environ[name] for name in ENVIRONMENT if name in os.environ}
    process = subprocess.Popen(
        [sys.executable, "-m", "lora_runtime.text.worker", kind],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # Ctrl-C is for the server, which ends this one
        cwd=root,
        env={
            **environment,
            "PYTHONPATH": root,
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
        },
    )
    for pipe in (process.stdin, process.stdout):
        assert pipe is not None
        os.set_blocking(pipe.fileno(), False)
    return process


def _talk(
    process: subprocess.Popen[bytes], request: dict[str, Any], deadline: float
) -> dict[str, Any]:
    """Write a frame and read one. Raises LimitExceeded where the process ends or is too late."""
    content = json.dumps(request).encode()
    unsent = memoryview(len(content).to_bytes(LENGTH_BYTES, "little") + content)
    received = bytearray()
    assert process.stdin is not None and process.stdout is not None
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdin, selectors.EVENT_WRITE)
        selector.register(process.stdout, selectors.EVENT_READ)
        while not _is_whole(received):
            ready = selector.select(max(0.0, deadline - time.monotonic()))
            if not ready:
                raise LimitExceeded
            for key, _ in ready:
                try:
                    if key.fileobj is process.stdin:
                        unsent = unsent[os.write(key.fd, unsent[: 1 << 16]) :]
                    elif data := os.read(key.fd, 1 << 20):
                        received += data
                    else:
                        raise LimitExceeded
                except BrokenPipeError:
                    raise LimitExceeded from None
            if not unsent and process.stdin in selector.get_map():
                selector.unregister(process.stdin)
    reply: dict[str, Any] = json.loads(received[LENGTH_BYTES:])
    return reply


def _is_whole(received: bytearray) -> bool:
    if len(received) < LENGTH_BYTES:
        return False
    size = int.from_bytes(received[:LENGTH_BYTES], "little")
    if size > MAX_REPLY_BYTES:
        raise LimitExceeded
    return len(received) >= LENGTH_BYTES + size

"""Processes that do what may run away, and are killed and replaced when it takes too much.

Callers are on an asyncio event loop, which never waits for a process: threads of this module do.
"""

from __future__ import annotations

import asyncio
import json
import os
import selectors
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import PriorityQueue
from typing import Any, TypeAlias

from lora_runtime.errors import Overloaded, Unavailable
from lora_runtime.shortages import shortage
from lora_runtime.text.worker_frames import LENGTH_BYTES

STARTING_S = 60.0
MAX_WAITING = 256
MAX_REPLY_BYTES = 256 << 20
ENVIRONMENT = ("HOME", "LANG", "LD_LIBRARY_PATH", "PATH", "SYSTEMROOT", "TMPDIR", "TZ")
"""All that a process sees of this one's environment."""


Opening: TypeAlias = Callable[[], dict[str, Any]]


class LimitExceeded(Exception):
    """The process took too long or too much memory, and was killed."""


class ProcessPool:
    """Some processes of one kind, each with a thread that waits for it."""

    def __init__(self, what: str, command: Sequence[str], count: int, opening: Opening) -> None:
        """`what` they do, for people; `command`: a module and its arguments; `opening`: makes the
        first request of every process, whose reply shows that it has started.
        """
        self._what = what
        self._threads = ThreadPoolExecutor(count, thread_name_prefix="-".join(("text", *command)))
        self._processes = [WorkerProcess(command, opening) for _ in range(count)]
        self._idle: PriorityQueue[tuple[bool, int]] = PriorityQueue()
        """Indices; those that have to be started come last."""
        for index in range(count):
            self._idle.put((True, index))
        self._num_waiting = 0

    async def run(self, work: Any) -> dict[str, Any]:
        """Give `work` an idle process in a thread. Raises LimitExceeded, Overloaded."""
        if self._num_waiting >= MAX_WAITING:
            raise Overloaded(f"too many requests wait for {self._what}; try again later")
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


class WorkerProcess:
    """One process, started when it is first asked and again after it was killed."""

    def __init__(self, command: Sequence[str], opening: Opening) -> None:
        self._command, self._opening = command, opening
        self._running: subprocess.Popen[bytes] | None = None
        self._is_closed = False

    @property
    def is_running(self) -> bool:
        return self._running is not None

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
            self._running = _start(self._command)
            if self._is_closed:
                self._running.kill()
            _talk(self._running, self._opening(), time.monotonic() + STARTING_S)
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


def _start(command: Sequence[str]) -> subprocess.Popen[bytes]:
    """Start a worker process, which sees little of this one's environment."""
    root = str(Path(__file__).parents[2])
    environment = {name: os.environ[name] for name in ENVIRONMENT if name in os.environ}
    process = subprocess.Popen(
        [sys.executable, "-m", *command],
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

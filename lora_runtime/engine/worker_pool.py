"""A few threads for one kind of blocking work, and a bound on what may wait for them.

asyncio's own executor is one for all kinds of work: calls of one kind that hang there end every
kind, and the process waits for them when it ends. The threads here are daemons, started when they
are needed and ended when they are not, and no process waits for them.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from contextvars import copy_context
from functools import partial
from typing import Any, NamedTuple, ParamSpec, TypeVar

from lora_runtime.errors import Overloaded

IDLE_S = 10.0
"""How long a thread without work lives on."""

P = ParamSpec("P")
T = TypeVar("T")


class _Job(NamedTuple):
    function: Callable[[], object]
    done: Future[Any]


class WorkerPool:
    """At most `num_threads` calls run, and at most `max_waiting` wait. For one kind of work."""

    def __init__(
        self,
        name: str,
        *,
        num_threads: int,
        max_waiting: int,
        on_start: Callable[[], None] = lambda: None,
    ) -> None:
        """`name` is what callers are told that they would wait for, and the threads' name. Each
        thread calls `on_start` before its first call.
        """
        self._name = name
        self._num_threads, self._max_waiting = num_threads, max_waiting
        self._on_start = on_start
        self._waiting: deque[_Job] = deque()
        self._changed = threading.Condition()
        self._num_alive = self._num_idle = self._num_running = 0
        self._moved_at = time.monotonic()
        """When a call was last begun."""

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def is_full(self) -> bool:
        """True when one more call would be refused. A call that a free thread is about to take
        does not count as waiting.
        """
        num_free = self._num_threads - self._num_running
        return len(self._waiting) - num_free >= self._max_waiting

    def is_stuck(self, seconds: float) -> bool:
        """True when calls wait and none was begun for so long."""
        return bool(self._waiting) and time.monotonic() - self._moved_at > seconds

    async def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call in a thread and return the result. Cancelled while it waits, it is never called.

        Raises Overloaded when too many calls wait already, and whatever the function raises.
        """
        job = _Job(partial(copy_context().run, function, *args, **kwargs), Future())
        self._put(job)
        try:
            return await asyncio.wrap_future(job.done)
        except asyncio.CancelledError:
            with self._changed:
                if job in self._waiting:
                    self._waiting.remove(job)
            raise

    def _put(self, job: _Job) -> None:
        with self._changed:
            if self.is_full():
                raise Overloaded(
                    f"{len(self._waiting)} calls wait for {self._name} already; try again later"
                )
            if not self._waiting:
                self._moved_at = time.monotonic()
            self._waiting.append(job)
            if self._num_idle >= len(self._waiting):
                self._changed.notify()
            elif self._num_alive < self._num_threads:
                self._num_alive += 1
                threading.Thread(target=self._work, name=self._name, daemon=True).start()

    def _work(self) -> None:
        self._on_start()
        while (job := self._next()) is not None:
            if job.done.set_running_or_notify_cancel():
                self._do(job)
            del job  # nothing of it is kept while the thread waits for the next one
            with self._changed:
                self._num_running -= 1

    def _do(self, job: _Job) -> None:
        try:
            job.done.set_result(job.function())
        except Exception as error:
            job.done.set_exception(error)
        except BaseException as error:  # SystemExit is for no thread, and no event loop either
            job.done.set_exception(RuntimeError(f"{error!r} was raised in {self._name}"))

    def _next(self) -> _Job | None:
        """Wait for a job; None when the thread is to end."""
        with self._changed:
            if not self._waiting:
                self._num_idle += 1
                self._changed.wait_for(lambda: self._waiting, timeout=IDLE_S)
                self._num_idle -= 1
            if self._waiting:
                self._moved_at = time.monotonic()
                self._num_running += 1
                return self._waiting.popleft()
            self._num_alive -= 1
            return None

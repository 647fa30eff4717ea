"""The calls that a server runs now, whichever protocol they came by: how many, and how they end."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lora_runtime.errors import Overloaded

MAX_CALLS = 4096
CALLS_PERIOD_S = 0.02
"""How often a stopping server looks whether its calls have ended."""


class Calls:
    """The calls of our own services and of HTTP's API that run now, each in a task of its own.
    Health and reflection are not counted: their streams stay open as long as a client likes.
    """

    def __init__(self, max_running: int = MAX_CALLS) -> None:
        self._max_running = max_running
        self._tasks: set[asyncio.Task[Any]] = set()
        self.is_cut = False

    @contextmanager
    def running(self) -> Iterator[None]:
        """Count the call that the current task runs. Raises Overloaded for one too many."""
        if len(self._tasks) >= self._max_running:
            raise Overloaded(f"{len(self._tasks)} calls are running already; try again later")
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            yield
        finally:
            self._tasks.discard(task)

    async def wait(self, timeout_s: float) -> None:
        """Return when none runs any more, or after `timeout_s`."""
        deadline = time.monotonic() + timeout_s
        while self._tasks and time.monotonic() < deadline:
            await asyncio.sleep(CALLS_PERIOD_S)

    def cut(self) -> None:
        """Have each answer at once that the server is shutting down."""
        self.is_cut = True
        for task in self._tasks:
            task.cancel()

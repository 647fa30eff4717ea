"""Watches an engine from the event loop: is it alive, does it go on, is anything still answered?

A busy engine must show progress: its count of beats moves with every step, command and layer
called, so that a long prefill is no hang. One that stands still for STALL_S is not ready any more,
and is ready again when it moves; one that stands still for `hang_s` counts as hung for good. Time
is counted in the watchdog's own ticks, so that a whole process that was stopped, or a machine that
slept, is no hang of the engine either.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import structlog

from lora_runtime.engine.client import EngineClient
from lora_runtime.errors import Unavailable

TICK_S = 0.25
STALL_S = 4.0
"""Longer than any single layer takes, on a slow CPU too, and short enough for probes to see it."""
MAX_FAILED_IN_A_ROW = 8
"""Requests that end for unforeseen reasons, none answered between: then not the requests, but the
server is at fault."""
RETRY_S = 30.0
"""After so long without another failure it counts as ready again: nothing else can show that it
is, as no traffic comes to a server that is not."""

logger = structlog.get_logger(__name__)


class Watchdog:
    """Says whether an engine is alive and ready, as far as can be told from outside."""

    def __init__(self, engine: EngineClient, *, hang_s: float) -> None:
        self._engine = engine
        self._hang_s = hang_s
        self._num_beats, self._silent_s = -1, 0.0
        self._num_failed, self._since_failure_s = 0, 0.0
        self._was_ready = True

    @property
    def is_alive(self) -> bool:
        """False when the engine has died, or hangs for good."""
        return self._engine.stats().is_alive and self._silent_s < self._hang_s

    @property
    def is_ready(self) -> bool:
        """False also while the engine stands still, and while every request fails."""
        return self._problem() is None

    async def run(self, on_tick: Callable[[], None] = lambda: None) -> None:
        """Watch until the engine is dead or hung, end all its requests, and raise Unavailable."""
        while self.is_alive:
            on_tick()
            self.look(TICK_S)
            await asyncio.sleep(TICK_S)
        error = Unavailable(f"{self._problem()}; start the server again")
        self._engine.abandon(error)
        raise error

    def look(self, elapsed_s: float) -> None:
        """Take in what the engine shows, `elapsed_s` after the last look."""
        stats = self._engine.stats()
        if stats.is_busy and stats.num_beats == self._num_beats:
            self._silent_s += elapsed_s
        else:
            self._num_beats, self._silent_s = stats.num_beats, 0.0
        if stats.num_failed_in_a_row == self._num_failed:
            self._since_failure_s += elapsed_s
        else:
            self._num_failed, self._since_failure_s = stats.num_failed_in_a_row, 0.0
        self._log_change()

    def _problem(self) -> str | None:
        if not self._engine.stats().is_alive:
            return "the engine has died; the log says why"
        if self._silent_s >= min(STALL_S, self._hang_s):
            return f"the engine has made no progress for {self._silent_s:.0f} s"
        if self._num_failed >= MAX_FAILED_IN_A_ROW and self._since_failure_s < RETRY_S:
            return f"the last {self._num_failed} requests failed and none was answered"
        return None

    def _log_change(self) -> None:
        problem = self._problem()
        if (problem is None) != self._was_ready:
            self._was_ready = problem is None
            if problem is None:
                logger.info("the engine is ready again")
            else:
                logger.error("the engine is not ready", reason=problem)

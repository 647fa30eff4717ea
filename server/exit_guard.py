"""Ends a process that has frozen so that neither a Python thread nor a signal handler can end it.

Python's `faulthandler` has a thread in C that needs neither the event loop nor the interpreter's
lock. The guard tells that thread, again and again, to end the process a little later. When the
guard is not called any more, the thread writes every Python thread's traceback to stderr and ends
the process.
"""

from __future__ import annotations

import faulthandler
import time

FROZEN_S = 20.0
"""Seconds without `touch` after which the process ends: its event loop answers no probe and no
signal.
"""
LEAST_S = 0.1
"""Seconds that faulthandler is given at least: it refuses 0."""


class ExitGuard:
    """Without `is_on` it does nothing: a server in somebody else's process must not end that."""

    def __init__(self, *, is_on: bool) -> None:
        self._is_on = is_on
        self._deadline: float | None = None

    def touch(self) -> None:
        """Put the end of the process off by `FROZEN_S`, but not beyond what `limit` has set."""
        if not self._is_on:
            return
        left = FROZEN_S
        if self._deadline is not None:
            left = min(left, max(self._deadline - time.monotonic(), LEAST_S))
        faulthandler.dump_traceback_later(left, exit=True, file=2)

    def limit(self, seconds: float) -> None:
        """From now on the process has `seconds` left at most; its exit code is then 1."""
        deadline = time.monotonic() + seconds
        self._deadline = deadline if self._deadline is None else min(deadline, self._deadline)
        self.touch()

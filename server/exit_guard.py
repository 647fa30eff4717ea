"""Ends the process where nothing in it can any more: no thread of Python's, no signal handler.

Python's `faulthandler` keeps a thread of C that needs neither the event loop nor the interpreter's
lock. It is told ever again to end the process a little later; when that stops, it does, after
writing every thread's traceback to stderr.
"""

from __future__ import annotations

import faulthandler
import time

FROZEN_S = 20.0
"""An event loop that has not run for so long answers no probe and no signal."""
LEAST_S = 0.1


class ExitGuard:
    """Off, it does nothing: a server that shares its process must not end it."""

    def __init__(self, *, is_on: bool) -> None:
        self._is_on = is_on
        self._deadline: float | None = None

    def touch(self) -> None:
        """Put the end of the process off, by `FROZEN_S` or to what `limit` has set."""
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

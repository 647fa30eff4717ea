"""The signals that ask a server to stop."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Callable, Iterator

import structlog

logger = structlog.get_logger(__name__)


class StopSignal:
    """SIGTERM and SIGINT as one awaitable event."""

    def __init__(self, on_request: Callable[[], None] = lambda: None) -> None:
        """`on_request` is called at the first graceful one."""
        self._on_request = on_request
        self.is_graceful = False
        """Until it is set there is nothing to drain: a signal ends the process at once."""
        self._requested = asyncio.Event()

    @contextlib.contextmanager
    def installed(self, loop: asyncio.AbstractEventLoop) -> Iterator[None]:
        """Handle the signals while the context lasts."""
        signals = (signal.SIGTERM, signal.SIGINT)
        for number in signals:
            loop.add_signal_handler(number, self._request, number)
        try:
            yield
        finally:
            for number in signals:
                loop.remove_signal_handler(number)

    @property
    def is_requested(self) -> bool:
        return self._requested.is_set()

    async def wait(self) -> None:
        """Return when the first signal has come."""
        await self._requested.wait()

    def _request(self, number: signal.Signals) -> None:
        if self._requested.is_set() or not self.is_graceful:
            os._exit(128 + number)
        logger.info("stopping", signal=number.name)
        self._on_request()
        self._requested.set()

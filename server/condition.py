"""How a server stands now: what probes, scrapes, routes and the page ask of it."""

from __future__ import annotations

from dataclasses import dataclass

from loramux.server.observability.metrics import Metrics
from loramux.server.page.history import History
from loramux.server.running_calls import Calls
from loramux.server.service import Service
from loramux.server.watchdog import Watchdog


@dataclass(slots=True)
class Condition:
    """What there is of a server now. Its parts are None while the engine is loading."""

    calls: Calls
    """The calls that run, over gRPC and HTTP."""
    watchdog: Watchdog | None = None
    metrics: Metrics | None = None
    service: Service | None = None
    history: History | None = None
    is_open: bool = False
    """Requests are taken."""

    def open_service(self) -> Service | None:
        """Return the service, or None while requests are not taken."""
        return self.service if self.is_open else None

    def is_alive(self) -> bool:
        """Tell whether there is a live engine."""
        return self.watchdog is not None and self.watchdog.is_alive

    def is_ready(self) -> bool:
        """Tell whether requests are taken and likely to be answered."""
        if self.service is None or self.watchdog is None:
            return False
        return self.is_open and self.watchdog.is_ready and not self.service.prompts.is_stuck()

    def render(self, accept: str = "") -> tuple[bytes, str]:
        """Return the page of metrics, empty while loading."""
        return self.metrics.render(accept) if self.metrics else (b"", "text/plain")

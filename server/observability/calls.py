"""Both wires seen from outside: how many calls of what kind come and how they end.

The interceptor and the middleware also keep a caller's trace context for the request's record.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Protocol

TRACE_HEADERS = ("traceparent", "tracestate")
"""Source: https://www.w3.org/TR/trace-context/"""
MAX_TRACE_HEADER = 512
"""Characters of a trace header that is kept; the standard asks for no more."""

trace_headers: ContextVar[Mapping[str, str]] = ContextVar("trace_headers")
"""The trace headers of the call that the current task answers."""


@dataclass(frozen=True, slots=True)
class Rpc:
    """A gRPC method, and its kind as middlewares write it: `unary`, `server_stream` …"""

    kind: str
    service: str
    method: str


class CallObserver(Protocol):
    """Told how calls fare; for metrics."""

    def on_rpc_started(self, rpc: Rpc) -> None:
        """A gRPC call has come in."""

    def on_rpc_handled(self, rpc: Rpc, code: str, seconds: float) -> None:
        """It has ended with the status of that name."""

    def on_http_handled(self, method: str, route: str, status: int, seconds: float) -> None:
        """An HTTP request has ended; `route` is the pattern that its path matched."""


def keep_trace_headers(headers: Iterable[tuple[str, str | bytes]]) -> None:
    """Keep what the headers (lower-case names) say of a trace, for the current task."""
    kept = {
        name: value
        for name, value in headers
        if name in TRACE_HEADERS and isinstance(value, str) and len(value) <= MAX_TRACE_HEADER
    }
    trace_headers.set(kept)

"""Around the HTTP application: counts every request by the route that answers it."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from loramux.server.observability.calls import CallObserver, keep_trace_headers

UNMATCHED = "none"
"""The route of a path that has none: a label for every path that clients make up has no bound."""
GONE = 499
"""The status of a request whose client left, or whose handler failed, before any answer."""

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]


class ObservedHttp:
    """An ASGI application that tells an observer of every request to the one it wraps.

    There is no observer while the base is loading.
    """

    def __init__(self, app: App, observer: Callable[[], CallObserver | None]) -> None:
        self._app = app
        self._observer = observer

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answer a request, or whatever else the server asks of the application."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        keep_trace_headers((k.decode("latin-1"), v.decode("latin-1")) for k, v in scope["headers"])
        begun, status = time.monotonic(), GONE

        async def watched_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, watched_send)
        finally:
            if (observer := self._observer()) is not None:
                seconds = time.monotonic() - begun
                route = getattr(scope.get("route"), "path", UNMATCHED)
                observer.on_http_handled(scope["method"], route, status, seconds)

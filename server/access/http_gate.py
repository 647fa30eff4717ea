"""The gate of the HTTP port: no route is reached without a caller, but for the open paths."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, TypeAlias

from server.access.caller import ANONYMOUS

Scope: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send: TypeAlias = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App: TypeAlias = Callable[[Scope, Receive, Send], Awaitable[None]]


class HttpGate:
    """ASGI middleware around the whole app. A route asks `request.state.caller` who calls."""

    def __init__(self, app: App) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request run as its caller."""
        scope.setdefault("state", {})["caller"] = ANONYMOUS
        await self._app(scope, receive, send)

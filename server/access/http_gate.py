"""The gate of the HTTP port: no route is reached without a caller, but for the open paths."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, MutableMapping
from http import HTTPStatus
from typing import Any, TypeAlias

from lora_runtime.errors import LoramuxError, PermissionDenied, Unauthenticated
from loramux.server.access.audit import log_refusal, log_stranger
from loramux.server.access.caller import Caller
from loramux.server.access.gate import Gate
from loramux.server.access.names import Names
from loramux.server.errors import http_error

OPEN_PATHS = frozenset({"/", "/health", "/healthz", "/readyz"})
OPEN_FOLDER = "/page/"
OPEN_SUFFIXES = (".css", ".js", ".svg")
"""Probes, and the files of the status page, which hold nothing of this server."""
USER_PATHS = frozenset({"/tokenize", "/detokenize", "/version", "/openapi.json"})
USER_FOLDERS = ("/v1/", "/api/")
"""What every key is for; all the rest, as /metrics, takes an operator's for all adapters. What
changes something there asks the caller's role once more, in the service.
"""
CERTIFICATE = "certificate"
"""Names in the client's certificate, in the state of a connection."""

ANY_NAME = Names()

Scope: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send: TypeAlias = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App: TypeAlias = Callable[[Scope, Receive, Send], Awaitable[None]]


class HttpGate:
    """ASGI middleware around the whole app. A route asks `request.state.caller` who calls."""

    def __init__(self, app: App, gate: Gate, names: Names = ANY_NAME) -> None:
        """`names` guard a server without keys; see `Names`."""
        self._app = app
        self._gate = gate
        self._names = names

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request run as its caller, or answer that it may not; its body is not read then."""
        path = scope["path"]
        if not is_open(path):
            try:
                scope.setdefault("state", {})["caller"] = self._caller(scope)
            except (Unauthenticated, PermissionDenied) as error:
                await _refuse(error, send)
                return
        await self._app(scope, receive, send)

    def _caller(self, scope: Scope) -> Caller:
        path, (host, port) = scope["path"], scope.get("client") or ("", 0)
        action, peer = f"{scope['method']} {path}", f"{host}:{port}"
        given = _values(scope, b"authorization")
        names = scope.get("state", {}).get(CERTIFICATE, ())
        try:
            caller = self._gate.caller(given, names, peer)
        except Unauthenticated as error:
            log_stranger(peer, action, error)
            raise
        try:
            if self._gate.keys is None:
                self._names.check(_values(scope, b"host"), _values(scope, b"origin"))
            if path not in USER_PATHS and not path.startswith(USER_FOLDERS):
                caller.check_over_all()
        except PermissionDenied as error:
            log_refusal(caller, action, error)
            raise
        return caller


def _values(scope: Scope, header: bytes) -> list[str]:
    return [value.decode("latin-1") for name, value in scope["headers"] if name == header]


def is_open(path: str) -> bool:
    """Tell whether a path may be asked for without a key."""
    return path in OPEN_PATHS or (path.startswith(OPEN_FOLDER) and path.endswith(OPEN_SUFFIXES))


async def _refuse(error: LoramuxError, send: Send) -> None:
    """Answer in the shape in which OpenAI's API refuses."""
    status, body = http_error(error)
    headers = [(b"content-type", b"application/json")]
    if status == HTTPStatus.UNAUTHORIZED:
        headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": json.dumps(body).encode()})

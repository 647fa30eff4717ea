"""The HTTP server: uvicorn with our signal handling and TLS, around any application."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass

import uvicorn

from loramux.server.access.tls import Tls
from loramux.server.http_connection import HttpConnection
from loramux.server.observability.http_calls import App

HTTP_STOP_S = 1.0


class HttpServer(uvicorn.Server):
    """uvicorn without its signal handling; `StopSignal` has that."""

    def __init__(self, app: App, tls: Tls | None = None) -> None:
        config = uvicorn.Config(
            app,
            http=HttpConnection,
            ws="none",
            log_config=None,
            access_log=False,
            lifespan="off",
            timeout_graceful_shutdown=1,
        )
        config.load()  # else it would make its own ssl of the files that it knows
        config.ssl = tls.http_context() if tls else None
        super().__init__(config)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave the process's signals alone."""
        yield


@dataclass(frozen=True, slots=True)
class RunningHttp:
    """The HTTP server and the address it listens on."""

    task: asyncio.Task[None]
    port: int


@contextlib.asynccontextmanager
async def serving_http(
    app: App, listener: socket.socket, tls: Tls | None
) -> AsyncIterator[RunningHttp]:
    """Answer requests that come to a listening socket while the context lasts."""
    server = HttpServer(app, tls)
    task = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        yield RunningHttp(task, listener.getsockname()[1])
    finally:
        server.should_exit = True
        await asyncio.wait([task], timeout=HTTP_STOP_S)

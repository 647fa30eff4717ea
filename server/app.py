"""The composition root: builds every part of the server, runs them, and stops them in order.

Stopping: not ready, no new calls, running ones drain, the engine closes, HTTP goes last.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import structlog
import uvicorn
from starlette.applications import Starlette

from lora_runtime.base.catalog import cache_folder
from lora_runtime.config import EngineConfig
from lora_runtime.engine.client import EngineClient
from lora_runtime.engine.loop import start_engine
from lora_runtime.errors import ConfigError, Unavailable
from lora_runtime.text.text_workers import TextWorkers
from lora_runtime.text.tokenizer import Tokenizer
from server.config import ServerConfig, split_address
from server.grpc_server import start_grpc
from server.http_gateway import build_http_app
from server.metrics import Metrics
from server.registry import Registry
from server.service import Service
from server.sources import Sources
from server.uploads import AdapterStore

WATCH_INTERVAL_S = 0.5
FAILURE_GRACE_S = 1.0
"""What streams get to receive their error when a part of the server has failed."""

logger = structlog.get_logger(__name__)


class LocalEngine(EngineClient, Protocol):
    """An engine in this process; `base_folder` holds the tokenizer's files."""

    @property
    def base_folder(self) -> Path: ...


class EngineStarter(Protocol):
    """Builds and starts an engine; may take minutes, so it runs in a thread."""

    def __call__(
        self, config: EngineConfig, *, on_progress: Callable[[str], None] | None = None
    ) -> LocalEngine: ...


@dataclass(frozen=True, slots=True)
class Ports:
    """Where a server that is ready listens."""

    grpc: int
    http: int


async def serve(
    config: ServerConfig,
    *,
    start: EngineStarter = start_engine,
    on_ready: Callable[[Ports], None] | None = None,
) -> None:
    """Serve until SIGTERM or SIGINT; a second signal ends the process at once.

    Raises ConfigError, BaseRefused, or Unavailable when the engine dies.
    """
    stop = StopSignal()
    with stop.installed(asyncio.get_running_loop()):
        engine_config = config.to_engine_config()
        engine = await asyncio.to_thread(start, engine_config, on_progress=_log_progress)
        stop.is_graceful = True
        await _serve_engine(config, engine, stop, on_ready)
    logger.info("stopped")


class StopSignal:
    """SIGTERM and SIGINT as one awaitable event."""

    def __init__(self) -> None:
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
        self._requested.set()


class HttpServer(uvicorn.Server):
    """uvicorn without its signal handling; `StopSignal` has that."""

    def __init__(self, app: Starlette) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                log_config=None,
                access_log=False,
                lifespan="off",
                timeout_graceful_shutdown=1,
            )
        )

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave the process's signals alone."""
        yield


async def _serve_engine(
    config: ServerConfig,
    engine: LocalEngine,
    stop: StopSignal,
    on_ready: Callable[[Ports], None] | None,
) -> None:
    base_name = engine.info.base.name
    metrics = Metrics(engine)
    registry = Registry(engine=engine, observer=metrics, base_name=base_name)
    store = AdapterStore(
        config.adapter_store or cache_folder() / "uploads", config.max_upload_bytes
    )
    own_text = TextWorkers(engine.base_folder, engine.info.base.vocab_size)
    try:
        service = Service(
            engine=engine,
            tokenizer=await asyncio.to_thread(Tokenizer.load, engine.base_folder),
            own_text=own_text,
            registry=registry,
            sources=Sources((*config.adapter_roots, store.root)),
            store=store,
            observer=metrics,
            base_name=base_name,
        )
        await _run(config, service, metrics, stop, on_ready)
    finally:
        own_text.close()
        await engine.close(drain_s=0)
        await registry.close()


async def _run(
    config: ServerConfig,
    service: Service,
    metrics: Metrics,
    stop: StopSignal,
    on_ready: Callable[[Ports], None] | None,
) -> None:
    """Run gRPC and HTTP until a signal, or until one part fails; then stop them all."""
    ready = asyncio.Event()
    app = build_http_app(metrics=metrics, is_alive=service.is_alive, is_ready=ready.is_set)
    http_server = HttpServer(app)
    with _listen(config.http_address) as listener:
        grpc_server = await start_grpc(service, config.grpc_address)
        parts = [
            asyncio.create_task(http_server.serve(sockets=[listener])),
            asyncio.create_task(grpc_server.wait()),
            asyncio.create_task(_until_dead(service)),
            asyncio.create_task(stop.wait()),
        ]
        ready.set()
        _announce(Ports(grpc=grpc_server.port, http=listener.getsockname()[1]), on_ready)
        try:
            await asyncio.wait(parts, return_when=asyncio.FIRST_COMPLETED)
        finally:
            ready.clear()
            await grpc_server.stop(config.drain_s if stop.is_requested else FAILURE_GRACE_S)
            http_server.should_exit = True
            await _end(parts)


async def _end(parts: list[asyncio.Task[None]]) -> None:
    """Wait for the servers, cancel the watchers, and raise what the first failed part raised."""
    servers, watchers = parts[:2], parts[2:]
    await asyncio.wait(servers)
    for watcher in watchers:
        watcher.cancel()
    outcomes = await asyncio.gather(*parts, return_exceptions=True)
    for outcome in outcomes:
        if isinstance(outcome, Exception):
            raise outcome


async def _until_dead(service: Service) -> None:
    while service.is_alive():
        await asyncio.sleep(WATCH_INTERVAL_S)
    raise Unavailable("the engine has died; the log says why. Start the server again")


def _listen(address: str) -> socket.socket:
    host, port = split_address(address)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise ConfigError(
            f"cannot listen on {address}: {error.strerror}; choose another http_address",
            field="http_address",
        ) from None


def _announce(ports: Ports, on_ready: Callable[[Ports], None] | None) -> None:
    logger.info("ready", grpc_port=ports.grpc, http_port=ports.http)
    if on_ready is not None:
        on_ready(ports)


def _log_progress(step: str) -> None:
    logger.info(step)

"""The composition root: builds every part of the server, runs them, and stops them in order.

HTTP comes first and answers probes with 503 until the server is ready.
Stopping: not ready, no new calls, running ones drain, the engine closes, HTTP goes last.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import socket
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass
from ipaddress import ip_network
from pathlib import Path
from typing import Protocol

import structlog

from lora_runtime.adapters.files.file_names import REQUIRED_FILES
from lora_runtime.base.catalog import cache_folder
from lora_runtime.config import EngineConfig
from lora_runtime.engine.client import EngineClient
from lora_runtime.engine.loop import start_engine
from lora_runtime.errors import AdapterSourceRefused, BaseRefused, ConfigError
from lora_runtime.shortages import allow_open_files
from lora_runtime.text.chat_output import Parsers
from lora_runtime.text.text_workers import TextWorkers
from lora_runtime.text.tokenizer import Tokenizer
from loramux.server.access.http_gate import HttpGate
from loramux.server.adapters.changes import NameChanges
from loramux.server.adapters.loads import Loads
from loramux.server.adapters.names import NameStore, claimed
from loramux.server.adapters.registry import Registry
from loramux.server.adapters.sources import Sources
from loramux.server.adapters.sources.remote import FetchLimits, RemoteSources
from loramux.server.adapters.uploads import AdapterStore
from loramux.server.addresses import check_free, listen
from loramux.server.condition import Condition
from loramux.server.config import ServerConfig
from loramux.server.doors import Doors, open_doors
from loramux.server.exit_guard import ExitGuard
from loramux.server.fields import adapter_name
from loramux.server.http_gateway import build_http_app
from loramux.server.http_server import RunningHttp, serving_http
from loramux.server.observability.http_calls import ObservedHttp
from loramux.server.observability.metrics import Metrics
from loramux.server.observability.observers import Observers
from loramux.server.observability.records import RequestWatcher
from loramux.server.observability.request_log import RequestLog
from loramux.server.observability.tracing import Tracing, span_exporter
from loramux.server.openai.boundary import Backend
from loramux.server.openai.routes import routes as openai_routes
from loramux.server.page.history import History
from loramux.server.page.routes import routes as page_routes
from loramux.server.rpc.server import start_grpc
from loramux.server.running_calls import Calls
from loramux.server.service import Service, build_service
from loramux.server.stop_signal import StopSignal
from loramux.server.watchdog import Watchdog

FAILURE_GRACE_S = 1.0
"""Seconds in which streams receive their error when a part of the server has failed."""
REFUSED_EXIT_S = 60.0
"""An ordinary mistake needs no tracebacks, however slowly a busy machine lets go of torch."""
EXIT_S = 4.0
"""Seconds that the process has to end after the drain; 5 are promised, on a busy machine too."""

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


def run(config: ServerConfig) -> None:
    """Serve in this process, whose only task it is, until SIGTERM or SIGINT.

    The process ends within seconds after that, or after the engine has died, whatever still runs
    in it. Raises as `serve`.
    """
    guard = ExitGuard(is_on=True)
    allow_open_files()
    left_s = EXIT_S
    try:
        asyncio.run(serve(config, guard=guard, on_ready=_set_objects_aside))
    except (ConfigError, BaseRefused):
        left_s = REFUSED_EXIT_S
        raise
    finally:
        guard.limit(left_s)
    # All is closed; the interpreter would take seconds to take torch apart on a busy machine.
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _set_objects_aside(_: Ports) -> None:
    """From now on no collection of garbage, which stops every thread, looks through what the start
    has left: with its imports half a million objects, which took a quarter of a second.
    """
    gc.collect()
    gc.freeze()


async def serve(
    config: ServerConfig,
    *,
    start: EngineStarter = start_engine,
    on_ready: Callable[[Ports], None] | None = None,
    guard: ExitGuard | None = None,
) -> None:
    """Serve until SIGTERM or SIGINT; a second signal ends the process at once.

    Raises ConfigError, BaseRefused, or Unavailable when the engine dies or hangs.
    """
    for name, source in config.adapter.items():
        _check_named(name, source)
    guard = guard or ExitGuard(is_on=False)
    stop = StopSignal(lambda: guard.limit(config.drain_s + EXIT_S))
    condition = Condition(Calls(config.max_concurrent_calls))
    doors = open_doors(config)
    with _claimed(config) as listener, stop.installed(asyncio.get_running_loop()):
        async with (
            doors.kept_current(),
            _watchers(config) as watchers,
            serving_http(_http_app(condition, doors), listener, doors.tls) as http,
        ):
            engine = await asyncio.to_thread(start, config, on_progress=_log_progress)
            stop.is_graceful = True
            announce = Announcement(http.port, on_ready)
            await _serve_engine(
                config, engine, stop, condition, doors, http, watchers, announce, guard
            )
    logger.info("stopped")


def _check_named(name: str, source: Path | str) -> None:
    """Find what cannot be an adapter's folder before the base is loaded, which may take minutes."""
    adapter_name(name, "adapter")
    if not isinstance(source, Path):
        return  # elsewhere, and its text was checked with the settings
    for file in REQUIRED_FILES:
        if not (source / file).is_file():
            raise AdapterSourceRefused(
                f"adapter.{name}: {source} has no file {file}; name the folder of a PEFT adapter",
                field=f"adapter.{name}",
            )


@contextlib.contextmanager
def _claimed(config: ServerConfig) -> Iterator[socket.socket]:
    """Give what HTTP listens on. What another server has is found here, before the base is loaded,
    which may take minutes: both addresses, and a chosen folder of adapters. gRPC's is bound when it
    serves.
    """
    with contextlib.ExitStack() as held:
        listener = held.enter_context(listen(config.http_address, "http_address"))
        check_free(config.grpc_address, "grpc_address")
        if config.adapter_store is not None:
            key = f"{config.base.model} {config.base.quantization}"
            held.enter_context(claimed(config.adapter_store, key))
        yield listener


def _http_app(condition: Condition, doors: Doors) -> ObservedHttp:
    """All that HTTP answers: probes and scrapes, before there is an engine too, API and page."""
    app = build_http_app(
        metrics=condition,
        is_alive=condition.is_alive,
        is_ready=condition.is_ready,
        routes=[
            *page_routes(condition),
            *openai_routes(Backend(condition.open_service, condition.calls)),
        ],
    )
    return ObservedHttp(HttpGate(app, doors.gate, doors.names), lambda: condition.metrics)


async def _serve_engine(
    config: ServerConfig,
    engine: LocalEngine,
    stop: StopSignal,
    condition: Condition,
    doors: Doors,
    http: RunningHttp,
    watchers: Sequence[RequestWatcher],
    announce: Announcement,
    guard: ExitGuard,
) -> None:
    base_name = engine.info.base.name
    condition.metrics = metrics = Metrics(engine)
    condition.history = history = History(engine)
    observer = Observers(metrics, history)
    condition.watchdog = Watchdog(engine, hang_s=config.engine_timeout_s)
    folder = config.adapter_store or cache_folder() / "uploads"
    store = AdapterStore(folder, config.max_upload_bytes, config.max_store_bytes)
    own_text = TextWorkers(engine.base_folder, engine.info.base.vocab_size)
    watching = asyncio.create_task(condition.watchdog.run(guard.touch))
    sampling = asyncio.create_task(history.run())
    changes = service = stopping = loading = None
    try:
        names = await asyncio.to_thread(_open_names, config, folder, engine)
        registry = Registry(engine, base_name, names)
        changes = NameChanges(engine, registry, observer)
        service = await _service(
            config, engine, own_text, registry, changes, store, observer, watchers
        )
        stopping = asyncio.create_task(stop.wait())
        loading = asyncio.create_task(_load_adapters(config, service.loads))
        parts = [http.task, watching, stopping]
        await _wait_for_adapters(config, loading, parts)
        await _run(config, service, condition, doors, parts, stop, announce)
    finally:
        guard.limit(config.drain_s + EXIT_S if stop.is_requested else EXIT_S)
        for task in (watching, sampling, stopping, loading):
            if task is not None:
                task.cancel()
        if service is not None:
            await service.close()
        own_text.close()
        await engine.close(drain_s=0)
        if changes is not None:
            await changes.close()


async def _service(
    config: ServerConfig,
    engine: LocalEngine,
    own_text: TextWorkers,
    registry: Registry,
    changes: NameChanges,
    store: AdapterStore,
    observer: Observers,
    watchers: Sequence[RequestWatcher],
) -> Service:
    service = build_service(
        engine=engine,
        tokenizer=await asyncio.to_thread(Tokenizer.load, engine.base_folder),
        own_text=own_text,
        registry=registry,
        changes=changes,
        sources=Sources((*config.adapter_roots, store.root)),
        store=store,
        observer=observer,
        base_name=engine.info.base.name,
        parsers=Parsers(config.tool_call_parser, config.reasoning_parser),
        watchers=watchers,
        remote=_remote_sources(config, store),
        on_demand=config.adapter_on_demand,
    )
    await asyncio.to_thread(service.generation.prepare)
    return service


def _remote_sources(config: ServerConfig, store: AdapterStore) -> RemoteSources:
    return RemoteSources(
        store,
        config.adapter_sources,
        named=map(str, (*config.adapter.values(), *config.adapter_on_demand.values())),
        networks=map(ip_network, config.adapter_source_networks),
        limits=FetchLimits(
            idle_s=config.adapter_fetch_idle_s, total_s=config.adapter_fetch_timeout_s
        ),
    )


@contextlib.asynccontextmanager
async def _watchers(config: ServerConfig) -> AsyncIterator[Sequence[RequestWatcher]]:
    """Who is told of requests that end. Traces come first: the log's lines name them."""
    exporter = span_exporter(config.otlp_endpoint)
    log = [RequestLog()] if config.log_requests else []
    if exporter is None:
        yield log
        return
    tracing = Tracing(exporter)
    try:
        yield [tracing, *log]
    finally:
        await tracing.close()


def _open_names(config: ServerConfig, folder: Path, engine: EngineClient) -> NameStore | None:
    """A folder that nobody chose may be another server's, or not writable: then there is no memory
    of names, and the log says so.
    """
    try:
        return NameStore(folder, engine.info.base.fingerprint)
    except ConfigError as error:
        if config.adapter_store is not None:
            raise
        logger.warning("names of adapters are not kept over a restart", reason=error.message)
        return None


async def _load_adapters(config: ServerConfig, loads: Loads) -> None:
    """Load what the names held, then what the operator named. Raises what the latter raises."""
    await loads.restore(config.adapter)
    for name, source in config.adapter.items():
        await loads.preload(name, source)


async def _wait_for_adapters(
    config: ServerConfig, loading: asyncio.Task[None], parts: list[asyncio.Task[None]]
) -> None:
    """Return when they are loaded or one part ends, or at once if nobody is to wait for them."""
    if not config.wait_for_adapters:
        loading.add_done_callback(_log_failure)
        return
    await asyncio.wait([loading, *parts], return_when=asyncio.FIRST_COMPLETED)
    if loading.done():
        loading.result()


async def _run(
    config: ServerConfig,
    service: Service,
    condition: Condition,
    doors: Doors,
    parts: list[asyncio.Task[None]],
    stop: StopSignal,
    announce: Announcement,
) -> None:
    """Run gRPC until a signal, or until one part fails; then stop it and raise what failed."""
    if any(part.done() for part in parts):
        return _raise_failures(parts)
    grpc_server = await start_grpc(
        service,
        config.grpc_address,
        gate=doors.gate,
        credentials=doors.tls.grpc_credentials() if doors.tls else None,
        calls=condition.calls,
        max_connection_age_s=config.max_connection_age_s,
        is_serving=condition.is_ready,
        observer=condition.metrics,
    )
    condition.service, condition.is_open = service, True
    await grpc_server.show_health()
    announce.ready(grpc_server.port)
    serving = asyncio.create_task(grpc_server.wait())
    try:
        await asyncio.wait([serving, *parts], return_when=asyncio.FIRST_COMPLETED)
    finally:
        condition.is_open = False
        await grpc_server.stop(config.drain_s if stop.is_requested else FAILURE_GRACE_S)
        serving.cancel()
    _raise_failures(parts)


def _raise_failures(parts: list[asyncio.Task[None]]) -> None:
    for part in parts:
        if part.done():
            part.result()


@dataclass(frozen=True, slots=True)
class Announcement:
    """Says where the server listens once it is ready."""

    http_port: int
    on_ready: Callable[[Ports], None] | None

    def ready(self, grpc_port: int) -> None:
        """Tell who wants to know, and log it."""
        if self.on_ready is not None:
            self.on_ready(Ports(grpc=grpc_port, http=self.http_port))
        logger.info("ready", grpc_port=grpc_port, http_port=self.http_port)


def _log_failure(loading: asyncio.Task[None]) -> None:
    if not loading.cancelled() and loading.exception() is not None:
        logger.error("an adapter named at the start was not loaded", exc_info=loading.exception())


def _log_progress(step: str) -> None:
    logger.info(step)

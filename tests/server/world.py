"""A whole server over a real socket, around a scripted engine."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc

from loramux.server.access.gate import OPEN_GATE, Gate
from loramux.server.adapters.changes import NameChanges
from loramux.server.adapters.registry import Registry
from loramux.server.adapters.sources import Sources
from loramux.server.adapters.uploads import AdapterStore
from loramux.server.client import AsyncClient, Client
from loramux.server.client.channel import Stubs
from loramux.server.observability.records import RequestWatcher
from loramux.server.rpc.server import GrpcServer, start_grpc
from loramux.server.service import Service, build_service
from tests.fakes import ByteTokenizer, FormatText, ScriptedEngine

MAX_UPLOAD_BYTES = 4 << 20


@dataclass
class RecordingObserver:
    """Keeps every call as (name, arguments); a request is named by its adapters."""

    calls: list[tuple[str, tuple[Any, ...]]] = field(default_factory=list)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if not name.startswith("on_"):
            raise AttributeError(name)
        return lambda *args: self.calls.append((name, args)) or args[0]

    def of(self, name: str) -> list[tuple[Any, ...]]:
        return [args for called, args in self.calls if called == name]


@dataclass
class World:
    """A running server and its parts."""

    engine: ScriptedEngine
    service: Service
    registry: Registry
    observer: RecordingObserver
    server: GrpcServer
    client: AsyncClient
    root: Path
    """The one folder adapters may be loaded from."""

    @property
    def target(self) -> str:
        return f"127.0.0.1:{self.server.port}"

    def write_adapter(self, folder: str, content: str, **facts: Any) -> str:
        """Write an adapter's files, return its source; `facts`: of AdapterFacts, and num_layers."""
        path = self.root / folder
        path.mkdir(parents=True, exist_ok=True)
        (path / "adapter_config.json").write_text(json.dumps(facts))
        (path / "adapter_model.safetensors").write_text(content)
        return folder

    async def load(self, name: str, content: str, *, replace: bool = False, **facts: Any) -> Any:
        source = self.write_adapter(f"{name}-{abs(hash(content))}", content, **facts)
        return await self.client.load_adapter(name, source, replace=replace)


@asynccontextmanager
async def serving(
    folder: Path,
    watchers: Sequence[RequestWatcher] = (),
    *,
    gate: Gate = OPEN_GATE,
    api_key: str | None = None,
    credentials: grpc.ServerCredentials | None = None,
    **engine_options: Any,
) -> AsyncIterator[World]:
    """Run a server whose adapter root lies in `folder`; `api_key` is the client's."""
    root = folder / "allowed" / "adapters"
    root.mkdir(parents=True, exist_ok=True)
    engine, observer = ScriptedEngine(**engine_options), RecordingObserver()
    registry = Registry(engine, "tiny")
    changes = NameChanges(engine, registry, observer)
    store = AdapterStore(folder / "store", MAX_UPLOAD_BYTES)
    service = build_service(
        engine=engine,
        tokenizer=ByteTokenizer(),
        own_text=FormatText(),
        registry=registry,
        changes=changes,
        sources=Sources([root, store.root]),
        store=store,
        observer=observer,
        base_name="tiny",
        watchers=watchers,
    )
    server = await start_grpc(
        service, "127.0.0.1:0", gate=gate, observer=RecordingObserver(), credentials=credentials
    )
    try:
        async with AsyncClient(f"127.0.0.1:{server.port}", api_key=api_key) as client:
            yield World(engine, service, registry, observer, server, client, root)
    finally:
        await server.stop(0)
        await service.close()
        await changes.close()


async def until(condition: Callable[[], bool], timeout_s: float = 5.0) -> None:
    """Wait until a condition holds; fails when it never does."""
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.002)


@asynccontextmanager
async def stubs_of(world: World, **options):
    async with grpc.aio.insecure_channel(world.target, **options) as channel:
        yield Stubs(channel)


async def in_thread(world: World, use) -> None:
    """Run `use(client)` with a blocking client while the server's loop goes on."""

    def body() -> None:
        with Client(world.target) as client:
            use(client)

    await asyncio.to_thread(body)

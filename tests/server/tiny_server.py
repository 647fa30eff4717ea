"""A whole server in this process, over a tiny base and adapters of the real peft."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from pathlib import Path

from lora_runtime.config import AdapterConfig, BaseConfig, CacheConfig, EngineConfig
from lora_runtime.config import SchedulerConfig as Limits
from lora_runtime.engine.loop import start_engine
from lora_runtime.text.text_workers import TextWorkers
from lora_runtime.text.tokenizer import Tokenizer
from loramux.server.access.gate import OPEN_GATE, Gate
from loramux.server.adapters.changes import NameChanges
from loramux.server.adapters.registry import Registry
from loramux.server.adapters.sources import Sources
from loramux.server.adapters.uploads import AdapterStore
from loramux.server.client import AsyncClient
from loramux.server.rpc.server import start_grpc
from loramux.server.service import Service, build_service
from tests.peft_adapters import write_adapter
from tests.server.world import RecordingObserver
from tests.tiny import tiny_checkpoint, tiny_model
from tests.tiny_tokenizer import write_tokenizer

NUM_ADAPTERS = 8

CONFIG = EngineConfig(
    cache=CacheConfig(num_blocks=600),
    scheduler=Limits(max_num_seqs=48, max_num_batched_tokens=256),
    adapters=AdapterConfig(pool_bytes=1 << 20, max_slots=6),
)


def write_folder(folder: Path) -> Path:
    """Write base/ and adapters/a0 … a7, ranks 2 to 9, into `folder`."""
    write_tokenizer(tiny_checkpoint(folder / "base"))
    model = tiny_model("llama")
    for index in range(NUM_ADAPTERS):
        write_adapter(model, folder / "adapters" / f"a{index}", seed=index, r=2 + index)
    return folder


@asynccontextmanager
async def running(folder: Path, gate: Gate = OPEN_GATE, api_key: str | None = None):
    """A server over `folder` and a client of it; the engine must end with everything freed."""
    async with (
        running_service(folder) as (service, engine),
        serving_grpc(service, gate, api_key) as client,
    ):
        yield client, engine


@asynccontextmanager
async def serving_grpc(service: Service, gate: Gate = OPEN_GATE, api_key: str | None = None):
    """A client of a server of gRPC over a service."""
    server = await start_grpc(service, "127.0.0.1:0", gate=gate)
    try:
        async with AsyncClient(f"127.0.0.1:{server.port}", api_key=api_key) as client:
            yield client
    finally:
        await server.stop(1.0)


@asynccontextmanager
async def running_service(folder: Path, **base_options):
    """A service over `folder` and its engine, which must end with everything freed."""
    base = BaseConfig(model=str(folder / "base"), dtype="float32", device="cpu", **base_options)
    config = EngineConfig(
        base=base, cache=CONFIG.cache, scheduler=CONFIG.scheduler, adapters=CONFIG.adapters
    )
    engine = await asyncio.to_thread(start_engine, config)
    observer = RecordingObserver()
    registry = Registry(engine, "tiny")
    changes = NameChanges(engine, registry, observer)
    own_text = TextWorkers(folder / "base", engine.info.base.vocab_size)
    service = build_service(
        engine=engine,
        tokenizer=Tokenizer.load(folder / "base"),
        own_text=own_text,
        registry=registry,
        changes=changes,
        sources=Sources([folder / "adapters"]),
        store=AdapterStore(folder / "store", 8 << 20),
        observer=observer,
        base_name="tiny",
    )
    try:
        yield service, engine
        stats = engine.stats()
        assert stats.is_alive and stats.num_running == stats.num_waiting == 0
        assert stats.kv_blocks_used == 0
    finally:
        own_text.close()
        await service.close()
        await engine.close(drain_s=5)
        await changes.close()

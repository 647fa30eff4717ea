from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import httpx
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from lora_runtime.adapters.files.file_names import REQUIRED_FILES
from lora_runtime.errors import (
    AdapterRefused,
    AdapterSourceRefused,
    BaseRefused,
    ConfigError,
    LoramuxError,
    Unavailable,
)
from loramux.server import app, watchdog
from loramux.server.app import Ports
from loramux.server.client import AsyncClient
from loramux.server.config import load_config
from loramux.server.errors import from_rpc_error
from loramux.v1 import adapters_pb2, adapters_pb2_grpc
from tests.fakes import ScriptedEngine
from tests.server.world import until
from tests.tiny_tokenizer import write_tokenizer

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
PROBES = ("/healthz", "/readyz")


class LocalEngine(ScriptedEngine):
    """A scripted engine that a server can start and close."""

    def __init__(self, base_folder: Path) -> None:
        super().__init__()
        self.base_folder = base_folder
        self.num_started = self.num_closed = 0

    def start(self, *_, **__) -> LocalEngine:
        self.num_started += 1
        return self

    async def close(self, *, drain_s: float) -> None:
        self.num_closed += 1


class Running:
    """A server in this process, and what a test asks of it."""

    def __init__(self, engine: LocalEngine, task: asyncio.Task, ports: Ports) -> None:
        self.engine = engine
        self.task = task
        self.http = httpx.AsyncClient(base_url=f"http://127.0.0.1:{ports.http}")
        self.target = f"127.0.0.1:{ports.grpc}"
        self.client = AsyncClient(self.target)

    async def status(self, path: str) -> int:
        return (await self.http.get(path)).status_code

    async def start_stream(self, max_tokens: int) -> asyncio.Task:
        async def collect() -> list:
            generation = self.client.generate(token_ids=[5, 6], max_tokens=max_tokens)
            return [event async for event in generation]

        num_seen = len(self.engine.seen)
        stream = asyncio.create_task(collect())
        await until(lambda: len(self.engine.seen) > num_seen)
        return stream


@pytest.fixture
def engine(tmp_path):
    write_tokenizer(tmp_path)
    return LocalEngine(tmp_path)


@asynccontextmanager
async def running(engine: LocalEngine, **flags) -> AsyncIterator[Running]:
    listen = {"grpc_address": "127.0.0.1:0", "http_address": "127.0.0.1:0"}
    listen["adapter_store"] = engine.base_folder / "store"
    ports: asyncio.Future[Ports] = asyncio.get_running_loop().create_future()
    config = load_config(flags={**listen, **flags})
    starting = app.serve(config, start=engine.start, on_ready=ports.set_result)
    task = asyncio.create_task(starting)
    await asyncio.wait([task, ports], return_when=asyncio.FIRST_COMPLETED)
    if not ports.done():
        await task
    server = Running(engine, task, ports.result())
    try:
        async with server.http, server.client:
            yield server
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def send(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)


async def test_both_ports_answer_and_metrics_follow_requests(engine):
    async with running(engine) as server:
        assert await server.status("/healthz") == 200
        assert await server.status("/readyz") == 200
        assert await server.client.is_serving()
        await (await server.start_stream(7))
        page = (await server.http.get("/metrics")).text
        assert 'loramux:generation_tokens_total{adapter=""} 7.0' in page
        assert 'vllm:request_success_total{finished_reason="length",model_name="tiny"} 1.0' in page


@pytest.mark.parametrize("missing", REQUIRED_FILES)
async def test_a_folder_that_is_no_adapter_is_found_before_the_base_is_loaded(engine, missing):
    folder = engine.base_folder / "no-adapter"
    folder.mkdir()
    for file in set(REQUIRED_FILES) - {missing}:
        (folder / file).write_text("x")
    with pytest.raises(
        AdapterSourceRefused, match=f"adapter.pirate: .*no-adapter has no file {missing}"
    ):
        async with running(engine, adapter=[f"pirate={folder}"]):
            pass
    assert engine.num_started == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_drains_and_then_the_server_ends(engine, number):
    async with running(engine) as server:
        engine.gate.clear()
        stream = await server.start_stream(20)
        send(number)
        async with asyncio.timeout(5):
            while await server.status("/readyz") == 200:
                await asyncio.sleep(0.01)
        assert await server.status("/healthz") == 200
        async with AsyncClient(server.target) as late:
            with pytest.raises(Unavailable):
                await late.generate(token_ids=[1], max_tokens=1).text()
        assert not server.task.done()
        engine.gate.set()
        events = await stream
        assert events[-1].finished.usage.output_tokens == 20
        await asyncio.wait_for(server.task, 10)
        assert engine.num_closed == 1


async def test_calls_over_http_drain_as_those_over_grpc(engine):
    async with running(engine) as server:
        engine.gate.clear()
        body = {"model": "tiny", "prompt": "hi", "max_tokens": 20, "ignore_eos": True}
        answer = asyncio.create_task(server.http.post("/v1/completions", json=body))
        await until(lambda: bool(engine.running))
        send(signal.SIGTERM)
        async with asyncio.timeout(5):
            while (late := await server.http.post("/v1/completions", json=body)).status_code != 503:
                await asyncio.sleep(0.01)
        assert late.json()["error"]["code"] == "unavailable"
        assert not server.task.done()
        engine.gate.set()
        assert (await answer).json()["usage"]["completion_tokens"] == 20
        await asyncio.wait_for(server.task, 10)


async def test_what_has_not_ended_when_the_drain_ends_is_cut(engine):
    async with running(engine, drain_s=0.2) as server:
        engine.gate.clear()
        stream = await server.start_stream(20)
        send(signal.SIGTERM)
        await asyncio.wait_for(server.task, 10)
        assert not engine.running
        (outcome,) = await asyncio.gather(stream, return_exceptions=True)
        assert isinstance(outcome, BaseException)


async def test_a_second_signal_ends_the_process_at_once(engine, monkeypatch):
    codes = []
    monkeypatch.setattr(app.os, "_exit", codes.append)
    async with running(engine, drain_s=30) as server:
        engine.gate.clear()
        stream = await server.start_stream(2)
        send(signal.SIGTERM)
        await asyncio.sleep(0.1)
        assert codes == []
        send(signal.SIGTERM)
        await until(lambda: codes == [128 + signal.SIGTERM])
        engine.gate.set()
        await stream
        await asyncio.wait_for(server.task, 10)


async def test_a_signal_before_the_server_is_up_ends_the_process_at_once(engine, monkeypatch):
    codes = []
    monkeypatch.setattr(app.os, "_exit", codes.append)

    def start(*_, **__):
        send(signal.SIGTERM)
        while not codes:
            time.sleep(0.01)
        raise BaseRefused("a process that had ended would not come here")

    with pytest.raises(BaseRefused):
        await app.serve(load_config(), start=start)
    assert codes == [128 + signal.SIGTERM]


async def watch_health(target: str, seen: list[int]) -> None:
    async with grpc.aio.insecure_channel(target) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        with contextlib.suppress(grpc.aio.AioRpcError):
            async for response in stub.Watch(health_pb2.HealthCheckRequest()):
                seen.append(response.status)


async def test_an_open_watch_of_health_does_not_hold_the_stop(engine):
    async with running(engine, drain_s=30) as server:
        seen: list[int] = []
        watching = asyncio.create_task(watch_health(server.target, seen))
        await until(lambda: seen == [SERVING])
        begun = time.monotonic()
        send(signal.SIGTERM)
        await asyncio.wait_for(server.task, 10)
        assert time.monotonic() - begun < 3
        await asyncio.wait_for(watching, 5)
        assert seen == [SERVING, NOT_SERVING]


async def test_what_the_drain_cuts_ends_typed_also_an_upload_that_stands_still(engine, tmp_path):
    async with running(engine, drain_s=0.2, adapter_store=tmp_path / "store") as server:
        engine.gate.clear()
        stream = await server.start_stream(20)

        async def stalled():
            files = [{"name": name, "num_bytes": 1} for name in REQUIRED_FILES]
            yield adapters_pb2.UploadAdapterRequest(start={"name": "x", "files": files})
            await asyncio.sleep(60)

        async with grpc.aio.insecure_channel(server.target) as channel:
            upload = adapters_pb2_grpc.AdapterServiceStub(channel).UploadAdapter(stalled())
            await until(lambda: any((tmp_path / "store").rglob("incoming/*")))
            send(signal.SIGTERM)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await asyncio.wait_for(upload, 10)
            error = from_rpc_error(caught.value)
            assert isinstance(error, Unavailable) and "shutting down" in str(error)
        (outcome,) = await asyncio.gather(stream, return_exceptions=True)
        assert isinstance(outcome, Unavailable) and "shutting down" in str(outcome)
        await asyncio.wait_for(server.task, 10)


async def test_probes_are_503_while_the_engine_is_loading(engine):
    release, answers = threading.Event(), []
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"

    def start(*_, **__):
        release.wait()
        return engine

    store = engine.base_folder / "store"
    flags = {"grpc_address": "127.0.0.1:0", "http_address": address, "adapter_store": store}
    config = load_config(flags=flags)
    ready = asyncio.Event()
    task = asyncio.create_task(app.serve(config, start=start, on_ready=lambda _: ready.set()))
    async with httpx.AsyncClient(base_url=f"http://{address}") as http:
        while not answers:
            await asyncio.sleep(0.02)
            with contextlib.suppress(httpx.ConnectError):
                answers = [(await http.get(path)).status_code for path in PROBES]
        assert answers == [503, 503]
        assert (await http.get("/metrics")).status_code == 200
        release.set()
        await asyncio.wait_for(ready.wait(), 10)
        assert [(await http.get(path)).status_code for path in PROBES] == [200, 200]
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_an_engine_that_stands_still_is_not_ready_and_is_ready_when_it_goes_on(
    engine, monkeypatch
):
    monkeypatch.setattr(watchdog, "STALL_S", 0.5)
    async with running(engine) as server:
        engine.is_busy = True
        seen: list[int] = []
        watching = asyncio.create_task(watch_health(server.target, seen))
        await until(lambda: seen == [SERVING, NOT_SERVING])
        assert await server.status("/readyz") == 503 and await server.status("/healthz") == 200
        engine.num_beats += 1
        await until(lambda: seen == [SERVING, NOT_SERVING, SERVING])
        assert await server.status("/readyz") == 200
        watching.cancel()


async def test_a_hung_engine_ends_streams_typed_and_the_server_with_an_error(engine):
    async with running(engine, engine_timeout_s=0.5) as server:
        engine.gate.clear()
        stream = await server.start_stream(20)
        engine.is_busy = True
        with pytest.raises(Unavailable, match="no progress"):
            await asyncio.wait_for(server.task, 10)
        (outcome,) = await asyncio.gather(stream, return_exceptions=True)
        assert isinstance(outcome, Unavailable) and "no progress" in str(outcome)


async def test_a_signal_while_adapters_are_loaded_again_ends_the_server(engine, monkeypatch):
    async with running(engine) as server:
        path = engine.base_folder / "x"
        path.mkdir()
        for name in REQUIRED_FILES:
            (path / name).write_text("{}")
        await server.client.upload_adapter("x", path)
    again = LocalEngine(engine.base_folder)
    again.load_gate.clear()

    async def interrupt() -> None:
        await until(lambda: again.num_started == 1)
        await asyncio.sleep(0.3)
        send(signal.SIGTERM)

    interrupting = asyncio.create_task(interrupt())
    flags = {"grpc_address": "127.0.0.1:0", "http_address": "127.0.0.1:0"}
    config = load_config(flags={**flags, "adapter_store": engine.base_folder / "store"})
    await asyncio.wait_for(app.serve(config, start=again.start), 5)
    await interrupting
    assert again.num_closed == 1


async def test_a_dead_engine_ends_the_server_with_an_error(engine):
    async with running(engine) as server:
        engine.is_alive = False
        with pytest.raises(Unavailable, match="engine has died"):
            await asyncio.wait_for(server.task, 10)
        assert engine.num_closed == 1


@pytest.mark.parametrize("setting", ["grpc_address", "http_address"])
async def test_an_address_in_use_is_named_and_everything_is_undone(engine, setting):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(ConfigError, match=address) as caught:
            async with running(engine, **{setting: address}):
                pass
    assert caught.value.field == setting
    assert engine.num_closed == engine.num_started


async def test_a_base_that_cannot_be_served_is_reported_as_such():
    def start(*_, **__):
        raise BaseRefused("no such architecture")

    with pytest.raises(BaseRefused, match="no such architecture"):
        await app.serve(load_config(), start=start)


def write_adapter(root: Path, name: str, template: str) -> None:
    (root / name).mkdir(parents=True)
    (root / name / "adapter_config.json").write_text(json.dumps({"chat_template": template}))
    (root / name / "adapter_model.safetensors").write_text(name)


LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
HANGS = "{% if messages[0].content == 'hang' %}" + LOOP + "{% endif %}{{ messages[0].content }}"


async def test_a_template_that_never_ends_holds_up_nothing(engine, tmp_path):
    """Neither health, nor other chats, loads and streams, nor the end of the server."""
    root = tmp_path / "adapters"
    write_adapter(root, "hangs", HANGS)
    write_adapter(root, "upper", "{{ messages[0].content | upper }}")
    write_adapter(root, "power", "{{ 7**60000000 }}")
    async with running(engine, adapter_roots=(root,), drain_s=30) as server:
        for name in ("hangs", "upper"):
            await server.client.load_adapter(name, name)

        async def chat(name: str, content: str) -> str:
            messages = [{"role": "user", "content": content}]
            generation = server.client.generate(messages=messages, adapter=name, max_tokens=1)
            await generation.text()
            return bytes(engine.seen[-1].prompt_token_ids).decode(errors="replace")

        stuck = [asyncio.create_task(chat("hangs", "hang")) for _ in range(8)]
        await asyncio.sleep(0.3)
        assert not any(task.done() for task in stuck)
        begun = time.monotonic()
        for _ in range(5):
            assert await server.status("/healthz") == 200 == await server.status("/readyz")
            await chat("upper", "hi")
        write_adapter(root, "later", "{{ messages[0].content }}?")
        await server.client.load_adapter("later", "later")
        with pytest.raises(AdapterRefused, match="power"):
            await server.client.load_adapter("power", "power")
        assert time.monotonic() - begun < 3
        stuck.append(asyncio.create_task(chat("hangs", "hang")))
        begun = time.monotonic()
        send(signal.SIGTERM)
        await server.task
        assert time.monotonic() - begun < 8
        ended = await asyncio.gather(*stuck, return_exceptions=True)
        assert [end for end in ended if not isinstance(end, LoramuxError)] == []

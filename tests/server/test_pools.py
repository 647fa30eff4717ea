"""Work of one kind that is stuck leaves the other kinds alone, and a full queue says so at once."""

from __future__ import annotations

import asyncio
import threading
import time

import grpc
import pytest

from lora_runtime.adapters.files.file_names import REQUIRED_FILES
from lora_runtime.engine.worker_pool import WorkerPool
from lora_runtime.errors import InvalidRequest, Overloaded
from loramux.server.adapters import uploads
from loramux.server.adapters.sources import Sources
from loramux.server.adapters.uploads import MAX_RUNNING_UPLOADS, Upload
from loramux.server.errors import from_rpc_error
from loramux.server.generation import prompts
from loramux.v1 import adapters_pb2, adapters_pb2_grpc, generation_pb2, generation_pb2_grpc
from tests.fakes import ByteTokenizer
from tests.server.world import until

CHAT = [{"role": "user", "content": "hi"}]
NUM_STUCK = 12
"""More than any pool has threads; asyncio's own had 6 on two cores, for everything."""


@pytest.fixture
def release():
    """Lets go of what is `stuck`, at the latest when the test is over."""
    event = threading.Event()
    yield event
    event.set()


@pytest.fixture
def stuck(monkeypatch, release):
    """Make a method wait until it is let go; gives the list of its calls."""

    def make(owner: type, name: str) -> list:
        original, calls = getattr(owner, name), []

        def waiting(*args, **kwargs):
            calls.append(args)
            release.wait(20)
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, waiting)
        return calls

    return make


async def chat(world, tenant: str = "one") -> str:
    return await world.client.generate(messages=CHAT, max_tokens=2, tenant=tenant).text()


async def load(world, name: str = "loaded") -> object:
    return await world.load(name, f"a{name}")


async def upload(world, name: str = "sent") -> object:
    folder = world.root / world.write_adapter(f"to-send-{name}", f"b{name}")
    return await world.client.upload_adapter(name, folder)


KINDS = {
    "chat": (ByteTokenizer, "apply_chat_template", chat),
    "load": (Sources, "resolve", load),
    "upload": (Upload, "write", upload),
}


@pytest.mark.parametrize("kind", KINDS)
async def test_what_is_stuck_stops_its_own_kind_only(serve, stuck, release, kind):
    owner, method, call = KINDS[kind]
    async with serve() as world:
        calls = stuck(owner, method)
        waiting = [
            asyncio.create_task(call(world) if kind == "chat" else call(world, f"stuck{index}"))
            for index in range(NUM_STUCK)
        ]
        await until(lambda: len(calls) >= 2)
        await asyncio.sleep(0.05)
        for name, (*_, other) in KINDS.items():
            if name != kind:
                await asyncio.wait_for(other(world), 2)
        assert await asyncio.wait_for(
            world.client.generate("text is never behind them", max_tokens=2).text(), 2
        )
        release.set()  # else the server's end waits for them
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)


async def test_waiting_chats_count_as_queued_and_one_more_is_refused_at_once(serve, stuck):
    async with serve(max_queued=8) as world:
        calls = stuck(ByteTokenizer, "apply_chat_template")
        waiting = [asyncio.create_task(chat(world, f"{index % 2}")) for index in range(8)]
        await until(lambda: len(calls) == 4)
        await asyncio.sleep(0.05)
        took = []
        for _ in range(20):
            begun = time.monotonic()
            with pytest.raises(Overloaded, match="8 requests"):
                await chat(world)
            took.append(time.monotonic() - begun)
            with pytest.raises(Overloaded):
                await world.client.generate("a text", max_tokens=2).text()
        assert sorted(took)[len(took) // 2] < 0.01, "half of them within 10 ms, through the socket"
        assert len(calls) == 4, "nothing was rendered for those that were refused"
        assert not world.engine.seen
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)


async def test_one_client_leaves_places_to_the_others(serve, stuck):
    own_connection = [("grpc.use_local_subchannel_pool", 1)]
    async with (
        serve(max_queued=8) as world,
        grpc.aio.insecure_channel(world.target, own_connection) as channel,
    ):
        calls = stuck(ByteTokenizer, "apply_chat_template")
        waiting = [asyncio.create_task(chat(world, "")) for _ in range(6)]
        await until(lambda: len(calls) == 4)
        await asyncio.sleep(0.05)
        with pytest.raises(Overloaded, match="6 requests of this client"):
            await chat(world, "")
        with pytest.raises(Overloaded, match="6 requests of this client"):
            await world.client.generate("a text", max_tokens=2).text()
        request = generation_pb2.GenerateRequest(text="another peer's")
        stub = generation_pb2_grpc.GenerationServiceStub(channel)
        assert [event async for event in stub.Generate(request)]
        assert await world.client.generate("a tenant's", max_tokens=2, tenant="x").text()
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        await until(lambda: not world.service.generation._preparing)
        assert await world.client.generate("there is room again", max_tokens=2).text()


async def test_a_request_that_waits_in_the_engine_counts_too(serve):
    async with serve(max_queued=3) as world:
        world.engine.num_waiting = 3
        with pytest.raises(Overloaded):
            await chat(world)
        world.engine.num_waiting = 2
        assert await chat(world)


async def test_uploads_that_run_are_bounded(serve, stuck, release):
    async with serve() as world:
        stuck(Upload, "write")
        waiting = [
            asyncio.create_task(upload(world, f"u{index}")) for index in range(MAX_RUNNING_UPLOADS)
        ]
        await until(lambda: world.service.adapters._store._running.num_held == MAX_RUNNING_UPLOADS)
        with pytest.raises(Overloaded, match=f"{MAX_RUNNING_UPLOADS} uploads"):
            await asyncio.wait_for(upload(world, "one-more"), 2)
        release.set()  # else the server's end waits for them
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)


@pytest.mark.parametrize(("data", "pause_s"), [(None, 60), (b"", 0), (b"", 0.01), (b"x", 0.05)])
async def test_an_upload_that_sends_next_to_nothing_gives_its_place_back(
    serve, monkeypatch, data, pause_s
):
    monkeypatch.setattr(uploads, "IDLE_S", 0.4)
    async with serve() as world:

        async def parts():
            files = [{"name": name, "num_bytes": 1 << 20} for name in REQUIRED_FILES]
            yield adapters_pb2.UploadAdapterRequest(start={"name": "x", "files": files})
            while True:
                await asyncio.sleep(pause_s)
                yield adapters_pb2.UploadAdapterRequest(chunk={"data": data})

        async with grpc.aio.insecure_channel(world.target) as channel:
            upload = adapters_pb2_grpc.AdapterServiceStub(channel).UploadAdapter(parts())
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await asyncio.wait_for(upload, 5)
        if caught.value.code() is not grpc.StatusCode.INTERNAL:  # lost while it was sending
            error = from_rpc_error(caught.value)
            assert isinstance(error, InvalidRequest) and "bytes a second" in str(error)
        await until(lambda: world.service.adapters._store._running.num_held == 0)


async def test_chats_that_nobody_renders_are_seen(serve, stuck, monkeypatch):
    monkeypatch.setattr(prompts, "STUCK_S", 0.2)
    async with serve() as world:
        assert not world.service.prompts.is_stuck()
        calls = stuck(ByteTokenizer, "apply_chat_template")
        waiting = [asyncio.create_task(chat(world)) for _ in range(4)]
        await until(lambda: len(calls) == 4)
        await asyncio.sleep(0.3)
        assert not world.service.prompts.is_stuck(), "all are being rendered, and none waits"
        waiting.append(asyncio.create_task(chat(world)))
        await until(world.service.prompts.is_stuck)
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)


async def test_a_pool_runs_so_many_and_refuses_beyond_those_that_wait():
    release, seen = threading.Event(), []

    def work(index: int) -> int:
        seen.append(index)
        release.wait(10)
        if index == 3:
            raise ZeroDivisionError
        return index

    pool = WorkerPool("the test", num_threads=2, max_waiting=3)
    tasks = [asyncio.create_task(pool.run(work, index)) for index in range(5)]
    await until(lambda: len(seen) == 2)
    assert pool.num_waiting == 3
    with pytest.raises(Overloaded, match="3 calls wait for the test"):
        await pool.run(work, 5)
    tasks[4].cancel()
    await asyncio.gather(tasks[4], return_exceptions=True)
    assert pool.num_waiting == 2, "who has gone makes room"
    release.set()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert results[:3] == [0, 1, 2] and isinstance(results[3], ZeroDivisionError)
    assert 4 not in seen
    for _ in range(50):
        assert await asyncio.gather(*(pool.run(int, n) for n in "12345"[:3])) == [1, 2, 3]

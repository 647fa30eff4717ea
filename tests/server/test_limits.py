"""What one client may send, hold and keep open; what is beyond it is refused by name."""

from __future__ import annotations

import asyncio
import time
from contextlib import asynccontextmanager

import grpc
import pytest

from lora_runtime.errors import InvalidRequest, Overloaded
from protos.loramux.v1 import adapters_pb2
from server.client import AsyncClient
from server.client_channel import typed_errors
from server.client_requests import generate_request
from server.grpc_server import MAX_MESSAGE_BYTES, AdapterServicer, start_grpc
from tests.server.test_grpc_server import stubs_of
from tests.server.test_uploads import chunk, start
from tests.server.world import World, until

MB = 1 << 20


@asynccontextmanager
async def limited(world: World, **limits: float):
    """A second server over the same service, and a client of it."""
    server = await start_grpc(world.service, "127.0.0.1:0", **limits)
    try:
        async with AsyncClient(f"127.0.0.1:{server.port}") as client:
            yield client
    finally:
        await server.stop(0)


async def test_a_message_over_the_limit_is_refused_with_details(serve) -> None:
    async with serve() as world, stubs_of(world) as stubs:
        request = adapters_pb2.GetAdapterRequest(name="x" * MAX_MESSAGE_BYTES)
        with pytest.raises(InvalidRequest, match=f"{MAX_MESSAGE_BYTES} are taken"), typed_errors():
            await stubs.adapters.GetAdapter(request)
        with pytest.raises(InvalidRequest, match="are taken"), typed_errors():
            await stubs.adapters.UploadAdapter(iter([start(), chunk(b"x" * (9 * MB))]))
        with pytest.raises(InvalidRequest, match="are taken"):
            await world.client.generate("x" * (9 * MB), max_tokens=1).text()
        with pytest.raises(InvalidRequest, match="larger than max"):  # grpc's own words
            await world.client.generate("x" * (40 * MB), max_tokens=1).text()
        assert (await world.client.generate("hi", max_tokens=2).text()) == "hi"


async def test_an_answer_over_the_limit_is_refused_with_details(serve) -> None:
    async with serve() as world:
        for name in "abcdefghi":
            await world.load(name, name, notes=["n" * MB])
        with pytest.raises(InvalidRequest, match="one adapter at a time"):
            await world.client.list_adapters()
        assert (await world.client.server_info()).num_loaded_adapters == 9
        assert (await world.client.get_adapter("a")).name == "a"


async def test_one_call_too_many_is_refused_at_once_and_health_is_not_a_call(serve) -> None:
    async with serve() as world, limited(world, max_calls=3) as client:
        world.engine.gate.clear()
        running = [
            asyncio.create_task(client.generate("hi", max_tokens=2).text()) for _ in range(3)
        ]
        await until(lambda: len(world.engine.running) == 3)
        for call in (client.list_adapters, client.server_info):
            begun = time.monotonic()
            with pytest.raises(Overloaded, match="3 calls are running"):
                await call()
            assert time.monotonic() - begun < 1
        assert await client.is_serving()
        world.engine.gate.set()
        assert await asyncio.gather(*running) == ["hi"] * 3
        assert await client.list_adapters() == []


async def test_an_old_connection_is_replaced_and_nothing_that_runs_is_cut(serve, monkeypatch):
    peers, listed = set(), AdapterServicer.ListAdapters

    async def listing(self, request, context):
        peers.add(context.peer())
        return await listed(self, request, context)

    monkeypatch.setattr(AdapterServicer, "ListAdapters", listing)
    async with serve() as world, limited(world, max_connection_age_s=0.2) as client:
        world.engine.gate.clear()
        long = asyncio.create_task(client.generate("hello", max_tokens=5).text())
        await until(lambda: len(world.engine.running) == 1)
        deadline = time.monotonic() + 1.5
        while time.monotonic() < deadline:
            await client.list_adapters()
            await asyncio.sleep(0.01)
        assert len(peers) >= 3
        world.engine.gate.set()
        assert await long == "hello"


async def test_a_prompt_that_cannot_fit_never_reaches_the_tokenizer(serve, monkeypatch) -> None:
    seen = []
    async with serve() as world:
        monkeypatch.setattr(world.service._tokenizer, "encode", seen.append, raising=False)
        limits = world.service.prompt_limits
        for prompt in ({"text": "x" * (limits.num_bytes + 1)},
                       {"token_ids": [5] * (limits.num_tokens + 1)}):  # fmt: skip
            with pytest.raises(InvalidRequest, match="at most"):
                await world.client.generate(**prompt).text()
        assert seen == []


@pytest.mark.parametrize("num_bytes", [4 * MB, 7 * MB])
@pytest.mark.parametrize("field", ["token_ids", "text", "stop_token_ids", "turns"])
async def test_others_are_answered_while_huge_requests_come(serve, field, num_bytes) -> None:
    """Health waited 3 to 5 s for eight megabytes of ids."""
    options = {"text": "hi", "max_tokens": 1}
    if field in ("token_ids", "stop_token_ids"):
        options = {**options, field: [5] * num_bytes}
        options.pop("text") if field == "token_ids" else None
    elif field == "turns":
        del options["text"]
        options["messages"] = [{"role": "user", "content": ""}] * (num_bytes // 8)
    else:
        options["text"] = "x" * num_bytes

    async with serve() as world:
        gaps, is_over = [], asyncio.Event()

        async def watch() -> None:
            while not is_over.is_set():
                begun = time.monotonic()
                await asyncio.sleep(0.005)
                gaps.append(time.monotonic() - begun)

        text, messages, ids = (options.pop(k, None) for k in ("text", "messages", "token_ids"))
        request = generate_request(text, messages, ids, {}, options).SerializeToString()
        async with grpc.aio.insecure_channel(world.target) as channel:
            call = channel.unary_stream("/loramux.v1.GenerationService/Generate")
            watching = asyncio.create_task(watch())
            for _ in range(3):
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    async for _ in call(request):
                        pass
                assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            is_over.set()
            await watching
        assert max(gaps) < 0.5, gaps

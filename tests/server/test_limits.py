"""What one client may send, hold and keep open; what is beyond it is refused by name."""

from __future__ import annotations

import asyncio
import time
from contextlib import asynccontextmanager
from dataclasses import replace

import grpc
import pytest
import structlog
from typer.testing import CliRunner

from lora_runtime.errors import (
    AdapterInUse,
    AdapterNotFound,
    AdapterSourceRefused,
    InvalidRequest,
    Overloaded,
)
from loramux.server.access.caller import ANONYMOUS
from loramux.server.calls import StoredAdapter
from loramux.server.cli import app
from loramux.server.client import AsyncClient
from loramux.server.client.channel import typed_errors
from loramux.server.client.requests import generate_request
from loramux.server.rpc.server import MAX_MESSAGE_BYTES, start_grpc
from loramux.server.rpc.servicers import AdapterServicer
from loramux.server.running_calls import Calls
from loramux.v1 import adapters_pb2
from tests.server.uploading import CONFIG, WEIGHTS, chunk, left_behind, local_adapter, send, start
from tests.server.world import World, stubs_of, until

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
        with pytest.raises(InvalidRequest, match="one adapter at a time"):
            await world.load("a", "a", notes=["n" * 9 * MB])
        assert (await world.client.server_info()).num_loaded_adapters == 1


async def test_one_adapter_never_hides_the_others_from_the_list(serve) -> None:
    async with serve() as world, stubs_of(world) as stubs:
        request = adapters_pb2.ListAdaptersRequest()
        for index, name in enumerate("abcdefghi"):
            assert (await stubs.adapters.ListAdapters(request)).is_abridged == (index > 3)
            wide = {"honoured": {"rank_pattern": "n" * MB}} if index % 2 else {"notes": ["n" * MB]}
            await world.load(name, name, **wide)
        found = await stubs.adapters.ListAdapters(request)
        assert found.is_abridged and "".join(info.name for info in found.adapters) == "abcdefghi"
        assert all(info.digest and not info.notes and not info.honoured for info in found.adapters)
        assert len((await world.client.get_adapter("b")).honoured["rank_pattern"]) == MB


async def test_the_store_is_listed_in_one_go_however_much_it_holds(serve, monkeypatch) -> None:
    """4,000 names and contents: comparing each with each took minutes on the event loop."""
    async with serve() as world:
        await world.load("x", "a")
        loaded = world.registry.get("x")
        digests = [f"{index:064x}" for index in range(4000)]
        for index, digest in enumerate(digests):
            record = replace(loaded, name=f"n{index}", source=digest, former=None)
            world.registry._records[record.name] = record
        in_store = [StoredAdapter(source=d, num_bytes=1, stored_at_s=0.0) for d in digests]

        async def stored() -> list[StoredAdapter]:
            return in_store

        monkeypatch.setattr(world.service.adapters._store, "stored", stored)
        begun = time.process_time()
        found = await world.service.adapters.stored(ANONYMOUS)
        assert time.process_time() - begun < 1
        assert [stored.adapters for stored in found] == [(f"n{i}",) for i in range(4000)]
        with pytest.raises(AdapterInUse, match="n7;"):
            await world.service.adapters.delete_stored(ANONYMOUS, digests[7])


async def test_the_log_is_not_filled_by_what_a_client_writes(serve) -> None:
    async with serve() as world:
        with structlog.testing.capture_logs() as lines, pytest.raises(AdapterSourceRefused):
            await world.client.load_adapter("x", "s" * (7 * MB))
        assert any(line["event"] == "adapter refused" for line in lines)
        assert sum(len(str(line)) for line in lines) < 2000


async def test_one_call_too_many_is_refused_at_once_and_health_is_not_a_call(serve) -> None:
    async with serve() as world, limited(world, calls=Calls(3)) as client:
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
        monkeypatch.setattr(world.service.prompts._tokenizer, "encode", seen.append, raising=False)
        limits = world.service.prompts.limits
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


async def test_stored_content_is_listed_and_deleted(serve, tmp_path) -> None:
    async with serve() as world:
        first = await world.client.upload_adapter("x", local_adapter(tmp_path / "a", "a" * 100))
        await world.client.upload_adapter("y", local_adapter(tmp_path / "b", "a" * 100))
        other = await world.client.upload_adapter(
            "x", local_adapter(tmp_path / "c", "c"), replace=True
        )
        listed = await world.client.list_stored_adapters()
        held = {stored.source: list(stored.adapters) for stored in listed.stored}
        assert held == {first.source: ["x", "y"], other.source: ["x"]}
        assert listed.num_bytes == sum(stored.num_bytes for stored in listed.stored) == 105
        for source in held:
            with pytest.raises(AdapterInUse) as caught:
                await world.client.delete_stored_adapter(source)
            assert caught.value.field == "source" and "'x'" not in str(caught.value)
        await world.client.unload_adapter("x", wait=True)
        with pytest.raises(AdapterInUse, match="held by y"):
            await world.client.delete_stored_adapter(first.source)
        assert (await world.client.delete_stored_adapter(other.source)).num_bytes == 3
        assert all(first.source in path for path in left_behind(world))
        with pytest.raises(AdapterSourceRefused):
            await world.client.load_adapter("z", other.source)
        for source in (other.source, "", "..", "../incoming", "x" * 70_000):
            with pytest.raises(AdapterNotFound):
                await world.client.delete_stored_adapter(source)


async def test_what_is_being_loaded_is_not_deleted(serve, tmp_path) -> None:
    async with serve() as world:
        info = await world.client.upload_adapter("x", local_adapter(tmp_path / "a", "a"))
        await world.client.unload_adapter("x", wait=True)
        world.engine.load_gate.clear()
        loading = asyncio.create_task(world.client.load_adapter("x", info.source))
        await until(lambda: bool(world.registry.records()))
        with pytest.raises(AdapterInUse):
            await world.client.delete_stored_adapter(info.source)
        world.engine.load_gate.set()
        assert (await loading).adapter.digest == info.digest


async def test_a_full_store_refuses_and_takes_again_when_there_is_room(serve, tmp_path) -> None:
    async with serve() as world:
        world.service.adapters._store.max_bytes = 250
        infos = [
            await world.client.upload_adapter(c, local_adapter(tmp_path / c, c * 100)) for c in "ab"
        ]
        with pytest.raises(Overloaded, match="store would have"):
            await world.client.upload_adapter("c", local_adapter(tmp_path / "c", "c" * 100))
        assert len(left_behind(world)) == 4
        await world.client.unload_adapter("a", wait=True)
        await world.client.delete_stored_adapter(infos[0].source)
        assert (await world.client.upload_adapter("c", tmp_path / "c")).digest[0] == "c"
        parts = [start(name="d"), chunk(CONFIG), chunk(WEIGHTS)]
        world.service.adapters._store.max_bytes = 300
        assert (await send(world, *parts)).name == "d"


async def test_the_commands_for_the_store(serve, tmp_path) -> None:
    async with serve() as world:
        info = await world.client.upload_adapter("x", local_adapter(tmp_path / "a", "a"))

        async def ask(*arguments: str):
            flags = ["--address", world.target]
            run, wide = CliRunner().invoke, {"COLUMNS": "200"}
            return await asyncio.to_thread(run, app, ["adapters", *arguments, *flags], env=wide)

        shown = await ask("stored")
        assert info.source in shown.stdout and "│ x" in shown.stdout
        refused = await ask("delete", info.source)
        assert refused.exit_code == 1 and "held by x" in refused.stderr
        await world.client.unload_adapter("x", wait=True)
        assert (await ask("delete", info.source)).exit_code == 0
        assert info.source not in (await ask("stored")).stdout

"""The wire, over a real socket: every refusal typed, every stream ended once, nobody disturbed."""

from __future__ import annotations

import asyncio
import json
import socket
import sys
from pathlib import Path

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from grpc_status import rpc_status

from lora_runtime.errors import AdapterFailed, AdapterNotFound, ConfigError
from loramux.server.client.channel import Stubs
from loramux.server.errors import INTERNAL_MESSAGE
from loramux.server.rpc.server import MAX_MESSAGE_BYTES, RECEIVED_AT_MOST, SERVICE_NAMES, start_grpc
from loramux.v1 import adapters_pb2, generation_pb2, types_pb2
from tests.server.world import World, stubs_of, until

Code = grpc.StatusCode
LETTERS = "abcdefgh"


def generate_request(**fields: object) -> generation_pb2.GenerateRequest:
    return generation_pb2.GenerateRequest(**{"text": "hello", **fields})


def sampling(**fields: object) -> dict:
    return {"sampling": types_pb2.SamplingParams(**fields)}


def adapter(*names: str) -> dict:
    return {"adapters": [types_pb2.AdapterSelection(name=name) for name in names]}


def weighted(**weights: float) -> dict:
    return {"adapters": [{"name": name, "weight": w} for name, w in weights.items()]}


async def refusal(call) -> tuple[grpc.StatusCode, str | None, str]:
    """Code, field and message of a call that must fail without a single response."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        if hasattr(call, "__aiter__"):
            async for message in call:
                raise AssertionError(f"got {message}")
        await call
    status = rpc_status.from_call(caught.value)
    info = error_details_pb2.ErrorInfo()
    assert status.details[0].Unpack(info) and info.domain == "loramux"
    return caught.value.code(), info.metadata.get("field"), caught.value.details()


BAD_REQUESTS = {
    "unknown adapter": (adapter("nobody"), Code.NOT_FOUND, "adapters[0].name"),
    "empty adapter name": (adapter(""), Code.INVALID_ARGUMENT, "adapters[0].name"),
    "second is unknown": (adapter("a", "nobody"), Code.NOT_FOUND, "adapters[1].name"),
    "twice the same": (adapter("a", "b", "a"), Code.INVALID_ARGUMENT, "adapters[2].name"),
    "weight NaN": (weighted(a=1, b=float("nan")), Code.INVALID_ARGUMENT, "adapters[1].weight"),
    "weight too large": (weighted(a=-101), Code.INVALID_ARGUMENT, "adapters[0].weight"),
    "nine adapters": (adapter(*"abcdefghi"), Code.INVALID_ARGUMENT, "adapters"),
    "different depths": (adapter("a", "deep"), Code.INVALID_ARGUMENT, "adapters"),
    "salt of two lines": ({"cache_salt": "a\nb"}, Code.INVALID_ARGUMENT, "cache_salt"),
    "prompt too long": ({"text": "a" * 600}, Code.INVALID_ARGUMENT, "text"),
    "empty prompt": ({"text": ""}, Code.INVALID_ARGUMENT, "text"),
    "no prompt": ({"text": None}, Code.INVALID_ARGUMENT, "input"),
    "temperature < 0": (sampling(temperature=-1), Code.INVALID_ARGUMENT, "sampling.temperature"),
    "max_tokens 0": (sampling(max_tokens=0), Code.INVALID_ARGUMENT, "sampling.max_tokens"),
    "max_tokens big": (sampling(max_tokens=999), Code.INVALID_ARGUMENT, "sampling.max_tokens"),
    "penalty": (sampling(presence_penalty=3), Code.INVALID_ARGUMENT, "sampling.presence_penalty"),
    "n": (sampling(n=129), Code.INVALID_ARGUMENT, "sampling.n"),
}


@pytest.mark.parametrize("name", BAD_REQUESTS)
async def test_a_bad_request_is_refused_by_name_and_disturbs_nobody(serve, name: str) -> None:
    fields, code, field = BAD_REQUESTS[name]
    async with serve() as world, stubs_of(world) as stubs:
        for loaded, facts in (("a", {}), ("b", {}), ("deep", {"num_layers": 3})):
            await world.load(loaded, loaded, **facts)
        world.engine.gate.clear()
        neighbour = asyncio.create_task(world.client.generate("abc", max_tokens=6).text())
        await until(lambda: len(world.engine.running) == 1)
        got = await refusal(stubs.generation.Generate(generate_request(**fields)))
        assert got[:2] == (code, field)
        world.engine.gate.set()
        assert await neighbour == "abcabc"
        assert all(info.num_in_flight == 0 for info in await world.client.list_adapters())


LOAD_FAILURES = {
    "missing folder": ("missing", Code.INVALID_ARGUMENT, "source"),
    "no source": ("", Code.INVALID_ARGUMENT, "source"),
    "outside": ("/etc", Code.INVALID_ARGUMENT, "source"),
    "dots": ("../adapters/good", Code.INVALID_ARGUMENT, "source"),
    "pickle": ("pickle", Code.INVALID_ARGUMENT, "source"),
    "link out": ("link", Code.INVALID_ARGUMENT, "source"),
    "refused": ("!AdapterRefused", Code.INVALID_ARGUMENT, "lora_A"),
    "wrong base": ("!BaseMismatch", Code.FAILED_PRECONDITION, "base"),
    "too large": ("!AdapterTooLarge", Code.FAILED_PRECONDITION, "r"),
    "I/O error": ("!OSError", Code.INTERNAL, None),
}


@pytest.mark.parametrize("name", LOAD_FAILURES)
async def test_a_bad_load_is_typed_shows_no_host_path_and_disturbs_nobody(
    serve, tmp_path: Path, name: str
) -> None:
    source, code, field = LOAD_FAILURES[name]
    async with serve() as world, stubs_of(world) as stubs:
        world.write_adapter("good", "a")
        world.write_adapter(source, source) if source.startswith("!") else None
        (world.root / "pickle").mkdir()
        (world.root / "pickle" / "adapter_model.bin").write_bytes(b"x")
        (world.root / "link").symlink_to(tmp_path)
        await world.client.load_adapter("good", "good")
        request = adapters_pb2.LoadAdapterRequest(name="bad", source=source)
        got_code, got_field, message = await refusal(stubs.adapters.LoadAdapter(request))
        assert (got_code, got_field) == (code, field)
        listed = str(await world.client.list_adapters())
        assert str(tmp_path) not in message + listed
        assert await world.client.generate("x", adapter="good", max_tokens=2).text() == "aa"
        with pytest.raises(AdapterNotFound):
            await world.client.generate("x", adapter="bad").text()


@pytest.mark.parametrize(("name", "field"), [("", "name"), ("a//b", "name"), ("tiny", "name")])
async def test_bad_names_at_load(serve, name: str, field: str) -> None:
    async with serve() as world, stubs_of(world) as stubs:
        source = world.write_adapter("good", "a")
        request = adapters_pb2.LoadAdapterRequest(name=name, source=source)
        got = await refusal(stubs.adapters.LoadAdapter(request))
        assert got[:2] == (Code.INVALID_ARGUMENT, field)


async def test_text_that_is_not_utf8_is_an_invalid_argument(serve) -> None:
    method = "/loramux.v1.GenerationService/"
    async with serve() as world, grpc.aio.insecure_channel(world.target) as channel:
        bad = b"\x0a\x02\xff\xfe"  # field 1, a string of two bytes
        for call in (
            channel.unary_stream(f"{method}Generate")(bad),
            channel.unary_unary(f"{method}Tokenize")(bad),
            channel.unary_stream(f"{method}Generate")(b"\xff\xff\xff"),
        ):
            code, _, message = await refusal(call)
            assert code is Code.INVALID_ARGUMENT and "UTF-8" in message
        assert await world.client.generate("ab", max_tokens=2).text() == "ab"


async def test_a_message_far_over_the_cap_is_refused_by_grpc(serve) -> None:
    async with serve() as world, stubs_of(world) as stubs:
        request = generation_pb2.TokenizeRequest(text="a" * (RECEIVED_AT_MOST * MAX_MESSAGE_BYTES))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stubs.generation.Tokenize(request)
        assert caught.value.code() is Code.RESOURCE_EXHAUSTED
        assert len(await world.client.tokenize("a" * 60_000)) == 60_000


async def test_a_rollback_without_a_former_content_is_refused(serve) -> None:
    async with serve() as world, stubs_of(world) as stubs:
        await world.load("x", "a")
        for name, code in (("x", Code.NOT_FOUND), ("y", Code.NOT_FOUND), ("", None)):
            call = stubs.adapters.RollbackAdapter(adapters_pb2.RollbackAdapterRequest(name=name))
            found, field, _ = await refusal(call)
            assert (found, field) == (code or Code.INVALID_ARGUMENT, "name")


@pytest.mark.parametrize(
    ("failure", "code", "message"),
    [
        (AdapterFailed("non-finite values"), Code.FAILED_PRECONDITION, "non-finite values"),
        (RuntimeError("/srv/secret"), Code.INTERNAL, INTERNAL_MESSAGE),
    ],
    ids=["typed", "unknown"],
)
async def test_a_failure_after_acceptance_is_one_status(serve, failure, code, message) -> None:
    async with serve() as world, stubs_of(world) as stubs:
        world.engine.failure = failure
        events = []
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async for event in stubs.generation.Generate(generate_request()):
                events.append(event.WhichOneof("event"))
        assert (caught.value.code(), caught.value.details()) == (code, message)
        assert events[0] == "started" and "finished" not in events


async def test_an_overloaded_server_says_when_to_retry(serve) -> None:
    async with serve(max_queued=0) as world, stubs_of(world) as stubs:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stubs.generation.Generate(generate_request()).read()
        assert caught.value.code() is Code.RESOURCE_EXHAUSTED
        retry = error_details_pb2.RetryInfo()
        assert any(d.Unpack(retry) for d in rpc_status.from_call(caught.value).details)


async def test_200_streams_end_once_each_while_adapters_come_and_go(serve) -> None:
    async def stream(stubs: Stubs, index: int) -> None:
        letter = LETTERS[index % 9] if index % 9 < 8 else None
        fields = adapter(letter) if letter else {"text": "z"}
        request = generate_request(**fields, **sampling(max_tokens=20), request_id=f"r{index}")
        events = [event async for event in stubs.generation.Generate(request)]
        kinds = [event.WhichOneof("event") for event in events]
        assert (kinds[0], kinds[-1]) == ("started", "finished")
        assert (kinds.count("started"), kinds.count("finished")) == (1, 1)
        assert events[0].started.request_id == f"r{index}"
        assert "".join(event.delta.text for event in events) == (letter or "z") * 20

    async def churn(world: World) -> None:
        for _ in range(10):
            await world.load("extra", "x")
            await world.load("extra", "y", replace=True)
            await world.client.unload_adapter("extra", wait=True)

    async with serve() as world, stubs_of(world) as stubs:
        for letter in LETTERS:
            await world.load(letter, letter)
        await asyncio.gather(churn(world), *(stream(stubs, index) for index in range(200)))
        assert world.engine.running == {} and world.engine.aborted == []
        assert len(world.engine.references) == 8
        assert all(info.num_in_flight == 0 for info in await world.client.list_adapters())


async def test_an_unloaded_name_is_gone_at_once_while_its_streams_finish(serve) -> None:
    async with serve() as world:
        await world.load("x", "a")
        world.engine.gate.clear()
        running = asyncio.create_task(world.client.generate("q", adapter="x", max_tokens=50).text())
        await until(lambda: len(world.engine.running) == 1)
        info = await world.client.unload_adapter("x")
        assert info.state == adapters_pb2.ADAPTER_STATE_DRAINING and info.num_in_flight == 1
        with pytest.raises(AdapterNotFound):
            await world.client.generate("q", adapter="x").text()
        with pytest.raises(AdapterNotFound):
            await world.client.get_adapter("x")
        with pytest.raises(AdapterNotFound):
            await world.client.unload_adapter("x")
        (draining,) = await world.client.list_adapters()
        assert draining.state == adapters_pb2.ADAPTER_STATE_DRAINING
        world.engine.gate.set()
        assert await running == "a" * 50
        await until(lambda: not world.registry.records())
        assert world.engine.references == {} and await world.client.list_adapters() == []


async def test_unload_may_wait_or_cancel(serve) -> None:
    async with serve() as world:
        await world.load("x", "a")
        world.engine.gate.clear()
        stream = world.client.generate("q", adapter="x", max_tokens=50)
        events = asyncio.create_task(_collect(stream))
        await until(lambda: len(world.engine.running) == 1)
        unload = asyncio.create_task(world.client.unload_adapter("x", cancel=True, wait=True))
        await until(lambda: not world.engine.references)
        assert not unload.done()
        world.engine.gate.set()
        await unload
        assert world.engine.running == {}
        assert (await events)[-1].finished.finish_reason == types_pb2.FINISH_REASON_CANCELLED


async def test_cancel_ends_what_was_asked_of_the_name_alone(serve) -> None:
    """Two names of one content; the first is unloaded without cancel, and lets its request end."""
    async with serve() as world:
        await world.load("x", "a")
        await world.load("y", "a")
        world.engine.gate.clear()
        events = {
            (name, n): asyncio.create_task(
                _collect(world.client.generate("q", adapter=name, max_tokens=50, n=n))
            )
            for name in "xy"
            for n in (1, 2)
        }
        await until(lambda: len(world.engine.running) == 6)
        await world.client.unload_adapter("x")
        await world.client.unload_adapter("y", cancel=True)
        world.engine.gate.set()
        cancelled, whole = types_pb2.FINISH_REASON_CANCELLED, types_pb2.FINISH_REASON_LENGTH
        for (name, n), task in events.items():
            ends = [e.finished.finish_reason for e in await task if e.HasField("finished")]
            assert ends == [cancelled if name == "y" else whole] * n
        await until(lambda: world.engine.references == {})


async def _collect(stream) -> list:
    return [event async for event in stream]


async def test_replace_swaps_new_streams_and_leaves_old_ones_whole(serve) -> None:
    async with serve() as world:
        await world.load("x", "a")
        world.engine.gate.clear()
        old = asyncio.create_task(world.client.generate("q", adapter="x", max_tokens=50).text())
        await until(lambda: len(world.engine.running) == 1)
        loaded = await world.load("x", "b", replace=True)
        assert not loaded.already_loaded and loaded.adapter.digest.startswith("b")
        new = asyncio.create_task(world.client.generate("q", adapter="x", max_tokens=50).text())
        await until(lambda: len(world.engine.running) == 2)
        world.engine.gate.set()
        assert await asyncio.gather(old, new) == ["a" * 50, "b" * 50]
        assert loaded.adapter.former_digest.startswith("a")


async def test_rollback_swaps_new_streams_and_leaves_old_ones_whole(serve) -> None:
    async with serve() as world:
        await world.load("x", "a")
        await world.load("x", "b", replace=True)
        world.engine.gate.clear()
        old = asyncio.create_task(world.client.generate("q", adapter="x", max_tokens=50).text())
        await until(lambda: len(world.engine.running) == 1)
        info = await world.client.rollback_adapter("x")
        assert (info.digest[0], info.former_digest[0]) == ("a", "b")
        new = asyncio.create_task(world.client.generate("q", adapter="x", max_tokens=50).text())
        await until(lambda: len(world.engine.running) == 2)
        world.engine.gate.set()
        assert await asyncio.gather(old, new) == ["b" * 50, "a" * 50]
        assert world.observer.of("on_adapter_loaded")[-1][1].startswith("a")
        await world.client.unload_adapter("x", wait=True)
        assert world.engine.references == {}


async def test_a_composition_is_in_flight_under_each_of_its_names(serve) -> None:
    async with serve() as world:
        await world.load("x", "a")
        await world.load("y", "b")
        world.engine.gate.clear()
        mixed = world.client.generate("q", adapters={"x": 0.5, "y": 2}, max_tokens=4)
        running = asyncio.create_task(mixed.text())
        await until(lambda: len(world.engine.running) == 1)
        assert [info.num_in_flight for info in await world.client.list_adapters()] == [1, 1]
        unload = asyncio.create_task(world.client.unload_adapter("y", wait=True))
        await until(lambda: len(world.engine.references) == 1)
        assert not unload.done()
        with pytest.raises(AdapterNotFound) as caught:
            await world.client.generate("q", adapters={"x": 1, "y": 1}).text()
        assert caught.value.field == "adapters[1].name"
        world.engine.gate.set()
        assert await running == "abab"
        assert (await unload).name == "y"
        assert world.registry.resolve("x").num_in_flight == 0
        (request, *_) = world.engine.seen
    assert {use.digest[0]: use.weight for use in request.adapters} == {"a": 0.5, "b": 2}


@pytest.mark.parametrize(("content", "used"), [("b", "xy"), ("a", "y")])
async def test_cancel_ends_what_uses_a_name_whoever_else_is_used_or_holds_its_content(
    serve, content, used
) -> None:
    """In a composition, and where another name goes on with the same content."""
    async with serve() as world:
        await world.load("x", "a")
        await world.load("y", content)
        world.engine.gate.clear()
        adapters = dict.fromkeys(used, 1.0)
        events = asyncio.create_task(
            _collect(world.client.generate("q", adapters=adapters, max_tokens=50))
        )
        await until(lambda: len(world.engine.running) == 1)
        await world.client.unload_adapter("y", cancel=True)
        world.engine.gate.set()
        assert (await events)[-1].finished.finish_reason == types_pb2.FINISH_REASON_CANCELLED
        assert await world.client.generate("q", adapter="x", max_tokens=2).text() == "aa"


async def test_salts_reach_the_engine(serve) -> None:
    async with serve() as world:
        for options in ({}, {"cache_salt": ""}, {"cache_salt": "tenant 1"}):
            await world.client.generate("q", max_tokens=1, **options).text()
    assert [request.cache_salt for request in world.engine.seen] == ["", "", "tenant 1"]


async def test_cancelling_a_call_frees_its_row(serve) -> None:
    async with serve() as world, stubs_of(world) as stubs:
        for num_events in (0, 1, 3):
            world.engine.aborted.clear()
            call = stubs.generation.Generate(generate_request(**sampling(max_tokens=500)))
            world.engine.gate.clear() if num_events == 0 else world.engine.gate.set()
            for _ in range(num_events):
                await call.read()
            await until(lambda: len(world.engine.running) == 1)
            call.cancel()
            await until(lambda: not world.engine.running)
            assert len(world.engine.aborted) == 1


async def test_a_deadline_frees_the_row(serve) -> None:
    async with serve() as world:
        world.engine.gate.clear()
        with pytest.raises(TimeoutError):
            await world.client.generate("q", timeout_s=0.2).text()
        await until(lambda: not world.engine.running)
        assert world.engine.seen[0].deadline is not None


async def test_adapter_info_and_server_info(serve) -> None:
    async with serve() as world:
        loaded = await world.load("x", "a")
        info = await world.client.get_adapter("x")
        assert info == loaded.adapter and info.loaded_at_s > 1e9
        assert (info.name, info.variant, list(info.ranks)) == ("x", "lora", [4, 8])
        assert (info.num_parameters, info.num_bytes) == (100, 200)
        assert dict(info.honoured) == {"r": "8"} and "lora_dropout" in info.inert
        assert info.state == adapters_pb2.ADAPTER_STATE_LOADED
        assert (list(info.notes), list(info.invocation_tokens)) == ([], [])
        assert (info.has_chat_template, info.num_layers) == (False, 0)
        assert (await world.load("x", "a")).already_loaded
        server = await world.client.server_info()
        assert (server.base.name, server.base.fingerprint) == ("tiny", "f" * 64)
        assert (server.limits.max_model_len, server.kernel_backend) == (512, "scripted")
        info = world.engine.info
        limits = server.limits.max_adapter_layers, server.limits.max_queued_requests
        assert limits == (info.max_adapter_layers, info.max_queued_requests) and all(limits)
        assert server.num_loaded_adapters == 1
        assert "sampling.temperature" in server.features
        assert {"sampling.n", "sampling.logit_bias"} <= set(server.features)
        assert not set(server.features) & set(server.refused_features)
        assert server.versions["grpcio"] == grpc.__version__


async def test_what_sets_an_adapter_apart_is_shown(serve) -> None:
    facts = {"invocation_tokens": [7, 8], "chat_template": "{content}", "num_layers": 12}
    async with serve() as world:
        await world.load("x", "a", notes=["bound 1e-4"], **facts)
        info = await world.client.get_adapter("x")
    assert (list(info.notes), list(info.invocation_tokens)) == (["bound 1e-4"], [7, 8])
    assert (info.has_chat_template, info.num_layers) == (True, 12)


async def test_notes_reach_the_caller_before_the_text(serve) -> None:
    async with serve() as world:
        await world.load("x", "a", invocation_tokens=list(b"go"))
        events = await _collect(world.client.generate("stay", adapter="x", max_tokens=2))
    (note,) = events[0].started.notes
    assert "'x'" in note and "not invoked" in note


async def test_chat_tokens_and_logprobs(serve) -> None:
    async with serve() as world:
        chat = [{"role": "user", "content": "hi"}]
        assert bytes(await world.client.tokenize(messages=chat)) == b"<user>hi"
        assert await world.client.generate(messages=chat, max_tokens=8).text() == "<user>hi"
        stream = world.client.generate(token_ids=[97, 98], max_tokens=1, logprobs=2)
        delta = (await _collect(stream))[1].delta
        assert list(delta.token_ids) == [97]
        assert [top.token_id for top in delta.logprobs[0].top] == [97, 97]


async def test_health_follows_the_engine_and_the_drain(serve) -> None:
    async with serve() as world, stubs_of(world) as stubs:
        for name in ("", *SERVICE_NAMES):
            health = await stubs.health.Check(health_pb2.HealthCheckRequest(service=name))
            assert health.status == health.SERVING
        changes = stubs.health.Watch(health_pb2.HealthCheckRequest())
        assert (await changes.read()).status == health.SERVING
        world.engine.is_alive = False
        assert (await changes.read()).status == health.NOT_SERVING
        assert not await world.client.is_serving()
        changes.cancel()


async def test_stop_turns_health_first_and_lets_streams_finish(serve) -> None:
    async with serve() as world, stubs_of(world) as stubs:
        changes = stubs.health.Watch(health_pb2.HealthCheckRequest())
        assert (await changes.read()).status == health_pb2.HealthCheckResponse.SERVING
        world.engine.gate.clear()
        running = asyncio.create_task(world.client.generate("ab", max_tokens=4).text())
        await until(lambda: len(world.engine.running) == 1)
        stopping = asyncio.create_task(world.server.stop(10))
        assert (await changes.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
        changes.cancel()
        with pytest.raises(grpc.aio.AioRpcError):
            async with stubs_of(world) as late:
                await late.generation.Tokenize(generation_pb2.TokenizeRequest(text="x"))
        world.engine.gate.set()
        assert await running == "abab"
        await asyncio.wait_for(stopping, 5)
        await world.server.wait()


async def test_reflection_lists_every_service(serve) -> None:
    async with serve() as world, grpc.aio.insecure_channel(world.target) as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        call = stub.ServerReflectionInfo(
            iter([reflection_pb2.ServerReflectionRequest(list_services="")])
        )
        listed = {service.name for service in (await call.read()).list_services_response.service}
        call.cancel()
    assert {*SERVICE_NAMES, "grpc.health.v1.Health"} <= listed


async def test_a_foreign_client_needs_only_reflection(serve) -> None:
    buf = Path(sys.executable).with_name("buf")
    async with serve() as world:
        url = f"http://{world.target}/loramux.v1.GenerationService/Generate"
        body = json.dumps({"text": "abc", "sampling": {"maxTokens": 3}})
        process = await asyncio.create_subprocess_exec(
            buf, "curl", "--protocol", "grpc", "--http2-prior-knowledge", "-d", body, url,
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip
        out, err = await process.communicate()
    assert process.returncode == 0, err.decode()
    assert b"FINISH_REASON_LENGTH" in out


async def test_a_taken_port_is_a_config_error(serve) -> None:
    async with serve() as world:
        with pytest.raises(ConfigError) as caught:
            await start_grpc(world.service, world.target)
        assert caught.value.field == "grpc_address"
        with socket.socket() as probe:
            assert probe.connect_ex(("127.0.0.1", world.server.port)) == 0

"""Every method that the server itself names, by reflection, under every kind of key."""

from __future__ import annotations

import asyncio
import time
from contextlib import asynccontextmanager
from statistics import median

import grpc
import pytest
import structlog
from google.protobuf import descriptor_pb2
from google.rpc import error_details_pb2
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from grpc_status import rpc_status

from lora_runtime.errors import AdapterNotFound, InvalidRequest, PermissionDenied, Unauthenticated
from loramux.server.access.grpc_gate import OPEN_METHODS, USER_METHODS
from loramux.server.client import AsyncClient
from loramux.v1 import generation_pb2
from tests.server.access.keyring import (
    ACME,
    EXPIRED,
    OPERATOR,
    RIVAL,
    RIVAL_OPERATOR,
    WRONG,
    gate_of,
    limited,
)
from tests.server.world import stubs_of

Code = grpc.StatusCode
HEALTH = {"/grpc.health.v1.Health/Check", "/grpc.health.v1.Health/Watch"}


def bearer(key: str | None) -> list[tuple[str, str]]:
    return [] if key is None else [("authorization", f"Bearer {key}")]


@asynccontextmanager
async def channel_to(world):
    async with grpc.aio.insecure_channel(world.target) as channel:
        yield channel


async def status_of(channel, method: str, metadata) -> grpc.aio.AioRpcError | None:
    """How a method that gets one empty message ends; None: with an answer."""
    # One message is the same on the wire in every kind; aio streams of requests lose a refusal
    # that comes while they write.
    call = channel.unary_stream(method)(b"", metadata=metadata, timeout=30)
    try:
        async for _ in call:
            call.cancel()
            return None
    except grpc.aio.AioRpcError as error:
        return error
    return None


async def methods_of(channel) -> set[str]:
    """What reflection, asked with a key, says that the server has."""
    stub = reflection_pb2_grpc.ServerReflectionStub(channel)
    Request = reflection_pb2.ServerReflectionRequest

    async def ask(**what):
        call = stub.ServerReflectionInfo(iter([Request(**what)]), metadata=bearer(OPERATOR))
        return [answer async for answer in call][0]

    services = (await ask(list_services="")).list_services_response.service
    found = set()
    for service in services:
        answer = await ask(file_containing_symbol=service.name)
        for data in answer.file_descriptor_response.file_descriptor_proto:
            file = descriptor_pb2.FileDescriptorProto.FromString(data)
            for each in file.service:
                if f"{file.package}.{each.name}" == service.name:
                    found |= {f"/{service.name}/{method.name}" for method in each.method}
    return found


REFUSED_HEADERS = {
    "no key": [],
    "a wrong key": bearer(WRONG),
    "an expired key": bearer(EXPIRED),
    "another scheme": [("authorization", f"Basic {OPERATOR}")],
    "no scheme": [("authorization", OPERATOR)],
    "an empty key": bearer(""),
    "two keys": bearer(OPERATOR) + bearer(ACME),
    "a hash": bearer("9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"),
    "a long key": bearer("k" * 4000),
    "a key with more behind": bearer(OPERATOR + "x"),
}


async def test_every_method_but_health_is_refused_without_a_key_that_is_known(serve, tmp_path):
    async with serve(gate=gate_of(tmp_path)) as world, channel_to(world) as channel:
        methods = await methods_of(channel)
        assert len(methods) >= 15 and methods > HEALTH
        unknown = {"/loramux.v1.AdapterService/Nothing", "/x/y"}
        for method in sorted(methods - HEALTH | unknown):
            for what, headers in REFUSED_HEADERS.items():
                error = await status_of(channel, method, headers)
                assert error is not None, (method, what)
                assert error.code() is Code.UNAUTHENTICATED, (method, what, error)
        for method in HEALTH:
            assert await status_of(channel, method, []) is None
        assert OPEN_METHODS == HEALTH
        assert world.engine.seen == [] and world.registry.records() == []


async def test_what_is_no_users_is_refused_to_users_and_everything_open_to_operators(
    serve, tmp_path
):
    async with serve(gate=gate_of(tmp_path)) as world, channel_to(world) as channel:
        methods = await methods_of(channel) - HEALTH
        assert methods >= USER_METHODS
        management = methods - USER_METHODS
        assert len(management) >= 6
        for method in management:
            error = await status_of(channel, method, bearer(ACME))
            assert error.code() is Code.PERMISSION_DENIED, method
        for method in methods:
            error = await status_of(channel, method, bearer(OPERATOR))
            assert error is None or error.code() not in (
                Code.PERMISSION_DENIED,
                Code.UNAUTHENTICATED,
            ), method
        error = await status_of(channel, "/x/y", bearer(ACME))
        assert error.code() is Code.PERMISSION_DENIED
        error = await status_of(channel, "/x/y", bearer(OPERATOR))
        assert error.code() is Code.UNIMPLEMENTED


@asynccontextmanager
async def tenants(serve, tmp_path, text=None):
    """A server with an adapter of each tenant, and clients: operator, acme's, rival's."""
    gate = gate_of(tmp_path) if text is None else gate_of(tmp_path, text)
    async with serve(gate=gate, api_key=OPERATOR) as world:
        await world.load("acme-a", "a")
        await world.load("rival-b", "b")
        async with (
            AsyncClient(world.target, api_key=ACME) as acme,
            AsyncClient(world.target, api_key=RIVAL) as rival,
        ):
            yield world, acme, rival


async def test_a_tenant_sees_and_uses_its_own_adapters_and_the_base(serve, tmp_path):
    async with tenants(serve, tmp_path) as (world, acme, rival):
        assert [info.name for info in await acme.list_adapters()] == ["acme-a"]
        assert [info.name for info in await rival.list_adapters()] == ["rival-b"]
        assert (await acme.server_info()).num_loaded_adapters == 1
        assert (await world.client.server_info()).num_loaded_adapters == 2
        assert await acme.generate("xy", adapter="acme-a", max_tokens=2).text() == "aa"
        assert await acme.generate("xy", max_tokens=2).text() == "xy"


async def test_unknown_and_forbidden_are_one_answer(serve, tmp_path):
    async with tenants(serve, tmp_path) as (world, acme, _):
        for ask in (
            lambda name: acme.get_adapter(name),
            lambda name: acme.generate("x", adapter=name).text(),
            lambda name: acme.generate("x", adapters={"acme-a": 1.0, name: 1.0}).text(),
        ):
            said = {}
            for name in ("rival-b", "rival-c"):
                with pytest.raises(AdapterNotFound) as caught:
                    await ask(name)
                said[name] = caught.value.message.replace(name, "NAME"), caught.value.field
            assert said["rival-b"] == said["rival-c"]
        assert world.registry.get("rival-b").num_in_flight == 0


@pytest.mark.parametrize("method", ["get", "generate"])
async def test_unknown_and_forbidden_take_one_time(serve, tmp_path, method):
    """Over the socket, in turns: the median of what one takes more than the other right after it,
    as a busy machine slows both alike."""
    async with tenants(serve, tmp_path) as (_, acme, _):

        async def seconds(name: str) -> float:
            begun = time.perf_counter()
            with pytest.raises(AdapterNotFound):
                if method == "get":
                    await acme.get_adapter(name)
                else:
                    await acme.generate("x", adapter=name).text()
            return time.perf_counter() - begun

        unknown, excess = [], []
        for turn in range(400):
            first, second = ("rival-b", "rival-c") if turn % 2 else ("rival-c", "rival-b")
            times = {first: await seconds(first), second: await seconds(second)}
            unknown.append(times["rival-c"])
            excess.append(times["rival-b"] - times["rival-c"])
        more, usual = median(excess), median(unknown)
        print(f"{method}: unknown {1e6 * usual:.0f} us, forbidden {1e6 * more:+.0f} us")
        assert abs(more) < 0.1 * usual


async def test_an_operator_of_some_adapters_manages_those(serve, tmp_path):
    async with (
        tenants(serve, tmp_path) as (world, _, _),
        AsyncClient(world.target, api_key=RIVAL_OPERATOR) as rival,
    ):
        folder = world.root / "local"
        world.write_adapter("local", "c")
        await rival.upload_adapter("rival-c", folder)
        assert [info.name for info in await rival.list_adapters()] == ["rival-b", "rival-c"]
        said = set()
        for name in ("acme-a", "acme-z"):
            for ask in (
                lambda name: rival.unload_adapter(name),
                lambda name: rival.rollback_adapter(name),
                lambda name: rival.upload_adapter(name, folder),
                lambda name: rival.load_adapter(name, "local"),
            ):
                with pytest.raises(PermissionDenied, match="rival-\\*") as caught:
                    await ask(name)
                said.add(caught.value.message)
        assert len(said) == 1
        with pytest.raises(PermissionDenied, match="sources"):
            await rival.load_adapter("rival-d", "local")
        uploaded = (await rival.get_adapter("rival-c")).source
        await rival.load_adapter("rival-d", uploaded)
        await world.client.load_adapter("acme-c", uploaded)
        (stored,) = (await rival.list_stored_adapters()).stored
        assert list(stored.adapters) == ["rival-c", "rival-d"]
        with pytest.raises(PermissionDenied):
            await rival.delete_stored_adapter(uploaded)
        await rival.unload_adapter("rival-c")
        assert world.registry.get("acme-a").loaded is not None


async def test_a_key_says_whose_requests_are(serve, tmp_path):
    async with tenants(serve, tmp_path, limited("weight: 2.5")) as (world, acme, rival):
        await acme.generate("x", max_tokens=1, cache_salt="s").text()
        await acme.generate("x", max_tokens=1, tenant="acme").text()
        await rival.generate("x", max_tokens=1, cache_salt="s").text()
        first, second, third = world.engine.seen[-3:]
        assert first.client == second.client == "tenant:acme" and third.client == "tenant:rival"
        assert (first.weight, third.weight) == (2.5, 1.0)
        assert first.cache_salt != third.cache_salt
        with pytest.raises(InvalidRequest) as caught:
            await acme.generate("x", tenant="rival").text()
        assert caught.value.field == "tenant"


async def test_retries_are_told_when(serve, tmp_path):
    text = limited("tokens_per_s: 2, burst_tokens: 4")
    async with tenants(serve, tmp_path, text) as (world, acme, rival), stubs_of(world) as stubs:
        assert await acme.generate("abcd", max_tokens=10).text() == "abcdabcdab"
        request = generation_pb2.GenerateRequest(text="x")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await anext(aiter(stubs.generation.Generate(request, metadata=bearer(ACME))))
        assert caught.value.code() is Code.RESOURCE_EXHAUSTED
        retry = error_details_pb2.RetryInfo()
        assert any(each.Unpack(retry) for each in rpc_status.from_call(caught.value).details)
        assert 4 < retry.retry_delay.ToTimedelta().total_seconds() <= 5
        assert await rival.generate("abcd", max_tokens=4).text() == "abcd"


async def test_the_audit_log_says_who_did_what_and_no_secret(serve, tmp_path):
    with structlog.testing.capture_logs() as logs:
        async with tenants(serve, tmp_path) as (world, acme, _):
            await world.client.unload_adapter("acme-a")
            for refused in (acme.unload_adapter("rival-b"), acme.get_adapter("rival-b")):
                with pytest.raises((PermissionDenied, AdapterNotFound)):
                    await refused
            async with AsyncClient(world.target, api_key=WRONG) as stranger:
                with pytest.raises(Unauthenticated):
                    await stranger.generate("a secret prompt").text()
    audit = [log for log in logs if log["event"] == "audit"]
    told = [(log.get("key"), log["action"], log.get("adapter"), log["outcome"]) for log in audit]
    assert told == [
        ("operator", "load", "acme-a", "done"),
        ("operator", "load", "rival-b", "done"),
        ("operator", "unload", "acme-a", "done"),
        ("acme", "/loramux.v1.AdapterService/UnloadAdapter", None, "PermissionDenied"),
        ("acme", "use adapter", "rival-b", "AdapterNotFound"),
        (None, "/loramux.v1.GenerationService/Generate", None, "Unauthenticated"),
    ]
    assert all(log["peer"].startswith("ipv4:127.0.0.1:") for log in audit)
    text = str(logs)
    assert not any(secret in text for secret in (WRONG, OPERATOR, ACME, "a secret prompt"))


async def test_of_a_call_without_a_key_no_message_is_read(serve, tmp_path):
    """A stranger who sends megabytes in many calls would fill the server's memory."""
    async with serve(gate=gate_of(tmp_path)) as world, channel_to(world) as channel:
        generate = "/loramux.v1.GenerationService/Generate"
        for key in (None, WRONG):
            # The message never ends: without reading it the server still knows what to answer.
            call = channel.stream_stream(generate)(endless(), metadata=bearer(key), timeout=30)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                [_ async for _ in call]
            assert caught.value.code() is Code.UNAUTHENTICATED
        unary = channel.unary_unary("/loramux.v1.GenerationService/Tokenize")
        request = generation_pb2.TokenizeRequest(text="hi").SerializeToString()
        answer = await unary(request, metadata=bearer(ACME))
        assert generation_pb2.TokenizeResponse.FromString(answer).token_ids
        nothing = channel.stream_unary("/loramux.v1.GenerationService/Tokenize")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await nothing(iter([]), metadata=bearer(ACME), timeout=30)
        assert caught.value.code() is Code.INVALID_ARGUMENT


async def endless():
    await asyncio.sleep(60)
    yield b""

"""What the calls' series say of real calls over both wires."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager

import grpc
import httpx
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse, StreamingResponse
from starlette.routing import Mount, Route

from lora_runtime.errors import AdapterNotFound, Unauthenticated
from loramux.server.access.gate import Gate
from loramux.server.client import AsyncClient
from loramux.server.observability.calls import Rpc, trace_headers
from loramux.server.observability.http_calls import ObservedHttp
from loramux.server.rpc.server import start_grpc
from tests.server.world import RecordingObserver, until

TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
GENERATE = Rpc("server_stream", "loramux.v1.GenerationService", "Generate")
GET = Rpc("unary", "loramux.v1.AdapterService", "GetAdapter")
CHECK = Rpc("unary", "grpc.health.v1.Health", "Check")
REFLECT = Rpc("bidi_stream", "grpc.reflection.v1alpha.ServerReflection", "ServerReflectionInfo")


@asynccontextmanager
async def observed(world):
    """A second gRPC server over the world's service, whose calls are observed."""
    observer = RecordingObserver()
    server = await start_grpc(world.service, "127.0.0.1:0", observer=observer)
    try:
        async with AsyncClient(f"127.0.0.1:{server.port}") as client:
            yield server, client, observer
    finally:
        await server.stop(0)


def handled(observer) -> list[tuple[Rpc, str]]:
    return [(rpc, code) for rpc, code, _ in observer.of("on_rpc_handled")]


async def generate(client, **options) -> None:
    async for _ in client.generate("ab", **options):
        pass


async def test_each_grpc_call_is_counted_once_with_the_status_that_its_caller_sees(serve):
    async with serve() as world, observed(world) as (_, client, observer):
        await generate(client, max_tokens=2)
        await until(lambda: handled(observer) == [(GENERATE, "OK")])
        with pytest.raises(AdapterNotFound):
            await client.get_adapter("ghost")
        await until(lambda: handled(observer)[1:] == [(GET, "NOT_FOUND")])
        world.engine.gate.clear()
        with pytest.raises(TimeoutError):
            await generate(client, timeout_s=0.2)
        await until(lambda: len(handled(observer)) == 3)
        assert handled(observer)[2:] == [(GENERATE, "DEADLINE_EXCEEDED")]
        started = [rpc for (rpc,) in observer.of("on_rpc_started")]
        assert started == [GENERATE, GET, GENERATE]
        seconds = [seconds for _, _, seconds in observer.of("on_rpc_handled")]
        assert 0.15 < seconds[2] < 5 and all(s >= 0 for s in seconds)


async def test_a_caller_that_leaves_is_cancelled(serve):
    async with serve() as world, observed(world) as (_, client, observer):
        world.engine.gate.clear()
        reading = asyncio.create_task(generate(client))
        await until(lambda: observer.of("on_rpc_started"))
        reading.cancel()
        await until(lambda: handled(observer))
        assert handled(observer) == [(GENERATE, "CANCELLED")]


async def test_health_and_reflection_are_counted_and_unknown_methods_share_a_name(serve):
    async with serve() as world, observed(world) as (server, _, observer):
        async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
            await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
            stub = reflection_pb2_grpc.ServerReflectionStub(channel)
            ask = reflection_pb2.ServerReflectionRequest(list_services="")
            answers = [answer async for answer in stub.ServerReflectionInfo(iter([ask]))]
            assert len(answers[0].list_services_response.service) == 5
            for path in ("/made.up/M1", "/made.up/M2", "/loramux.v1.ServerService/No", "/a/b/c"):
                with pytest.raises(grpc.aio.AioRpcError):
                    await channel.unary_unary(path)(b"")
        await until(lambda: len(handled(observer)) == 6)
        assert handled(observer)[:2] == [(CHECK, "OK"), (REFLECT, "OK")]
        unknown = {(rpc.service, rpc.method, code) for rpc, code in handled(observer)[2:]}
        assert unknown == {("unknown", "unknown", "UNIMPLEMENTED")}


async def test_calls_that_the_gate_refuses_are_counted_as_what_they_are(serve):
    gate, observer = Gate(needs_certificate=True), RecordingObserver()
    async with serve() as world:
        server = await start_grpc(world.service, "127.0.0.1:0", gate=gate, observer=observer)
        async with AsyncClient(f"127.0.0.1:{server.port}") as client:
            with pytest.raises(Unauthenticated):
                await client.get_adapter("x")
        await server.stop(0)
    assert handled(observer) == [(GET, "UNAUTHENTICATED")]


def http_app(seen: list) -> Starlette:
    async def show(request):
        seen.append(trace_headers.get())
        return PlainTextResponse(request.path_params.get("name", "x"), 202)

    async def stream(request):
        async def parts():
            seen.append(trace_headers.get())
            yield b"a"

        return StreamingResponse(parts())

    async def fail(request):
        raise RuntimeError("unforeseen")

    routes = [
        Route("/v1/models/{name}", show),
        Route("/stream", stream),
        Route("/fail", fail),
        Mount("/page", routes=[Route("/{file}", show)]),
    ]
    return Starlette(routes=routes)


async def test_http_requests_are_counted_by_the_pattern_of_their_route():
    observer, seen = RecordingObserver(), []
    app = ObservedHttp(http_app(seen), lambda: observer)
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://loramux") as client:
        for number in range(3):
            await client.get(f"/v1/models/a{number}", headers={"traceparent": TRACEPARENT})
            await client.get(f"/made/up/{number}")
        await client.post("/v1/models/a", content=b"x")
        await client.get("/fail")
        await client.get("/stream", headers={"tracestate": "a=b"})
        await client.get("/page/app.js")
    counted = {(m, route, status) for m, route, status, _ in observer.of("on_http_handled")}
    assert counted == {
        ("GET", "/v1/models/{name}", 202),
        ("GET", "none", 404),
        ("POST", "/v1/models/{name}", 405),
        ("GET", "/fail", 500),
        ("GET", "/stream", 200),
        ("GET", "/{file}", 202),
    }
    assert seen == [{"traceparent": TRACEPARENT}] * 3 + [{"tracestate": "a=b"}, {}]


async def test_without_an_observer_http_answers_as_ever():
    transport = httpx.ASGITransport(ObservedHttp(http_app([]), lambda: None))
    async with httpx.AsyncClient(transport=transport, base_url="http://loramux") as client:
        assert (await client.get("/v1/models/a")).text == "a"

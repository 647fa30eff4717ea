"""The gRPC side of a server: servicers decode, call the service and encode; nothing else.

One interceptor stands at the boundary: it parses requests itself, because grpc answers text that
is not UTF-8 with UNKNOWN, and turns every exception into a typed status.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from functools import partial
from typing import Any, TypeAlias

import grpc
from google.protobuf import descriptor_pool
from google.protobuf.message import DecodeError, Message
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from lora_runtime.errors import ConfigError, InvalidRequest, Unavailable
from protos.loramux.v1 import (
    adapters_pb2,
    adapters_pb2_grpc,
    generation_pb2,
    generation_pb2_grpc,
    server_pb2,
    server_pb2_grpc,
)
from server import codec
from server.access.caller import CURRENT
from server.access.gate import OPEN_GATE, Gate
from server.access.grpc_gate import GrpcGate
from server.adapters.adapters import Adapters
from server.addresses import bracketed, check_free
from server.errors import grpc_status
from server.generation.generation import Generation
from server.generation.prompts import Prompts
from server.observability.calls import CallObserver
from server.observability.grpc_calls import KINDS, ObservedGrpc
from server.running_calls import Calls
from server.service import ServerFacts, Service

MAX_MESSAGE_BYTES = 8 << 20
MAX_CONNECTION_AGE_S = 3600.0
RECEIVED_AT_MOST = 2
"""Times the largest message: what grpc itself refuses has none of our details, so that messages up
to this size are received and refused here.
"""
HEALTH_PERIOD_S = 0.25
"""How often health asks whether the engine is alive."""
CUT_S = 1.0
"""Seconds that calls have to answer when the drain is over."""
PACKAGE_PREFIX = "/loramux."
SERVICE_NAMES = tuple(
    file.DESCRIPTOR.services_by_name[name].full_name
    for file, name in (
        (generation_pb2, "GenerationService"),
        (adapters_pb2, "AdapterService"),
        (server_pb2, "ServerService"),
    )
)

Context: TypeAlias = grpc.aio.ServicerContext


async def start_grpc(
    service: Service,
    address: str,
    *,
    gate: Gate = OPEN_GATE,
    credentials: grpc.ServerCredentials | None = None,
    max_message_bytes: int = MAX_MESSAGE_BYTES,
    calls: Calls | None = None,
    max_connection_age_s: float = MAX_CONNECTION_AGE_S,
    is_serving: Callable[[], bool] | None = None,
    observer: CallObserver | None = None,
) -> GrpcServer:
    """Serve on `host:port` and return the running server; port 0 takes any free one.

    `gate` says who callers are; health is open to all. Health follows `is_serving`, or whether the
    engine is alive. `calls` counts them, together with those of HTTP; the server drains and cuts
    both when it stops. A connection of `max_connection_age_s` takes no new calls, so that its
    client connects anew, perhaps to another server behind the same name; running calls go on.
    `observer` hears of every call.
    Raises ConfigError (field `grpc_address`) when the address cannot be bound.
    """
    calls = calls or Calls()
    boundary = Boundary(calls, max_message_bytes)
    options = _options(max_message_bytes, max_connection_age_s)
    observing = [] if observer is None else [ObservedGrpc(observer, _methods())]
    server = grpc.aio.server(interceptors=[*observing, GrpcGate(gate), boundary], options=options)
    generation_pb2_grpc.add_GenerationServiceServicer_to_server(
        GenerationServicer(service.prompts, service.generation), server
    )
    adapters_pb2_grpc.add_AdapterServiceServicer_to_server(
        AdapterServicer(service.adapters), server
    )
    server_pb2_grpc.add_ServerServiceServicer_to_server(ServerServicer(service.facts), server)
    health_servicer = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(health_servicer, server)
    reflection.enable_server_reflection(
        (*SERVICE_NAMES, health.SERVICE_NAME, reflection.SERVICE_NAME), server
    )
    check_free(address, "grpc_address")  # grpc would write a line of its own to stderr
    try:
        port = _bind(server, address, credentials)
    except RuntimeError:
        raise ConfigError(
            f"grpc_address: cannot listen on {address}; choose another with --grpc-address",
            field="grpc_address",
        ) from None
    running = GrpcServer(server, health_servicer, calls, is_serving or service.facts.is_alive, port)
    await running.start()
    return running


class GrpcServer:
    """A running gRPC server, listening on `port`."""

    def __init__(
        self,
        server: grpc.aio.Server,
        health_servicer: health.aio.HealthServicer,
        calls: Calls,
        is_serving: Callable[[], bool],
        port: int,
    ) -> None:
        self.port = port
        self._server = server
        self._health = health_servicer
        self._calls = calls
        self._is_serving = is_serving

    async def start(self) -> None:
        """Begin to serve, health included."""
        await self.show_health()
        await self._server.start()
        self._health_task = asyncio.create_task(self._follow_engine())

    async def stop(self, grace_s: float) -> None:
        """Turn health to NOT_SERVING, refuse new calls, give running ones `grace_s` seconds.

        Those that run on then end with Unavailable, and open streams of health with the server.
        """
        self._health_task.cancel()
        await self._health.enter_graceful_shutdown()
        stopping = asyncio.create_task(self._server.stop(grace_s + CUT_S))
        await asyncio.sleep(0)  # it refuses new calls now
        await self._calls.wait(grace_s)
        self._calls.cut()
        await self._calls.wait(CUT_S)
        await asyncio.wait([stopping, asyncio.create_task(self._server.stop(0))], timeout=CUT_S)

    async def wait(self) -> None:
        """Return when the server has stopped."""
        await self._server.wait_for_termination()

    async def show_health(self) -> None:
        """Tell watchers of health how things stand."""
        statuses = health_pb2.HealthCheckResponse.ServingStatus
        status = statuses.SERVING if self._is_serving() else statuses.NOT_SERVING
        for name in ("", *SERVICE_NAMES):
            await self._health.set(name, status)

    async def _follow_engine(self) -> None:
        while True:
            await asyncio.sleep(HEALTH_PERIOD_S)
            await self.show_health()


class GenerationServicer(generation_pb2_grpc.GenerationServiceServicer):
    """loramux.v1.GenerationService."""

    def __init__(self, prompts: Prompts, generation: Generation) -> None:
        self._prompts = prompts
        self._generation = generation

    async def Generate(self, request: generation_pb2.GenerateRequest, context: Context) -> None:
        """Stream one generation; the call's deadline is the request's."""
        call = codec.decode_generate(
            request,
            context.time_remaining(),
            self._prompts.limits,
            CURRENT.get(),
            context.peer(),
        )
        async with aclosing(self._generation.generate(call)) as events:
            async for event in events:
                await context.write(codec.encode_event(event))

    async def Tokenize(
        self, request: generation_pb2.TokenizeRequest, context: Context
    ) -> generation_pb2.TokenizeResponse:
        """Show a prompt's token ids."""
        prompt = codec.decode_prompt(request, self._prompts.limits)
        token_ids = await self._prompts.tokenize(prompt)
        return generation_pb2.TokenizeResponse(token_ids=token_ids)


class AdapterServicer(adapters_pb2_grpc.AdapterServiceServicer):
    """loramux.v1.AdapterService."""

    def __init__(self, adapters: Adapters) -> None:
        self._adapters = adapters

    async def LoadAdapter(
        self, request: adapters_pb2.LoadAdapterRequest, context: Context
    ) -> adapters_pb2.LoadAdapterResponse:
        """Load a source under a name."""
        record, already_loaded = await self._adapters.load(
            CURRENT.get(),
            codec.adapter_name(request.name),
            request.source,
            replace=request.replace,
            pin=request.pin,
        )
        return adapters_pb2.LoadAdapterResponse(
            adapter=codec.encode_adapter(record), already_loaded=already_loaded
        )

    async def UnloadAdapter(
        self, request: adapters_pb2.UnloadAdapterRequest, context: Context
    ) -> adapters_pb2.UnloadAdapterResponse:
        """Take a name away."""
        record = await self._adapters.unload(
            CURRENT.get(),
            codec.adapter_name(request.name),
            cancel=request.cancel,
            wait=request.wait,
        )
        return adapters_pb2.UnloadAdapterResponse(adapter=codec.encode_adapter(record))

    async def ListAdapters(
        self, request: adapters_pb2.ListAdaptersRequest, context: Context
    ) -> adapters_pb2.ListAdaptersResponse:
        """List every adapter."""
        return codec.encode_adapters(self._adapters.records(CURRENT.get()))

    async def GetAdapter(
        self, request: adapters_pb2.GetAdapterRequest, context: Context
    ) -> adapters_pb2.GetAdapterResponse:
        """Show one adapter."""
        name = codec.adapter_name(request.name)
        record = self._adapters.get(CURRENT.get(), name)
        return adapters_pb2.GetAdapterResponse(adapter=codec.encode_adapter(record))

    async def UploadAdapter(
        self,
        request_iterator: AsyncIterator[adapters_pb2.UploadAdapterRequest],
        context: Context,
    ) -> adapters_pb2.UploadAdapterResponse:
        """Receive an adapter's files and load them under a name."""
        first = await anext(request_iterator, None)
        if first is None or first.WhichOneof("part") != "start":
            raise InvalidRequest("an upload begins with start; send it first", field="start")
        data = (codec.upload_data(part) async for part in request_iterator)
        call = codec.decode_upload(first.start)
        record = await self._adapters.upload(CURRENT.get(), call, data)
        return adapters_pb2.UploadAdapterResponse(adapter=codec.encode_adapter(record))

    async def RollbackAdapter(
        self, request: adapters_pb2.RollbackAdapterRequest, context: Context
    ) -> adapters_pb2.RollbackAdapterResponse:
        """Give a name its former content back."""
        name = codec.adapter_name(request.name)
        record = await self._adapters.rollback(CURRENT.get(), name)
        return adapters_pb2.RollbackAdapterResponse(adapter=codec.encode_adapter(record))

    async def ListStoredAdapters(
        self, request: adapters_pb2.ListStoredAdaptersRequest, context: Context
    ) -> adapters_pb2.ListStoredAdaptersResponse:
        """List the content of the upload store."""
        found = await self._adapters.stored(CURRENT.get())
        return adapters_pb2.ListStoredAdaptersResponse(
            stored=[codec.encode_stored(stored) for stored in found],
            num_bytes=sum(stored.num_bytes for stored in found),
            max_bytes=self._adapters.max_store_bytes,
        )

    async def DeleteStoredAdapter(
        self, request: adapters_pb2.DeleteStoredAdapterRequest, context: Context
    ) -> adapters_pb2.DeleteStoredAdapterResponse:
        """Delete one content of the upload store."""
        stored = await self._adapters.delete_stored(CURRENT.get(), request.source)
        return adapters_pb2.DeleteStoredAdapterResponse(stored=codec.encode_stored(stored))


class ServerServicer(server_pb2_grpc.ServerServiceServicer):
    """loramux.v1.ServerService."""

    def __init__(self, facts: ServerFacts) -> None:
        self._facts = facts

    async def GetServerInfo(
        self, request: server_pb2.GetServerInfoRequest, context: Context
    ) -> server_pb2.GetServerInfoResponse:
        """Show what this server is."""
        return codec.encode_server_info(self._facts.info(CURRENT.get()))


class Boundary(grpc.aio.ServerInterceptor):
    """Parses the requests of our own services and gives every failure its typed status."""

    def __init__(self, calls: Calls, max_message_bytes: int) -> None:
        self._calls = calls
        self._max_message_bytes = max_message_bytes

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler | None:
        """Wrap a handler of our own; others, and unknown methods, pass as they are."""
        handler = await continuation(handler_call_details)
        if handler is None or not handler_call_details.method.startswith(PACKAGE_PREFIX):
            return handler
        make, behaviour = _KINDS[handler.request_streaming, handler.response_streaming](handler)
        parse = partial(_parsed, handler.request_deserializer, self._max_message_bytes)
        if handler.request_streaming:
            parse = partial(_parsed_parts, parse)
        serialise = partial(_serialised, handler.response_serializer, self._max_message_bytes)
        is_stream = handler.response_streaming
        return make(
            _guarded(behaviour, parse, self._calls, None if is_stream else serialise),
            request_deserializer=None,
            response_serializer=handler.response_serializer if is_stream else None,
        )


_KINDS: dict[tuple[bool, bool], Callable[[Any], tuple[Callable[..., Any], Any]]] = {
    (False, False): lambda h: (grpc.unary_unary_rpc_method_handler, h.unary_unary),
    (False, True): lambda h: (grpc.unary_stream_rpc_method_handler, h.unary_stream),
    (True, False): lambda h: (grpc.stream_unary_rpc_method_handler, h.stream_unary),
}


def _guarded(
    behaviour: Callable[[Any, Context], Awaitable[Message | None]],
    parse: Callable[[Any], Any],
    calls: Calls,
    serialise: Callable[[Any], bytes] | None,
) -> Callable[[Any, Context], Awaitable[bytes | None]]:
    async def guarded(request: Any, context: Context) -> Any:
        try:
            with calls.running():
                response = await behaviour(parse(request), context)
                return response if serialise is None else serialise(response)
        except grpc.aio.AbortError:
            raise
        except asyncio.CancelledError:
            if not calls.is_cut:
                raise
            await context.abort_with_status(grpc_status(Unavailable("the server is shutting down")))
        except Exception as error:
            await context.abort_with_status(grpc_status(error))

    return guarded


def _parsed(parse: Callable[[bytes], Message], max_bytes: int, data: bytes) -> Message:
    if len(data) > max_bytes:
        raise InvalidRequest(f"the message has {len(data)} bytes; at most {max_bytes} are taken")
    try:
        return parse(data)
    except DecodeError:
        raise InvalidRequest(
            "the request cannot be parsed; every text in it must be valid UTF-8"
        ) from None


async def _parsed_parts(
    parse: Callable[[bytes], Message], parts: AsyncIterator[bytes]
) -> AsyncIterator[Message]:
    async for part in parts:
        yield parse(part)


def _serialised(serialise: Callable[[Any], bytes], max_bytes: int, response: Any) -> bytes:
    """A unary response; clients refuse larger ones, without saying which."""
    data = serialise(response)
    if len(data) > max_bytes:
        raise InvalidRequest(
            f"the answer has {len(data)} bytes; at most {max_bytes} are sent. Ask for one adapter "
            "at a time"
        )
    return data


def _methods() -> dict[str, str]:
    """All methods of the server, as `/service/method`, and their kinds."""
    pool = descriptor_pool.Default()
    return {
        f"/{name}/{method.name}": KINDS[method.client_streaming, method.server_streaming]
        for name in (*SERVICE_NAMES, health.SERVICE_NAME, reflection.SERVICE_NAME)
        for method in pool.FindServiceByName(name).methods
    }


def _bind(server: grpc.aio.Server, address: str, credentials: grpc.ServerCredentials | None) -> int:
    target = bracketed(address)
    if credentials is None:
        return server.add_insecure_port(target)
    return server.add_secure_port(target, credentials)


def _options(max_message_bytes: int, max_connection_age_s: float) -> list[tuple[str, int]]:
    return [
        ("grpc.max_receive_message_length", RECEIVED_AT_MOST * max_message_bytes),
        ("grpc.max_connection_age_ms", int(1000 * max_connection_age_s)),
        ("grpc.max_send_message_length", max_message_bytes),
        ("grpc.so_reuseport", 0),  # a second server on the port is an error, not a share
        ("grpc.keepalive_time_ms", 60_000),  # finds clients that vanished; their rows are freed
        ("grpc.keepalive_timeout_ms", 20_000),
        ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
        ("grpc.keepalive_permit_without_calls", 1),
    ]

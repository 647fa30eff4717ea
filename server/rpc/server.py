"""The gRPC server: its interceptors, its servicers, its health, and how it stops.

Requests are parsed by `boundary.py`, because grpc answers text that is not UTF-8 with UNKNOWN.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import grpc
from google.protobuf import descriptor_pool
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from lora_runtime.errors import ConfigError
from loramux.server.access.gate import OPEN_GATE, Gate
from loramux.server.access.grpc_gate import GrpcGate
from loramux.server.addresses import bracketed, check_free
from loramux.server.observability.calls import CallObserver
from loramux.server.observability.grpc_calls import KINDS, ObservedGrpc
from loramux.server.rpc.boundary import Boundary
from loramux.server.rpc.servicers import AdapterServicer, GenerationServicer, ServerServicer
from loramux.server.running_calls import Calls
from loramux.server.service import Service
from loramux.v1 import (
    adapters_pb2,
    adapters_pb2_grpc,
    generation_pb2,
    generation_pb2_grpc,
    server_pb2,
    server_pb2_grpc,
)

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
SERVICE_NAMES = tuple(
    file.DESCRIPTOR.services_by_name[name].full_name
    for file, name in (
        (generation_pb2, "GenerationService"),
        (adapters_pb2, "AdapterService"),
        (server_pb2, "ServerService"),
    )
)


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

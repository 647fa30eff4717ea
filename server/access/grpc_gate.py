"""The gate of the gRPC port: no method is reached without a caller, but for health."""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc

from server.access.caller import ANONYMOUS, CURRENT, Caller

OPEN_METHODS = frozenset({"/grpc.health.v1.Health/Check", "/grpc.health.v1.Health/Watch"})
"""All that may be asked without a key."""


class GrpcGate(grpc.aio.ServerInterceptor):
    """The outermost interceptor. A servicer asks `CURRENT.get()` who calls."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler | None:
        """Let a handler run as its caller."""
        handler = await continuation(handler_call_details)
        if handler is None or handler_call_details.method in OPEN_METHODS:
            return handler
        return _as_caller(handler, ANONYMOUS)


def _as_caller(handler: Any, caller: Caller) -> grpc.RpcMethodHandler:
    kind = handler.request_streaming, handler.response_streaming
    make, behaviour = _KINDS[kind](handler)

    async def run(request: Any, context: Any) -> Any:
        CURRENT.set(caller)
        return await behaviour(request, context)

    async def stream(request: Any, context: Any) -> AsyncIterator[Any]:
        CURRENT.set(caller)
        async for response in behaviour(request, context):
            yield response

    return make(
        stream if inspect.isasyncgenfunction(behaviour) else run,
        request_deserializer=handler.request_deserializer,
        response_serializer=handler.response_serializer,
    )


_KINDS: dict[tuple[bool, bool], Callable[[Any], tuple[Callable[..., Any], Any]]] = {
    (False, False): lambda h: (grpc.unary_unary_rpc_method_handler, h.unary_unary),
    (False, True): lambda h: (grpc.unary_stream_rpc_method_handler, h.unary_stream),
    (True, False): lambda h: (grpc.stream_unary_rpc_method_handler, h.stream_unary),
    (True, True): lambda h: (grpc.stream_stream_rpc_method_handler, h.stream_stream),
}

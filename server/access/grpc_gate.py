"""The gate of the gRPC port: no method is reached without a caller, but for health."""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from typing import Any

import grpc

from lora_runtime.errors import LoramuxError, PermissionDenied, Unauthenticated
from loramux.server.access.audit import log_refusal, log_stranger
from loramux.server.access.caller import CURRENT, Caller
from loramux.server.access.gate import Gate
from loramux.server.errors import grpc_status
from loramux.server.grpc_handlers import behaviour_of, maker

OPEN_METHODS = frozenset({"/grpc.health.v1.Health/Check", "/grpc.health.v1.Health/Watch"})
"""All that may be asked without a key."""
USER_METHODS = frozenset(
    {
        "/loramux.v1.GenerationService/Generate",
        "/loramux.v1.GenerationService/Tokenize",
        "/loramux.v1.AdapterService/ListAdapters",
        "/loramux.v1.AdapterService/GetAdapter",
        "/loramux.v1.ServerService/GetServerInfo",
        "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
    }
)
"""What every key is for; all the rest takes an operator's."""
CERTIFICATE_NAMES = ("x509_common_name", "x509_subject_alternative_name")


class GrpcGate(grpc.aio.ServerInterceptor):
    """The outermost interceptor. A servicer asks `CURRENT.get()` who calls."""

    def __init__(self, gate: Gate) -> None:
        self._gate = gate

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler | None:
        """Let a handler run as its caller, or answer that it may not be called: before any message
        of the call is read, if its key is not known.
        """
        method = handler_call_details.method
        handler = await continuation(handler_call_details)
        if method in OPEN_METHODS:
            return handler
        metadata = handler_call_details.invocation_metadata or ()
        enter = partial(self._enter, method, [str(v) for k, v in metadata if k == "authorization"])
        return _unknown(enter) if handler is None else _entered(handler, enter)

    async def _enter(self, method: str, authorizations: list[str], context: Any) -> None:
        """Make the caller known to what runs in this task, or end the call."""
        try:
            caller = self._caller(method, authorizations, context)
            if method not in USER_METHODS:
                _check_role(caller, method)
        except LoramuxError as error:
            await context.abort_with_status(grpc_status(error))
        CURRENT.set(caller)

    def _caller(self, method: str, authorizations: list[str], context: Any) -> Caller:
        known = context.auth_context()
        names = [name.decode() for kind in CERTIFICATE_NAMES for name in known.get(kind, ())]
        try:
            return self._gate.caller(authorizations, names, context.peer())
        except Unauthenticated as error:
            log_stranger(context.peer(), method, error)
            raise


def _check_role(caller: Caller, method: str) -> None:
    try:
        caller.check_manages()
    except PermissionDenied as error:
        log_refusal(caller, method, error)
        raise


def _entered(handler: Any, enter: Callable[[Any], Awaitable[None]]) -> grpc.RpcMethodHandler:
    """Every handler takes a stream, which is the same on the wire: of a call that has one request
    grpc would have read that, and kept its megabytes, before anybody could say who calls.
    """
    behaviour = behaviour_of(handler)
    read = _all if handler.request_streaming else _first

    async def run(requests: AsyncIterator[Any], context: Any) -> Any:
        await enter(context)
        return await behaviour(await read(requests, context), context)

    async def stream(requests: AsyncIterator[Any], context: Any) -> AsyncIterator[Any]:
        await enter(context)
        async for response in behaviour(await read(requests, context), context):
            yield response

    make = maker(request_streaming=True, response_streaming=handler.response_streaming)
    return make(
        stream if inspect.isasyncgenfunction(behaviour) else run,
        request_deserializer=handler.request_deserializer,
        response_serializer=handler.response_serializer,
    )


async def _all(requests: AsyncIterator[Any], context: Any) -> AsyncIterator[Any]:
    return requests


async def _first(requests: AsyncIterator[Any], context: Any) -> Any:
    async for request in requests:
        return request
    await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "the call has no message; send one")


def _unknown(enter: Callable[[Any], Awaitable[None]]) -> grpc.RpcMethodHandler:
    """Only who has a key learns that there is no such method."""

    async def run(_: Any, context: Any) -> None:
        await enter(context)
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, "Method not found!")

    handler: grpc.RpcMethodHandler = maker(request_streaming=True, response_streaming=True)(run)
    return handler

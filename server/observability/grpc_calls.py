"""The outermost interceptor of the gRPC server: counts every call, health and reflection too."""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeAlias

import grpc

from loramux.server.grpc_handlers import behaviour_of, maker
from loramux.server.observability.calls import CallObserver, Rpc, keep_trace_headers

Context: TypeAlias = grpc.aio.ServicerContext

_CODES = {code.value[0]: code.name for code in grpc.StatusCode}
KINDS: Mapping[tuple[bool, bool], str] = {
    (False, False): "unary",
    (False, True): "server_stream",
    (True, False): "client_stream",
    (True, True): "bidi_stream",
}
"""Whether request and response are streams → the kind."""
UNKNOWN = "unknown"
"""The service and method of a call for none that there is: clients make up any name."""


class ObservedGrpc(grpc.aio.ServerInterceptor):
    """Tells an observer of every call, also of those that other interceptors answer."""

    def __init__(self, observer: CallObserver, methods: Mapping[str, str]) -> None:
        """`methods`: those that there are, as `/service/method` → the kind."""
        self._observer = observer
        self._methods = methods

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler | None:
        """Wrap a handler; an unknown method has one where an interceptor answers for it."""
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        streams = handler.request_streaming, handler.response_streaming
        path = handler_call_details.method
        kind = self._methods.get(path, KINDS[streams])
        is_known = path in self._methods
        _, service, method = path.split("/") if is_known else ("", UNKNOWN, UNKNOWN)
        watch = _Watch(self._observer, Rpc(kind, service, method))
        make = maker(request_streaming=streams[0], response_streaming=streams[1])
        handled: grpc.RpcMethodHandler = make(
            _observed(behaviour_of(handler), watch),
            request_deserializer=handler.request_deserializer,
            response_serializer=handler.response_serializer,
        )
        return handled


class _Watch:
    def __init__(self, observer: CallObserver, rpc: Rpc) -> None:
        self._observer = observer
        self._rpc = rpc

    @contextmanager
    def over(self, context: Context) -> Iterator[None]:
        """Report one call, from entering to leaving; errors go on."""
        keep_trace_headers(context.invocation_metadata() or ())
        begun, error = time.monotonic(), None
        self._observer.on_rpc_started(self._rpc)
        try:
            yield
        except BaseException as raised:
            error = raised
            raise
        finally:
            code = _code(context, error)
            self._observer.on_rpc_handled(self._rpc, code, time.monotonic() - begun)


def _observed(behaviour: Callable[..., Any], watch: _Watch) -> Callable[..., Any]:
    if inspect.isasyncgenfunction(behaviour):

        async def stream(request: Any, context: Context) -> AsyncIterator[Any]:
            with watch.over(context):
                async for response in behaviour(request, context):
                    yield response

        return stream

    async def call(request: Any, context: Context) -> Any:
        with watch.over(context):
            return await behaviour(request, context)

    return call


def _code(context: Context, error: BaseException | None) -> str:
    """The name of the status that the caller gets, or would get if it were still there."""
    if isinstance(error, asyncio.CancelledError | GeneratorExit):
        left_s = context.time_remaining()
        is_late = left_s is not None and left_s <= 0
        return "DEADLINE_EXCEEDED" if is_late else "CANCELLED"
    code = context.code()
    if isinstance(code, grpc.StatusCode):
        return code.name
    if error is not None and not code:
        return "UNKNOWN"
    return _CODES[code or 0]

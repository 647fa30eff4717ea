"""The boundary of our gRPC calls: each request is parsed, each call counted, and every exception
becomes a typed status.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from typing import Any, TypeAlias

import grpc
from google.protobuf import descriptor_pool
from google.protobuf.descriptor import Descriptor
from google.protobuf.message import DecodeError, Message

from lora_runtime.engine.worker_pool import WorkerPool
from lora_runtime.errors import InvalidRequest, Unavailable
from loramux.server.errors import grpc_status
from loramux.server.grpc_handlers import behaviour_of, maker
from loramux.server.rpc.message_size import check_size
from loramux.server.running_calls import Calls

PACKAGE_PREFIX = "/loramux."
LONG_MESSAGE = 1 << 16
"""Bytes from which parsing, and whatever else reads all of a message, leaves the event loop; below,
a thread costs more."""
MAX_WAITING = 256
END_S = 10.0
"""Seconds in which a caller must have taken the status of its call."""

Context: TypeAlias = grpc.aio.ServicerContext


class Boundary(grpc.aio.ServerInterceptor):
    """Parses the requests of our own services and gives every failure its typed status."""

    def __init__(self, calls: Calls, max_message_bytes: int) -> None:
        self._calls = calls
        self._max_message_bytes = max_message_bytes
        self._parsers = WorkerPool("parsing", num_threads=2, max_waiting=MAX_WAITING)

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler | None:
        """Wrap a handler of our own; others, and unknown methods, pass as they are."""
        handler = await continuation(handler_call_details)
        if handler is None or not handler_call_details.method.startswith(PACKAGE_PREFIX):
            return handler
        kind = _request_kind(handler_call_details.method)
        parse = partial(_parsed, handler.request_deserializer, kind, self._max_message_bytes)
        read = partial(_read, parse, self._parsers)
        serialise = partial(_serialised, handler.response_serializer, self._max_message_bytes)
        is_stream = handler.response_streaming
        make = maker(request_streaming=handler.request_streaming, response_streaming=is_stream)
        guarded: grpc.RpcMethodHandler = make(
            _guarded(
                behaviour_of(handler),
                partial(_read_parts, read) if handler.request_streaming else read,
                self._calls,
                None if is_stream else serialise,
            ),
            request_deserializer=None,
            response_serializer=handler.response_serializer if is_stream else None,
        )
        return guarded


def _guarded(
    behaviour: Callable[[Any, Context], Awaitable[Message | None]],
    read: Callable[[Any], Awaitable[Any]],
    calls: Calls,
    serialise: Callable[[Any], bytes] | None,
) -> Callable[[Any, Context], Awaitable[bytes | None]]:
    async def guarded(request: Any, context: Context) -> Any:
        try:
            with calls.running():
                response = await behaviour(await read(request), context)
                return response if serialise is None else serialise(response)
        except grpc.aio.AbortError:
            raise
        except asyncio.CancelledError:
            if not calls.is_cut:
                raise
            await _end(context, Unavailable("the server is shutting down"))
        except Exception as error:
            await _end(context, error)

    return guarded


async def _end(context: Context, error: Exception) -> None:
    """End a call with a typed status. It stands behind what the caller has not read yet, and that
    may never be read: the call is over for us, and grpc sends the status if it can.
    """
    try:
        async with asyncio.timeout(END_S):
            await context.abort_with_status(grpc_status(error))
    except TimeoutError:
        raise grpc.aio.AbortError from None


def _parsed(
    parse: Callable[[bytes], Message], kind: Descriptor, max_bytes: int, data: bytes
) -> Message:
    if len(data) > max_bytes:
        raise InvalidRequest(f"the message has {len(data)} bytes; at most {max_bytes} are taken")
    check_size(data, kind)
    try:
        return parse(data)
    except DecodeError:
        raise InvalidRequest(
            "the request cannot be parsed; every text in it must be valid UTF-8"
        ) from None


async def _read(parse: Callable[[bytes], Message], parsers: WorkerPool, data: bytes) -> Message:
    return parse(data) if len(data) < LONG_MESSAGE else await parsers.run(parse, data)


async def _read_parts(
    read: Callable[[bytes], Awaitable[Message]], parts: AsyncIterator[bytes]
) -> AsyncIterator[Message]:
    return (await read(part) async for part in parts)


def _request_kind(method: str) -> Descriptor:
    name = method.removeprefix("/").replace("/", ".")
    kind: Descriptor = descriptor_pool.Default().FindMethodByName(name).input_type
    return kind


def _serialised(serialise: Callable[[Any], bytes], max_bytes: int, response: Any) -> bytes:
    """A unary response; clients refuse larger ones, without saying which."""
    data = serialise(response)
    if len(data) > max_bytes:
        raise InvalidRequest(
            f"the answer has {len(data)} bytes; at most {max_bytes} are sent. Ask for one adapter "
            "at a time"
        )
    return data

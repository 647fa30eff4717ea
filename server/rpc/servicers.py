"""The methods of the gRPC services: each decodes, calls the part it is about and encodes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from functools import partial
from typing import TypeAlias, TypeVar

import grpc
from google.protobuf.message import Message

from lora_runtime.engine.worker_pool import WorkerPool
from lora_runtime.errors import InvalidRequest, Overloaded
from loramux.server.access.caller import CURRENT
from loramux.server.adapters.adapters import Adapters
from loramux.server.fields import adapter_name
from loramux.server.generation.generation import Generation
from loramux.server.generation.prompts import Prompts
from loramux.server.rpc import codec
from loramux.server.rpc.boundary import LONG_MESSAGE, MAX_WAITING
from loramux.server.service import ServerFacts
from loramux.v1 import (
    adapters_pb2,
    adapters_pb2_grpc,
    generation_pb2,
    generation_pb2_grpc,
    server_pb2,
    server_pb2_grpc,
)

Context: TypeAlias = grpc.aio.ServicerContext
T = TypeVar("T")

STALL_S = 120.0
"""Seconds in which a caller must have read some of its stream."""
MIN_BYTES_PER_S = 16 << 10
"""What is added to that for a message, which may be one of megabytes, at so many bytes a second."""


class GenerationServicer(generation_pb2_grpc.GenerationServiceServicer):
    """loramux.v1.GenerationService."""

    def __init__(self, prompts: Prompts, generation: Generation) -> None:
        self._prompts = prompts
        self._generation = generation
        self._decoders = WorkerPool("decoding", num_threads=2, max_waiting=MAX_WAITING)

    async def Generate(self, request: generation_pb2.GenerateRequest, context: Context) -> None:
        """Stream one generation; the call's deadline is the request's."""
        decode = partial(
            codec.decode_generate,
            request,
            context.time_remaining(),
            self._prompts.limits,
            CURRENT.get(),
            context.peer(),
        )
        call = await self._decoded(request, decode)
        async with aclosing(self._generation.generate(call)) as events:
            async for event in events:
                await _write(context, codec.encode_event(event))

    async def Tokenize(
        self, request: generation_pb2.TokenizeRequest, context: Context
    ) -> generation_pb2.TokenizeResponse:
        """Show a prompt's token ids."""
        decode = partial(codec.decode_prompt, request, self._prompts.limits)
        prompt = await self._decoded(request, decode)
        token_ids = await self._prompts.tokenize(prompt)
        return generation_pb2.TokenizeResponse(token_ids=token_ids)

    async def _decoded(self, request: Message, decode: Callable[[], T]) -> T:
        """Translate a request, off the event loop where it is long."""
        if request.ByteSize() < LONG_MESSAGE:
            return decode()
        return await self._decoders.run(decode)


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
            adapter_name(request.name),
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
            adapter_name(request.name),
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
        name = adapter_name(request.name)
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
        name = adapter_name(request.name)
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


async def _write(context: Context, message: Message) -> None:
    """Send a message of a stream, which waits until the caller has read enough of those before.

    Raises Overloaded where it reads nothing: what its call holds is others' too.
    """
    try:
        async with asyncio.timeout(STALL_S + message.ByteSize() / MIN_BYTES_PER_S):
            await context.write(message)
    except TimeoutError:
        raise Overloaded(
            f"the stream has not been read for {STALL_S:g} s; read it as it comes, or ask for less"
        ) from None

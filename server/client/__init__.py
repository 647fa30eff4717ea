"""Python clients of a loramux server: `Client` blocks, `AsyncClient` is its asyncio twin.

Results are the messages of protos/loramux/v1. A failed call raises the class of
lora_runtime.errors that the server raised, with its `field`; TimeoutError past the deadline.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self, Unpack

import grpc

from lora_runtime.errors import Unavailable
from loramux.server.client.channel import (
    HEALTH_REQUEST,
    SERVING,
    AsyncGeneration,
    Generation,
    Stubs,
    answered,
    authorization,
    dial,
    tls_credentials,
    typed_errors,
)
from loramux.server.client.requests import (
    Messages,
    Options,
    choose,
    generate_request,
    tokenize_request,
)
from loramux.server.client.uploads import Outgoing, Progress, no_progress
from loramux.v1 import adapters_pb2, server_pb2

__all__ = ["AsyncClient", "Client", "tls_credentials"]

DEFAULT_TARGET = "127.0.0.1:50051"
TIMEOUT_S = 60.0
LOAD_TIMEOUT_S = 300.0
UPLOAD_TIMEOUT_S = 1800.0
GENERATE_TIMEOUT_S = 600.0
READY_PERIOD_S = 0.1


class Client:
    """A blocking client; use it as a context manager, or `close` it."""

    def __init__(
        self,
        target: str = DEFAULT_TARGET,
        *,
        api_key: str | None = None,
        credentials: grpc.ChannelCredentials | None = None,
    ) -> None:
        """`target` is host:port. `api_key` goes with every call. Without `credentials`, which
        `tls_credentials` makes of files, the connection is not encrypted.
        """
        self.target = target
        self._metadata = authorization(api_key)
        self._channel = dial(grpc, target, credentials)
        self._stubs = Stubs(self._channel)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection; running calls are cancelled."""
        self._channel.close()

    def generate(
        self,
        text: str | None = None,
        *,
        messages: Messages | None = None,
        token_ids: Sequence[int] | None = None,
        adapter: str | None = None,
        adapters: Mapping[str, float] | None = None,
        timeout_s: float = GENERATE_TIMEOUT_S,
        **options: Unpack[Options],
    ) -> Generation:
        """Continue a prompt with an adapter, several (name to weight) or, without any, the base."""
        request = generate_request(text, messages, token_ids, choose(adapter, adapters), options)
        return Generation(
            self._stubs.generation.Generate(request, timeout=timeout_s, metadata=self._metadata)
        )

    def tokenize(self, text: str | None = None, *, messages: Messages | None = None) -> list[int]:
        """Return the token ids of a text or a conversation."""
        request = tokenize_request(text, messages)
        response = self._call(self._stubs.generation.Tokenize, request)
        return list(response.token_ids)

    def load_adapter(
        self,
        name: str,
        source: str,
        *,
        replace: bool = False,
        pin: bool = False,
        timeout_s: float = LOAD_TIMEOUT_S,
    ) -> adapters_pb2.LoadAdapterResponse:
        """Load an adapter's folder, as the server sees it, or what lies elsewhere, under a name;
        `pin` keeps it in the device pool.
        """
        request = adapters_pb2.LoadAdapterRequest(
            name=name, source=source, replace=replace, pin=pin
        )
        return self._call(self._stubs.adapters.LoadAdapter, request, timeout_s)

    def upload_adapter(
        self,
        name: str,
        folder: Path | str,
        *,
        replace: bool = False,
        on_progress: Progress = no_progress,
        timeout_s: float = UPLOAD_TIMEOUT_S,
    ) -> adapters_pb2.AdapterInfo:
        """Send the files of a folder on this machine and load them under a name.

        `on_progress` is told of the bytes sent and of all bytes, from another thread.
        """
        outgoing = Outgoing(name, Path(folder), replace)
        upload = self._stubs.adapters.UploadAdapter
        return self._call(upload, outgoing.parts(on_progress), timeout_s).adapter

    def rollback_adapter(self, name: str) -> adapters_pb2.AdapterInfo:
        """Swap a name's content and the one it had before; running requests end on theirs."""
        request = adapters_pb2.RollbackAdapterRequest(name=name)
        return self._call(self._stubs.adapters.RollbackAdapter, request).adapter

    def unload_adapter(
        self, name: str, *, cancel: bool = False, wait: bool = False, timeout_s: float = TIMEOUT_S
    ) -> adapters_pb2.AdapterInfo:
        """Take a name away; `cancel` ends its requests, `wait` returns when its memory is free."""
        request = adapters_pb2.UnloadAdapterRequest(name=name, cancel=cancel, wait=wait)
        return self._call(self._stubs.adapters.UnloadAdapter, request, timeout_s).adapter

    def list_adapters(self) -> list[adapters_pb2.AdapterInfo]:
        """Return every adapter by name."""
        request = adapters_pb2.ListAdaptersRequest()
        return list(self._call(self._stubs.adapters.ListAdapters, request).adapters)

    def list_stored_adapters(self) -> adapters_pb2.ListStoredAdaptersResponse:
        """Return what uploads have left in the server's store."""
        request = adapters_pb2.ListStoredAdaptersRequest()
        return self._call(self._stubs.adapters.ListStoredAdapters, request)

    def delete_stored_adapter(self, source: str) -> adapters_pb2.StoredAdapter:
        """Delete from the store what no name holds; `source` is its digest."""
        request = adapters_pb2.DeleteStoredAdapterRequest(source=source)
        return self._call(self._stubs.adapters.DeleteStoredAdapter, request).stored

    def get_adapter(self, name: str) -> adapters_pb2.AdapterInfo:
        """Return one adapter."""
        request = adapters_pb2.GetAdapterRequest(name=name)
        return self._call(self._stubs.adapters.GetAdapter, request).adapter

    def server_info(self) -> server_pb2.GetServerInfoResponse:
        """Return versions, base, limits and features of the server."""
        return self._call(self._stubs.server.GetServerInfo, server_pb2.GetServerInfoRequest())

    def is_serving(self, *, timeout_s: float = TIMEOUT_S) -> bool:
        """Tell whether the server answers and calls itself healthy."""
        try:
            health = self._call(self._stubs.health.Check, HEALTH_REQUEST, timeout_s)
        except (Unavailable, TimeoutError):
            return False
        return health == SERVING

    def wait_ready(self, timeout_s: float = TIMEOUT_S) -> None:
        """Return once the server is SERVING. Raises Unavailable after `timeout_s`."""
        deadline = time.monotonic() + timeout_s
        while not self.is_serving(timeout_s=1):
            if time.monotonic() > deadline:
                raise Unavailable(f"the server was not ready after {timeout_s:g} seconds")
            time.sleep(READY_PERIOD_S)

    def _call(
        self, method: Callable[..., Any], request: object, timeout_s: float = TIMEOUT_S
    ) -> Any:
        with typed_errors():
            return method(request, timeout=timeout_s, metadata=self._metadata)


class AsyncClient:
    """The asyncio twin of Client; make and use it in one event loop."""

    def __init__(
        self,
        target: str = DEFAULT_TARGET,
        *,
        api_key: str | None = None,
        credentials: grpc.ChannelCredentials | None = None,
    ) -> None:
        """`target` is host:port. `api_key` goes with every call. Without `credentials`, which
        `tls_credentials` makes of files, the connection is not encrypted.
        """
        self.target = target
        self._metadata = authorization(api_key)
        self._channel = dial(grpc.aio, target, credentials)
        self._upload_channel = dial(grpc, target, credentials)
        """Connects when it is used. What a server says while grpc.aio writes is lost."""
        self._stubs = Stubs(self._channel)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connection; running calls are cancelled."""
        self._upload_channel.close()
        await self._channel.close()

    def generate(
        self,
        text: str | None = None,
        *,
        messages: Messages | None = None,
        token_ids: Sequence[int] | None = None,
        adapter: str | None = None,
        adapters: Mapping[str, float] | None = None,
        timeout_s: float = GENERATE_TIMEOUT_S,
        **options: Unpack[Options],
    ) -> AsyncGeneration:
        """Continue a prompt with an adapter, several (name to weight) or, without any, the base."""
        request = generate_request(text, messages, token_ids, choose(adapter, adapters), options)
        return AsyncGeneration(
            self._stubs.generation.Generate(request, timeout=timeout_s, metadata=self._metadata)
        )

    async def tokenize(
        self, text: str | None = None, *, messages: Messages | None = None
    ) -> list[int]:
        """Return the token ids of a text or a conversation."""
        request = tokenize_request(text, messages)
        response = await self._call(self._stubs.generation.Tokenize, request)
        return list(response.token_ids)

    async def load_adapter(
        self,
        name: str,
        source: str,
        *,
        replace: bool = False,
        pin: bool = False,
        timeout_s: float = LOAD_TIMEOUT_S,
    ) -> adapters_pb2.LoadAdapterResponse:
        """Load an adapter's folder, as the server sees it, or what lies elsewhere, under a name;
        `pin` keeps it in the device pool.
        """
        request = adapters_pb2.LoadAdapterRequest(
            name=name, source=source, replace=replace, pin=pin
        )
        return await self._call(self._stubs.adapters.LoadAdapter, request, timeout_s)

    async def upload_adapter(
        self,
        name: str,
        folder: Path | str,
        *,
        replace: bool = False,
        on_progress: Progress = no_progress,
        timeout_s: float = UPLOAD_TIMEOUT_S,
    ) -> adapters_pb2.AdapterInfo:
        """Send the files of a folder on this machine and load them under a name.

        `on_progress` is told as by `Client`, from another thread.
        """
        outgoing = await asyncio.to_thread(Outgoing, name, Path(folder), replace)
        upload = Stubs(self._upload_channel).adapters.UploadAdapter
        parts = outgoing.parts(on_progress)
        call = upload.future(parts, timeout=timeout_s, metadata=self._metadata)
        return (await answered(call)).adapter

    async def rollback_adapter(self, name: str) -> adapters_pb2.AdapterInfo:
        """Swap a name's content and the one it had before; running requests end on theirs."""
        request = adapters_pb2.RollbackAdapterRequest(name=name)
        return (await self._call(self._stubs.adapters.RollbackAdapter, request)).adapter

    async def unload_adapter(
        self, name: str, *, cancel: bool = False, wait: bool = False, timeout_s: float = TIMEOUT_S
    ) -> adapters_pb2.AdapterInfo:
        """Take a name away; `cancel` ends its requests, `wait` returns when its memory is free."""
        request = adapters_pb2.UnloadAdapterRequest(name=name, cancel=cancel, wait=wait)
        return (await self._call(self._stubs.adapters.UnloadAdapter, request, timeout_s)).adapter

    async def list_adapters(self) -> list[adapters_pb2.AdapterInfo]:
        """Return every adapter by name."""
        request = adapters_pb2.ListAdaptersRequest()
        response = await self._call(self._stubs.adapters.ListAdapters, request)
        return list(response.adapters)

    async def list_stored_adapters(self) -> adapters_pb2.ListStoredAdaptersResponse:
        """Return what uploads have left in the server's store."""
        request = adapters_pb2.ListStoredAdaptersRequest()
        return await self._call(self._stubs.adapters.ListStoredAdapters, request)

    async def delete_stored_adapter(self, source: str) -> adapters_pb2.StoredAdapter:
        """Delete from the store what no name holds; `source` is its digest."""
        request = adapters_pb2.DeleteStoredAdapterRequest(source=source)
        return (await self._call(self._stubs.adapters.DeleteStoredAdapter, request)).stored

    async def get_adapter(self, name: str) -> adapters_pb2.AdapterInfo:
        """Return one adapter."""
        request = adapters_pb2.GetAdapterRequest(name=name)
        return (await self._call(self._stubs.adapters.GetAdapter, request)).adapter

    async def server_info(self) -> server_pb2.GetServerInfoResponse:
        """Return versions, base, limits and features of the server."""
        return await self._call(self._stubs.server.GetServerInfo, server_pb2.GetServerInfoRequest())

    async def is_serving(self, *, timeout_s: float = TIMEOUT_S) -> bool:
        """Tell whether the server answers and calls itself healthy."""
        try:
            health = await self._call(self._stubs.health.Check, HEALTH_REQUEST, timeout_s)
        except (Unavailable, TimeoutError):
            return False
        return health == SERVING

    async def wait_ready(self, timeout_s: float = TIMEOUT_S) -> None:
        """Return once the server is SERVING. Raises Unavailable after `timeout_s`."""
        deadline = time.monotonic() + timeout_s
        while not await self.is_serving(timeout_s=1):
            if time.monotonic() > deadline:
                raise Unavailable(f"the server was not ready after {timeout_s:g} seconds")
            await asyncio.sleep(READY_PERIOD_S)

    async def _call(
        self, method: Callable[..., Any], request: object, timeout_s: float = TIMEOUT_S
    ) -> Any:
        with typed_errors():
            return await method(request, timeout=timeout_s, metadata=self._metadata)

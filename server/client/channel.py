"""A client's connection: channel, stubs, running generations, and the server's typed errors."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from lora_runtime.errors import InvalidRequest
from lora_runtime.plain_file import read_plain_file
from loramux.server.errors import from_rpc_error
from loramux.v1 import (
    adapters_pb2_grpc,
    generation_pb2,
    generation_pb2_grpc,
    server_pb2_grpc,
)

HEALTH_REQUEST = health_pb2.HealthCheckRequest()
SERVING = health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.SERVING)

_KEY = re.compile(r"[!-~]+")
_PORT = re.compile(r":\d+$")
_CHANNEL_OPTIONS = [
    ("grpc.max_receive_message_length", 8 << 20),
    ("grpc.keepalive_time_ms", 60_000),
]


class Generation:
    """A running generation. Iterate it once for its events, or take its whole text."""

    def __init__(self, call: Any) -> None:
        self._call = call

    def __iter__(self) -> Iterator[generation_pb2.GenerateResponse]:
        with typed_errors():
            try:
                yield from self._call
            finally:
                self._call.cancel()  # leaving early frees the row; no effect at the end

    def text(self) -> str:
        """Return the whole output, with `n` the first one; waits for the end of all."""
        return self.texts()[0]

    def texts(self) -> list[str]:
        """Return all outputs; waits for their ends."""
        return _texts(list(self))

    def cancel(self) -> None:
        """End it now; whoever iterates it gets concurrent.futures.CancelledError."""
        self._call.cancel()


class AsyncGeneration:
    """The asyncio twin of Generation."""

    def __init__(self, call: Any) -> None:
        self._call = call

    async def __aiter__(self) -> AsyncIterator[generation_pb2.GenerateResponse]:
        with typed_errors():
            try:
                async for event in self._call:
                    yield event
            finally:
                self._call.cancel()

    async def text(self) -> str:
        """Return the whole output, with `n` the first one; waits for the end of all."""
        return (await self.texts())[0]

    async def texts(self) -> list[str]:
        """Return all outputs; waits for their ends."""
        return _texts([event async for event in self])

    def cancel(self) -> None:
        """End it now; whoever iterates it gets asyncio.CancelledError."""
        self._call.cancel()


def _texts(events: Sequence[generation_pb2.GenerateResponse]) -> list[str]:
    """The text of each output, by index."""
    num_outputs = sum(event.HasField("finished") for event in events)
    parts: list[list[str]] = [[] for _ in range(num_outputs)]
    for event in events:
        if event.HasField("delta"):
            parts[event.delta.index].append(event.delta.text)
    return ["".join(own) for own in parts]


def dial(grpc_api: Any, target: str, credentials: grpc.ChannelCredentials | None) -> Any:
    """Open a channel of `grpc_api`, which is grpc or grpc.aio. Raises InvalidRequest for a target
    that is a web address or lacks a port, which gRPC would take for 443.
    """
    is_plain = "/" not in target and not target.startswith("unix")
    if target.startswith(("http:", "https:")) or (is_plain and not _PORT.search(target)):
        raise InvalidRequest(
            f"the server's address is {target!r}; it must be host:port, as 127.0.0.1:50051",
            field="address",
        )
    if credentials is None:
        return grpc_api.insecure_channel(target, options=_CHANNEL_OPTIONS)
    return grpc_api.secure_channel(target, credentials, options=_CHANNEL_OPTIONS)


def authorization(api_key: str | None) -> tuple[tuple[str, str], ...]:
    """Return what goes with each call. Raises InvalidRequest for a key that no header can hold."""
    if api_key is None:
        return ()
    if not _KEY.fullmatch(api_key):
        raise InvalidRequest(
            "the API key is empty, or has spaces or other than ASCII characters in it; copy it "
            "again",
            field="api_key",
        )
    return (("authorization", f"Bearer {api_key}"),)


def tls_credentials(
    ca: Path | str | None = None, cert: Path | str | None = None, key: Path | str | None = None
) -> grpc.ChannelCredentials:
    """Make credentials of PEM files: the roots of the server's certificate, by default those that
    gRPC brings, and the client's own certificate and its key, for a server that wants one. Raises
    InvalidRequest for a file that cannot be read.
    """
    if (cert is None) != (key is None):
        raise InvalidRequest("a client's certificate takes its key, and a key its certificate")
    return grpc.ssl_channel_credentials(*(_pem(file) for file in (ca, key, cert)))


def _pem(file: Path | str | None) -> bytes | None:
    try:
        return None if file is None else read_plain_file(Path(file))
    except OSError as error:
        raise InvalidRequest(f"{file} cannot be read: {error.strerror or error}") from None


class Stubs:
    """The generated stubs of every service on one channel."""

    def __init__(self, channel: grpc.Channel | grpc.aio.Channel) -> None:
        self.generation = generation_pb2_grpc.GenerationServiceStub(channel)
        self.adapters = adapters_pb2_grpc.AdapterServiceStub(channel)
        self.server = server_pb2_grpc.ServerServiceStub(channel)
        self.health = health_pb2_grpc.HealthStub(channel)


async def answered(call: Any) -> Any:
    """Return the answer to a running call of blocking stubs. Who leaves early ends the call.

    Raises as `typed_errors`.
    """
    loop, is_over = asyncio.get_running_loop(), asyncio.Event()

    def tell(_: object) -> None:
        with suppress(RuntimeError):  # the loop has closed: nobody waits any more
            loop.call_soon_threadsafe(is_over.set)

    call.add_done_callback(tell)
    try:
        await is_over.wait()
        with typed_errors():
            return call.result()
    finally:
        call.cancel()  # no effect at the end


@contextmanager
def typed_errors() -> Iterator[None]:
    """Raise what the server raised in place of grpc's own error."""
    try:
        yield
    except grpc.RpcError as error:
        raise from_rpc_error(error) from None

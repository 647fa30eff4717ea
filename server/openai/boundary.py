"""Where HTTP's API meets the service: reads a request, counts it, and gives every failure OpenAI's
form of an error. A caller that goes away ends its call.
"""

from __future__ import annotations

import asyncio
import math
import re
import uuid
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ParamSpec, TypeVar

import structlog
from starlette.types import Receive, Scope, Send

from lora_runtime.engine.worker_pool import WorkerPool
from lora_runtime.errors import Unavailable
from loramux.server.access.caller import Caller
from loramux.server.errors import LOADING_RETRY_S, RETRY_AFTER_S, http_error
from loramux.server.openai.body import Bodies, CallerGone, Refusal
from loramux.server.openai.json_text import encoded, encoded_in_parts
from loramux.server.peers import client_address, peer_of
from loramux.server.running_calls import Calls
from loramux.server.service import Service

REQUEST_ID = b"x-request-id"

P = ParamSpec("P")
T = TypeVar("T")

_RETRYABLE = (408, 429, 503)
_REQUEST_ID = re.compile(r"[!-~]{1,128}")

logger = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Backend:
    """What the routes work on."""

    find_service: Callable[[], Service | None]
    """Gives the service, or None while the server loads or drains."""
    calls: Calls
    """The server's running calls, those of gRPC included."""
    bodies: Bodies = field(default_factory=Bodies)
    long_work: WorkerPool = field(
        default_factory=lambda: WorkerPool("long answers", num_threads=2, max_waiting=256)
    )
    """Writes answers that would hold up the event loop."""

    def service(self) -> Service:
        """Return the service. Raises Unavailable while calls are not taken."""
        service = self.find_service()
        if service is None:
            raise Unavailable(
                "the server is loading or shutting down; try again later",
                retry_after_s=LOADING_RETRY_S,
            )
        return service


class Answer:
    """The answer to one request: a JSON value, or a stream of server-sent events."""

    def __init__(self, send: Send, request_id: str, long_work: WorkerPool) -> None:
        self._send = send
        self._long_work = long_work
        self._request_id = request_id
        self._is_started = self._is_over = False

    async def json(
        self,
        value: Any,
        status: int = 200,
        retry_after_s: int | None = None,
        *,
        is_long: bool = False,
    ) -> None:
        """Answer with a JSON value; a long one is written off the event loop."""
        body = (await self._text(value, is_long)).encode()
        await self._whole(body, b"application/json", status, retry_after_s)

    async def text(self, text: str) -> None:
        """Answer with plain text."""
        await self._whole(text.encode(), b"text/plain; charset=utf-8", 200, None)

    async def begin_events(self) -> None:
        """Begin a stream of server-sent events."""
        headers = [(b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no")]
        await self._start(200, b"text/event-stream; charset=utf-8", headers)

    async def event(self, value: Any, name: str = "", *, is_long: bool = False) -> None:
        """Send one event; returns when the connection has room for more."""
        data = f"data: {await self._text(value, is_long)}\n\n"
        await self._write(f"event: {name}\n{data}" if name else data)

    async def end_events(self, last: str = "") -> None:
        """End a stream, with one last event that is no JSON."""
        self._is_over = True
        data = f"data: {last}\n\n".encode() if last else b""
        await self._send({"type": "http.response.body", "body": data})

    async def fail(self, error: BaseException) -> None:
        """Answer with an error; in a stream it is the last event."""
        status, body = http_error(error)
        if isinstance(error, Refusal):
            status = error.status
        if self._is_over:
            logger.error("a request failed after its answer", exc_info=error)
        elif self._is_started:
            await self.event(body)
            await self.end_events()
        else:
            wait_s = getattr(error, "retry_after_s", None) or RETRY_AFTER_S
            await self.json(body, status, math.ceil(wait_s) if status in _RETRYABLE else None)

    async def _text(self, value: Any, is_long: bool) -> str:
        return await self._long_work.run(encoded_in_parts, value) if is_long else encoded(value)

    async def _whole(
        self, body: bytes, content_type: bytes, status: int, retry_after_s: int | None
    ) -> None:
        headers = [(b"content-length", str(len(body)).encode())]
        if retry_after_s is not None:
            headers.append((b"retry-after", str(retry_after_s).encode()))
        await self._start(status, content_type, headers)
        self._is_over = True
        await self._send({"type": "http.response.body", "body": body})

    async def _start(
        self, status: int, content_type: bytes, headers: list[tuple[bytes, bytes]]
    ) -> None:
        self._is_started = True
        names = [(b"content-type", content_type), (REQUEST_ID, self._request_id.encode())]
        message = {"type": "http.response.start", "status": status, "headers": [*names, *headers]}
        await self._send(message)

    async def _write(self, text: str) -> None:
        await self._send({"type": "http.response.body", "body": text.encode(), "more_body": True})


@dataclass(frozen=True, slots=True)
class Exchange:
    """One request and where its answer goes."""

    service: Service
    request_id: str
    caller: Caller
    client: str
    """Who asks; see `Request.client`."""
    path: Mapping[str, str]
    """Parts of the path, by name."""
    body: dict[str, Any]
    """The JSON object that was sent; empty where the route takes none."""
    has_long_body: bool
    answer: Answer
    long_work: WorkerPool
    """For what would hold up the event loop."""

    async def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call what reads all of the body; off the event loop where that is long."""
        if not self.has_long_body:
            return function(*args, **kwargs)
        return await self.long_work.run(function, *args, **kwargs)


Handler = Callable[[Exchange], Awaitable[None]]


class Endpoint:
    """One route as an ASGI application."""

    def __init__(self, backend: Backend, handle: Handler, *, takes_body: bool = True) -> None:
        self._backend = backend
        self._handle = handle
        self._takes_body = takes_body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Read the request and run its call in a task of its own, until it or the caller ends."""
        answer = Answer(send, _request_id(scope), self._backend.long_work)
        body: dict[str, Any] = {}
        is_long = False
        try:
            if self._takes_body:
                body, is_long = await self._backend.bodies.read(scope, receive)
        except CallerGone:
            return
        except Exception as error:
            return await answer.fail(error)
        call = asyncio.create_task(self._run(scope, body, is_long, answer))
        leaving = asyncio.create_task(_left(receive))
        try:
            await asyncio.wait((call, leaving), return_when=asyncio.FIRST_COMPLETED)
        finally:
            call.cancel()
            leaving.cancel()
            await asyncio.wait((call, leaving))
        if not call.cancelled():
            call.result()

    async def _run(self, scope: Scope, body: dict[str, Any], is_long: bool, answer: Answer) -> None:
        calls = self._backend.calls
        try:
            with calls.running():
                caller: Caller = scope["state"]["caller"]  # the gate lets nobody in without
                exchange = Exchange(
                    service=self._backend.service(),
                    request_id=answer._request_id,
                    caller=caller,
                    client=caller.client("", _address(scope)),
                    path=scope.get("path_params", {}),
                    body=body,
                    has_long_body=is_long,
                    answer=answer,
                    long_work=self._backend.long_work,
                )
                await self._handle(exchange)
        except asyncio.CancelledError:
            if not calls.is_cut:
                raise
            await answer.fail(Unavailable("the server is shutting down"))
        except Exception as error:
            await answer.fail(error)


async def _left(receive: Receive) -> None:
    """Return when the caller has closed the connection, or the answer is complete."""
    while (await receive())["type"] != "http.disconnect":
        pass


def _request_id(scope: Scope) -> str:
    """The caller's own name for the request, if it is one, or a new one."""
    given = next((value for name, value in scope["headers"] if name == REQUEST_ID), b"")
    text = given.decode("latin-1")
    return text if _REQUEST_ID.fullmatch(text) else uuid.uuid4().hex


def _address(scope: Scope) -> str:
    host, port = scope.get("client") or ("", 0)
    return client_address(peer_of(host, port))

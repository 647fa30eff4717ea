"""The body of a request: JSON of a bounded size, read in bounded time, parsed off the event loop
where it is long.
"""

from __future__ import annotations

import asyncio
from typing import Any

from starlette.types import Receive, Scope

from lora_runtime.engine.worker_pool import WorkerPool
from lora_runtime.errors import InvalidRequest, Overloaded
from lora_runtime.strict_json import parse_object
from loramux.server.openai.json_size import check_size

MAX_BODY_BYTES = 8 << 20
MAX_BODIES_BYTES = 256 << 20
"""Bytes of all bodies that are being received."""
MAX_KEYS = 4096
"""Keys of one object: what reports each wrong one has a bounded number to report."""
READ_S = 60.0
LONG_BODY = 1 << 16
"""Bytes from which parsing, and whatever else reads all of a body, leaves the event loop; below, a
thread costs more."""
MAX_WAITING = 256
_RECEIVED_AT_MOST = 2
"""Times the largest body: what is a little too large is read to its end, so that its sender gets
the answer and not a broken connection."""


class CallerGone(Exception):
    """The caller closed the connection before its request was complete."""


class Refusal(InvalidRequest):
    """A request that HTTP has a status of its own for."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Bodies:
    """Reads the bodies of one server."""

    def __init__(self) -> None:
        self._num_bytes = 0
        self._parsers = WorkerPool("parsing", num_threads=2, max_waiting=MAX_WAITING)

    async def read(self, scope: Scope, receive: Receive) -> tuple[dict[str, Any], bool]:
        """Return the JSON object that a request holds, and whether it is long.

        Raises Refusal (content type, size, time), InvalidRequest (field `body`), Overloaded where
        others are sending too much, and CallerGone.
        """
        _check_type(scope)
        try:
            async with asyncio.timeout(READ_S):
                content = await self._received(receive)
        except TimeoutError:
            raise Refusal(408, f"the body has not arrived within {READ_S:g} seconds") from None
        if len(content) < LONG_BODY:
            return _parsed(content), False
        return await self._parsers.run(_parsed, content), True

    async def _received(self, receive: Receive) -> bytes:
        parts: list[bytes] = []
        num_bytes = num_counted = 0
        is_complete = False
        try:
            while not is_complete:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise CallerGone
                part, is_complete = message.get("body", b""), not message.get("more_body", False)
                num_bytes += len(part)
                if num_bytes > _RECEIVED_AT_MOST * MAX_BODY_BYTES:
                    break
                if num_bytes <= MAX_BODY_BYTES:
                    parts.append(part)
                    num_counted += len(part)
                    self._count(len(part))
        finally:
            self._num_bytes -= num_counted
        if num_bytes > MAX_BODY_BYTES:
            raise Refusal(413, f"the body is too large; at most {MAX_BODY_BYTES} bytes are taken")
        return b"".join(parts)

    def _count(self, num_bytes: int) -> None:
        self._num_bytes += num_bytes
        if self._num_bytes > MAX_BODIES_BYTES:
            raise Overloaded("too many long requests arrive at once; try again later")


def _check_type(scope: Scope) -> None:
    given = next((value for name, value in scope["headers"] if name == b"content-type"), b"")
    kind = given.decode("latin-1").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise Refusal(415, f"the content type is {kind[:100]!r}; send application/json")


def _parsed(content: bytes) -> dict[str, Any]:
    check_size(content)
    return parse_object(content, "body", refusal=InvalidRequest, max_keys=MAX_KEYS)

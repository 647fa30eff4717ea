"""A gRPC caller by hand, frame by frame: it grants its server no more than the first window."""

from __future__ import annotations

import asyncio
import struct
from dataclasses import dataclass

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RST_STREAM, SETTINGS, PING, WINDOW_UPDATE = 0, 1, 3, 4, 6, 8
END_STREAM, ACK, END_HEADERS = 1, 1, 4
STREAM = 1


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    """Source: https://www.rfc-editor.org/rfc/rfc9113#section-4.1"""
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


def header(name: str, value: str) -> bytes:
    """A header without index and without Huffman's code."""
    parts = (text.encode() for text in (name, value))
    return b"\0" + b"".join(bytes([len(part)]) + part for part in parts)


@dataclass
class Caller:
    """One call of one message on a connection of its own."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    num_bytes: int = 0
    """Of messages that came."""
    trailers: bytes | None = None
    """The last headers, once the stream has ended; empty where it was reset."""

    async def call(self, method: str, message: bytes) -> None:
        """Send the request."""
        names = {
            ":method": "POST", ":scheme": "http", ":path": method, ":authority": "x",
            "te": "trailers", "content-type": "application/grpc",
        }  # fmt: skip
        heads = b"".join(header(name, value) for name, value in names.items())
        body = b"\0" + struct.pack(">I", len(message)) + message
        self.writer.write(
            PREFACE
            + frame(SETTINGS, 0, 0, b"")
            + frame(HEADERS, END_HEADERS, STREAM, heads)
            + frame(DATA, END_STREAM, STREAM, body)
        )
        await self.writer.drain()

    async def follow(self) -> None:
        """Read frames, without a word of how much more may come, until the stream ends."""
        while self.trailers is None:
            head = b"\0" + await self.reader.readexactly(9)
            size, kind, flags, stream = struct.unpack(">IBBI", head)
            payload = await self.reader.readexactly(size)
            if kind in (SETTINGS, PING) and not flags & ACK:
                self.writer.write(frame(kind, ACK, 0, payload if kind == PING else b""))
            elif kind == DATA and stream == STREAM:
                self.num_bytes += size
            elif (kind == HEADERS and flags & END_STREAM) or kind == RST_STREAM:
                self.trailers = payload if kind == HEADERS else b""

    def grant(self, num_bytes: int) -> None:
        """Let the server send so many bytes more."""
        for stream in (0, STREAM):
            self.writer.write(frame(WINDOW_UPDATE, 0, stream, struct.pack(">I", num_bytes)))


async def connected(port: int) -> Caller:
    """Return a caller of a server of this machine."""
    return Caller(*await asyncio.open_connection("127.0.0.1", port))

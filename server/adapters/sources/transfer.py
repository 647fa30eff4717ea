"""What a place that holds adapters must offer, whatever its protocol. All of it blocks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Network
from typing import Protocol, TypeAlias

from loramux.server.adapters.sources.location import Location

CONNECT_S = 10.0
"""Seconds that a connection may take to be made."""
MAX_PART_BYTES = 8 << 20

Network: TypeAlias = IPv4Network | IPv6Network


class TransferFailed(Exception):
    """Something that may go well another time; the text is for clients and names no secret."""


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """One file of an adapter, by its name in the adapter's folder."""

    name: str
    num_bytes: int
    sha256: str = ""
    """As its place says; "" where it does not."""


class Reader(Protocol):
    """One file while it is read."""

    def read(self, num_bytes: int) -> bytes:
        """Return the next bytes, as many as have come and at most `num_bytes`; b"" at the end.

        Raises TransferFailed.
        """
        ...

    def close(self) -> None:
        """Let go of it, also while another thread reads: that one then fails soon."""
        ...


class RemoteFolder(Protocol):
    """An adapter's folder elsewhere, as it was when it was listed."""

    @property
    def files(self) -> tuple[RemoteFile, ...]:
        """Those of the wanted files that are there."""
        ...

    @property
    def version(self) -> str:
        """Changes whenever a file changes; "" where the place does not tell."""
        ...

    def open(self, file: RemoteFile) -> Reader:
        """Begin to read a file. Raises as `list_folder`."""
        ...


class Place(Protocol):
    """A kind of place: a hub, object stores, web servers."""

    def list_folder(self, location: Location, names: Sequence[str]) -> RemoteFolder:
        """Find out which of the wanted files there are, and how large.

        Raises AdapterSourceRefused for what will not change by itself, and TransferFailed.
        """
        ...


Places: TypeAlias = Mapping[str, Place]
"""Scheme → the place that serves it."""

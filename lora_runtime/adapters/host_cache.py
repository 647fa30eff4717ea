"""Adapters in host memory, by digest: files that are loaded twice are kept once."""

from __future__ import annotations

import torch

from lora_runtime.adapters.packed_adapter import PackedAdapter
from lora_runtime.base.device import memory_bytes
from lora_runtime.errors import Overloaded

CPU = torch.device("cpu")


class HostMemoryFull(Overloaded):
    """An adapter of `num_bytes` finds no room beside the `held_bytes` of others: `max_bytes` are
    allowed in all.
    """

    def __init__(self, num_bytes: int, held_bytes: int, max_bytes: int) -> None:
        super().__init__(
            f"adapters take {held_bytes} bytes of host memory, this one {num_bytes} more, and "
            f"{max_bytes} are allowed; unload some first",
            field="adapters.host_bytes",
        )
        self.num_bytes, self.max_bytes = num_bytes, max_bytes


class HostCache:
    """Reference-counted packed adapters, keyed by digest."""

    def __init__(self, max_bytes: int | None = None) -> None:
        """`max_bytes`: what all adapters together may take; None: half of the machine's memory."""
        self._max_bytes = max_bytes or memory_bytes(CPU) // 2
        self._adapters: dict[str, PackedAdapter] = {}
        self._references: dict[str, int] = {}

    def __contains__(self, digest: str) -> bool:
        return digest in self._adapters

    def __getitem__(self, digest: str) -> PackedAdapter:
        return self._adapters[digest]

    @property
    def nbytes(self) -> int:
        return sum(adapter.nbytes for adapter in self._adapters.values())

    def check_room(self, num_bytes: int) -> None:
        """Raise HostMemoryFull if an adapter of `num_bytes` has no room beside the others."""
        if self.nbytes + num_bytes > self._max_bytes:
            raise HostMemoryFull(num_bytes, self.nbytes, self._max_bytes)

    def add(self, adapter: PackedAdapter) -> None:
        """Keep `adapter` with one reference; if its content is here already, add a reference."""
        self._adapters.setdefault(adapter.digest, adapter)
        self._references[adapter.digest] = self._references.get(adapter.digest, 0) + 1

    def drop(self, digest: str) -> None:
        """Give up one reference; after the last the adapter stays until `remove`."""
        self._references[digest] -= 1

    def is_referenced(self, digest: str) -> bool:
        """True while a load of the adapter has not been undone by `drop`."""
        return self._references.get(digest, 0) > 0

    def unreferenced(self) -> list[str]:
        """Digests that were dropped and still wait for `remove`."""
        return [digest for digest, count in self._references.items() if count == 0]

    def remove(self, digest: str) -> None:
        """Forget an adapter without references."""
        assert not self.is_referenced(digest)
        del self._adapters[digest], self._references[digest]

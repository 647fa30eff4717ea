"""Adapters kept on the host, by content: loading the same files twice keeps one copy."""

from __future__ import annotations

from lora_runtime.adapters.packed_adapter import PackedAdapter


class HostCache:
    """Reference-counted packed adapters, keyed by digest."""

    def __init__(self) -> None:
        self._adapters: dict[str, PackedAdapter] = {}
        self._references: dict[str, int] = {}

    def __contains__(self, digest: str) -> bool:
        return digest in self._adapters

    def __getitem__(self, digest: str) -> PackedAdapter:
        return self._adapters[digest]

    @property
    def nbytes(self) -> int:
        return sum(adapter.nbytes for adapter in self._adapters.values())

    def add(self, adapter: PackedAdapter) -> None:
        """Keep `adapter`, or gain a reference if its content is here already."""
        self._adapters.setdefault(adapter.digest, adapter)
        self._references[adapter.digest] = self._references.get(adapter.digest, 0) + 1

    def drop(self, digest: str) -> bool:
        """Give up one reference; True when it was the last. The bytes stay until `remove`."""
        self._references[digest] -= 1
        return self._references[digest] == 0

    def is_referenced(self, digest: str) -> bool:
        """True while a load of it has not been undone."""
        return self._references.get(digest, 0) > 0

    def unreferenced(self) -> list[str]:
        """Digests that were dropped and still wait for `remove`."""
        return [digest for digest, count in self._references.items() if count == 0]

    def remove(self, digest: str) -> None:
        """Forget an adapter without references."""
        assert not self.is_referenced(digest)
        del self._adapters[digest], self._references[digest]

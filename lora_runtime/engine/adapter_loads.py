"""Copies adapters into the pool: at once, or behind the running steps on a CUDA stream.

No row runs under an adapter before the event of its own copy, and no copy begins before the steps
queued ahead of it are over: what they read is never written over. Copies keep their order, so one
into memory that an earlier one still fills comes after it.
The stream is unmeasured on a GPU; tests put a slow one of their own in its place.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

from lora_runtime.adapters.packed_adapter import PackedAdapter
from lora_runtime.adapters.pool import AdapterPool
from lora_runtime.core import AdapterPlacement


class Event(Protocol):
    """The end of a copy; `torch.cuda.Event` is one."""

    def query(self) -> bool:
        """True when the copy is done."""
        ...

    def synchronize(self) -> None:
        """Return when the copy is done."""
        ...


Enqueue = Callable[[Callable[[], None]], Event]
"""Runs a function that enqueues copies after all work queued so far; returns an event that tells
when they are done."""


class AdapterLoads:
    """The copies that plans ask for. Without `enqueue` each is done when `start` returns."""

    def __init__(self, pool: AdapterPool, enqueue: Enqueue | None) -> None:
        self._pool, self._enqueue = pool, enqueue
        self._copies: list[tuple[Event, PackedAdapter | None]] = []
        """Under way, in order; None: the emptying of a slot."""

    def start(self, placement: AdapterPlacement, adapter: PackedAdapter) -> None:
        """Copy an adapter to its place, or start to."""
        if self._enqueue is None:
            self._pool.load(placement, adapter)
            return
        if adapter.num_replicas > self._pool.num_replicas:
            # The extent tables are about to move, and copies under way still write to the old ones.
            self._finish(len(self._copies))
        self._pool.make_room_for(adapter)
        event = self._enqueue(lambda: self._pool.copy(placement, adapter))
        self._copies.append((event, adapter))

    def clear(self, slot: int) -> None:
        """Empty a slot, in order with the copies to it and behind the steps that read it."""
        if self._enqueue is None:
            self._pool.clear(slot)
        else:
            self._copies.append((self._enqueue(lambda: self._pool.clear(slot)), None))

    def in_progress(self) -> frozenset[str] | None:
        """Digests of adapters whose copies are not done; None when copies are done at once."""
        if self._enqueue is None:
            return None
        self._copies = [copy for copy in self._copies if not copy[0].query()]
        return frozenset(adapter.digest for _, adapter in self._copies if adapter is not None)

    def wait(self) -> None:
        """Return when one more copy is done, at once if there is none."""
        self._finish(1)

    def _finish(self, num_copies: int) -> None:
        for event, _ in self._copies[:num_copies]:
            event.synchronize()


class CopyStream:
    """An Enqueue on a CUDA stream of its own."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._stream = device, torch.cuda.Stream(device)

    def __call__(self, copy: Callable[[], None]) -> Event:
        """Start `copy` when what the current stream was given so far is done."""
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            copy()
            done: Event = self._stream.record_event()
            return done

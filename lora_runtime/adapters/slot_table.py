"""Which adapter sits in which device slot and pool rows. Bookkeeping only: ints, no tensors.

Memory is proportional to the true rank: a module of rank r takes r consecutive rows of the pool
of its shape. Adapters without a running request are evicted, least recently used first.
"""

from __future__ import annotations

from bisect import insort
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass

from lora_runtime.core import AdapterPlacement, LinearShape
from lora_runtime.errors import AdapterTooLarge

Footprint = tuple[tuple[LinearShape, int], ...]
"""(shape, rank) of each module of an adapter, in the order of its modules."""


class RowAllocator:
    """First-fit allocation of consecutive rows out of `num_rows`."""

    def __init__(self, num_rows: int) -> None:
        self.num_rows = num_rows
        self._holes: list[tuple[int, int]] = [(0, num_rows)] if num_rows else []

    @property
    def num_free(self) -> int:
        return sum(length for _, length in self._holes)

    def allocate(self, length: int) -> int | None:
        """The first row of a free run of `length` rows, or None if there is none."""
        if length == 0:
            return 0
        for index, (start, size) in enumerate(self._holes):
            if size >= length:
                rest = [(start + length, size - length)] if size > length else []
                self._holes[index : index + 1] = rest
                return start
        return None

    def free(self, start: int, length: int) -> None:
        """Give back a run; neighbouring holes are joined."""
        if length == 0:
            return
        insort(self._holes, (start, length))
        joined: list[tuple[int, int]] = []
        for hole_start, hole_length in self._holes:
            if joined and sum(joined[-1]) == hole_start:
                joined[-1] = (joined[-1][0], joined[-1][1] + hole_length)
            else:
                joined.append((hole_start, hole_length))
        self._holes = joined


@dataclass(frozen=True, slots=True)
class Acquired:
    """A pinned slot, and what the runner must copy into it before it can be used."""

    slot: int
    load: AdapterPlacement | None = None


class SlotTable:
    """Slots and rows of the device pool: residency, pins, least-recently-used eviction."""

    def __init__(self, rows: Mapping[LinearShape, int], max_slots: int) -> None:
        self._rows = {shape: RowAllocator(count) for shape, count in rows.items()}
        self._free_slots = list(reversed(range(max_slots)))
        self._footprints: dict[str, Footprint] = {}
        self._resident: OrderedDict[str, AdapterPlacement] = OrderedDict()
        self._pins: dict[str, int] = {}

    @property
    def resident(self) -> tuple[str, ...]:
        return tuple(self._resident)

    @property
    def num_elements_used(self) -> int:
        """Weights in use: rows times (in + out), over all shapes."""
        return sum(
            (rows.num_rows - rows.num_free) * (shape.in_features + shape.out_features)
            for shape, rows in self._rows.items()
        )

    def register(self, digest: str, footprint: Footprint) -> None:
        """Make an adapter known. Raises AdapterTooLarge if it could never fit."""
        needed: dict[LinearShape, int] = {}
        for shape, rank in footprint:
            needed[shape] = needed.get(shape, 0) + rank
        for shape, count in needed.items():
            available = self._rows[shape].num_rows
            if count > available:
                raise AdapterTooLarge(
                    f"the adapter needs {count} rank rows for its "
                    f"{shape.in_features}x{shape.out_features} layers and the pool has "
                    f"{available}; raise the adapter pool size or lower the rank"
                )
        self._footprints[digest] = footprint

    def forget(self, digest: str) -> None:
        """Remove an adapter that no request pins; its slot and rows become free."""
        assert digest not in self._pins, "forgetting a pinned adapter"
        if digest in self._resident:
            self._evict(digest)
        del self._footprints[digest]

    def acquire(self, digest: str) -> Acquired | None:
        """Pin an adapter in a slot, evicting unpinned ones if it must; None if there is no room."""
        load = None
        if digest not in self._resident:
            while (load := self._place(digest)) is None:
                victim = next((other for other in self._resident if other not in self._pins), None)
                if victim is None:
                    return None
                self._evict(victim)
        self._resident.move_to_end(digest)
        self._pins[digest] = self._pins.get(digest, 0) + 1
        return Acquired(self._resident[digest].slot, load)

    def release(self, digest: str) -> None:
        """Undo one `acquire`; the adapter stays resident until it is evicted."""
        self._pins[digest] -= 1
        if self._pins[digest] == 0:
            del self._pins[digest]

    def is_pinned(self, digest: str) -> bool:
        """True while a running request uses the adapter."""
        return digest in self._pins

    def _place(self, digest: str) -> AdapterPlacement | None:
        if not self._free_slots:
            return None
        starts: list[int] = []
        footprint = self._footprints[digest]
        for shape, rank in footprint:
            start = self._rows[shape].allocate(rank)
            if start is None:
                self._free_rows(footprint, starts)
                return None
            starts.append(start)
        placement = AdapterPlacement(digest, self._free_slots.pop(), tuple(starts))
        self._resident[digest] = placement
        return placement

    def _evict(self, digest: str) -> None:
        placement = self._resident.pop(digest)
        self._free_rows(self._footprints[digest], placement.starts)
        self._free_slots.append(placement.slot)

    def _free_rows(self, footprint: Footprint, starts: tuple[int, ...] | list[int]) -> None:
        for (shape, rank), start in zip(footprint, starts, strict=False):
            self._rows[shape].free(start, rank)

    def check_integrity(self) -> None:
        """Assert that free and resident rows and slots add up to all of them."""
        used: dict[LinearShape, int] = dict.fromkeys(self._rows, 0)
        for digest in self._resident:
            for shape, rank in self._footprints[digest]:
                used[shape] += rank
        for shape, rows in self._rows.items():
            assert rows.num_free + used[shape] == rows.num_rows
        assert set(self._pins) <= set(self._resident)

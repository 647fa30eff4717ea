"""Which adapter sits in which device slot, and where in the pool. Ints only, no tensors.

An adapter takes consecutive bytes, as many as its tensors have. Adapters without a running request
are evicted, least recently used first, but for those that an operator keeps here.
"""

from __future__ import annotations

from bisect import insort
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from lora_runtime.core import AdapterPlacement
from lora_runtime.errors import AdapterTooLarge, Overloaded


class SpaceAllocator:
    """First-fit allocation of consecutive bytes out of `size`."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._holes: list[tuple[int, int]] = [(0, size)] if size else []

    @classmethod
    def around(cls, size: int, taken: Iterable[tuple[int, int]]) -> SpaceAllocator:
        """An allocator in which the places `taken`, each (start, length), are not free."""
        space, end = cls(size), 0
        space._holes = []
        for start, length in sorted(place for place in taken if place[1]):
            space._holes += [(end, start - end)] if start > end else []
            end = start + length
        space._holes += [(end, size - end)] if size > end else []
        return space

    @property
    def num_free(self) -> int:
        return sum(length for _, length in self._holes)

    def allocate_last(self, length: int) -> int | None:
        """As `allocate`, from the end of the last hole that is large enough."""
        for index, (start, size) in reversed(list(enumerate(self._holes))):
            if size >= length:
                self._holes[index : index + 1] = [(start, size - length)] if size > length else []
                return start + size - length
        return None if length else 0

    def allocate(self, length: int) -> int | None:
        """The first of `length` consecutive free bytes, or None if there is no such hole."""
        if length == 0:
            return 0
        for index, (start, size) in enumerate(self._holes):
            if size >= length:
                rest = [(start + length, size - length)] if size > length else []
                self._holes[index : index + 1] = rest
                return start
        return None

    def free(self, start: int, length: int) -> None:
        """Give back `length` bytes from `start` on; neighbouring holes are joined."""
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
    """Slots and bytes of the device pool: residency, pins, least-recently-used eviction."""

    def __init__(self, num_bytes: int, max_slots: int) -> None:
        self._space = SpaceAllocator(num_bytes)
        self._max_slots = max_slots
        self._free_slots = list(reversed(range(max_slots)))
        self._sizes: dict[str, int] = {}
        self._resident: OrderedDict[str, AdapterPlacement] = OrderedDict()
        self._pins: dict[str, int] = {}
        self._kept: set[str] = set()
        """Resident whether or not a request pins them. They never move, so what can ever fit is
        known when a request, an adapter or one more to keep is taken."""
        self._vacated: set[int] = set()
        self.num_loads = 0
        """Times that an adapter was given a place."""
        self.num_evictions = 0
        """Times that one lost its place to make room for another."""

    @property
    def resident(self) -> tuple[str, ...]:
        return tuple(self._resident)

    @property
    def num_bytes_used(self) -> int:
        return self._space.size - self._space.num_free

    def register(self, digest: str, num_bytes: int) -> None:
        """Make an adapter known. Raises AdapterTooLarge if it could never fit."""
        if num_bytes > self._space.size:
            raise AdapterTooLarge(
                f"the adapter takes {num_bytes} bytes and the adapter pool has "
                f"{self._space.size}; raise the pool size or lower the rank"
            )
        self._sizes[digest] = num_bytes
        if not self._could_fit([digest]):
            del self._sizes[digest]
            raise AdapterTooLarge(
                f"the adapter takes {num_bytes} bytes, and {len(self._kept)} pinned adapters leave "
                "no such place in the adapter pool; unpin some or raise the pool size"
            )

    def forget(self, digest: str) -> None:
        """Remove an adapter that no request pins; its slot and bytes become free."""
        assert digest not in self._pins, "forgetting a pinned adapter"
        self._kept.discard(digest)
        if digest in self._resident:
            self.evict(digest)
        del self._sizes[digest]

    def check_fits(self, digests: Collection[str]) -> None:
        """Raise AdapterTooLarge if these adapters could never be resident together. They are
        given in the order in which they are going to be acquired.
        """
        if not self._could_fit(digests):
            num_bytes = sum(self._sizes[digest] for digest in set(digests))
            kept = f", {len(self._kept)} pinned adapters among them" if self._kept else ""
            raise AdapterTooLarge(
                f"the request's {len(set(digests))} adapters take {num_bytes} bytes together; the "
                f"pool has {self._space.size} bytes and {self._max_slots} slots{kept}",
                field="adapters",
            )

    def keep(
        self, digest: str, together: Iterable[Collection[str]] = ()
    ) -> AdapterPlacement | None:
        """Keep an adapter resident until `let_go`, whether or not a request uses it; what must be
        copied for it, if anything. `together`: the adapters of each request that runs or waits.

        Raises AdapterTooLarge where one of those, or a known adapter, would find no place any
        more, and Overloaded while running requests fill the pool; nothing is kept then.
        """
        if digest in self._kept:
            return None
        load = self._place_last(digest)
        self._kept.add(digest)
        others = [[other] for other in self._sizes]
        if len(self._kept) < self._max_slots and all(map(self._could_fit, [*others, *together])):
            return load
        self._kept.discard(digest)
        if load is not None:
            self.evict(digest)
        raise AdapterTooLarge(
            f"pin: with this adapter {len(self._kept) + 1} would be pinned, and others would find "
            f"no place any more among the {self._max_slots} slots and {self._space.size} bytes of "
            "the adapter pool; unpin some, or raise the pool size",
            field="pin",
        )

    def let_go(self, digest: str) -> None:
        """Undo `keep`: the adapter stays resident until it is evicted."""
        self._kept.discard(digest)

    def _place_last(self, digest: str) -> AdapterPlacement | None:
        """Make an adapter resident at the end of the pool, where it divides no hole; one that a
        running request uses stays where it is.
        """
        if digest in self._resident:
            if digest in self._pins:
                return None
            self.evict(digest)
        while (load := self._place(digest, self._space.allocate_last)) is None:
            victim = self._victim()
            if victim is None:
                raise Overloaded(
                    "pin: adapters of running requests fill the adapter pool; try again later",
                    field="pin",
                )
            self._make_room(victim)
        return load

    def _could_fit(self, digests: Collection[str]) -> bool:
        """True if these find room in a pool that holds nothing but what is kept."""
        missing = [digest for digest in dict.fromkeys(digests) if digest not in self._kept]
        if len(missing) > self._max_slots - len(self._kept):
            return False
        return self._fit_beside(self._kept, missing)

    def _fit_beside(self, resident: Iterable[str], digests: Iterable[str]) -> bool:
        taken = [(self._resident[digest].address, self._sizes[digest]) for digest in resident]
        space = SpaceAllocator.around(self._space.size, taken)
        return all(space.allocate(self._sizes[digest]) is not None for digest in digests)

    def acquire(self, digests: Sequence[str]) -> list[Acquired] | None:
        """Pin the adapters of one request, evicting unpinned ones if it must; None if there is no
        room. With nothing pinned what fits an empty pool always finds room.
        """
        acquired = self._acquire_each(digests)
        # Enough bytes may be free and no hole large enough, as in an empty pool.
        if acquired is None and not self._pins:
            for resident in list(self._resident):
                if resident not in self._kept:
                    self._make_room(resident)
            acquired = self._acquire_each(digests)
        self.num_loads += sum(got.load is not None for got in acquired or ())
        return acquired

    def has_room(self, digests: Sequence[str]) -> bool:
        """True when `acquire` will find room, if need be by evicting what nobody pins."""
        missing = [digest for digest in set(digests) if digest not in self._resident]
        if not missing or not self._pins:
            return True
        stay = {*self._pins, *self._kept, *digests}
        staying = [digest for digest in self._resident if digest in stay]
        if len(missing) > self._max_slots - len(staying):
            return False
        return self._fit_beside(staying, missing)

    def _acquire_each(self, digests: Sequence[str]) -> list[Acquired] | None:
        acquired: list[Acquired] = []
        for digest in digests:
            try:
                got = self._acquire(digest)
            except Exception:
                self._undo(digests, acquired)
                raise
            if got is None:
                self._undo(digests, acquired)
                return None
            acquired.append(got)
        return acquired

    def _undo(self, digests: Sequence[str], acquired: Sequence[Acquired]) -> None:
        """Release what was acquired; what was only now placed is not loaded, so it goes again."""
        for digest, got in zip(digests, acquired, strict=False):
            self.release(digest)
            if got.load is not None:
                self.evict(digest)

    def _acquire(self, digest: str) -> Acquired | None:
        load = None
        if digest not in self._resident:
            while (load := self._place(digest, self._space.allocate)) is None:
                victim = self._victim()
                if victim is None:
                    return None
                self._make_room(victim)
        self._resident.move_to_end(digest)  # the order of `_resident` is that of last use
        self._pins[digest] = self._pins.get(digest, 0) + 1
        return Acquired(self._resident[digest].slot, load)

    def _victim(self) -> str | None:
        """The least recently used adapter that may be evicted."""
        may_go = (d for d in self._resident if d not in self._pins and d not in self._kept)
        return next(may_go, None)

    def release(self, digest: str) -> None:
        """Unpin an adapter of one request; it stays resident until it is evicted."""
        self._pins[digest] -= 1
        if self._pins[digest] == 0:
            del self._pins[digest]

    @property
    def vacated(self) -> tuple[int, ...]:
        """Slots that lost their adapter, got no other and were not `cleared`: their extents still
        point at its bytes.
        """
        return tuple(sorted(self._vacated))

    def cleared(self, slot: int) -> None:
        """Note that the extents of a vacated slot point at nothing any more."""
        self._vacated.discard(slot)

    def is_pinned(self, digest: str) -> bool:
        """True while a running request uses the adapter."""
        return digest in self._pins

    def _place(self, digest: str, allocate: Callable[[int], int | None]) -> AdapterPlacement | None:
        if not self._free_slots:
            return None
        address = allocate(self._sizes[digest])
        if address is None:
            return None
        placement = AdapterPlacement(digest, self._free_slots.pop(), address)
        self._vacated.discard(placement.slot)
        self._resident[digest] = placement
        return placement

    def _make_room(self, victim: str) -> None:
        self.evict(victim)
        self.num_evictions += 1

    def evict(self, digest: str) -> None:
        """Take an adapter that no request pins out of its slot; it stays known."""
        placement = self._resident.pop(digest)
        self._space.free(placement.address, self._sizes[digest])
        self._free_slots.append(placement.slot)
        self._vacated.add(placement.slot)

    def check_integrity(self, pins: Mapping[str, int]) -> None:
        """Assert that free and resident bytes add up, and that exactly `pins` are pinned, each so
        often, and resident.
        """
        assert self._pins == pins, (self._pins, pins)
        assert self.num_bytes_used == sum(self._sizes[digest] for digest in self._resident)
        assert set(self._pins) | self._kept <= set(self._resident)

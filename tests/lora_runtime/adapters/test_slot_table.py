"""Slots and bytes under random loads, pins and unloads."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from lora_runtime.adapters.slot_table import SlotTable, SpaceAllocator
from lora_runtime.errors import AdapterTooLarge, Overloaded


@given(st.lists(st.integers(0, 9), max_size=30), st.randoms())
def test_runs_never_overlap_and_all_come_back(lengths, random):
    space = SpaceAllocator(40)
    taken: dict[int, int] = {}
    for length in lengths:
        start = space.allocate(length)
        if start is not None and length:
            assert all(start + length <= s or s + n <= start for s, n in taken.items())
            taken[start] = length
        if taken and random.random() < 0.3:
            start = random.choice(sorted(taken))
            space.free(start, taken.pop(start))
        assert space.num_free == 40 - sum(taken.values())
    for start, length in taken.items():
        space.free(start, length)
    assert space.allocate(40) == 0


def test_loads_and_evictions_are_counted():
    table = SlotTable(10, max_slots=3)
    for name in "abc":
        table.register(name, 5)
    for name in "abab":
        assert table.acquire([name]) is not None
        table.release(name)
    assert (table.num_loads, table.num_evictions) == (2, 0)
    assert table.acquire(["c"]) is not None  # in the place of a
    assert (table.num_loads, table.num_evictions) == (3, 1)
    assert table.acquire(["b"]) is not None
    assert table.acquire(["a"]) is None  # all are pinned
    assert (table.num_loads, table.num_evictions) == (3, 1)
    table.release("b")
    table.forget("b")
    assert (table.num_loads, table.num_evictions) == (3, 1)


class Slots(RuleBasedStateMachine):
    """A model of residency: what is pinned must stay, what is acquired must be placed."""

    def __init__(self) -> None:
        super().__init__()
        self.table = SlotTable(24, max_slots=3)
        self.pins: dict[str, int] = {}
        self.known: set[str] = set()
        self.slots: dict[str, int] = {}
        self.kept: dict[str, int] = {}

    @rule(name=st.sampled_from("abcdef"), num_bytes=st.integers(0, 16))
    def register(self, name, num_bytes):
        if name not in self.known:
            try:
                self.table.register(name, num_bytes)
            except AdapterTooLarge:
                assert self.kept, "an empty pool takes any one adapter"
                return
            self.known.add(name)
            self.pins[name] = 0

    @rule(name=st.sampled_from("abcdef"))
    def keep(self, name):
        if name not in self.known:
            return
        try:
            load = self.table.keep(name)
        except AdapterTooLarge:
            assert len(self.known) > 1 or len(self.kept) + 1 == 3
            return
        except Overloaded:
            assert any(self.pins.values()), "only running requests fill a pool"
            return
        if load is not None:
            self.slots[name] = load.slot
        self.kept.setdefault(name, self.slots[name])
        assert len(self.kept) < 3, "others find a slot"

    @rule(name=st.sampled_from("abcdef"))
    def let_go(self, name):
        self.table.let_go(name)
        self.kept.pop(name, None)

    @rule(name=st.sampled_from("abcdef"))
    def acquire(self, name):
        if name not in self.known:
            return
        pinned = {n for n, count in self.pins.items() if count}
        acquired = self.table.acquire([name])
        if acquired is None:
            assert name not in pinned and pinned, "an empty pool takes any one adapter"
            assert name not in self.kept, "it is there"
            return
        acquired = acquired[0]
        if name in pinned or name in self.kept:
            assert acquired.load is None and acquired.slot == self.slots[name]
        self.slots[name] = acquired.slot
        self.pins[name] += 1
        assert len({self.slots[n] for n in pinned | {name}}) == len(pinned | {name})

    @rule(first=st.sampled_from("abcdef"), second=st.sampled_from("abcdef"))
    def acquire_and_release_two(self, first, second):
        if not {first, second} <= self.known:
            return
        before = {n for n, count in self.pins.items() if count}
        try:
            self.table.check_fits([first, second])
        except AdapterTooLarge:
            return
        acquired = self.table.acquire([first, second])
        assert acquired is not None or before, "what fits is not kept waiting by what is kept"
        if acquired is not None:
            assert first == second or acquired[0].slot != acquired[1].slot
            self.table.release(first)
            self.table.release(second)
        assert {n for n in before if not self.table.is_pinned(n)} == set()

    @rule(name=st.sampled_from("abcdef"))
    def release(self, name):
        if self.pins.get(name):
            self.table.release(name)
            self.pins[name] -= 1

    @rule(name=st.sampled_from("abcdef"))
    def forget(self, name):
        if name in self.known and not self.pins[name]:
            self.table.forget(name)
            self.known.remove(name)
            self.kept.pop(name, None)
            del self.pins[name]

    @invariant()
    def integrity(self):
        self.table.check_integrity({n: count for n, count in self.pins.items() if count})
        assert {n for n, count in self.pins.items() if count} <= set(self.table.resident)
        assert set(self.kept) <= set(self.table.resident)


TestSlots = Slots.TestCase


def test_least_recently_used_is_evicted_and_pins_are_kept():
    table = SlotTable(100, max_slots=2)
    for name in "abc":
        table.register(name, 4)
    table.acquire(["a"])
    table.acquire(["b"])
    assert table.acquire(["c"]) is None, "both residents are pinned"
    table.release("a")
    table.release("b")
    table.acquire(["a"])
    table.release("a")
    acquired = table.acquire(["c"])
    assert acquired is not None and acquired[0].load is not None
    assert set(table.resident) == {"a", "c"}, "b was used longest ago"


def test_an_adapter_that_can_never_fit_is_refused_at_once():
    table = SlotTable(100, max_slots=1)
    with pytest.raises(AdapterTooLarge, match="takes 112 bytes"):
        table.register("big", 112)
    table.register("fits", 100)
    assert table.acquire(["fits"]) is not None
    assert table.num_bytes_used == 100


def test_a_composition_finds_room_in_a_fragmented_pool():
    """x and a leave holes that hold neither a nor b beside each other."""
    table = SlotTable(24, max_slots=3)
    for name, num_bytes in (("x", 8), ("a", 8), ("b", 16)):
        table.register(name, num_bytes)
    for name in "xa":
        table.acquire([name])
        table.release(name)
    acquired = table.acquire(["a", "b"])
    assert acquired is not None and all(got.load is not None for got in acquired)
    table.check_integrity({"a": 1, "b": 1})


def test_what_is_kept_is_never_evicted_and_leaves_room_for_others():
    table = SlotTable(24, max_slots=3)
    for name, num_bytes in (("a", 8), ("b", 8), ("c", 16), ("d", 8)):
        table.register(name, num_bytes)
    table.acquire(["b"])
    table.acquire(["a"])  # in the middle of the pool
    table.release("a")
    table.release("b")
    assert table.keep("a").address == 16, "moved to the end, where it leaves one hole"
    assert table.keep("a") is None
    for name in "cbdc":
        assert table.acquire([name]) is not None
        assert "a" in table.resident
        table.release(name)
    with pytest.raises(AdapterTooLarge, match="pin: with this adapter 2 would be pinned"):
        table.keep("b")  # c would have no place
    with pytest.raises(AdapterTooLarge, match="1 pinned adapters leave no such place"):
        table.register("large", 24)
    with pytest.raises(AdapterTooLarge, match="together"):
        table.check_fits(["b", "c"])
    table.forget("c")
    assert table.keep("b") is not None
    with pytest.raises(AdapterTooLarge, match="3 would be pinned"):
        table.keep("d")  # the last slot
    table.let_go("b")
    for name in "xy":
        table.register(name, 8)
    with pytest.raises(AdapterTooLarge, match="2 would be pinned"):
        table.keep("b", together=[["x", "y"]])  # a request that waits would wait for ever
    table.check_integrity({})


def test_a_composition_that_finds_no_room_leaves_no_trace():
    table = SlotTable(24, max_slots=3)
    for name, num_bytes in (("pinned", 16), ("a", 8), ("b", 16)):
        table.register(name, num_bytes)
    table.acquire(["pinned"])
    assert table.acquire(["a", "b"]) is None
    assert table.resident == ("pinned",) and not table.is_pinned("a")


def test_adapters_that_can_never_be_resident_together_are_refused():
    table = SlotTable(24, max_slots=2)
    for name in "abc":
        table.register(name, 8)
    table.register("wide", 20)
    table.check_fits({"a", "wide"} - {"a"})
    for digests in ({"a", "wide"}, {"a", "b", "c"}):
        with pytest.raises(AdapterTooLarge, match="together"):
            table.check_fits(digests)

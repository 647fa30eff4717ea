"""Slots and rank rows under random loads, pins and unloads."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from lora_runtime.adapters.slot_table import RowAllocator, SlotTable
from lora_runtime.core import LinearShape
from lora_runtime.errors import AdapterTooLarge

WIDE, TALL = LinearShape(8, 16), LinearShape(16, 8)


@given(st.lists(st.integers(0, 9), max_size=30), st.randoms())
def test_row_runs_never_overlap_and_all_come_back(lengths, random):
    rows = RowAllocator(40)
    taken: dict[int, int] = {}
    for length in lengths:
        start = rows.allocate(length)
        if start is not None and length:
            assert all(start + length <= s or s + n <= start for s, n in taken.items())
            taken[start] = length
        if taken and random.random() < 0.3:
            start = random.choice(sorted(taken))
            rows.free(start, taken.pop(start))
        assert rows.num_free == 40 - sum(taken.values())
    for start, length in taken.items():
        rows.free(start, length)
    assert rows.allocate(40) == 0


class Slots(RuleBasedStateMachine):
    """A model of residency: what is pinned must stay, what is acquired must be placed."""

    def __init__(self) -> None:
        super().__init__()
        self.table = SlotTable({WIDE: 24, TALL: 12}, max_slots=3)
        self.pins: dict[str, int] = {}
        self.known: set[str] = set()
        self.slots: dict[str, int] = {}

    @rule(name=st.sampled_from("abcdef"), wide=st.integers(0, 16), tall=st.integers(0, 8))
    def register(self, name, wide, tall):
        if name not in self.known:
            self.table.register(name, ((WIDE, wide), (TALL, tall)))
            self.known.add(name)
            self.pins[name] = 0

    @rule(name=st.sampled_from("abcdef"))
    def acquire(self, name):
        if name not in self.known:
            return
        pinned = {n for n, count in self.pins.items() if count}
        acquired = self.table.acquire(name)
        if acquired is None:
            assert name not in pinned
            return
        if name in pinned:
            assert acquired.load is None and acquired.slot == self.slots[name]
        self.slots[name] = acquired.slot
        self.pins[name] += 1
        assert len({self.slots[n] for n in pinned | {name}}) == len(pinned | {name})

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
            del self.pins[name]

    @invariant()
    def integrity(self):
        self.table.check_integrity()
        assert {n for n, count in self.pins.items() if count} <= set(self.table.resident)


TestSlots = Slots.TestCase


def test_least_recently_used_is_evicted_and_pins_are_kept():
    table = SlotTable({WIDE: 100}, max_slots=2)
    for name in "abc":
        table.register(name, ((WIDE, 4),))
    table.acquire("a")
    table.acquire("b")
    assert table.acquire("c") is None, "both residents are pinned"
    table.release("a")
    table.release("b")
    table.acquire("a")
    table.release("a")
    acquired = table.acquire("c")
    assert acquired is not None and acquired.load is not None
    assert set(table.resident) == {"a", "c"}, "b was used longest ago"


def test_an_adapter_that_can_never_fit_is_refused_at_once():
    table = SlotTable({WIDE: 10}, max_slots=1)
    with pytest.raises(AdapterTooLarge, match="needs 12 rank rows"):
        table.register("big", ((WIDE, 6), (WIDE, 6)))
    table.register("fits", ((WIDE, 5), (WIDE, 5)))
    assert table.acquire("fits") is not None
    assert table.num_elements_used == 10 * (8 + 16)

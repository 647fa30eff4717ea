"""Examples in a resumable random order, and what of them shares a forward."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from lora_runtime.training.data.examples import Item, num_tokens

ItemT = TypeVar("ItemT", bound=Item)


class ExampleStream(Generic[ItemT]):
    """The items of all epochs one after another, each epoch in its own random order.

    The order is a function of (seed, epoch), so a position in the stream is the whole cursor.
    """

    def __init__(self, examples: Sequence[ItemT], seed: int) -> None:
        self._examples = examples
        self._seed = seed
        self._epoch, self._order = -1, list[int]()

    def take(self, start: int, count: int) -> list[ItemT]:
        """The `count` items from position `start`."""
        return [self._at(position) for position in range(start, start + count)]

    def _at(self, position: int) -> ItemT:
        epoch, index = divmod(position, len(self._examples))
        if epoch != self._epoch:
            self._epoch, self._order = epoch, list(range(len(self._examples)))
            random.Random(f"{self._seed}:{epoch}").shuffle(self._order)
        return self._examples[self._order[index]]


def micro_batches(
    items: Sequence[Item], size: int, max_tokens: int | None = None
) -> list[list[Item]]:
    """All `items` in the groups that share a forward, formed as by `grouped_places`."""
    lengths = list(map(num_tokens, items))
    groups = grouped_places(lengths, size, max_tokens)
    return [[items[place] for place in places] for places in groups]


def grouped_places(
    lengths: Sequence[int], size: int, max_tokens: int | None = None
) -> list[list[int]]:
    """The positions of `lengths` in groups: `size` each, in order; or with `max_tokens` by first
    fit decreasing (Johnson 1973), so that few groups are all but full.

    A length over `max_tokens` is alone. Equal input gives equal groups, and without the first
    group's members the others stay as they are.
    """
    places = range(len(lengths))
    if max_tokens is None:
        return [list(places[start : start + size]) for start in places[::size]]
    groups: list[list[int]] = []
    room: list[int] = []
    for place in sorted(places, key=lambda place: -lengths[place]):
        fits = (group for group, left in enumerate(room) if left >= lengths[place])
        group = next(fits, len(groups))
        if group == len(groups):
            groups.append([])
            room.append(max_tokens)
        groups[group].append(place)
        room[group] -= lengths[place]
    return groups


def balanced(lengths: Sequence[int], num_shares: int) -> list[list[int]]:
    """The positions of `lengths` in shares of about equal sums, each share in order.

    Longest first, each to the share that has the least (Graham 1969). Equal input gives equal
    shares.
    """
    shares: list[list[int]] = [[] for _ in range(num_shares)]
    sums = [0] * num_shares
    for position in sorted(range(len(lengths)), key=lambda position: -lengths[position]):
        least = sums.index(min(sums))
        shares[least].append(position)
        sums[least] += lengths[position]
    return [sorted(share) for share in shares]


@dataclass(slots=True)
class Limits:
    """The most that one unit puts in a forward; lowered after an out-of-memory error."""

    num_examples: int
    num_tokens: int | None
    """Counted instead of the examples, unless None."""
    is_alone: bool = False
    """True when the unit has forwards of its own."""
    num_shared_tokens: int | None = None
    """Most tokens of a forward that it shares; None until there was an out-of-memory error."""

    def groups(self, items: Sequence[Item]) -> list[list[Item]]:
        """`items` as micro-batches within the limits."""
        return micro_batches(items, self.num_examples, self.num_tokens)

    def first_group(self, lengths: Sequence[int]) -> list[int]:
        """The positions of `lengths` that make the first micro-batch; empty if there are none."""
        groups = grouped_places(lengths, self.num_examples, self.num_tokens)
        return groups[0] if groups else []

    def halve(self, batch: Sequence[Item]) -> str:
        """Make the next micro-batches half as large as `batch`, which did not fit; say so."""
        if self.num_tokens is None:
            self.num_examples = (len(batch) + 1) // 2
            return f"{self.num_examples} examples"
        self.num_tokens = sum(map(num_tokens, batch)) // 2
        return f"{self.num_tokens} tokens"

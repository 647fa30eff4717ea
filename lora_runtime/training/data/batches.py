"""Examples in a resumable random order, and what of them shares a forward."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from lora_runtime.training.data.examples import Item, num_tokens

T = TypeVar("T")


class ExampleStream:
    """The items of all epochs one after another, each epoch in its own random order.

    The order is a function of (seed, epoch), so a position in the stream is the whole cursor.
    """

    def __init__(self, examples: Sequence[Item], seed: int) -> None:
        self._examples = examples
        self._seed = seed
        self._epoch, self._order = -1, list[int]()

    def take(self, start: int, count: int) -> list[Item]:
        """The `count` items from position `start`."""
        return [self._at(position) for position in range(start, start + count)]

    def _at(self, position: int) -> Item:
        epoch, index = divmod(position, len(self._examples))
        if epoch != self._epoch:
            self._epoch, self._order = epoch, list(range(len(self._examples)))
            random.Random(f"{self._seed}:{epoch}").shuffle(self._order)
        return self._examples[self._order[index]]


def micro_batches(
    examples: Sequence[T],
    size: int,
    max_tokens: int | None = None,
    length: Callable[[T], int] = num_tokens,
) -> list[list[T]]:
    """All `examples` in the groups that share a forward: `size` each, in order; or with
    `max_tokens` by first fit decreasing (Johnson 1973), so that few forwards are all but full.

    An example longer than `max_tokens` is alone. Equal input gives equal groups, and without the
    first group's examples the others stay as they are.
    """
    if max_tokens is None:
        return [list(examples[start : start + size]) for start in range(0, len(examples), size)]
    groups: list[list[T]] = []
    room: list[int] = []
    for example in sorted(examples, key=lambda example: -length(example)):
        index = next((i for i, left in enumerate(room) if left >= length(example)), len(room))
        if index == len(room):
            groups.append([])
            room.append(max_tokens)
        groups[index].append(example)
        room[index] -= length(example)
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
    """What one unit puts in a forward; lowered when memory does not take it."""

    num_examples: int
    num_tokens: int | None
    """Counted instead of the examples, unless None."""
    is_alone: bool = False
    """True when the unit has forwards of its own."""
    num_shared_tokens: int | None = None
    """What it and others may have together, where memory did not take what devices usually do."""

    def groups(
        self, examples: Sequence[T], length: Callable[[T], int] = num_tokens
    ) -> list[list[T]]:
        """`examples` as micro-batches within the limits."""
        return micro_batches(examples, self.num_examples, self.num_tokens, length)

    def halve(self, batch: Sequence[Item]) -> str:
        """Make the next micro-batches half as large as `batch`, which did not fit; say so."""
        if self.num_tokens is None:
            self.num_examples = (len(batch) + 1) // 2
            return f"{self.num_examples} examples"
        self.num_tokens = sum(map(num_tokens, batch)) // 2
        return f"{self.num_tokens} tokens"

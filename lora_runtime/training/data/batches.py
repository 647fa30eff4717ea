"""Examples in a resumable random order, and what of them shares a forward."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TypeVar

import torch
from torch import Tensor

from lora_runtime.training.data.dataset import Example

T = TypeVar("T")


class ExampleStream:
    """The examples of all epochs one after another, each epoch in its own random order.

    The order is a function of (seed, epoch), so a position in the stream is the whole cursor.
    """

    def __init__(self, examples: Sequence[Example], seed: int) -> None:
        self._examples = examples
        self._seed = seed
        self._epoch, self._order = -1, list[int]()

    def take(self, start: int, count: int) -> list[Example]:
        """The `count` examples from position `start`."""
        return [self._at(position) for position in range(start, start + count)]

    def _at(self, position: int) -> Example:
        epoch, index = divmod(position, len(self._examples))
        if epoch != self._epoch:
            self._epoch, self._order = epoch, list(range(len(self._examples)))
            random.Random(f"{self._seed}:{epoch}").shuffle(self._order)
        return self._examples[self._order[index]]


def num_tokens(example: Example) -> int:
    """Length of an example."""
    return len(example.token_ids)


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

    def groups(
        self, examples: Sequence[T], length: Callable[[T], int] = num_tokens
    ) -> list[list[T]]:
        """`examples` as micro-batches within the limits."""
        return micro_batches(examples, self.num_examples, self.num_tokens, length)

    def halve(self, batch: Sequence[Example]) -> str:
        """Make the next micro-batches half as large as `batch`, which did not fit; say so."""
        if self.num_tokens is None:
            self.num_examples = (len(batch) + 1) // 2
            return f"{self.num_examples} examples"
        self.num_tokens = sum(map(num_tokens, batch)) // 2
        return f"{self.num_tokens} tokens"


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """Examples laid end to end, T tokens in all, n of them predictors of a target.

    token_ids, position_ids (T,) int64, positions restart at 0 in every example; logits_at (n,)
    int64: rows of the predictors; labels (n,) int64: the tokens after them.
    """

    token_ids: Tensor
    position_ids: Tensor
    lengths: list[int]
    logits_at: Tensor
    labels: Tensor

    @classmethod
    def of(cls, examples: Sequence[Example], device: torch.device | str = "cpu") -> PackedBatch:
        lengths = [len(example.token_ids) for example in examples]
        token_ids = torch.cat([example.token_ids for example in examples])
        starts = accumulate(lengths, initial=0)
        logits_at = torch.cat([e.predictors + s for e, s in zip(examples, starts, strict=False)])
        return cls(
            token_ids=token_ids.to(device),
            position_ids=torch.cat([torch.arange(length) for length in lengths]).to(device),
            lengths=lengths,
            logits_at=logits_at.to(device),
            labels=token_ids[logits_at + 1].to(device),
        )

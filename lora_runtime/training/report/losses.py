"""The figures that progress lines, the terminal's table and the report show, each of one meaning.

first loss           training loss, mean over the first updates
loss                 training loss, mean over the last updates so far
held-out loss        of the last evaluation, over all held-out data
best held-out loss   the lowest of all evaluations

First and last updates are up to NUM_AVERAGED each, of short runs half of all, so that they do not
overlap. Curves (loss.csv, loss.png, TensorBoard) have the loss of every single update.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")

NUM_AVERAGED = 10
"""Updates that a shown training loss or speed is averaged over, where there are as many."""


def first_of(updates: Sequence[T]) -> Sequence[T]:
    """The first updates of a run, for a mean; empty if there are none."""
    return updates[: _num_averaged(updates)]


def last_of(updates: Sequence[T]) -> Sequence[T]:
    """The last updates of a run, for a mean; empty if there are none."""
    return updates[-_num_averaged(updates) :]


def mean(values: Sequence[float]) -> float:
    """The mean of one or more values."""
    return sum(values) / len(values)


def _num_averaged(updates: Sequence[object]) -> int:
    return min(NUM_AVERAGED, max(1, len(updates) // 2))

"""The item of one row of training data: an example, or a pair of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Example:
    """token_ids (n,) int64; predictors (m,) int64, m ≥ 1: positions whose next token is learned.

    Equal to itself only.
    """

    token_ids: Tensor
    predictors: Tensor

    @property
    def examples(self) -> tuple[Example, ...]:
        return (self,)

    @property
    def weight(self) -> int:
        """Its number of target tokens: how much it counts in a mean."""
        return len(self.predictors)


class Pair(NamedTuple):
    """Two answers to one prompt."""

    chosen: Example
    rejected: Example

    @property
    def examples(self) -> tuple[Example, ...]:
        return self

    @property
    def weight(self) -> int:
        """1: how much it counts in a mean over pairs."""
        return 1


Item = Example | Pair
"""Example or pair of one row; never divided among forwards."""


def num_tokens(item: Item) -> int:
    """Length of an example, or of both of a pair."""
    return sum(len(example.token_ids) for example in item.examples)

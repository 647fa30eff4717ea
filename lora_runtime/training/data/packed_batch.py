"""Examples laid end to end for one forward; a beginning that several share is computed once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lora_runtime.base.model.varlen_attention import RowLengths
from lora_runtime.training.data.examples import Example


class Family(NamedTuple):
    """Consecutive examples and how many tokens all of them begin with, none of them a predictor."""

    examples: Sequence[Example]
    prefix: int

    @property
    def rows(self) -> RowLengths:
        """The lengths as attention takes them."""
        return RowLengths(
            [len(example.token_ids) - self.prefix for example in self.examples], self.prefix
        )


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """Examples of several units laid end to end, n of their tokens predictors of a target.

    token_ids, position_ids (T,) int64, positions go on in every example from what it shares;
    logits_at (n,) int64: places of the predictors; labels (n,) int64: the tokens after them.
    """

    token_ids: Tensor
    position_ids: Tensor
    rows: list[list[RowLengths]]
    """Per unit, the lengths of its rows as attention takes them."""
    logits_at: Tensor
    labels: Tensor

    @classmethod
    def of(
        cls, batches: Sequence[Sequence[Example]], device: torch.device | str = "cpu"
    ) -> PackedBatch:
        units = [families(examples) for examples in batches]
        parts, positions, logits_at, end = [], [], [], 0
        for examples, prefix in (family for own in units for family in own):
            parts.append(examples[0].token_ids[:prefix])
            positions.append(torch.arange(prefix))
            end += prefix
            for example in examples:
                parts.append(example.token_ids[prefix:])
                positions.append(torch.arange(prefix, len(example.token_ids)))
                logits_at.append(example.predictors + (end - prefix))
                end += len(parts[-1])
        labels = [e.token_ids[e.predictors + 1] for examples in batches for e in examples]
        return cls(
            token_ids=torch.cat(parts).to(device),
            position_ids=torch.cat(positions).to(device),
            rows=[[family.rows for family in own] for own in units],
            logits_at=torch.cat(logits_at).to(device),
            labels=torch.cat(labels).to(device),
        )


def families(examples: Sequence[Example]) -> list[Family]:
    """Group examples, in order, by a shared beginning: one system prompt, or a preference's prompt.

    Greedy: an example joins the family before it unless that would save fewer tokens in all, as a
    shorter common prefix does for a large family.
    """
    found: list[Family] = []
    for example in examples:
        if found:
            others, prefix = found[-1]
            joint = shared_prefix(others[0], example)
            joint = joint if len(others) == 1 else min(joint, prefix)
            if len(others) * joint >= (len(others) - 1) * prefix:
                found[-1] = Family([*others, example], joint)
                continue
        found.append(Family([example], 0))
    return found


def shared_prefix(one: Example, other: Example) -> int:
    """Tokens that both begin with, none of them a predictor."""
    end = min(int(one.predictors[0]), int(other.predictors[0]))
    is_equal = one.token_ids[:end] == other.token_ids[:end]
    return int(is_equal.cumprod(0).sum())

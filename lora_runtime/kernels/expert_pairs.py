"""Adapters on a mixture of experts, laid out for the ops that one linear layer has.

A token under an adapter is K entries there, one for each expert that it chose: a *pair* of token
and expert. Sorted by (slot, replica, expert) they are segments as any other, so that the same ops
run; what differs is where a segment's tensors lie. An adapter has E blocks of one size at each
module, expert after expert: expert e's A begins at `a + e · rank · in`, its B' at
`b + e · rank · out`, its gain and bias at `e · out`. So its run in the table is one Extent, as that
of a plain linear layer, and not one for each of hundreds of experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lora_runtime.kernels import cpu
from lora_runtime.kernels.types import StepMeta

MAX_EXPERTS = 1 << 20
"""Above every number of experts."""
MAX_REPLICAS = 1 << 20
"""Above every number of visits to a layer."""


@dataclass(frozen=True, slots=True)
class ExpertPairs:
    """The segments of a step's pairs under adapters; shared by the mixture's products.

    `meta` is over the pairs as tokens, and a segment's number is its slot. slots, replicas and
    experts (K,) int64 say of each segment what it is.
    """

    meta: StepMeta
    slots: Tensor
    replicas: Tensor
    experts: Tensor

    @classmethod
    def of(cls, meta: StepMeta, places: Tensor, experts: Tensor, num_experts: int) -> ExpertPairs:
        """From the adapters of tokens to those of pairs, in one sort.

        places (T, K) int64: where among the pairs each token's are; experts (P,) int64: the expert
        of each pair. A token has K pairs, and each has the entries of the token.
        """
        if not cpu.can_sort(places, experts, meta.tokens):
            return cls._sorted(meta, places, experts)
        pairs, segments, weights, starts, slots, replicas, own = cpu.find_segments(
            meta, places, experts, num_experts
        )
        return cls(_meta(pairs, segments, weights, starts), slots, replicas, own)

    @classmethod
    def _sorted(cls, meta: StepMeta, places: Tensor, experts: Tensor) -> ExpertPairs:
        """`of` in torch."""
        pairs = places.index_select(0, meta.tokens.long())
        adapter = meta.slots.long() * MAX_REPLICAS + meta.replicas
        keys = (adapter[:, None] * MAX_EXPERTS + experts[pairs]).flatten()
        keys, order = torch.sort(keys, stable=True)
        weights = meta.weights.repeat_interleave(places.shape[1])[order]
        is_first = torch.ones_like(keys, dtype=torch.bool)
        is_first[1:] = keys[1:] != keys[:-1]
        firsts = is_first.nonzero()[:, 0]
        ends = torch.cat([firsts, firsts.new_full((1,), len(keys))])
        segments = is_first.cumsum(0) - 1
        found = keys[firsts]
        own = _meta(pairs.flatten()[order].int(), segments.int(), weights, ends.int())
        adapter = found // MAX_EXPERTS
        return cls(own, adapter // MAX_REPLICAS, adapter % MAX_REPLICAS, found % MAX_EXPERTS)

    def extents(self, extents: Tensor, in_features: int, out_features: int) -> Tensor:
        """(K, 1, 8) int64: where each segment's own expert lies, given a module's table (S, R, 8)
        and the sizes of one expert.
        """
        if cpu.can_sort(extents, self.slots):
            where = self.slots, self.replicas, self.experts
            return cpu.find_extents(extents, *where, in_features, out_features)
        whole = extents[self.slots, self.replicas]
        experts, rank = self.experts, whole[:, 0]
        shift = torch.zeros_like(whole)
        shift[:, 1] = experts * rank * in_features
        shift[:, 2] = experts * rank * out_features
        shift[:, 3] = shift[:, 4] = experts * out_features
        # −1 says that a part is missing, for every expert.
        return torch.where(whole < 0, whole, whole + shift)[:, None]


def _meta(pairs: Tensor, segments: Tensor, weights: Tensor, starts: Tensor) -> StepMeta:
    """Over pairs as tokens, a segment as a slot."""
    return StepMeta(
        tokens=pairs,
        slots=segments,
        replicas=torch.zeros_like(segments),
        weights=weights,
        segment_starts=starts,
        end_slot=len(starts) - 1,
        end_replica=1,
    )

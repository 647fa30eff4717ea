"""Which tokens chose which experts, in the order in which they are multiplied."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import Tensor

from lora_runtime.kernels import ExpertPairs, StepMeta, sort_pairs, sum_pairs


@dataclass(frozen=True, slots=True)
class Routing:
    """The P = T · K pairs of a token and an expert that it chose, sorted by expert, then token.

    tokens and experts (P,) int64: of each pair; places (T, K) int64: where each token's pairs are;
    starts (E + 1,) int32: where each expert's pairs begin.
    """

    tokens: Tensor
    experts: Tensor
    places: Tensor
    starts: Tensor
    _pairs: dict[int, tuple[StepMeta, ExpertPairs]] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, chosen: Tensor, num_experts: int) -> Routing:
        """chosen (T, K) int64: each token's experts."""
        return cls(*sort_pairs(chosen, num_experts))

    def pairs(self, meta: StepMeta) -> ExpertPairs:
        """The pairs under the adapters of a step; found once for all products of a mixture."""
        known = self._pairs.get(id(meta))
        if known is None or known[0] is not meta:
            known = self._pairs[id(meta)] = meta, self._pairs_of(meta)
        return known[1]

    def _pairs_of(self, meta: StepMeta) -> ExpertPairs:
        return ExpertPairs.of(meta, self.places, self.experts, len(self.starts) - 1)

    def pairs_in(self, tokens: slice) -> Iterator[tuple[int, Tensor]]:
        """Each expert that some consecutive tokens chose, and their pairs with it (n,) int64."""
        pairs = self.places[tokens].flatten().sort().values
        experts, counts = self.experts[pairs].unique_consecutive(return_counts=True)
        yield from zip(experts.tolist(), pairs.split(counts.tolist()), strict=True)

    def summed(self, y: Tensor, weights: Tensor) -> Tensor:
        """Σ_k weights[t, k] · y of the token's k-th pair: y (P, H), weights (T, K) → (T, H), summed
        in float32 or better and rounded once to y's dtype.
        """
        return sum_pairs(y, self.places, weights)

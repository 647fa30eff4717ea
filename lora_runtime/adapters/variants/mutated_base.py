"""ΔW of an adapter whose training began by taking its first factors out of the base.

PEFT's base was W − s·B₀A₀, so on the untouched W the adapter is ΔW = s·(BA − B₀A₀): rank 2r.
Source: PiSSA arXiv:2404.02948, OLoRA arXiv:2406.01775; peft 0.21.2, `pissa_init`, `olora_init`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

ROUNDING = 2.0**-22
"""Relative error of two float32 factorisations of one weight, PEFT's and ours."""
CANCELLATION = 0.1
"""‖BA‖ below this share of its terms' norm: a difference of large products."""


class Factors(NamedTuple):
    """ΔW = b a; a (r, in), b (out, r)."""

    a: Tensor
    b: Tensor


class Initial(NamedTuple):
    """What was taken out of the base, s·B₀A₀, and its relative error (0 where it was given)."""

    factors: Factors
    error: float


def from_singular(left: Tensor, values: Tensor, right: Tensor) -> Factors:
    """U (out, r), S (r,) and Vᵀ (r, in) → a = √S Vᵀ and b = U √S, so that b a = U S Vᵀ."""
    root = values.sqrt()
    return Factors(root[:, None] * right, left * root)


def first_of_qr(weight: Tensor, rank: int) -> Factors:
    """The first `rank` rows of R as a and columns of Q as b, where W (out, in) = QR."""
    orthogonal, triangular = torch.linalg.qr(weight)
    return Factors(triangular[:rank], orthogonal[:, :rank])


def recovered_initial(initialisation: str, weight: Tensor, rank: int, scaling: float) -> Initial:
    """Recompute s·B₀A₀ from the checkpoint's weight (out, in).

    `pissa`: the best approximation of rank r. `olora`: s times the first r columns of Q and rows
    of R in W = QR. The error is that of float32 in both factorisations, magnified where the factors
    are nearly undetermined; infinite where they are.
    """
    if initialisation == "olora":
        return _first_of_qr(weight.float(), rank, scaling)
    return _first_singular(weight.float(), rank)


def _first_singular(weight: Tensor, rank: int) -> Initial:
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    factors = from_singular(left[:, :rank], values[:rank], right[:rank])
    gap = values[rank - 1] - values[rank] if rank < len(values) else values[rank - 1]
    return Initial(factors, _magnified(float(values[0]), float(gap)))


def _first_of_qr(weight: Tensor, rank: int, scaling: float) -> Initial:
    rows, columns = first_of_qr(weight, rank)
    values = torch.linalg.svdvals(rows[:, :rank])
    error = _magnified(float(values[0]), float(values[-1]))
    return Initial(Factors(rows.contiguous(), scaling * columns), error)


def _magnified(largest: float, smallest: float) -> float:
    return ROUNDING * largest / smallest if smallest > 0 else float("inf")


def difference(trained: Factors, initial: Factors) -> Factors:
    """ΔW = trained − initial, in factors that keep it when they are rounded."""
    return rebalanced(
        Factors(
            torch.cat([trained.a, initial.a]).double(),
            torch.cat([trained.b, -initial.b], dim=1).double(),
        )
    )


def rebalanced(factors: Factors) -> Factors:
    """The same product from its singular vectors: QR of both factors, SVD of the small middle.

    Large terms that cancel are gone, so rounding to bfloat16 costs ΔW no more than a plain LoRA.
    """
    left, left_rest = torch.linalg.qr(factors.b.double())
    right, right_rest = torch.linalg.qr(factors.a.double().T)
    inner_left, values, inner_right = torch.linalg.svd(
        left_rest @ right_rest.T, full_matrices=False
    )
    factors = from_singular(left @ inner_left, values, inner_right @ right.T)
    return Factors(factors.a.float(), factors.b.float())


def cancelling(all_factors: Sequence[Factors]) -> list[bool]:
    """Of each whether BA is much smaller than its r terms b_k a_k, as in a converted PiSSA file:
    ‖BA‖² = Σ (BᵀB) ∘ (AAᵀ) beside the trace of that. Of all of one rank at once, as the sums are
    small and a load has hundreds.
    """
    places: dict[int, list[int]] = {}
    for place, factors in enumerate(all_factors):
        places.setdefault(len(factors.a), []).append(place)
    found = [False] * len(all_factors)
    for own in places.values():
        of_b = torch.stack([all_factors[i].b.T @ all_factors[i].b for i in own])
        overlaps = of_b * torch.stack([all_factors[i].a @ all_factors[i].a.T for i in own])
        terms = overlaps.diagonal(dim1=1, dim2=2).sum(1)
        are_small = overlaps.sum((1, 2), dtype=torch.float64) < CANCELLATION**2 * terms
        for place, is_small in zip(own, are_small.tolist(), strict=True):
            found[place] = is_small
    return found

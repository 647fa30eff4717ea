"""Where an adapter's training starts: one function a kind, from a weight, a rank and a generator.

`kaiming` starts as no change. PiSSA and OLoRA start at factors of the weight itself, which
elsewhere are taken out of the base; here the base stays, and only what is learned beyond them
acts. LoftQ and QERA start at what quantisation lost.
Source: LoRA arXiv:2106.09685, PiSSA arXiv:2404.02948, OLoRA arXiv:2406.01775, LoftQ
arXiv:2310.08659, QERA arXiv:2410.06040 (theorem 2); peft 0.21.2, `lora/layer.py`.
"""

from __future__ import annotations

import math
import re

import torch
from torch import Tensor

from lora_runtime.adapters.variants.mutated_base import Factors, first_of_qr, from_singular
from lora_runtime.core import LinearShape

FACTOR_OF_WEIGHT = re.compile(r"pissa(_niter_(?P<niter>\d{1,3}))?|olora")
"""Inits whose first factors are a part of the weight."""
LOST_BY_QUANTISATION = ("loftq", "qera")
"""Inits that start at `quantisation_loss`."""


def kaiming(shape: LinearShape, rank: int, generator: torch.Generator) -> Factors:
    """A (rank, in) ~ U(±1/√in) and B (out, rank) = 0, float32: the adapter starts as no change."""
    a = torch.empty(rank, shape.in_features)
    torch.nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=generator)
    return Factors(a, torch.zeros(shape.out_features, rank))


def embedding_start(
    shape: LinearShape, rank: int, generator: torch.Generator, *, is_tied: bool
) -> Factors:
    """A (rank, vocab) = 0 and B (hidden, rank) ~ N(0, 1), float32: the embedding's no change.

    An output layer that shares the factors wants `kaiming` of them: B ~ U(±1/√hidden).
    """
    if is_tied:
        head = kaiming(LinearShape(shape.out_features, shape.in_features), rank, generator)
        return Factors(head.b.T, head.a.T)
    b = torch.randn(shape.out_features, rank, generator=generator)
    return Factors(torch.zeros(rank, shape.in_features), b)


def factors_of_weight(
    init: str, weight: Tensor, rank: int, scaling: float, generator: torch.Generator
) -> Factors:
    """A₀, B₀ of an init that `FACTOR_OF_WEIGHT` matches, in the weight's dtype and on its device.

    `pissa`: s·B₀A₀ is the best approximation of rank r of `weight` (out, in), and both factors have
    the same length; `pissa_niter_N`: the same from a random sketch and N power iterations;
    `olora`: the first r columns of Q and rows of R in W = QR.
    """
    if init == "olora":
        return first_of_qr(weight, rank)
    match = FACTOR_OF_WEIGHT.fullmatch(init)
    niter = match and match["niter"]
    if niter is None:
        left, values, right = torch.linalg.svd(weight, full_matrices=False)
    else:
        left, values, right = sketched_svd(weight, rank, int(niter), generator)
    return from_singular(left[:, :rank], values[:rank] / scaling, right[:rank])


def sketched_svd(
    weight: Tensor, rank: int, niter: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """U (out, r), S (r,) and Vᵀ (r, in) of about the best approximation of rank r, far faster.

    Source: Halko, Martinsson, Tropp, arXiv:0909.4061, algorithms 4.4 and 5.1; no oversampling, as
    in PEFT.
    """
    noise = torch.randn(weight.shape[1], rank, generator=generator)
    span = torch.linalg.qr(weight @ noise.to(weight)).Q
    for _ in range(niter):
        span = torch.linalg.qr(weight @ torch.linalg.qr(weight.T @ span).Q).Q
    left, values, right = torch.linalg.svd(span.T @ weight, full_matrices=False)
    return span @ left, values, right


def quantisation_loss(
    original: Tensor, serving: Tensor, rank: int, scaling: float, input_rms: Tensor | None = None
) -> Factors:
    """A, B with s·BA a best approximation of rank r of E = W₁₆ − q(W), both (out, in).

    LoftQ of one iteration, q(W) being the serving base: the smallest ‖E − s·BA‖. With `input_rms`
    (in,), σ_i = sqrt(E[x_i²]) of the layer's inputs, QERA-approx: the smallest ‖(E − s·BA) diag σ‖,
    the error of the output where inputs are not correlated. QERA's SVD_r(E diag σ) diag σ⁻¹ is
    U Uᵀ E, which has no division by a σ_i of 0. Each term u(uᵀE) is shared equally between A and
    B, whatever the scale of the inputs. PEFT leaves out the division by s.
    """
    loss = original - serving
    weighted = loss if input_rms is None else loss * input_rms
    left, _, right = torch.linalg.svd(weighted, full_matrices=False)
    left, right = left[:, :rank], right[:rank]
    rows = left.T @ loss
    root = torch.linalg.vector_norm(rows, dim=1).sqrt()
    a = torch.where(root[:, None] > 0, rows / root[:, None], right)  # of a term that is nothing, a
    return Factors(a, left * root / scaling)  # B = 0 alone, as in plain LoRA, can still be trained

"""Draws in Triton and in torch against the definition written out in float64, one row at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lora_runtime import kernels
from lora_runtime.kernels import gpu, reference
from lora_runtime.kernels.triton import sampling as triton_sampling
from tests.lora_runtime.kernels.on_triton import DEVICE

VOCAB_SIZE = 151
CUTS = [(5, 1.0, 0.0), (np.inf, 0.5, 0.0), (np.inf, 0.97, 0.0), (60, 0.9, 0.02), (1, 1.0, 0.0),
        (np.inf, 1.0, 0.3), (120, 0.999, 0.0), (np.inf, 1e-9, 0.0)]  # fmt: skip


@pytest.fixture(autouse=True)
def triton_takes_the_device(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(gpu, "DEVICES", {DEVICE})
    monkeypatch.setattr(triton_sampling, "CANDIDATES", 32)
    monkeypatch.setattr(triton_sampling, "BLOCK", 256)


def one(scaled, number, top_k, top_p, min_p):
    """The token of one row: all lists, nothing but sums in order."""
    p = np.exp(scaled.double().numpy())
    p /= p.sum()
    kept, before = [], 0.0
    for rank, token in enumerate(sorted(range(len(p)), key=lambda token: (-scaled[token], token))):
        if rank < top_k and before < top_p and p[token] >= min_p * p.max():
            kept.append(token)
        before += p[token]
    cumulative = np.cumsum(p[kept])
    return kept[int(np.searchsorted(cumulative, number * cumulative[-1], side="right"))]


def rows(spread, step):
    """Scaled logits of one row a cut, rounded to multiples of `step`, so that many are equal."""
    logits = spread * torch.randn(len(CUTS), VOCAB_SIZE)
    scaled = torch.round(logits / step) * step if step else logits
    scaled = scaled - scaled.amax(1, keepdim=True)
    cuts = torch.tensor(CUTS, dtype=torch.float32).T[:, :, None]
    return scaled, torch.rand(len(CUTS), 1, dtype=torch.float64), cuts


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize(("spread", "step"), [(3.0, 0), (2.0, 0.5), (0.3, 0), (0.0, 0)])
def test_draws(backend, spread, step):
    """Peaked and flat rows, with ties and of one value alone: cut before the last candidate and
    behind it.
    """
    scaled, number, cuts = rows(spread, step)
    draw_cut = kernels.draw_cut if backend == "triton" else reference.draw_cut
    found = draw_cut(scaled.to(DEVICE), number.to(DEVICE), *cuts.to(DEVICE))
    given = zip(scaled, number[:, 0].tolist(), *cuts[:, :, 0].tolist(), strict=True)
    assert found[:, 0].tolist() == [one(*row) for row in given]


def test_all_tokens_are_drawn_in_their_order(monkeypatch):
    """From 0 to 1 numbers give a flat row's first to last token, in several blocks."""
    monkeypatch.setattr(triton_sampling, "BLOCK", 64)
    scaled = torch.zeros(3, VOCAB_SIZE, device=DEVICE)
    scaled[:, 7] = -200.0
    number = torch.linspace(0, 1 - 2**-53, 3, dtype=torch.float64, device=DEVICE)[:, None]
    cuts = [torch.full((3, 1), cut, device=DEVICE) for cut in (torch.inf, 0.9999999, 0.0)]
    found = kernels.draw_cut(scaled, number, *cuts)[:, 0].tolist()
    assert found == sorted(found) and found[0] == 0 and found[-1] == VOCAB_SIZE - 1
    assert 7 not in found


def test_rows_that_are_not_finite_touch_no_other():
    scaled, number, cuts = (part.to(DEVICE) for part in rows(0.3, 0))
    expected = kernels.draw_cut(scaled, number, *cuts)
    scaled[2], scaled[3, 5:] = float("nan"), float("-inf")
    found = kernels.draw_cut(scaled, number, *cuts)
    others = [0, 1, 4, 5, 6, 7]
    assert torch.equal(found[others], expected[others])
    assert 0 <= int(found[2]) < VOCAB_SIZE and int(found[3]) < 5
    alone = kernels.draw_cut(scaled[6:7], number[6:7], *cuts[:, 6:7])
    assert torch.equal(alone[0], expected[6])

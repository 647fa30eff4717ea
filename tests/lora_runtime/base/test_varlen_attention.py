"""Rows end to end, with and without a shared beginning, against each row by the formula."""

from __future__ import annotations

import pytest
import torch

from lora_runtime.base.varlen_attention import Rows, VarlenAttention

ROWS = [Rows([3, 70, 1, 33]), Rows([5, 40, 2], prefix=19), Rows([4], prefix=1), Rows([1])]


def whole_rows(rows):
    """The tokens of each row, shared ones first, and how many of them are its own."""
    end = 0
    for part in rows:
        shared, end = range(end, end + part.prefix), end + part.prefix
        if part.prefix:
            yield list(shared), part.prefix
        for length in part.lengths:
            yield [*shared, *range(end, end + length)], length
            end += length


def by_formula(q, k, v, scale, window, softcap):
    """One row: q (L, H, D), k and v (L, G, D)."""
    repeats = q.shape[1] // k.shape[1]
    k, v = (part.repeat_interleave(repeats, 1) for part in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    for i in range(len(q)):
        first = 0 if window is None else max(0, i - window + 1)
        scores[:, i, i + 1 :] = -torch.inf
        scores[:, i, :first] = -torch.inf
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), v)


@pytest.mark.parametrize("window", [None, 7, 30])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_values_and_gradients(window, softcap):
    torch.manual_seed(0)
    num_tokens = sum(rows.num_tokens for rows in ROWS)
    q, k, v = (
        torch.randn(num_tokens, heads, 8, dtype=torch.float64, requires_grad=True)
        for heads in (6, 2, 2)
    )
    options = dict(scale=0.4, window=window, softcap=softcap)
    ours = VarlenAttention(ROWS).attend(q, k, v, layer=0, **options)
    expected = torch.zeros_like(ours)
    for tokens, num_own in whole_rows(ROWS):
        out = by_formula(q[tokens], k[tokens], v[tokens], **options)
        expected = expected.index_copy(0, torch.tensor(tokens[-num_own:]), out[-num_own:])
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12)
    weights = torch.randn_like(ours)
    found = torch.autograd.grad((ours * weights).sum(), (q, k, v))
    wanted = torch.autograd.grad((expected * weights).sum(), (q, k, v))
    for mine, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)


def test_a_poisoned_row_reaches_no_other():
    torch.manual_seed(0)
    num_tokens = sum(rows.num_tokens for rows in ROWS)
    q, k, v = (torch.randn(num_tokens, heads, 8) for heads in (6, 2, 2))
    rows = list(whole_rows(ROWS))
    poisoned, _ = rows[1]
    for part in (q, k, v):
        part[poisoned] = torch.nan
    out = VarlenAttention(ROWS).attend(q, k, v, layer=0, scale=0.4, window=None, softcap=None)
    is_finite = out.isfinite().all(-1).all(-1)
    assert is_finite.logical_not().nonzero()[:, 0].tolist() == poisoned

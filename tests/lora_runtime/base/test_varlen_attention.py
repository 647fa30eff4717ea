"""Rows end to end, with and without a shared beginning, against each row by the formula."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from lora_runtime.base.model import varlen_attention
from lora_runtime.base.model.varlen_attention import RowLengths, VarlenAttention, can_use_flash

ROWS = [
    RowLengths([3, 70, 1, 33]),
    RowLengths([5, 40, 2], prefix=19),
    RowLengths([4], prefix=1),
    RowLengths([1]),
]


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


def assert_by_formula(window, softcap):
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


@pytest.mark.parametrize("window", [None, 7, 30])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_values_and_gradients(window, softcap):
    assert_by_formula(window, softcap)


def flash(q, k, v, query_ends, key_ends, longest_q, longest_k, dropout, causal, probs, **options):
    """What torch's operator says it does, segment by segment: queries are the last of the keys, a
    query sees its own key, `window_size_left` before and `window_size_right` behind it, -1 for all.
    """
    assert query_ends.dtype == key_ends.dtype == torch.int32 and not (dropout or probs)
    assert (query_ends.diff().max(), key_ends.diff().max()) == (longest_q, longest_k)
    left, right = options["window_size_left"], options["window_size_right"]
    right = 0 if causal else right
    outs = []
    for (q0, q1), (k0, k1) in zip(
        query_ends.unfold(0, 2, 1).tolist(), key_ends.unfold(0, 2, 1).tolist(), strict=True
    ):
        place = torch.arange(k1 - k0)
        behind = place - (place[k1 - k0 - (q1 - q0) :, None])
        seen = ((left < 0) | (behind >= -left)) & ((right < 0) | (behind <= right))
        repeats = q.shape[1] // k.shape[1]
        keys, values = (part[k0:k1].repeat_interleave(repeats, 1) for part in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q[q0:q1], keys) * options["scale"]
        scores = scores.masked_fill(~seen, -torch.inf)
        outs.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), values))
    return torch.cat(outs), None


@pytest.mark.parametrize("window", [None, 1, 7, 30])
def test_values_and_gradients_by_flash_attention(monkeypatch, window):
    """Of what is handed to it: the kernel itself runs on a GPU alone."""
    monkeypatch.setattr(varlen_attention, "can_use_flash", lambda *_: True)
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", flash)
    assert_by_formula(window, None)


@pytest.mark.parametrize(
    "rows", [ROWS, [RowLengths([40]), RowLengths([7, 7])]], ids=["shared", "plain"]
)
@pytest.mark.parametrize("window", [None, 7])
def test_torch_takes_what_flash_attention_is_given(monkeypatch, rows, window):
    """By the shapes alone that its operator and its gradient have, with fewer key heads."""
    monkeypatch.setattr(varlen_attention, "can_use_flash", lambda *_: True)
    num_tokens = sum(part.num_tokens for part in rows)
    q, k, v = (
        torch.empty(num_tokens, h, 64, dtype=torch.bfloat16, device="meta", requires_grad=True)
        for h in (6, 2, 2)
    )
    options = dict(layer=0, scale=0.4, window=window, softcap=None)
    out = VarlenAttention(rows, "meta").attend(q, k, v, **options)
    assert (out.shape, out.dtype) == (q.shape, q.dtype)
    gradients = torch.autograd.grad(out.sum(), (q, k, v))
    assert [g.shape for g in gradients] == [q.shape, k.shape, v.shape]


def test_rows_alone_are_neither_gathered_nor_padded(monkeypatch):
    monkeypatch.setattr(varlen_attention, "can_use_flash", lambda *_: True)
    given = []
    monkeypatch.setattr(
        torch.ops.aten,
        "_flash_attention_forward",
        lambda *a, **_: (given.extend(a[:3]), (a[0],))[1],
    )
    q, k, v = (torch.zeros(9, 2, 8) for _ in range(3))
    attention = VarlenAttention([RowLengths([3]), RowLengths([1, 5])])
    out = attention.attend(q, k, v, layer=0, scale=1.0, window=None, softcap=None)
    assert all(ours is theirs for ours, theirs in zip([*given, out], [q, k, v, q], strict=True))


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({}, True), ({"dtype": torch.float16}, True), ({"shape": (5, 4, 96)}, True),
        ({"is_cuda": False}, False), ({"dtype": torch.float32}, False),
        ({"shape": (5, 4, 100)}, False), ({"shape": (5, 4, 264)}, False),
        ({"softcap": 30.0}, False), ({"capability": (7, 5)}, False),
    ],
    ids=str,
)  # fmt: skip
def test_what_flash_attention_takes(monkeypatch, changed, expected):
    settings = dict(
        is_cuda=True, dtype=torch.bfloat16, shape=(5, 4, 128), softcap=None, capability=(8, 0)
    )
    settings |= changed
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: settings["capability"])
    q = SimpleNamespace(device="cuda:0", **settings)
    assert can_use_flash(q, settings["softcap"]) == expected


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

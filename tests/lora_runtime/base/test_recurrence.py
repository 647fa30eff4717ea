"""Linear recurrences over rows end to end, in pieces, against their formula token by token."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lora_runtime.base.model.linear_recurrence import advance, causal_conv
from lora_runtime.base.model.recurrence import Piece, Recurrence, StatePool
from lora_runtime.base.model.varlen_attention import RowLengths, VarlenAttention
from tests.lora_runtime.base.test_varlen_attention import ROWS, whole_rows

HEADS, KEYS, VALUES, CHANNELS, TAPS = 3, 5, 4, 6, 3


def by_formula(q, k, v, g, beta, state):
    """Of one row (L, H, …): the recurrence at the top of the module."""
    outs = []
    for t in range(len(q)):
        state = g[t].exp()[:, None, None] * state
        value = v[t]
        if beta is not None:
            value = beta[t][:, None] * (value - torch.einsum("hkv,hk->hv", state, k[t]))
        state = state + torch.einsum("hk,hv->hkv", k[t], value)
        outs.append(torch.einsum("hkv,hk->hv", state, q[t]))
    return torch.stack(outs), state


def numbers(num_tokens, seed=0) -> list[Tensor]:
    """q, k, v, g, β and x of a convolution; keys are of unit length, as layers make them."""
    torch.manual_seed(seed)
    q, k = torch.randn(2, num_tokens, HEADS, KEYS, dtype=torch.float64)
    v = torch.randn(num_tokens, HEADS, VALUES, dtype=torch.float64)
    g = -torch.rand(num_tokens, HEADS, dtype=torch.float64)
    beta = torch.rand(num_tokens, HEADS, dtype=torch.float64)
    x = torch.randn(num_tokens, CHANNELS, dtype=torch.float64)
    found = [q, k / k.norm(dim=-1, keepdim=True), v, g, beta, x]
    return [part.detach().requires_grad_() for part in found]


class ToyRule:
    """A convolution beside a recurrence, as every layer has them."""

    layer_idx = 7
    state_shapes = ((TAPS - 1, CHANNELS), (HEADS, KEYS, VALUES))

    def __init__(self, has_beta: bool) -> None:
        generator = torch.Generator().manual_seed(5)
        self.weight = torch.randn(CHANNELS, TAPS, generator=generator, dtype=torch.float64)
        self.has_beta = has_beta

    def advance(self, states, inputs, padding):
        q, k, v, g, beta, x = inputs
        if padding.is_token is not None:
            g, beta = (torch.where(padding.is_token[..., None], part, 0) for part in (g, beta))
            v = torch.where(padding.is_token[..., None, None], v, 0)
        lengths = None if padding.is_token is None else padding.lengths
        y, history = causal_conv(x, states[0], self.weight, None, lengths)
        out, state = advance(q, k, v, g, beta if self.has_beta else None, states[1])
        return torch.cat([out.flatten(2), y], dim=2), (history, state)

    def by_formula(self, parts) -> Tensor:
        """A row from its beginning."""
        q, k, v, g, beta, x = parts
        start = torch.zeros(HEADS, KEYS, VALUES, dtype=torch.float64)
        out, _ = by_formula(q, k, v, g, beta if self.has_beta else None, start)
        padded = torch.cat([torch.zeros(TAPS - 1, CHANNELS, dtype=torch.float64), x])
        y = sum(padded[n : n + len(x)] * self.weight[:, n] for n in range(TAPS))
        return torch.cat([out.flatten(1), y], dim=1)


@pytest.mark.parametrize("has_beta", [True, False])
def test_rows_and_their_gradients_are_those_of_each_alone(has_beta):
    """Also those that share a beginning, which is computed once."""
    rule, rows = ToyRule(has_beta), [*ROWS, RowLengths([150, 64, 65, 128])]
    parts = numbers(sum(part.num_tokens for part in rows))
    ours = VarlenAttention(rows).recurrence.run(rule, parts)
    expected = torch.zeros_like(ours)
    for own, length in whole_rows(rows):
        out = rule.by_formula([part[own] for part in parts])
        expected = expected.index_copy(0, torch.tensor(own[-length:]), out[-length:])
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-10)
    weights = torch.randn_like(ours)
    used = parts if has_beta else [part for n, part in enumerate(parts) if n != 4]
    found = torch.autograd.grad((ours * weights).sum(), used)
    wanted = torch.autograd.grad((expected * weights).sum(), used)
    for mine, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-9)


@pytest.mark.parametrize("cuts", [[1, 1, 1], [64, 1, 63], [5, 130, 2, 60], [200]])
@torch.no_grad()
def test_a_row_may_be_cut_anywhere_and_its_states_kept(cuts):
    """Steps of a row beside another's, through a pool whose free slots hold NaN."""
    rule, total = ToyRule(True), sum(cuts)
    parts, other = numbers(total), numbers(total, seed=1)
    whole = rule.by_formula(parts)
    like = torch.empty(0, dtype=torch.float64)
    pool = StatePool.allocate({rule.layer_idx: rule.state_shapes}, 4, like)
    for part in pool.layers[rule.layer_idx]:
        part.fill_(torch.nan)
    done, found = 0, []
    for step, length in enumerate(cuts):
        before = 2 if step else None
        pieces = [Piece(0, length, loads=before, stores=(2,)), Piece(length, 3, stores=(1,))]
        inputs = [
            torch.cat([a[done : done + length], b[:3]]) for a, b in zip(parts, other, strict=True)
        ]
        found.append(Recurrence(pieces, "cpu", pool).run(rule, inputs)[:length])
        done += length
    torch.testing.assert_close(torch.cat(found), whole, rtol=0, atol=1e-10)
    _, state = by_formula(*parts[:5], torch.zeros(HEADS, KEYS, VALUES, dtype=torch.float64))
    torch.testing.assert_close(pool.layers[7][1][2], state, rtol=0, atol=1e-10)
    assert pool.layers[7][1][0].isnan().all() and pool.layers[7][1][3].isnan().all()


@torch.no_grad()
def test_pieces_of_one_step_go_on_from_each_other_and_store_on_the_way():
    rule, parts = ToyRule(True), numbers(100)
    pool = StatePool.allocate(
        {rule.layer_idx: rule.state_shapes}, 3, torch.empty(0, dtype=torch.float64)
    )
    pieces = [Piece(0, 64, stores=(0,)), Piece(64, 36, after=0, stores=(1, 2))]
    out = Recurrence(pieces, "cpu", pool).run(rule, parts)
    torch.testing.assert_close(out, rule.by_formula(parts), rtol=0, atol=1e-10)
    start = torch.zeros(HEADS, KEYS, VALUES, dtype=torch.float64)
    _, middle = by_formula(*(part[:64] for part in parts[:5]), start)
    history, state = pool.layers[7]
    torch.testing.assert_close(state[0], middle, rtol=0, atol=1e-10)
    torch.testing.assert_close(history[0], parts[5][62:64], rtol=0, atol=0)
    assert state[1].equal(state[2]) and history[1].equal(parts[5][98:])


@torch.no_grad()
def test_a_row_of_nan_reaches_no_other():
    rule, lengths = ToyRule(True), [10, 12, 1, 1]
    parts = numbers(sum(lengths))
    for part in parts:
        part[10:23] = torch.nan  # the second and the third row
    out = VarlenAttention([RowLengths(lengths)]).recurrence.run(rule, parts)
    assert out[:10].isfinite().all() and out[23:].isfinite().all()
    assert out[10:23].isnan().all()

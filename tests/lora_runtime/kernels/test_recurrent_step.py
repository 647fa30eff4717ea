"""One token of a linear recurrence: the compiled step against the definition in float64."""

from __future__ import annotations

import pytest
import torch

from lora_runtime.kernels import cpu, recurrent_step, reference

SHAPES = [(1, 1, 1, 1), (3, 2, 5, 7), (5, 4, 16, 24), (2, 3, 128, 128), (7, 2, 64, 80)]
"""Rows, heads, keys, values."""


def numbers(shape, has_beta, dtype=torch.float32):
    rows, heads, keys, values = shape
    generator = torch.Generator().manual_seed(sum(shape))

    def random(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    states = random(rows + 3, heads, keys, values)
    slots = torch.randperm(rows + 3, generator=generator)[:rows]
    q, k, v = random(rows, heads, keys), random(rows, heads, keys), random(rows, heads, values)
    keep, beta = random(rows, heads).sigmoid(), random(rows, heads).sigmoid()
    k = k / k.norm(dim=-1, keepdim=True)
    given = [states, slots, q, k, v, keep, beta if has_beta else None]
    return [
        part.to(dtype) if part is not None and part.is_floating_point() else part for part in given
    ]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("has_beta", [True, False])
@pytest.mark.parametrize("level", range(5))
def test_the_compiled_step_is_the_definition(shape, has_beta, level):
    if cpu.library() is None:
        pytest.skip("without the library")
    states, slots, *rest = numbers(shape, has_beta)
    exact, _, *exact_rest = numbers(shape, has_beta, torch.float64)
    before = states.clone()
    expected = reference.recurrent_step(exact, slots, *exact_rest)
    cpu.library().loramux_limit_level(level)
    try:
        out = recurrent_step(states, slots, *rest)
    finally:
        cpu.library().loramux_limit_level(4)
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=3e-5)
    torch.testing.assert_close(states.double(), exact, rtol=0, atol=1e-5)
    others = [slot for slot in range(len(states)) if slot not in slots.tolist()]
    assert states[others].equal(before[others])


def test_a_row_is_bit_equal_in_every_batch_and_reaches_no_other():
    states, slots, q, k, v, keep, beta = numbers((6, 4, 16, 40), True)
    alone = states.clone()
    out = recurrent_step(alone, slots[:1], q[:1], k[:1], v[:1], keep[:1], beta[:1])
    states[slots[3]] = torch.nan
    q[4], k[5] = torch.inf, torch.nan
    together = recurrent_step(states, slots, q, k, v, keep, beta)
    assert together[:1].equal(out) and states[slots[0]].equal(alone[slots[0]])
    assert together[:3].isfinite().all()
    assert not together[3:].isfinite().any(dim=2).any()

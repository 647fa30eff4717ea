"""One adapter in training: the compiled product and its gradients against float64."""

from __future__ import annotations

import random

import pytest
import torch

from lora_runtime.kernels import (
    can_train_adapter,
    cpu,
    train_adapter,
    trained_adapter_gradients,
)

pytestmark = pytest.mark.skipif(not cpu.multiplies_bfloat16(), reason="needs AVX512-BF16")

ROUNDING = 2.0**-8
"""What rounding to bfloat16 may be off by, relative to the result."""


def drawn(*shape):
    return torch.randn(shape).bfloat16()


class Case:
    def __init__(self, seed: int) -> None:
        chance = random.Random(seed)
        torch.manual_seed(seed)
        tokens, rank = chance.randint(1, 150), chance.choice([1, 7, 8, 15, 16, 17, 32, 40, 64])
        inputs, outputs = (32 * chance.randint(1, 12) for _ in range(2))
        self.x, self.y, self.grad = (drawn(tokens, n) for n in (inputs, outputs, outputs))
        self.a, self.b = drawn(rank, inputs), drawn(outputs, rank)
        self.of_x = drawn(tokens, inputs)

    def run(self, rows=slice(None)):
        """y, and the gradients of x, a and b, of these rows."""
        y, of_x, x, grad = (part[rows].clone() for part in (self.y, self.of_x, self.x, self.grad))
        assert can_train_adapter(y, x, self.a)
        hidden = train_adapter(y, x, self.a, self.b)
        return y, of_x, *trained_adapter_gradients(grad, x, hidden, self.a, self.b, of_x)


@pytest.mark.parametrize("seed", range(12))
def test_values_and_gradients(level, seed):
    """∂A and ∂B are float32 sums of what is rounded before: A x, and G B."""
    case = Case(seed)
    x, a, b, grad = (part.double() for part in (case.x, case.a, case.b, case.grad))
    y, of_x, of_a, of_b = case.run()
    wanted = case.y.double() + x @ a.T @ b.T, case.of_x.double() + grad @ b @ a
    for mine, theirs in zip((y, of_x), wanted, strict=True):
        assert mine.dtype == torch.bfloat16
        assert (mine - theirs).norm() <= ROUNDING * theirs.norm()
    hidden, of_hidden = (
        (left @ right).bfloat16().double() for left, right in ((x, a.T), (grad, b))
    )
    for mine, theirs in zip((of_a, of_b), (of_hidden.T @ x, grad.T @ hidden), strict=True):
        assert mine.dtype == torch.float32
        # A float32 sum may lie on the other side of a rounding of A x than float64's: rarely.
        assert (mine - theirs).norm() <= ROUNDING / 16 * theirs.norm()
    assert (of_a == of_a.bfloat16()).double().mean() < 0.1, "rounded on its way"


@pytest.mark.parametrize("seed", range(4))
def test_rows_do_not_touch(level, seed):
    """Nor what lies behind them in memory."""
    case = Case(seed)
    cut = len(case.x) // 2 + 1
    alone = case.run(slice(cut))
    case.x, case.grad = (torch.cat([part, part / 0]) for part in (case.x[:cut], case.grad[:cut]))
    y, of_x, *of_factors = case.run(slice(cut))
    for mine, own in zip((y, of_x, *of_factors), alone, strict=True):
        assert torch.equal(mine, own)


def test_a_gradient_of_x_that_is_not_wanted(level):
    case = Case(0)
    *_, of_a, of_b = case.run()
    hidden = train_adapter(case.y.clone(), case.x, case.a, case.b)
    found = trained_adapter_gradients(case.grad, case.x, hidden, case.a, case.b, None)
    assert torch.equal(found[0], of_a) and torch.equal(found[1], of_b)


def test_what_it_does_not_take():
    x, y, a = drawn(3, 64), drawn(3, 32), drawn(2, 64)
    assert can_train_adapter(y, x, a)
    assert not can_train_adapter(y, drawn(3, 65), drawn(2, 65))
    assert not can_train_adapter(drawn(3, 40), x, a)
    assert not can_train_adapter(y.float(), x, a)
    assert not can_train_adapter(y.float(), x.float(), a.float())

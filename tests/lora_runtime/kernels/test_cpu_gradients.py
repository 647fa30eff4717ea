"""Gradients of the compiled norms, rotation and activation against autograd of the definition."""

from __future__ import annotations

import random

import pytest
import torch

from lora_runtime import kernels
from lora_runtime.base.model.varlen_attention import RowLengths, VarlenAttention
from lora_runtime.kernels import HeadNorm, cpu_tracked, reference
from lora_runtime.kernels.cpu_library import LEVELS, library

DTYPES = [torch.float32, torch.bfloat16]
SEEDS = range(6)

pytestmark = pytest.mark.skipif(library() is None, reason="the compiled library is missing")


@pytest.fixture(autouse=True)
def only_tracked(monkeypatch):
    """The definition would give the right gradients too."""
    used = []
    for name in ("rms_norm", "add_rms_norm", "rotate", "attend_rows", "gated_activation"):
        real = getattr(cpu_tracked, name)

        def counted(*args, _real=real, **kwargs):
            used.append(_real)
            return _real(*args, **kwargs)

        monkeypatch.setattr(cpu_tracked, name, counted)
    yield
    assert used


def drawn(*shape, dtype, requires_grad=True, scale=2.0):
    return (scale * torch.randn(*shape)).to(dtype).requires_grad_(requires_grad)


def check(op, definition, inputs, dtype):
    """Gradients of `inputs` for drawn gradients of the outputs, by `op` and by `definition` in
    float64.
    """
    outputs = op(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    grads = [drawn(*y.shape, dtype=dtype, requires_grad=False) for y in outputs]
    found = torch.autograd.grad(outputs, inputs, grads)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    wanted = definition(*exact)
    wanted = wanted if isinstance(wanted, tuple) else (wanted,)
    expected = torch.autograd.grad(wanted, exact, [grad.double() for grad in grads])
    step = 2**-7 if dtype == torch.bfloat16 else 2e-5
    for x, own, right in zip(inputs, found, expected, strict=True):
        assert own.dtype == dtype and own.shape == x.shape
        scale = float(right.abs().max())
        torch.testing.assert_close(own.double(), right, rtol=step, atol=step * scale)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", SEEDS)
def test_norms(seed, dtype):
    torch.manual_seed(seed)
    draw = random.Random(seed)
    rows, width, plus_one = draw.randint(1, 40), draw.randint(1, 700), bool(seed % 2)
    weight, branch = (drawn(width, dtype=dtype, requires_grad=False) for _ in range(2))
    wide = weight.double(), branch.double()
    inputs = [drawn(1, rows, width, dtype=dtype) for _ in range(2)]

    def normed(x, own):
        return kernels.rms_norm(x, own, 1e-5, plus_one=plus_one)

    check(lambda x: normed(x, weight), lambda x: normed(x, wide[0]), inputs[:1], dtype)
    for has_branch in (False, True):

        def added(x, residual, own, branch_weight, has_branch=has_branch):
            of_branch = branch_weight if has_branch else None
            options = {"plus_one": plus_one, "branch_weight": of_branch}
            return kernels.add_rms_norm(x, residual, own, 1e-5, **options)

        check(
            lambda *given, op=added: op(*given, weight, branch),
            lambda *given, op=added: op(*given, *wide),
            inputs,
            dtype,
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", [None, "plain", "plus_one"])
@pytest.mark.parametrize("seed", SEEDS)
def test_rotation(seed, kind, dtype):
    """Queries and keys are slices of one product."""
    torch.manual_seed(seed)
    draw = random.Random(seed)
    tokens, groups, half = draw.randint(1, 30), draw.randint(1, 4), draw.randint(1, 40)
    head_dim, heads = 2 * half + draw.choice([0, 5, 32]), groups * draw.randint(1, 4)
    cos, sin = (drawn(tokens, 2 * half, dtype=dtype, requires_grad=False) for _ in range(2))
    weights = [drawn(head_dim, dtype=dtype, requires_grad=False) for _ in range(2)]

    def rotated(qk, dtype):
        norm = HeadNorm(*(w.to(dtype) for w in weights), 1e-5, kind == "plus_one")
        q, k = qk.unflatten(1, (-1, head_dim)).split((heads, groups), 1)
        return kernels.rotate(q, k, cos.to(dtype), sin.to(dtype), norm if kind else None)

    qk = drawn(tokens, (heads + groups) * head_dim, dtype=dtype)
    check(lambda x: rotated(x, dtype), lambda x: rotated(x, torch.float64), [qk], dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("seed", SEEDS)
def test_gated_activation(seed, kind, dtype):
    torch.manual_seed(seed)
    draw = random.Random(seed)
    shape = 1, draw.randint(1, 40), draw.randint(1, 700)
    inputs = [drawn(*shape, dtype=dtype, scale=4.0) for _ in range(2)]

    def gated(gate, up):
        return kernels.gated_activation(gate, up, kind)

    check(gated, gated, inputs, dtype)


def drawn_rows(draw, dtype):
    """Rows, some of which share a prefix, with queries, keys and values of their tokens."""
    rows = [
        RowLengths(
            [draw.randint(1, 70) for _ in range(draw.randint(1, 4))], draw.choice([0, 1, 30])
        )
        for _ in range(draw.randint(1, 3))
    ]
    groups, head_dim = draw.randint(1, 3), draw.choice([8, 24, 64, 80])
    heads, tokens = groups * draw.randint(1, 4), sum(own.num_tokens for own in rows)
    return rows, [drawn(tokens, n, head_dim, dtype=dtype, scale=1) for n in (heads, groups, groups)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("highest", range(len(LEVELS)))
@pytest.mark.parametrize("seed", SEEDS)
def test_attention_over_rows(highest, seed, dtype, request):
    """In float64 rows are padded to one and masked."""
    found = library()
    request.addfinalizer(lambda: found.loramux_limit_level(len(LEVELS) - 1))
    found.loramux_limit_level(highest)
    torch.manual_seed(seed)
    rows, inputs = drawn_rows(random.Random(seed), dtype)
    attention = VarlenAttention(rows)

    def attended(*qkv):
        return attention.attend(*qkv, layer=0, scale=0.2, window=None, softcap=None)

    torch.testing.assert_close(
        attended(*inputs).double(),
        attended(*(part.double() for part in inputs)),
        rtol=2**-7 if dtype == torch.bfloat16 else 2e-5,
        atol=2**-8 if dtype == torch.bfloat16 else 2e-5,
    )
    check(attended, attended, inputs, dtype)


def test_rows_of_attention_do_not_touch():
    """To the last bit, but for the gradient of tokens that they share."""
    torch.manual_seed(0)
    q, k, v = (drawn(50, n, 16, dtype=torch.float32) for n in (4, 2, 2))
    options = {"layer": 0, "scale": 0.25, "window": None, "softcap": None}
    weights = torch.randn(40, 4, 16)
    alone = VarlenAttention([RowLengths([40])]).attend(q[:40], k[:40], v[:40], **options)
    wanted = torch.autograd.grad(alone, (q, k, v), weights)
    with torch.no_grad():
        for part in (q, k, v):
            part[40:] = torch.nan
    beside = VarlenAttention([RowLengths([40, 10])]).attend(q, k, v, **options)
    found = torch.autograd.grad(beside, (q, k, v), torch.cat([weights, torch.randn(10, 4, 16)]))
    assert torch.equal(beside[:40], alone)
    for mine, own in zip(found, wanted, strict=True):
        assert torch.equal(mine[:40], own[:40])


def test_rows_do_not_touch_and_large_values_do_not_overflow():
    x = torch.tensor([[300.0, -300.0, 3.0], [1.0, 2.0, float("nan")]], requires_grad=True)
    up = torch.ones_like(x)
    for y in (
        kernels.gated_activation(x, up, "silu"),
        kernels.gated_activation(x, up, "gelu_tanh"),
        kernels.rms_norm(x, torch.ones(3), 1e-5, plus_one=False),
    ):
        (found,) = torch.autograd.grad(y.sum(), x)
        assert found[0].isfinite().all() and found[1].isnan().any()


def test_a_trained_weight_takes_the_definition():
    weight = torch.ones(8, requires_grad=True)
    x = torch.randn(2, 8, requires_grad=True)
    found = torch.autograd.grad(kernels.rms_norm(x, weight, 1e-5, plus_one=False).sum(), weight)
    plain = reference.rms_norm(x, weight, 1e-5, plus_one=False).sum()
    torch.testing.assert_close(found, torch.autograd.grad(plain, weight))
    kernels.gated_activation(x, x, "silu")  # has a gradient of x alone

"""Norm, rotation and gated activation in Triton against transformers' own modules."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.phi3.modeling_phi3 import apply_rotary_pos_emb

from lora_runtime import kernels
from lora_runtime.kernels import HeadNorm, gpu, reference
from lora_runtime.kernels.triton import elementwise as triton_elementwise
from tests.lora_runtime.kernels.on_triton import DEVICE

pytestmark = [
    pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning"),
    pytest.mark.usefixtures("poisoned_outputs"),
]
"""The warning is numpy's, in the interpreter: 1 / (1 + ∞) is 0 as it should be."""
DTYPES = [torch.float32, torch.bfloat16]


ROUNDING = 4e-6
"""float32's, in sums and exponentials."""


@pytest.fixture(autouse=True)
def triton_takes_the_device(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(gpu, "DEVICES", {DEVICE})


def close(y, expected):
    """Equal but for float32's rounding, which makes few values of bfloat16 one step of it."""
    step = 2**-7 if y.dtype == torch.bfloat16 else ROUNDING
    torch.testing.assert_close(y, expected, rtol=step, atol=ROUNDING)
    is_off = ~torch.isclose(y.double(), expected.double(), rtol=ROUNDING, atol=ROUNDING)
    assert is_off.sum() <= 1 + y.numel() // 100


def random(*shape, dtype):
    return torch.randn(*shape, device=DEVICE).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 33, 96, 576])
@pytest.mark.parametrize("kind", [LlamaRMSNorm, Gemma2RMSNorm])
def test_rms_norm(monkeypatch, kind, width, dtype):
    """Rows laid end to end, and heads that are a slice of a wider product."""
    norm = kind(width, eps=1e-5).to(DEVICE, dtype)
    norm.weight.requires_grad_(False).copy_(random(width, dtype=dtype))
    is_shifted = kind is Gemma2RMSNorm
    wide = 3 * random(1, 5, 4 * width + 3, dtype=dtype)
    heads = wide[..., width : 3 * width].unflatten(-1, (2, width))
    for x in (3 * random(1, 7, width, dtype=dtype), random(3, width, dtype=dtype), heads):
        expected = norm(x)
        y = kernels.rms_norm(x, norm.weight, 1e-5, plus_one=is_shifted)
        assert y.is_contiguous() and y.dtype == dtype
        close(y, expected)
        close(reference.rms_norm(x, norm.weight, 1e-5, plus_one=is_shifted), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 33, 1100])
@pytest.mark.parametrize("kind", [LlamaRMSNorm, Gemma2RMSNorm])
@pytest.mark.parametrize("has_branch_norm", [False, True])
def test_add_rms_norm(has_branch_norm, kind, width, dtype):
    """The sum is torch's to the bit, where nothing is normed before, and the norm that of it."""
    norm, branch = (kind(width, eps=1e-5).to(DEVICE, dtype) for _ in range(2))
    for one in (norm, branch):
        one.weight.requires_grad_(False).copy_(random(width, dtype=dtype))
    x = 3 * random(1, 5, width, dtype=dtype)
    residual = random(1, 5, 2 * width, dtype=dtype)[..., width:]
    options = dict(plus_one=kind is Gemma2RMSNorm)
    options["branch_weight"] = branch.weight if has_branch_norm else None
    for op in (kernels.add_rms_norm, reference.add_rms_norm):
        total, y = op(x, residual, norm.weight, 1e-5, **options)
        assert total.dtype == y.dtype == dtype
        if has_branch_norm:
            close(total, residual + branch(x))
        else:
            assert torch.equal(total, residual + x)
        close(y, norm(total))


@pytest.mark.parametrize("width", [48, 1100])
def test_a_norm_is_bit_equal_in_any_batch_beside_any_neighbour(width):
    """Several short rows go together; one of them is NaN, and so is what lies between them."""
    wide = random(61, width + 5, dtype=torch.float32)
    wide[:, width:] = wide[13] = float("nan")
    x, weight = wide[:, :width], torch.ones(width, device=DEVICE)
    y = kernels.rms_norm(x, weight, 1e-5, plus_one=False)
    assert y[13].isnan().all() and y[12].isfinite().all() and y[14:].isfinite().all()
    for rows in (slice(0, 1), slice(5, 12), slice(20, 61)):
        assert torch.equal(kernels.rms_norm(x[rows], weight, 1e-5, plus_one=False), y[rows])


def head_norm(kind, head_dim, dtype):
    """transformers' modules for queries and keys, and what our ops take for both."""
    modules = [kind(head_dim, eps=1e-5).to(DEVICE, dtype) for _ in range(2)]
    for module in modules:
        module.weight.requires_grad_(False).copy_(random(head_dim, dtype=dtype))
    weights = (module.weight for module in modules)
    return modules, HeadNorm(*weights, eps=1e-5, plus_one=kind is Gemma2RMSNorm)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", [None, LlamaRMSNorm, Gemma2RMSNorm])
@pytest.mark.parametrize(
    ("heads", "head_dim", "rotated"), [((5, 2), 16, 16), ((1, 1), 80, 80), ((4, 4), 48, 20)]
)
def test_rotate(heads, head_dim, rotated, kind, dtype):
    """transformers rounds each product, so it may be a few bfloat16 steps off. Queries, keys and
    values are slices of one product, and what the cache held stays where nothing is written.
    """
    num_heads, num_groups = heads
    width = (num_heads + 2 * num_groups) * head_dim
    qkv = random(6, width + 7, dtype=dtype)[:, :width].unflatten(1, (-1, head_dim))
    q, k, v = qkv.split((num_heads, num_groups, num_groups), 1)
    angles = torch.rand(1, 6, rotated // 2, device=DEVICE) * 6
    cos, sin = (torch.cat([f(angles)] * 2, -1).to(dtype) for f in (torch.cos, torch.sin))
    modules, norm = head_norm(kind, head_dim, dtype) if kind else ([nn.Identity()] * 2, None)
    turned = (
        module(part.transpose(0, 1)[None]) for module, part in zip(modules, (q, k), strict=True)
    )
    expected = [x[0].transpose(0, 1) for x in apply_rotary_pos_emb(*turned, cos, sin)]
    tolerance = 3e-2 if dtype == torch.bfloat16 else 2e-6
    slots = torch.tensor([7, 2, -1, 0, 9, 4], device=DEVICE)
    empty = random(2, 11, num_groups, head_dim, dtype=dtype)
    spread = torch.stack([cos[0], sin[0]], -1)
    for backend in (kernels, reference):
        turned = backend.rotate(q, k, *spread.unbind(-1), norm)
        cache = empty.clone()
        rotated_q = backend.rotate_and_write(q, k, v, cos[0], sin[0], *cache, slots, norm)
        assert torch.equal(rotated_q, turned[0])
        for y, wanted in zip(turned, expected, strict=True):
            assert y.is_contiguous() and y.dtype == dtype
            torch.testing.assert_close(y, wanted, rtol=tolerance if kind else 0, atol=tolerance)
            if norm is None:
                assert torch.equal(y[..., rotated:], wanted[..., rotated:])
        for found, before, wanted in zip(cache, empty, (turned[1], v), strict=True):
            is_written = torch.isin(torch.arange(11, device=DEVICE), slots)
            assert torch.equal(found[~is_written], before[~is_written])
            assert torch.equal(found[slots[slots >= 0]], wanted[slots >= 0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 33, 1100])
@pytest.mark.parametrize(("kind", "name"), [("silu", "silu"), ("gelu_tanh", "gelu_pytorch_tanh")])
def test_gated_activation(kind, name, width, dtype):
    gate, up = (4 * random(1, 3, 2 * width + 1, dtype=dtype)[..., : 2 * width]).chunk(2, -1)
    expected = (ACT2FN[name](gate.double()) * up.double()).to(dtype)
    close(kernels.gated_activation(gate, up, kind), expected)
    close(reference.gated_activation(gate, up, kind), expected)


def test_large_values_do_not_overflow_and_nan_stays_in_its_row():
    x = torch.tensor([[200.0, -200.0, 3.0], [1.0, 2.0, float("nan")]], device=DEVICE)
    y = kernels.gated_activation(x, torch.ones_like(x), "silu")
    torch.testing.assert_close(y[0].cpu(), torch.tensor([200.0, 0.0, 3 / (1 + 2.718281828**-3)]))
    normed = kernels.rms_norm(x, torch.ones(3, device=DEVICE), 1e-5, plus_one=False)
    assert normed[0].isfinite().all() and normed[1].isnan().all()


def test_gradients_take_the_definition(monkeypatch):
    monkeypatch.setattr(triton_elementwise, "rms_norm", None)
    x = torch.randn(2, 8, device=DEVICE, requires_grad=True)
    kernels.rms_norm(x, torch.ones(8, device=DEVICE), 1e-5, plus_one=False).sum().backward()
    assert x.grad is not None

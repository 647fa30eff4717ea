"""One token of recurrent layers: every backend's steps against their formulas in float64."""

from __future__ import annotations

import contextlib

import pytest
import torch
import torch.nn.functional as F

from lora_runtime.kernels import conv_step, cpu, gpu, recurrent_step, reference
from lora_runtime.kernels.cpu_library import LEVELS, library
from tests.lora_runtime.kernels.on_triton import DEVICE, on_device

SHAPES = [
    (1, 1, 1, 1, 1),
    (3, 2, 2, 5, 7),
    (5, 2, 4, 16, 24),
    (2, 1, 3, 128, 128),
    (7, 2, 2, 64, 80),
    (4, 1, 5, 130, 33),
]
"""Rows, key heads, heads, keys, values."""
BACKENDS = ["triton", "torch", *LEVELS]


@pytest.fixture(params=BACKENDS)
def backend(request, monkeypatch):
    """Calls an op by one backend, on its device; what it changed in place, and its result, come
    back to the host.
    """
    name = request.param
    if name in LEVELS and library() is None:
        pytest.skip("without the library")
    monkeypatch.setattr(gpu, "DEVICES", {DEVICE} if name == "triton" else set())
    if name == "torch":
        monkeypatch.setattr(cpu, "library", lambda: None)

    def call(op, states, *args, **options):
        move = on_device if name == "triton" else lambda value: value
        there = move(states)
        with level(name) if name in LEVELS else contextlib.nullcontext():
            moved = {key: move(value) for key, value in options.items()}
            out = op(there, *map(move, args), **moved)
        states.copy_(there)
        return out.cpu()

    call.name = name
    return call


@contextlib.contextmanager
def level(name):
    library().loramux_limit_level(LEVELS.index(name))
    try:
        yield
    finally:
        library().loramux_limit_level(len(LEVELS) - 1)


def places(num_rows, generator):
    """Slots in any order, the second of three rows without one; further slots for every second."""
    order = torch.randperm(2 * num_rows + 3, generator=generator)
    slots, copies = order[:num_rows], order[num_rows : 2 * num_rows].clone()
    copies[::2] = -1
    slots[1::3] = -1
    return slots, copies


def numbers(shape, has_beta, dtype=torch.float32):
    rows, key_heads, heads, keys, values = shape
    generator = torch.Generator().manual_seed(sum(shape))

    def random(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    states = random(2 * rows + 3, heads, keys, values)
    slots, copies = places(rows, generator)
    q, k, v = random(rows, key_heads, keys), random(rows, key_heads, keys), random(rows, 1, values)
    v = v + random(rows, heads, values)
    keep, beta = random(rows, heads).sigmoid(), random(rows, heads).sigmoid()
    k = k / k.norm(dim=-1, keepdim=True)
    given = [states, slots, q, k, v, keep, beta if has_beta else None, copies]
    return [
        part.to(dtype) if part is not None and part.is_floating_point() else part for part in given
    ]


def by_formula(states, slots, q, k, v, keep, beta, copies):
    """Row by row and head by head; → the outputs and the states afterwards."""
    states, out = states.clone(), torch.zeros_like(v)
    for row, slot in enumerate(slots.tolist()):
        for head in range(v.shape[1] if slot >= 0 else 0):
            own = head // (v.shape[1] // q.shape[1])
            state, value = keep[row, head] * states[slot, head], v[row, head]
            if beta is not None:
                value = beta[row, head] * (value - state.T @ k[row, own])
            states[slot, head] = state + torch.outer(k[row, own], value)
            out[row, head] = states[slot, head].T @ q[row, own]
            if copies[row] >= 0:
                states[copies[row], head] = states[slot, head]
    return out, states


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("has_beta", [True, False])
def test_a_step_is_its_formula(backend, shape, has_beta):
    """No slot but the rows' own and the further ones changes."""
    states, *rest = numbers(shape, has_beta)
    expected, expected_states = by_formula(*numbers(shape, has_beta, torch.float64))
    before = states.clone()
    out = backend(recurrent_step, states, *rest)
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=3e-5)
    torch.testing.assert_close(states.double(), expected_states, rtol=0, atol=1e-5)
    written = {*rest[0].tolist(), *rest[-1][rest[0] >= 0].tolist()}
    others = [slot for slot in range(len(states)) if slot not in written]
    assert states[others].equal(before[others])


def test_no_copies_and_what_is_given_in_slices(backend):
    """As layers have it: q, k and v side by side in one product."""
    states, slots, q, k, v, keep, beta, _ = numbers((5, 2, 4, 16, 24), True)
    joined = torch.cat([part.flatten(1) for part in (q, k, v)], 1)
    q_cut, k_cut, v_cut = joined.split([32, 32, 96], 1)
    shapes = ((2, 16), (2, 16), (4, 24))
    cut = [x.unflatten(1, s) for x, s in zip((q_cut, k_cut, v_cut), shapes, strict=True)]
    sliced = states.clone()
    out = backend(recurrent_step, sliced, slots, *cut, keep, beta)
    whole = backend(recurrent_step, states, slots, q, k, v, keep, beta, torch.full_like(slots, -1))
    assert out.equal(whole) and sliced.equal(states)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_a_row_is_bit_equal_in_every_batch_and_reaches_no_other(backend):
    states, _, q, k, v, keep, beta, _ = numbers((6, 2, 4, 16, 40), True)
    slots = torch.tensor([9, 3, 14, 0, 7, 11])
    alone = states.clone()
    out = backend(recurrent_step, alone, slots[:1], q[:1], k[:1], v[:1], keep[:1], beta[:1])
    states[slots[3]] = torch.nan
    q[4], k[5] = torch.inf, torch.nan
    together = backend(recurrent_step, states, slots, q, k, v, keep, beta)
    assert together[:3].isfinite().all()
    assert not together[3:].isfinite().any(dim=2).any()
    # torch's batched products take another way for one matrix than for several.
    atol = 1e-6 if backend.name == "torch" else 0
    torch.testing.assert_close(together[:1], out, rtol=0, atol=atol)
    torch.testing.assert_close(states[slots[0]], alone[slots[0]], rtol=0, atol=atol)


CONVOLUTIONS = [(1, 1, 1), (1, 5, 2), (4, 70, 4), (7, 300, 3), (3, 256, 4), (2, 513, 4)]
"""Rows, channels, taps."""


def conv_numbers(shape, dtype):
    rows, channels, taps = shape
    generator = torch.Generator().manual_seed(sum(shape))
    slots, copies = places(rows, generator)
    histories = torch.randn(2 * rows + 3, taps - 1, channels, generator=generator)
    x, weight, bias = (
        torch.randn(*size, generator=generator).to(dtype)
        for size in ((rows, channels), (channels, taps), (channels,))
    )
    return histories, slots, copies, x, weight, bias


@pytest.mark.parametrize("shape", CONVOLUTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("has_bias", "is_silu"), [(True, True), (False, False)])
def test_a_convolutions_step_is_torchs(backend, shape, dtype, has_bias, is_silu):
    """Of one token behind a row's history; rounded once."""
    histories, slots, copies, x, weight, bias = conv_numbers(shape, dtype)
    expected = histories.clone()
    inputs = torch.cat([histories[slots].double(), x.double()[:, None]], 1)
    filters = weight.double()[:, None]
    y = F.conv1d(
        inputs.mT, filters, bias.double() if has_bias else None, groups=x.shape[1]
    )[:, :, 0]  # fmt: skip
    y = torch.where(slots[:, None] < 0, 0, F.silu(y) if is_silu else y)
    for row, slot in enumerate(slots.tolist()):
        if slot >= 0:
            expected[slot] = inputs[row, 1:]
            if copies[row] >= 0:
                expected[copies[row]] = inputs[row, 1:]
    bias = bias if has_bias else None
    out = backend(conv_step, histories, slots, x, weight, bias, is_silu=is_silu, copies=copies)
    assert histories.equal(expected) and out.dtype == dtype
    half_a_place = 2**-8 if dtype == torch.bfloat16 else 0
    torch.testing.assert_close(out.double(), y, rtol=half_a_place, atol=1e-5)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_a_convolutions_row_reaches_no_other(backend):
    histories, _, _, x, weight, bias = conv_numbers((4, 70, 4), torch.float32)
    slots = torch.tensor([5, 0, 9, 2])
    alone = histories.clone()
    out = backend(conv_step, alone, slots[:1], x[:1], weight, bias, is_silu=True)
    x[1], histories[9] = torch.nan, torch.inf
    wide = torch.cat([x, x], 1)
    together = backend(conv_step, histories, slots, wide[:, :70], weight, bias, is_silu=True)
    assert together[0].equal(out[0]) and histories[5].equal(alone[5])
    assert together[3].isfinite().all() and not together[1].isfinite().any()


def test_the_ops_take_what_triton_does_not(monkeypatch):
    """Float64 runs in torch on any device."""
    monkeypatch.setattr(gpu, "DEVICES", {DEVICE})
    given = [on_device(part) for part in numbers((2, 1, 2, 4, 4), True, torch.float64)]
    states = given[0].clone()
    assert recurrent_step(*given).equal(reference.recurrent_step(states, *given[1:]))

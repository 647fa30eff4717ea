"""Adapters in Triton against dense float64, with everything poisoned that must not be read."""

from __future__ import annotations

import dataclasses
from functools import partial

import pytest
import torch
from torch.nn.functional import gelu, silu

from lora_runtime import kernels
from lora_runtime.kernels import NO_EXTENT, AdapterMemory, Span, StepMeta, gpu, reference
from lora_runtime.kernels.triton import adapters as triton_adapters
from tests.lora_runtime.kernels.adapter_cases import (
    NUM_TOKENS,
    OUT,
    SPANS,
    TOLERANCES,
    build_adapters,
    dense,
    layer_of,
    popularity,
)
from tests.lora_runtime.kernels.on_triton import DEVICE, apply_adapters, on_device
from tests.lora_runtime.kernels.scattered import Scattered, table

pytestmark = pytest.mark.usefixtures("poisoned_outputs")

RANKS = [1, 3, 8, 16, 64]


def mixed_batch(counts, in_features, out_features, dtype, seed):
    """Adapters of RANKS in turn, every second with a gain, every third with a bias, on tokens in
    random order with one base row between; returns the op's arguments and the float64 result."""
    generator = torch.Generator().manual_seed(seed)
    random = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    scattered, extents, parts = Scattered(), [], []
    for slot in range(len(counts)):
        rank = RANKS[(slot + seed) % len(RANKS)]
        part = {"a": random(rank, in_features), "b": random(rank, out_features)}
        part = {name: (value / rank**0.5).to(dtype).float() for name, value in part.items()}
        part |= {"gain": random(out_features)} if slot % 2 else {}
        part |= {"bias": random(out_features)} if slot % 3 == 0 else {}
        extents.append([scattered.extent(**part)])
        parts.append(part)
    num_tokens = sum(counts) + 1
    order = torch.randperm(num_tokens, generator=generator)[1:].tolist()
    slots = [slot for slot, count in enumerate(counts) for _ in range(count)]
    x, base = random(num_tokens, in_features).to(dtype), random(num_tokens, out_features).to(dtype)
    bias = random(out_features).to(dtype)
    expected = base.double() + bias.double()
    for t, slot in zip(order, slots, strict=True):
        part = parts[slot]
        expected[t] += part["b"].double().T @ (part["a"].double() @ x[t].double())
        if "gain" in part:
            expected[t] += (part["gain"].double() - 1) * base[t].double()
        if "bias" in part:
            expected[t] += part["bias"].double() - bias.double()
    spans = [Span(slot=s, first_token=t, num_tokens=1) for t, s in zip(order, slots, strict=True)]
    memory, meta = scattered.memory(dtype), StepMeta.build(spans)
    return (base, x, bias, memory, table(extents), meta), expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["distinct", "uniform", "zipf", "identical"])
@pytest.mark.parametrize("num_tokens", [1, 2, 3, 7])
def test_agrees_with_float64_at_every_popularity(kind, num_tokens, dtype):
    check_popularity(kind, num_tokens, dtype)


@pytest.mark.parametrize(("kind", "dtype"), [("zipf", torch.bfloat16), ("uniform", torch.float32)])
def test_agrees_with_float64_over_many_tokens(kind, dtype):
    check_popularity(kind, 133, dtype)


def check_popularity(kind, num_tokens, dtype):
    sizes = {1: (5, 130), 2: (33, 17), 3: (300, 48), 7: (64, 65), 133: (33, 17)}[num_tokens]
    arguments, expected = mixed_batch(popularity(kind, num_tokens), *sizes, dtype, num_tokens)
    y = apply_adapters(*arguments)
    assert y.dtype == dtype
    if dtype == torch.float32:
        torch.testing.assert_close(y.double(), expected, rtol=2e-5, atol=2e-5)
    else:  # one rounding of the result, and h to 16 bits
        torch.testing.assert_close(y.double(), expected, rtol=2**-8, atol=1e-3)


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_kind_of_row_in_one_step(dtype, has_bias):
    memory, extents, parts = build_adapters(dtype)
    generator = torch.Generator().manual_seed(1)
    base = torch.randn(NUM_TOKENS, OUT, generator=generator).to(dtype)
    x = torch.randn(NUM_TOKENS, 24, generator=generator).to(dtype)
    bias = torch.randn(OUT, generator=generator).to(dtype) if has_bias else None
    y = apply_adapters(base, x, bias, memory, extents, StepMeta.build(SPANS))
    assert (y.double() - dense(base, x, bias, parts, SPANS)).abs().max() <= TOLERANCES[dtype]
    untouched = [0, 7, 8, 12]
    plain = base if bias is None else (base.float() + bias.float()).to(dtype)
    assert torch.equal(y[untouched], plain[untouched])


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy's, in the interpreter
def test_non_finite_values_stay_in_their_rows():
    """A NaN adapter, an infinite input, and a composition of four, one adapter twice."""
    memory, extents, parts = build_adapters(torch.float32)
    x, base = torch.randn(NUM_TOKENS, 24), torch.randn(NUM_TOKENS, OUT)
    more = (Span(slot=s, first_token=11, num_tokens=1, weight=0.75) for s in (0, 3))
    spans = [*SPANS, *more]
    clean = apply_adapters(base, x, None, memory, extents, StepMeta.build(spans))
    assert (clean.double() - dense(base, x, None, parts, spans)).abs().max() <= 2e-5
    x[1] = float("inf")
    broken = extents[2, 0]  # the DoRA of tokens 5 and 11
    for name, first in (("weights", broken[1]), ("weights", broken[2]), ("vectors", broken[3])):
        getattr(memory, name)[int(first)] = float("nan")
    y = apply_adapters(base, x, None, memory, extents, StepMeta.build(spans))
    rest = [t for t in range(NUM_TOKENS) if t not in (1, 5, 11)]
    assert torch.equal(y[rest], clean[rest])
    assert not y[[1, 5, 11]].isfinite().all(1).any()


def stacked_batch(counts, widths, dtype, seed):
    """`mixed_batch` of modules that share x: each has adapters of its own ranks, gains and biases
    for the same slots and tokens. Returns the stacked op's arguments without the widths.
    """
    parts = [mixed_batch(counts, 40, width, dtype, seed + i)[0] for i, width in enumerate(widths)]
    x, memories, meta = parts[0][1], [part[3] for part in parts], parts[0][5]
    bases, biases = (torch.cat([part[i] for part in parts], dim=-1) for i in (0, 2))
    shifts = [sum(len(m.weights) for m in memories[:i]) for i in range(len(widths))]
    extents = torch.stack([part[4] for part in parts])
    for own, shift in zip(extents, shifts, strict=True):
        own[..., 1:5] += torch.where(own[..., 1:5] >= 0, shift, 0)
    flat = [torch.cat([getattr(m, n) for m in memories]) for n in ("weights", "vectors", "indices")]
    return bases, x, biases, AdapterMemory(*flat), extents, meta


@pytest.mark.parametrize("on_gpu", [True, False])
@pytest.mark.parametrize("widths", [(70, 33, 33), (20, 150)])
def test_modules_that_share_their_input_are_one_launch(monkeypatch, widths, on_gpu):
    monkeypatch.setattr(gpu, "DEVICES", {DEVICE} if on_gpu else set())
    arguments = stacked_batch([2, 1, 3], widths, torch.float32, seed=9)
    bases, x, biases, memory, extents, meta = arguments
    y = kernels.apply_stacked_adapters(*map(on_device, arguments), widths).cpu()
    for part, base, bias, own in zip(
        y.split(widths, 1), bases.split(widths, 1), biases.split(widths), extents, strict=True
    ):
        expected = reference.apply_adapters(base, x, bias, memory, own, meta)
        torch.testing.assert_close(part, expected, rtol=2e-5, atol=2e-5)
        assert (part - base - bias).abs().max() > 0.5


@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")  # numpy's, in the interpreter
@pytest.mark.parametrize(
    ("counts", "dtype", "kind", "has_bias"),
    [
        ([2, 0, 3, 1], torch.float32, "silu", True),
        ([2, 0, 3, 1], torch.bfloat16, "gelu_tanh", False),
        ([190, 80], torch.bfloat16, "silu", True),
    ],
)
def test_gate_and_up_end_in_their_activation_bit_for_bit(
    monkeypatch, counts, dtype, kind, has_bias
):
    """As one op writes the two halves and the other reads them, under small tiles and large; and
    as plain torch."""
    monkeypatch.setattr(gpu, "DEVICES", {DEVICE})
    base, x, bias, memory, extents, meta = map(
        on_device, stacked_batch(counts, (150, 150), dtype, sum(counts))
    )
    bias = bias if has_bias else None
    y = kernels.apply_gated_adapters(base, x, bias, memory, extents, meta, kind)
    both = kernels.apply_stacked_adapters(base, x, bias, memory, extents, meta, (150, 150))
    assert y.dtype == dtype
    assert torch.equal(y, kernels.gated_activation(*both.chunk(2, 1), kind))
    act = {"silu": silu, "gelu_tanh": partial(gelu, approximate="tanh")}[kind]
    biases = bias.chunk(2) if has_bias else (None, None)
    gate, up = (
        reference.apply_adapters(half, x, own, memory, table, meta)
        for half, own, table in zip(base.chunk(2, 1), biases, extents, strict=True)
    )
    tolerance = 2e-5 if dtype == torch.float32 else 2**-6
    torch.testing.assert_close(y, act(gate) * up, rtol=tolerance, atol=tolerance)


def test_large_steps_use_large_tiles():
    arguments, expected = mixed_batch([180, 0, 80, 1], 24, 20, torch.float32, seed=3)
    y = apply_adapters(*arguments)
    torch.testing.assert_close(y.double(), expected, rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(y, reference.apply_adapters(*arguments), rtol=2e-5, atol=2e-5)


def test_padded_tables_change_nothing():
    """A captured graph has tables of fixed sizes: segments of no entries, entries of no segment."""
    arguments, _ = mixed_batch([3, 1, 2], 40, 24, torch.float32, seed=5)
    meta = arguments[-1]
    end = meta.segment_starts[-1:]
    padded = dataclasses.replace(
        meta,
        **{
            name: torch.cat([getattr(meta, name), getattr(meta, name)[:1].expand(20)])
            for name in ("tokens", "slots", "replicas", "weights")
        },
        segment_starts=torch.cat([meta.segment_starts, end.expand(4)]),
        derived={},
    )
    expected = apply_adapters(*arguments)
    assert torch.equal(apply_adapters(*arguments[:-1], padded), expected)


@pytest.mark.parametrize("block", [16, 64])
def test_tiles_hold_every_entry_and_token_once(block):
    """Segments without entries between and behind others, as many as tiles can be; the bound of
    their number is reached, and what is beyond is padding."""
    counts = [block + 1, 0, 1, 2 * block + 1, 0, 1]
    starts = torch.tensor([0, *counts]).cumsum(0).int()
    num_entries, num_tokens = int(starts[-1]), int(starts[-1]) + 5
    tokens = torch.randperm(num_tokens)[:num_entries].int()
    slots = torch.arange(6).repeat_interleave(torch.tensor(counts)).int()
    meta = StepMeta(tokens, slots, slots * 0, torch.ones(num_entries), starts)
    tiles = triton_adapters.step_tiles(on_device(meta), num_tokens, block)
    entries, owners = tiles.entries.cpu(), tiles.tokens.cpu()
    assert sorted(entries[entries >= 0].tolist()) == list(range(num_entries))
    assert sorted(owners[owners >= 0].tolist()) == list(range(num_tokens))
    for entry, token in zip(entries, owners, strict=False):
        assert len(slots[entry[entry >= 0]].unique()) <= 1, "a tile of two adapters"
        assert torch.equal(tokens[entry[entry >= 0]], token[token >= 0])
    used = (entries >= 0).any(1)
    assert used.sum() == 7 and used[:7].all() and len(entries) == 6 + (num_entries - 6) // block


def test_as_many_tiles_as_there_can_be():
    """An entry a segment; and one segment that needs a tile more than its entries fill."""
    for starts, num_tiles in (([0, 1, 2, 3, 4, 5], 5), ([0, 1, 18], 3)):
        column = torch.zeros(starts[-1]).int()
        tokens, starts = torch.arange(starts[-1]).int(), torch.tensor(starts).int()
        meta = StepMeta(tokens, column, column, column.float(), starts)
        tiles = triton_adapters.step_tiles(on_device(meta), len(tokens), 16)
        assert len(tiles.entries) == num_tiles == (tiles.entries >= 0).any(1).sum()
        assert (tiles.entries >= 0).sum() == len(tokens)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rank", [1, 7, 15, 17, 33, 64, 100])
def test_ranks_beside_their_blocks(rank, dtype):
    """The last ranks of a block are read as zeros up to a multiple of 8, and not beyond: poison
    lies behind every part, and in what shrink does not write."""
    scattered, (a, b) = Scattered(), (torch.randn(rank, 1100), torch.randn(rank, 130) / rank)
    extents = table([[scattered.extent(a=a.to(dtype), b=b.to(dtype))]])
    memory = dataclasses.replace(scattered.memory(dtype), max_rank=128)
    base, x = torch.randn(3, 130).to(dtype), torch.randn(3, 1100).to(dtype)
    meta = StepMeta.build([Span(slot=0, first_token=1, num_tokens=2)])
    y = apply_adapters(base, x, None, memory, extents, meta)
    expected = base.double()
    expected[1:] += x[1:].double() @ a.to(dtype).double().T @ b.to(dtype).double()
    assert torch.equal(y[0], base[0])
    tolerance = 2e-4 if dtype == torch.float32 else 2**-8
    torch.testing.assert_close(y.double(), expected, rtol=tolerance, atol=20 * tolerance / 2)


def test_a_visit_that_the_table_has_no_room_for_has_no_run():
    """Replica 1 of a table of one: its place would be the next slot's. The token's other entry
    acts, and so do other rows'."""
    (base, x, bias, memory, extents, _), _ = mixed_batch([2, 2], 40, 24, torch.float32, seed=8)
    good = [Span(slot=1, first_token=1, num_tokens=2), Span(slot=0, first_token=4, num_tokens=1)]
    lost = [Span(slot=0, first_token=2, num_tokens=2, replica=1)]
    expected = apply_adapters(base, x, bias, memory, extents, StepMeta.build(good))
    y = apply_adapters(base, x, bias, memory, extents, StepMeta.build([*good, *lost]))
    assert torch.equal(y, expected) and not torch.equal(y[4], base[4] + bias)


def test_a_told_rank_bound_and_a_step_without_ranks():
    arguments, _ = mixed_batch([2, 3], 40, 24, torch.float32, seed=6)
    told = dataclasses.replace(arguments[3], max_rank=100)
    y = apply_adapters(*arguments[:3], told, *arguments[4:])
    torch.testing.assert_close(y, apply_adapters(*arguments), rtol=1e-5, atol=1e-5)
    base, x, bias, memory, extents, meta = arguments
    memory = dataclasses.replace(memory, max_rank=0)
    y = apply_adapters(base, x, bias, memory, torch.tensor(NO_EXTENT).expand(2, 1, 8), meta)
    assert torch.equal(y, base + bias)


def test_the_public_op_takes_it_for_tensors_of_its_devices_without_gradient(monkeypatch):
    called = []
    real = gpu.apply_stacked_adapters
    monkeypatch.setattr(gpu, "apply_stacked_adapters", lambda *a: called.append(1) or real(*a))
    arguments, expected = mixed_batch([2, 1], 16, 24, torch.float32, seed=7)
    arguments = [on_device(value) for value in arguments]
    if DEVICE == "cpu":
        kernels.apply_adapters(*arguments)
        assert called == [], "a CPU tensor is not Triton's"
        monkeypatch.setattr(gpu, "DEVICES", {"cpu"})
    y = kernels.apply_adapters(*arguments)
    assert called == [1]
    torch.testing.assert_close(y.cpu().double(), expected, rtol=2e-5, atol=2e-5)
    kernels.apply_adapters(arguments[0].requires_grad_(), *arguments[1:]).sum().backward()
    assert called == [1] and arguments[0].grad is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("kind", "num_rows"), [("nf4", 1), ("nf4-double", 3), ("int8", 19)])
def test_shrink_in_the_launch_of_the_product_changes_no_bit(monkeypatch, kind, num_rows, dtype):
    """Three parts that share x, adapters of several ranks, padding tiles, splits of both."""
    monkeypatch.setattr(gpu, "DEVICES", {DEVICE})
    in_features, widths = 1088, (70, 20, 33)
    layer = layer_of(kind, (sum(widths), in_features), dtype)
    generator = torch.Generator().manual_seed(num_rows)
    random = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    scattered = Scattered()
    extents = [
        [
            [scattered.extent(a=random(rank, in_features), b=random(rank, width))]
            for rank in (1, 40, 8)
        ]
        for width in widths
    ]
    spans = [Span(slot=i * i % 3, first_token=i, num_tokens=1) for i in range(num_rows)]
    memory, meta = map(on_device, (scattered.memory(dtype), StepMeta.build(spans)))
    memory = dataclasses.replace(memory, max_rank=40)
    tables = torch.stack([table(part) for part in extents]).to(DEVICE)
    x = (random(num_rows, in_features) / in_features**0.5).to(DEVICE, dtype)
    adapters = kernels.PooledAdapters(memory, tables, meta)
    product, hidden = layer.product_and_shrink(x, adapters)
    assert hidden is not None and torch.equal(product, layer.product(x))
    apart = kernels.apply_stacked_adapters(product, x, None, *adapters, widths)
    joined = kernels.apply_stacked_adapters(product, x, None, *adapters, widths, hidden)
    assert torch.equal(joined, apart) and not torch.equal(joined, product)


def test_a_large_step_shrinks_in_a_launch_of_its_own(monkeypatch):
    monkeypatch.setattr(gpu, "DEVICES", {DEVICE})
    layer = layer_of("nf4", (16, 64), torch.float32)
    scattered = Scattered()
    extents = table([[scattered.extent(a=torch.randn(4, 64), b=torch.randn(4, 16))]])
    spans = [Span(slot=0, first_token=0, num_tokens=257)]
    memory, meta = map(on_device, (scattered.memory(torch.float32), StepMeta.build(spans)))
    adapters = kernels.PooledAdapters(memory, extents[None].to(DEVICE), meta)
    _, hidden = layer.product_and_shrink(torch.randn(257, 64, device=DEVICE), adapters)
    assert hidden is None

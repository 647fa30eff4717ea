"""Adapters in float16 under bfloat16 activations: the compiled op against float64."""

from __future__ import annotations

import random

import pytest
import torch

from lora_runtime.kernels import Span, StepMeta, cpu, reference
from tests.lora_runtime.kernels.scattered import Scattered, table

pytestmark = pytest.mark.skipif(not cpu.multiplies_bfloat16(), reason="needs AVX512-BF16")

BFLOAT16, FLOAT16 = torch.bfloat16, torch.float16
ROUNDING = 2.0**-8
"""What rounding to bfloat16 may be off by, relative to the result."""


class Case:
    """Random modules that share x, and adapters of every kind on them."""

    def __init__(self, seed: int, num_tokens: int, in_features: int | None = None) -> None:
        chance = random.Random(seed)
        torch.manual_seed(seed)
        self.in_features = in_features or chance.choice([5, 31, 32, 64, 65, 96, 200, 576])
        self.widths = tuple(chance.choice([1, 16, 33, 128, 130, 600]) for _ in range(3))
        num_slots = chance.choice([1, 3, 9])
        scattered = Scattered()
        self.extents = torch.stack(
            [
                table([[self.extent(scattered, chance, width)] for _ in range(num_slots)])
                for width in self.widths
            ]
        )
        self.memory = scattered.memory(FLOAT16)
        self.x = torch.randn(num_tokens, self.in_features).to(BFLOAT16)
        self.base = torch.randn(num_tokens, sum(self.widths)).to(BFLOAT16)
        self.bias = torch.randn(sum(self.widths)).to(BFLOAT16) if chance.random() < 0.5 else None
        self.spans = [
            Span(slot=slot, first_token=token, num_tokens=1, weight=chance.choice([1.0, -0.7]))
            for token in range(num_tokens)
            for slot in chance.sample(range(num_slots), min(num_slots, chance.choice([0, 1, 1, 2])))
        ]  # fmt: skip

    def extent(self, scattered, chance, width):
        rank = chance.choice([0, 1, 8, 15, 16, 17, 64, 70])
        a = torch.randn(rank, self.in_features) / self.in_features**0.5 if rank else None
        b = torch.randn(rank, width) if rank else None
        gain = torch.randn(width) if chance.random() < 0.3 else None
        bias = torch.randn(width) if chance.random() < 0.3 else None
        return scattered.extent(a=a, b=b, gain=gain, bias=bias)

    def run(self, tokens=None):
        """(n, Σ widths) of these tokens alone, None: all."""
        tokens = range(len(self.x)) if tokens is None else tokens
        place = {token: index for index, token in enumerate(tokens)}
        spans = [
            Span(slot=s.slot, first_token=place[s.first_token], num_tokens=1, weight=s.weight)
            for s in self.spans
            if s.first_token in place
        ]
        meta = StepMeta.build(spans)
        base, x = self.base[list(tokens)], self.x[list(tokens)]
        if meta is None:
            return (base.float() + (0 if self.bias is None else self.bias.float())).to(BFLOAT16)
        return cpu.apply_stacked_adapters(
            base, x, self.bias, self.memory, self.extents, meta, self.widths
        )

    def expected(self):
        """In float64, from the same float16 weights."""
        meta = StepMeta.build(self.spans)
        biases = [None] * 3 if self.bias is None else self.bias.double().split(self.widths)
        parts = zip(self.base.double().split(self.widths, 1), biases, self.extents, strict=True)
        x = self.x.double()
        return torch.cat(
            [reference.apply_adapters(y, x, b, self.memory, own, meta) for y, b, own in parts], 1
        )


@pytest.mark.parametrize("seed", range(12))
def test_results_are_the_exact_ones_rounded_once(level, seed):
    case = Case(seed, num_tokens=[1, 4, 16, 40, 150][seed % 5])
    if not case.spans:
        case.spans = [Span(slot=0, first_token=0, num_tokens=1)]
    y, expected = case.run().double(), case.expected()
    # Beside the rounding of the result there is that of A x, to 17 bits, and of sums in float32.
    size = 1 + case.x.double().abs().amax(1, keepdim=True)
    assert ((y - expected).abs() <= 1.001 * ROUNDING * expected.abs() + 2e-4 * size).all()
    assert case.memory.weights.isnan().any(), "what nobody owns must not be read"


@pytest.mark.parametrize("seed", range(8))
def test_a_result_written_over_the_bases_has_the_same_bits(level, seed):
    case = Case(seed, num_tokens=[4, 40, 150, 33][seed % 4])
    meta = StepMeta.build(case.spans)
    assert meta is not None
    base, rest = case.base.clone(), (case.memory, case.extents, meta, case.widths)
    expected = cpu.apply_stacked_adapters(base, case.x, case.bias, *rest)
    assert torch.equal(base, case.base)
    y = cpu.apply_stacked_adapters(base, case.x, case.bias, *rest, may_overwrite=True)
    assert torch.equal(y, expected) and y.data_ptr() == base.data_ptr()


@pytest.mark.parametrize("seed", range(4))
def test_a_row_is_bit_equal_whatever_stands_beside_it(level, seed):
    case = Case(seed, num_tokens=150)
    together, found = case.run(), []
    tokens = list(range(150))
    random.Random(seed).shuffle(tokens)
    for count in (1, 2, 15, 17, 40, 75):
        some, tokens = sorted(tokens[:count]), tokens[count:]
        found.append(torch.equal(case.run(some), together[some]))
    assert all(found)


def test_a_row_that_is_not_finite_stays_alone(level):
    case = Case(3, num_tokens=40)
    clean = case.run()
    for token, value in ((7, float("nan")), (20, float("inf"))):
        case.x[token] = value
    y, others = case.run(), [t for t in range(40) if t not in (7, 20)]
    assert torch.equal(y[others], clean[others])


def test_threads_change_no_bit(level):
    case, found, num_threads = Case(5, num_tokens=40, in_features=576), [], torch.get_num_threads()
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            found.append(case.run())
    finally:
        torch.set_num_threads(num_threads)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_it_is_not_run_where_the_processor_does_not_multiply_bfloat16(monkeypatch):
    weights = torch.zeros(4, dtype=FLOAT16)
    x = torch.zeros(1, 4, dtype=BFLOAT16)
    assert cpu.can_run(x, weights=(weights,)) and not cpu.can_run(x.float(), weights=(weights,))
    monkeypatch.setattr(cpu, "multiplies_bfloat16", lambda: False)
    assert not cpu.can_run(x, weights=(weights,))

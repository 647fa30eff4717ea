"""Grouped products and adapters of pairs, against one ordinary product or op for each group."""

from __future__ import annotations

import pytest
import torch

from lora_runtime.base.model.int8_linear import Int8Linear
from lora_runtime.base.model.quant_linear import DenseLinear, QuantLinear
from lora_runtime.base.model.routing import Routing
from lora_runtime.base.model.stacked_linears import join_layers
from lora_runtime.kernels import (
    AdapterMemory,
    ExpertPairs,
    Extent,
    Span,
    StepMeta,
    apply_adapters,
    can_multiply_groups,
    cpu,
)

MAKERS = {
    "none": DenseLinear,
    "nf4": QuantLinear,
    "fp4": lambda w, b: QuantLinear(w, b, quant_type="fp4"),
    "nf4-double": lambda w, b: QuantLinear(w, b, is_nested=True),
    "int8": Int8Linear,
}


def experts_of(quantization, num_experts, out, width, dtype):
    """The layers of each expert, and the one of all."""
    weights = torch.randn(num_experts, out, width).bfloat16().to(dtype)
    layers = [MAKERS[quantization](weight, None) for weight in weights]
    alone = [MAKERS[quantization](weight, None) for weight in weights]
    joined = join_layers(layers)
    assert joined is not None
    return alone, joined


@pytest.mark.parametrize("quantization", MAKERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_a_group_has_the_bits_of_its_own_product(quantization, dtype):
    """Groups without rows among them, of one row, and of more than two tiles."""
    generator = torch.Generator().manual_seed(1)
    for counts in ([0, 1, 0, 70], [33, 0, 16, 2], [0, 0, 0, 1]):
        out, width = (256, 128) if quantization == "nf4-double" else (80, 192)
        alone, joined = experts_of(quantization, len(counts), out, width, dtype)
        x = torch.randn(sum(counts), width, generator=generator).to(dtype)
        starts = torch.tensor([0, *counts]).cumsum(0).int()
        found = joined.grouped_product(x, starts)
        bounds = starts.tolist()
        parts = zip(alone, bounds, bounds[1:], strict=False)
        expected = torch.cat([own.product(x[first:end]) for own, first, end in parts])
        if dtype == torch.bfloat16 and can_multiply_groups(x):
            assert torch.equal(found, expected)
        else:
            torch.testing.assert_close(found, expected)


@torch.no_grad()
def test_a_row_is_bit_equal_whatever_stands_beside_it():
    _, joined = experts_of("nf4", 6, 96, 128, torch.bfloat16)
    x = torch.randn(90, 128).bfloat16()
    if not can_multiply_groups(x):
        pytest.skip("this processor does not multiply bfloat16")
    chosen = torch.randint(6, (90, 1))
    every = Routing.of(chosen, 6)
    y = joined.grouped_product(x[every.tokens], every.starts)[every.places[:, 0]]
    x[::3] = float("nan")
    for rows in (slice(1, 2), slice(4, 60)):
        some = Routing.of(chosen[rows], 6)
        own = joined.grouped_product(x[rows][some.tokens], some.starts)[some.places[:, 0]]
        clean = ~torch.isnan(x[rows][:, 0])
        assert torch.equal(own[clean], y[rows][clean])


@torch.no_grad()
def test_gradients_are_those_of_each_experts_weight():
    alone, joined = experts_of("nf4", 3, 64, 128, torch.float64)
    x = torch.randn(9, 128, dtype=torch.float64, requires_grad=True)
    starts, grad = torch.tensor([0, 4, 4, 9]).int(), torch.randn(9, 64, dtype=torch.float64)
    with torch.enable_grad():
        joined.grouped_product(x, starts).backward(grad)
    expected = torch.cat([grad[:4] @ alone[0].weight_values(), grad[4:] @ alone[2].weight_values()])
    torch.testing.assert_close(x.grad, expected)


def test_pairs_are_sorted_by_expert_and_found_again():
    chosen = torch.tensor([[2, 0], [0, 3], [2, 3]])
    routing = Routing.of(chosen, 5)
    assert routing.experts.tolist() == [0, 0, 2, 2, 3, 3]
    assert routing.tokens.tolist() == [0, 1, 0, 2, 1, 2]
    assert routing.starts.tolist() == [0, 2, 2, 4, 6, 6]
    assert torch.equal(routing.experts[routing.places], chosen)
    y, weights = torch.randn(6, 4), torch.rand(3, 2)
    expected = sum(weights[:, k, None] * y[routing.places[:, k]] for k in range(2))
    torch.testing.assert_close(routing.summed(y, weights), expected)


@pytest.mark.parametrize("level", ["compiled", "reference"])
@torch.no_grad()
def test_adapters_of_pairs_are_those_of_each_token_and_expert(level, monkeypatch):
    """Two adapters of other ranks, one with a gain, one that lacks the module; a token under both,
    one under none; free memory is NaN.
    """
    if level == "reference":
        monkeypatch.setattr(cpu, "can_run", lambda *a, **k: False)
        monkeypatch.setattr(cpu, "can_sort", lambda *a: False)
    num_experts, width, out, num_tokens = 4, 24, 40, 11
    memory = AdapterMemory.over(torch.full((200_000,), 255, dtype=torch.uint8), torch.float32, 16)
    table = torch.tensor(Extent()).repeat(4, 1, 1)
    parts, at = {}, 16
    for slot, rank in ((0, 3), (3, 5)):
        a, b = torch.randn(num_experts, rank, width), torch.randn(num_experts, rank, out)
        gain = torch.rand(num_experts, out)
        places = []
        for part in (a, b, gain):
            memory.weights[at : at + part.numel()] = part.flatten()
            places.append(at)
            at += part.numel() + 4
        table[slot, 0] = torch.tensor(
            Extent(rank=rank, a=places[0], b=places[1], gain=places[2] if slot else -1)
        )
        parts[slot] = a, b, gain if slot else torch.ones(num_experts, out)
    spans = [
        Span(slot=3, first_token=0, num_tokens=4),
        Span(slot=0, first_token=3, num_tokens=5),
        Span(slot=1, first_token=8, num_tokens=1),
        Span(slot=3, first_token=9, num_tokens=2, weight=0.5),
    ]
    meta = StepMeta.build(spans)
    chosen = torch.stack([torch.randperm(num_experts)[:2] for _ in range(num_tokens)])
    routing = Routing.of(chosen, num_experts)
    x, product = torch.randn(num_tokens, width), torch.randn(2 * num_tokens, out)
    pairs = ExpertPairs.of(meta, routing.places, routing.experts, num_experts)
    extents = pairs.extents(table, width, out)
    found = apply_adapters(product, x[routing.tokens], None, memory, extents, pairs.meta)
    expected = product.clone()
    for span in spans:
        for token in range(num_tokens)[span.rows] if span.slot in parts else ():
            a, b, gain = parts[span.slot]
            for pair in routing.places[token]:
                expert = routing.experts[pair]
                delta = b[expert].T @ (a[expert] @ x[token])
                delta += (gain[expert] - 1) * product[pair]
                expected[pair] += span.weight * delta
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)

"""Adapters and batches that the kernels' tests share, and the dense result they are held to."""

from __future__ import annotations

import torch

from lora_runtime.base.model.int8_linear import Int8Linear
from lora_runtime.base.model.quant_linear import QuantLinear
from lora_runtime.kernels import NO_EXTENT, Span
from tests.lora_runtime.kernels.on_triton import DEVICE
from tests.lora_runtime.kernels.scattered import Scattered, table


def popularity(kind: str, num_tokens: int) -> list[int]:
    """Tokens of each adapter: how a batch is spread over adapters."""
    if kind == "distinct":
        return [1] * num_tokens
    if kind == "identical":
        return [num_tokens]
    if kind == "uniform":
        width = max(1, round(num_tokens**0.5))
        return [width] * (num_tokens // width) + [num_tokens % width] * (num_tokens % width > 0)
    counts, size = [], 1.0
    while sum(counts) + int(size) < num_tokens:
        counts.append(int(size))
        size *= 1.5
    return [*counts, num_tokens - sum(counts)]


IN, OUT = 24, 40

PLAIN, REPLICATED, DORA, BIAS_ONLY, ALORA = range(5)


def build_adapters(dtype):
    """Five adapters in one memory; returns it, the extent table and each extent's tensors."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def low_rank(rank):
        return {"a": random(rank, IN), "b": random(rank, OUT)}

    def vector():
        """Exact in float32, the dtype of gains and biases."""
        return random(OUT).float().double()

    parts = {
        (PLAIN, 0): low_rank(4),
        (REPLICATED, 0): low_rank(2),
        (REPLICATED, 1): low_rank(7),
        (DORA, 0): low_rank(8) | {"gain": vector()},
        (BIAS_ONLY, 0): {"bias": vector()},
        (ALORA, 0): low_rank(5),
    }
    scattered = Scattered()
    extents = [[NO_EXTENT, NO_EXTENT] for _ in range(5)]
    for (slot, replica), tensors in parts.items():
        extents[slot][replica] = scattered.extent(**tensors)
    return scattered.memory(torch.promote_types(dtype, torch.float32)), table(extents), parts


SPANS = [
    Span(slot=PLAIN, first_token=1, num_tokens=2),
    Span(slot=REPLICATED, first_token=3, num_tokens=1, replica=0),
    Span(slot=REPLICATED, first_token=4, num_tokens=1, replica=1),
    Span(slot=DORA, first_token=5, num_tokens=1),
    Span(slot=BIAS_ONLY, first_token=6, num_tokens=1),
    Span(slot=ALORA, first_token=9, num_tokens=2),  # its row is 7..10; 7 and 8 precede activation
    Span(slot=PLAIN, first_token=11, num_tokens=1, weight=0.5),  # a composition with a DoRA
    Span(slot=DORA, first_token=11, num_tokens=1, weight=-1.25),
]

NUM_TOKENS = 13


def dense(base, x, bias, parts, spans):
    """The formula of a composition, token by token in float64."""
    product, x = base.double(), x.double()
    b0 = torch.zeros(OUT, dtype=torch.float64) if bias is None else bias.double()
    y = product + b0
    for span in spans:
        run = parts[span.slot, span.replica]
        for t in range(span.first_token, span.first_token + span.num_tokens):
            effect = torch.zeros(OUT, dtype=torch.float64)
            if "gain" in run:
                effect += (run["gain"] - 1) * product[t]
            if "a" in run:
                effect += run["b"].T @ (run["a"] @ x[t])
            if "bias" in run:
                effect += run["bias"] - b0
            y[t] += span.weight * effect
    return y


TOLERANCES = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 0.35}


def layer_of(kind, shape, dtype):
    generator = torch.Generator().manual_seed(sum(shape))
    weight = torch.randn(*shape, generator=generator).to(DEVICE, dtype)
    if kind == "int8":
        return Int8Linear(weight, None)
    return QuantLinear(weight, None, quant_type=kind[:3], is_nested=kind == "nf4-double")

"""The op's contract, driven with every kind of row at once against a dense float64 formula."""

from __future__ import annotations

import pytest
import torch

from lora_runtime.core import BASE_EFFECT, AdapterUse, Effect, Request, block_key, effect_at
from lora_runtime.kernels import NO_RUN, RankPool, Span, StepMeta, apply_adapters, cpu, reference

IN, OUT = 24, 40
PLAIN, REPLICATED, DORA, BIAS_ONLY, ALORA = range(5)


def build_pool(dtype):
    """Five adapters in one poisoned pool: runs are scattered, free rows hold NaN."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    pool = RankPool(
        a=torch.full((64, IN), float("nan"), dtype=torch.float64),
        b=torch.full((64, OUT), float("nan"), dtype=torch.float64),
        gains=torch.full((3, OUT), float("nan"), dtype=torch.float64),
        biases=torch.full((3, OUT), float("nan"), dtype=torch.float64),
    )
    table = [[NO_RUN, NO_RUN] for _ in range(5)]
    table[PLAIN][0] = (3, 4, -1, -1)
    table[REPLICATED] = [(10, 2, -1, -1), (20, 7, -1, -1)]
    table[DORA][0] = (30, 8, 1, -1)
    table[BIAS_ONLY][0] = (0, 0, -1, 2)
    table[ALORA][0] = (50, 5, -1, -1)
    for runs in table:
        for start, rank, gain, bias in runs:
            pool.a[start : start + rank] = random(rank, IN)
            pool.b[start : start + rank] = random(rank, OUT)
            if gain >= 0:
                pool.gains[gain] = 1 + 0.3 * random(OUT)
            if bias >= 0:
                pool.biases[bias] = random(OUT)
    weights = torch.float64 if dtype == torch.float64 else torch.float32
    pool = RankPool(pool.a.to(weights), pool.b.to(weights), pool.gains.float(), pool.biases.float())
    return pool, torch.tensor(table, dtype=torch.int32)


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


def dense(base, x, bias, pool, runs, spans):
    """The formula of DESIGN's composition, token by token in float64."""
    product, x = base.double(), x.double()
    b0 = torch.zeros(OUT, dtype=torch.float64) if bias is None else bias.double()
    y = product + b0
    for span in spans:
        start, rank, gain, bias_row = runs[span.slot, span.replica].tolist()
        for t in range(span.first_token, span.first_token + span.num_tokens):
            effect = torch.zeros(OUT, dtype=torch.float64)
            if gain >= 0:
                effect += (pool.gains[gain].double() - 1) * product[t]
            if rank:
                a, b = pool.a[start : start + rank].double(), pool.b[start : start + rank].double()
                effect += b.T @ (a @ x[t])
            if bias_row >= 0:
                effect += pool.biases[bias_row].double() - b0
            y[t] += span.weight * effect
    return y


TOLERANCES = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 0.35}


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize(
    ("backend", "dtype"),
    [(reference, dtype) for dtype in TOLERANCES] + [(cpu, torch.float32), (cpu, torch.bfloat16)],
)
def test_every_kind_of_row_in_one_step(backend, dtype, has_bias):
    pool, runs = build_pool(dtype)
    generator = torch.Generator().manual_seed(1)
    base = torch.randn(NUM_TOKENS, OUT, generator=generator).to(dtype)
    x = torch.randn(NUM_TOKENS, IN, generator=generator).to(dtype)
    bias = torch.randn(OUT, generator=generator).to(dtype) if has_bias else None
    y = backend.apply_adapters(base, x, bias, pool, runs, StepMeta.build(SPANS))
    expected = dense(base, x, bias, pool, runs, SPANS)
    assert y.dtype == dtype
    assert (y.double() - expected).abs().max() <= TOLERANCES[dtype]
    untouched = [0, 7, 8, 12]
    plain = base if bias is None else (base.float() + bias.float()).to(dtype)
    if dtype != torch.float64:
        assert torch.equal(y[untouched], plain[untouched])


def test_span_order_does_not_matter():
    pool, runs = build_pool(torch.float32)
    base, x = torch.randn(NUM_TOKENS, OUT), torch.randn(NUM_TOKENS, IN)
    forward = apply_adapters(base, x, None, pool, runs, StepMeta.build(SPANS))
    backward = apply_adapters(base, x, None, pool, runs, StepMeta.build(reversed(SPANS)))
    assert torch.equal(forward, backward)


def test_base_only_step_has_no_tables():
    assert StepMeta.build([]) is None
    assert StepMeta.build([Span(slot=0, first_token=0, num_tokens=0)]) is None


def test_effect_follows_activation_and_order():
    request = Request(
        request_id="r",
        prompt_token_ids=(1, 2, 3),
        adapters=(AdapterUse(digest="b"), AdapterUse(digest="a", weight=0.5, start_position=2)),
    )
    assert effect_at(request, 1) == Effect(adapters=(("b", 1.0),))
    assert effect_at(request, 2) == Effect(adapters=(("a", 0.5), ("b", 1.0)))


def test_block_key_separates_everything_that_changes_keys_and_values():
    plain = block_key(None, [1, 2], BASE_EFFECT, "")
    others = [
        block_key(plain, [1, 2], BASE_EFFECT, ""),
        block_key(None, [1, 3], BASE_EFFECT, ""),
        block_key(None, [12], BASE_EFFECT, ""),
        block_key(None, [1, 2], BASE_EFFECT, "tenant"),
        block_key(None, [1, 2], Effect(adapters=(("d", 1.0),)), ""),
        block_key(None, [1, 2], Effect(adapters=(("d", 0.5),)), ""),
        block_key(None, [1, 2], Effect(layer_map=(0, 1, 1)), ""),
        block_key(None, [1, 2], Effect(patches=("d",)), ""),
    ]
    assert len({plain, *others}) == len(others) + 1
    assert plain == block_key(None, (1, 2), Effect(), "")

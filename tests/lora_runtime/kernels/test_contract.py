"""The op's contract, driven with every kind of row at once against a dense float64 formula."""

from __future__ import annotations

import pytest
import torch

from lora_runtime.kernels import (
    NO_EXTENT,
    AdapterMemory,
    Span,
    StepMeta,
    apply_adapters,
    apply_stacked_adapters,
    cpu,
    embed_adapters,
    patch_logits,
    reference,
)
from lora_runtime.kernels.cpu_library import LEVELS
from tests.lora_runtime.kernels.adapter_cases import (
    IN,
    NUM_TOKENS,
    OUT,
    SPANS,
    TOLERANCES,
    build_adapters,
    dense,
)
from tests.lora_runtime.kernels.one_module import of_one_module
from tests.lora_runtime.kernels.scattered import Scattered, table


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize(
    ("backend", "dtype"),
    [(reference, dtype) for dtype in TOLERANCES] + [(cpu, torch.float32), (cpu, torch.bfloat16)],
)
def test_every_kind_of_row_in_one_step(backend, dtype, has_bias):
    memory, extents, parts = build_adapters(dtype)
    generator = torch.Generator().manual_seed(1)
    base = torch.randn(NUM_TOKENS, OUT, generator=generator).to(dtype)
    x = torch.randn(NUM_TOKENS, IN, generator=generator).to(dtype)
    bias = torch.randn(OUT, generator=generator).to(dtype) if has_bias else None
    y = of_one_module(backend, base, x, bias, memory, extents, StepMeta.build(SPANS))
    expected = dense(base, x, bias, parts, SPANS)
    assert y.dtype == dtype
    assert (y.double() - expected).abs().max() <= TOLERANCES[dtype]
    untouched = [0, 7, 8, 12]
    plain = base if bias is None else (base.float() + bias.float()).to(dtype)
    if dtype != torch.float64:
        assert torch.equal(y[untouched], plain[untouched])


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("level", LEVELS, indirect=True)
def test_written_over_the_base_every_kind_of_row_has_the_same_bits(level, dtype, has_bias):
    memory, extents, _ = build_adapters(dtype)
    base, x = torch.randn(NUM_TOKENS, OUT).to(dtype), torch.randn(NUM_TOKENS, IN).to(dtype)
    bias = torch.randn(OUT).to(dtype) if has_bias else None
    given, adapters = base.clone(), (memory, extents, StepMeta.build(SPANS))
    expected = apply_adapters(given, x, bias, *adapters)
    assert torch.equal(given, base)
    y = apply_adapters(given, x, bias, *adapters, may_overwrite=True)
    assert torch.equal(y, expected) and y.data_ptr() == given.data_ptr()


def test_span_order_does_not_matter():
    memory, extents, _ = build_adapters(torch.float32)
    base, x = torch.randn(NUM_TOKENS, OUT), torch.randn(NUM_TOKENS, IN)
    forward = apply_adapters(base, x, None, memory, extents, StepMeta.build(SPANS))
    backward = apply_adapters(base, x, None, memory, extents, StepMeta.build(reversed(SPANS)))
    assert torch.equal(forward, backward)


@pytest.mark.parametrize("outside", [{"slot": 3}, {"slot": 0, "replica": 2}])
def test_every_op_refuses_a_slot_or_replica_outside_of_the_run_tables(outside):
    """Beyond a slot's runs lie the next slot's: another adapter's weights."""
    memory = AdapterMemory(torch.zeros(64), torch.zeros(64), torch.zeros(64, dtype=torch.int32))
    extents = torch.tensor(NO_EXTENT).repeat(3, 2, 1)
    base, x, ids = torch.zeros(4, 4), torch.zeros(4, 4), torch.zeros(4, dtype=torch.int64)
    inside = Span(slot=2, replica=1, first_token=0, num_tokens=1)
    meta = StepMeta.build([inside, Span(first_token=1, num_tokens=2, **outside)])
    for op in (
        lambda: apply_adapters(base, x, None, memory, extents, meta),
        lambda: apply_stacked_adapters(base, x, None, memory, extents[None], meta, (4,)),
        lambda: embed_adapters(base, ids, 1.0, memory, extents, meta, 4),
        lambda: patch_logits(base, base, x, memory, extents, meta),
    ):
        with pytest.raises(IndexError, match="extent tables"):
            op()


def test_base_only_step_has_no_tables():
    assert StepMeta.build([]) is None
    assert StepMeta.build([Span(slot=0, first_token=0, num_tokens=0)]) is None


VOCAB, HIDDEN = 30, 12


def vocabulary_adapters(random):
    """A DoRA of rank 3, a patch of three rows, and a LoRA with every row replaced."""
    return [
        {"a": random(3, VOCAB), "b": random(3, HIDDEN), "gain": random(HIDDEN)},
        {"rows": random(3, HIDDEN), "row_ids": torch.tensor([2, 11, 29])},
        {"a": random(2, VOCAB), "b": random(2, HIDDEN), "rows": random(VOCAB, HIDDEN)},
    ]


VOCABULARY_SPANS = [
    Span(slot=0, first_token=1, num_tokens=2),
    Span(slot=1, first_token=3, num_tokens=4),
    Span(slot=2, first_token=7, num_tokens=2, weight=0.75),
    Span(slot=0, first_token=9, num_tokens=1, weight=-0.5),
    Span(slot=1, first_token=9, num_tokens=1, weight=2.0),
]


def patched(matrix, extent):
    """The matrix (vocab, hidden) with the rows of an extent in place."""
    result = matrix.double().clone()
    if "rows" in extent:
        result[extent.get("row_ids", torch.arange(len(extent["rows"])))] = extent["rows"]
    return result


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 0.2)])
def test_embedding_adapters_and_replaced_rows(dtype, tolerance):
    generator = torch.Generator().manual_seed(2)
    random = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    parts, scale = vocabulary_adapters(random), 3.0
    scattered = Scattered()
    extents = table([[scattered.extent(**part)] for part in parts])
    weight = random(VOCAB, HIDDEN).to(dtype)
    ids = torch.tensor([5, 11, 2, 2, 29, 3, 11, 0, 29, 2, 4])
    base = scale * weight[ids]
    y = embed_adapters(
        base, ids, scale, scattered.memory(torch.float32), extents,
        StepMeta.build(VOCABULARY_SPANS), VOCAB,
    )  # fmt: skip
    expected = base.double()
    for span in VOCABULARY_SPANS:
        part = parts[span.slot]
        for t in range(span.first_token, span.first_token + span.num_tokens):
            new = scale * patched(weight, part)[ids[t]]
            if "gain" in part:
                new = part["gain"] * new
            if "a" in part:
                new = new + scale * part["b"].T @ part["a"][:, ids[t]]
            expected[t] += span.weight * (new - base[t].double())
    assert y.dtype == dtype and (y.double() - expected).abs().max() <= tolerance
    assert torch.equal(y[[0, 10]], base[[0, 10]])


def test_patched_logits_replace_rows_of_the_output_layer():
    generator = torch.Generator().manual_seed(3)
    random = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    parts = vocabulary_adapters(random)
    scattered = Scattered()
    extents = table([[scattered.extent(**part)] for part in parts])
    x, weight = random(11, HIDDEN).float(), random(VOCAB, HIDDEN).float()
    base = x @ weight.T
    meta = StepMeta.build(VOCABULARY_SPANS)
    y = patch_logits(base + 1, base, x, scattered.memory(torch.float32), extents, meta)
    expected = base.double() + 1
    for span in VOCABULARY_SPANS:
        shift = patched(weight, parts[span.slot]) - weight
        for t in range(span.first_token, span.first_token + span.num_tokens):
            expected[t] += span.weight * shift @ x[t].double()
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=2e-5)
    assert torch.equal(y[[0, 10]], (base + 1)[[0, 10]])

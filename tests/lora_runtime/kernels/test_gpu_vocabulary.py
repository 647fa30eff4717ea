"""Embeddings and replaced rows in Triton against dense float64, everything else poisoned."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from lora_runtime import kernels
from lora_runtime.kernels import AdapterMemory, Span, StepMeta, gpu
from lora_runtime.kernels.triton import vocabulary as triton_vocabulary
from tests.lora_runtime.kernels.on_triton import DEVICE, on_device
from tests.lora_runtime.kernels.scattered import Scattered, table

pytestmark = pytest.mark.usefixtures("poisoned_outputs")

VOCAB, WIDTH, SCALE = 90, 70, 1.5
TOLERANCES = {
    torch.float32: dict(rtol=2e-5, atol=2e-5),
    torch.bfloat16: dict(rtol=2**-8, atol=2e-2),
}
SPANS = [
    Span(slot=0, first_token=0, num_tokens=2),
    Span(slot=1, first_token=3, num_tokens=3, weight=0.5),
    Span(slot=2, first_token=6, num_tokens=2),
    *(Span(slot=s, first_token=8, num_tokens=2, weight=w) for s, w in ((0, 2.0), (1, -0.5))),
    *(Span(slot=s, first_token=10, num_tokens=1, weight=w) for s, w in ((1, 1.0), (3, 0.25))),
    *(Span(slot=s, first_token=11, num_tokens=2, weight=0.5) for s in (0, 1, 2, 3)),
]
"""Tokens 2 and 13 are the base's; from 8 on tokens have two to four adapters."""
NUM_TOKENS = 14


@pytest.fixture(autouse=True)
def triton_takes_the_device(monkeypatch):
    monkeypatch.setattr(gpu, "DEVICES", {DEVICE})


def adapters(dtype):
    """Low rank with few rows, rows alone, all rows and a gain, a gain alone."""
    generator = torch.Generator().manual_seed(0)
    random = lambda *shape: torch.randn(*shape, generator=generator).to(dtype).float()  # noqa: E731
    few, more = torch.tensor([3, 17, 40, 89]), torch.tensor([0, 5, 17, 40, 41, 60])
    parts = [
        {"a": random(20, VOCAB), "b": random(20, WIDTH), "rows": random(4, WIDTH), "row_ids": few},
        {"rows": random(6, WIDTH), "row_ids": more},
        {"rows": random(VOCAB, WIDTH), "gain": random(WIDTH)},
        {"gain": random(WIDTH)},
    ]
    scattered = Scattered()
    extents = table([[scattered.extent(**part)] for part in parts])
    return scattered.memory(dtype), extents, parts


def rows_of(part):
    """Replaced ids and their rows in float64."""
    if "rows" not in part:
        return torch.empty(0, dtype=torch.long), torch.empty(0, WIDTH).double()
    ids = part.get("row_ids", torch.arange(len(part["rows"])))
    return ids, part["rows"].double()


def entries():
    for span in SPANS:
        for token in range(span.first_token, span.first_token + span.num_tokens):
            yield span.slot, token, span.weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_embeddings(dtype):
    memory, extents, parts = adapters(dtype)
    base = torch.randn(NUM_TOKENS, WIDTH).to(dtype)
    ids = torch.tensor([3, 4, 17, 0, 17, 89, 88, 40, 40, 17, 41, 3, 40, 5])
    expected = base.double()
    for slot, token, weight in entries():
        part, own = parts[slot], base[token].double()
        delta = torch.zeros(WIDTH).double()
        if "a" in part:
            delta += SCALE * part["b"].double().T @ part["a"][:, ids[token]].double()
        if "gain" in part:
            delta += (part["gain"].double() - 1) * own
        replaced, rows = rows_of(part)
        for row in rows[replaced == ids[token]]:
            delta += SCALE * row - own
        expected[token] += weight * delta
    arguments = (base, ids, SCALE, memory, extents, StepMeta.build(SPANS), VOCAB)
    y = kernels.embed_adapters(*map(on_device, arguments)).cpu()
    assert y.dtype == dtype and torch.equal(y[[2, 13]], base[[2, 13]])
    torch.testing.assert_close(y.double(), expected, **TOLERANCES[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits(dtype):
    """y already holds what low rank, gain and bias gave; base is W x alone."""
    memory, extents, parts = adapters(dtype)
    y, base = (torch.randn(NUM_TOKENS, VOCAB).to(dtype) for _ in range(2))
    x = torch.randn(NUM_TOKENS, WIDTH).to(dtype)
    expected = y.double()
    tolerance, rounded = TOLERANCES[dtype], torch.zeros_like(expected)
    for slot, token, weight in entries():
        ids, rows = rows_of(parts[slot])
        expected[token, ids] += weight * (rows @ x[token].double() - base[token, ids].double())
        rounded[token, ids] += expected[token, ids].abs()
    arguments = (y.clone(), base, x, memory, extents, StepMeta.build(SPANS))
    found = kernels.patch_logits(*map(on_device, arguments)).cpu()
    assert found.dtype == dtype and torch.equal(found[[2, 13]], y[[2, 13]])
    # every entry rounds what the cell has so far, by half a step at most
    allowed = tolerance["atol"] + tolerance["rtol"] * rounded
    assert ((found.double() - expected).abs() <= allowed).all()
    assert (found - y).abs().max() > 1


@pytest.mark.parametrize("num_programs", [2, 512])
def test_rows_of_any_number_in_any_composition(monkeypatch, num_programs):
    """Also where a token's first adapter replaces nothing, or less than its others; more tokens
    under one adapter than a tile has; programs that do several blocks of rows."""
    monkeypatch.setattr(triton_vocabulary, "MAX_PROGRAMS", num_programs)
    generator = torch.Generator().manual_seed(num_programs)
    vocab, width, num_tokens = 133, 20, 26
    counts, scattered, parts = (0, 1, 33, 70, vocab, 5, 32), Scattered(), []
    for count in counts:
        rows = torch.randn(count, width, generator=generator)
        ids = torch.randperm(vocab, generator=generator)[:count].sort().values
        parts.append({"rows": rows, "row_ids": ids} if count else {})
    extents = table([[scattered.extent(**part)] for part in parts])
    spans = [Span(slot=4, first_token=0, num_tokens=18), Span(slot=0, first_token=5, num_tokens=9)]
    for token in range(10, num_tokens - 1):
        slots = torch.randperm(len(parts), generator=generator)[: 1 + token % 4].tolist()
        spans += [Span(slot=s, first_token=token, num_tokens=1, weight=0.5 - s) for s in slots]
    spans.append(Span(slot=2, first_token=12, num_tokens=1, weight=3.0))  # perhaps once more
    y, base = (torch.randn(num_tokens, vocab, generator=generator) for _ in range(2))
    x, expected = torch.randn(num_tokens, width, generator=generator), y.double()
    for span in spans:
        ids, own = parts[span.slot].get("row_ids", []), span.rows
        if len(ids):
            product = x[own].double() @ parts[span.slot]["rows"].double().T
            expected[own, ids] += span.weight * (product - base[own][:, ids].double())
    memory, meta = scattered.memory(torch.float32), StepMeta.build(spans)
    found = kernels.patch_logits(*map(on_device, (y, base, x, memory, extents, meta))).cpu()
    torch.testing.assert_close(found.double(), expected, rtol=2e-5, atol=1e-4)


def test_non_finite_values_stay_with_their_tokens():
    memory, extents, _ = adapters(torch.float32)
    meta = StepMeta.build(SPANS)
    x, y, base = (torch.randn(NUM_TOKENS, n) for n in (WIDTH, VOCAB, VOCAB))
    embedded, ids = torch.randn(NUM_TOKENS, WIDTH), torch.full((NUM_TOKENS,), 17)

    def both():
        logits = (y.clone(), base, x, memory, extents, meta)
        embedding = (embedded, ids, SCALE, memory, extents, meta, VOCAB)
        return (
            kernels.patch_logits(*map(on_device, logits)).cpu(),
            kernels.embed_adapters(*map(on_device, embedding)).cpu(),
        )

    clean = both()
    first = int(extents[1, 0, 6])
    memory.weights[first : first + 6 * WIDTH] = float("nan")  # of tokens 3 to 5 and 8 to 12
    rest = [0, 1, 2, 6, 7, 13]
    for found, expected in zip(both(), clean, strict=True):
        assert torch.equal(found[rest], expected[rest])
        assert found[[3, 4, 5, 8, 9, 10, 11, 12]].isnan().any(1).all()


def test_padding_and_bounds_change_nothing():
    """A captured graph has entries of no segment, and a pool tells how many rows there may be."""
    memory, extents, _ = adapters(torch.float32)
    meta = StepMeta.build(SPANS)
    names = ("tokens", "slots", "replicas", "weights")
    padded = {n: torch.cat([getattr(meta, n), getattr(meta, n)[:1].expand(9)]) for n in names}
    starts = torch.cat([meta.segment_starts, meta.segment_starts[-1:].expand(3)])
    padded = StepMeta(**padded, segment_starts=starts)
    base, x = torch.randn(NUM_TOKENS, VOCAB), torch.randn(NUM_TOKENS, WIDTH)
    embedded, ids = torch.randn(NUM_TOKENS, WIDTH), torch.randint(VOCAB, (NUM_TOKENS,))
    found = []
    for told, each in ((memory, meta), (replace(memory, max_rows=VOCAB + 50), padded)):
        logits = (base.clone(), base, x, told, extents, each)
        embedding = (embedded, ids, SCALE, told, extents, each, VOCAB)
        y = kernels.patch_logits(*map(on_device, logits))
        found.append((y, kernels.embed_adapters(*map(on_device, embedding))))
    for expected, y in zip(*found, strict=True):
        assert torch.equal(expected, y)
    none = replace(memory, max_rows=0)
    y = base.clone()
    assert (
        kernels.patch_logits(*map(on_device, (y, base, x, none, extents, meta))).cpu().equal(base)
    )


def test_a_step_reads_no_value_on_the_host(monkeypatch):
    grids = []

    class Launch:
        def __getitem__(self, grid):
            grids.append(grid)
            return lambda *args, **options: None

    for name in ("_embed_kernel", "_patch_kernel"):
        monkeypatch.setattr(triton_vocabulary, name, Launch())
    monkeypatch.setattr(triton_vocabulary.step_tiles.__module__ + ".tiles_kernel", Launch())
    with FakeTensorMode():
        floats, ints = torch.empty(100), torch.empty(100, dtype=torch.int32)
        memory = AdapterMemory(floats, floats, ints, 8, 16, 70)
        entry = torch.empty(7, dtype=torch.int32)
        meta = StepMeta(entry, entry, entry, torch.empty(7), torch.empty(4, dtype=torch.int32))
        extents = torch.empty(3, 1, 8, dtype=torch.int64)
        ids = torch.empty(9, dtype=torch.int64)
        triton_vocabulary.embed_adapters(torch.empty(9, 300), ids, 1.0, memory, extents, meta, 50)
        y = torch.empty(9, 50)
        triton_vocabulary.patch_logits(y, y, torch.empty(9, 300), memory, extents, meta)
    assert grids == [(4,), (4 * 16, 2), (3, 3)]


def test_a_visit_that_the_table_has_no_room_for_replaces_nothing():
    """Replica 1 of a table of one: its place would be the next slot's. The public op refuses it."""
    memory, extents, _ = adapters(torch.float32)
    base, ids = torch.randn(4, WIDTH), torch.tensor([3, 17, 40, 5])
    good = [Span(slot=1, first_token=1, num_tokens=2)]
    lost = [Span(slot=0, first_token=0, num_tokens=3, replica=1)]
    metas = [StepMeta.build(spans) for spans in (good, [*good, *lost])]
    arguments = [(base, ids, SCALE, memory, extents, meta, VOCAB) for meta in metas]
    embedded = [gpu.embed_adapters(*map(on_device, own)).cpu() for own in arguments]
    x, logits = torch.randn(4, WIDTH), torch.randn(4, VOCAB)
    arguments = [(logits.clone(), logits, x, memory, extents, meta) for meta in metas]
    patched = [gpu.patch_logits(*map(on_device, own)).cpu() for own in arguments]
    for (expected, found), plain in ((embedded, base), (patched, logits)):
        assert torch.equal(found, expected) and not torch.equal(found, plain)

"""The compiled backend against the torch definition, and both against dense torch."""

from __future__ import annotations

import importlib.util
import shutil

import pytest
import torch
import torch.nn.functional as F

from lora_runtime import kernels
from lora_runtime.kernels import AttentionMeta, Span, StepMeta, cpu, reference
from tests.lora_runtime.kernels.adapter_cases import popularity
from tests.lora_runtime.kernels.one_module import of_one_module
from tests.lora_runtime.kernels.scattered import Scattered, table

BACKENDS = [reference, cpu]


def test_compiled_backend_exists_where_a_compiler_does():
    if shutil.which("g++"):
        assert importlib.util.find_spec("lora_runtime.kernels._cpu"), "the C++ extension is missing"
        assert kernels.BACKEND.startswith("cpu-")


@pytest.mark.parametrize("kind", ["distinct", "uniform", "zipf", "identical"])
@pytest.mark.parametrize("num_tokens", [1, 2, 3, 7, 133])
@pytest.mark.parametrize("sizes", [(64, 48), (33, 17), (5, 130)])
def test_apply_adapters_agrees_at_every_popularity(kind, num_tokens, sizes):
    generator = torch.Generator().manual_seed(num_tokens)
    in_features, out_features = sizes
    counts = popularity(kind, num_tokens)
    ranks = [int(r) for r in torch.randint(1, 20, (len(counts),), generator=generator)]
    factors = [
        (
            torch.randn(rank, in_features, generator=generator),
            torch.randn(rank, out_features, generator=generator),
        )
        for rank in ranks
    ]
    scattered = Scattered()
    extents = table([[scattered.extent(a=a, b=b)] for a, b in factors])
    order = torch.randperm(num_tokens, generator=generator).tolist()
    spans, position = [], 0
    for slot, count in enumerate(counts):
        spans += [
            Span(slot=slot, first_token=t, num_tokens=1) for t in order[position : position + count]
        ]
        position += count
    meta = StepMeta.build(spans)
    x = torch.randn(num_tokens, in_features, generator=generator)
    base = torch.randn(num_tokens, out_features, generator=generator)
    expected = base.double()
    for span in spans:
        a, b = factors[span.slot]
        t = span.first_token
        expected[t] += a.double() @ x[t].double() @ b.double()
    memory = scattered.memory(torch.float32)
    for backend in BACKENDS:
        y = of_one_module(backend, base, x, None, memory, extents, meta)
        torch.testing.assert_close(y.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("sizes", [(40, 24), (72, 1700)])
def test_compiled_rows_are_bit_equal_whatever_stands_beside_them(sizes):
    in_features, out_features = sizes
    counts = range(1, 21)
    ranks = [int(rank) for rank in torch.randperm(20) + 1]
    pairs = [(torch.randn(r, in_features), torch.randn(r, out_features)) for r in ranks]
    scattered = Scattered()
    extents = table([[scattered.extent(a=a, b=b)] for a, b in pairs])
    memory = scattered.memory(torch.float32)
    owners = torch.arange(20).repeat_interleave(torch.tensor(counts))
    x, base = torch.randn(len(owners), in_features), torch.randn(len(owners), out_features)
    starts = torch.tensor([0, *counts]).cumsum(0).tolist()
    spans = [
        Span(slot=i, first_token=starts[i], num_tokens=count) for i, count in enumerate(counts)
    ]
    together = of_one_module(cpu, base, x, None, memory, extents, StepMeta.build(spans))
    for t, owner in enumerate(owners.tolist()):
        alone = StepMeta.build([Span(slot=owner, first_token=0, num_tokens=1)])
        y = of_one_module(cpu, base[t : t + 1], x[t : t + 1], None, memory, extents, alone)
        assert torch.equal(y[0], together[t])
        a, b = (part.double() for part in pairs[owner])
        expected = base[t].double() + a @ x[t].double() @ b
        torch.testing.assert_close(together[t].double(), expected, rtol=1e-4, atol=1e-3)


def attention_case(num_heads, num_kv_heads, head_dim, dtype):
    """Rows of 1, 9 and 30 cached positions in scattered blocks, every other cache slot NaN."""
    generator = torch.Generator().manual_seed(7)
    block_size, lengths, chunk = 4, [1, 9, 30], [1, 1, 11]
    tables = torch.zeros(3, 8, dtype=torch.int32)
    blocks = (torch.randperm(20, generator=generator) + 1).tolist()
    keys = torch.full((21 * block_size, num_kv_heads, head_dim), float("nan"), dtype=dtype)
    values = keys.clone()
    rows, positions, dense = [], [], []
    for row, length in enumerate(lengths):
        for i in range(-(-length // block_size)):
            tables[row, i] = blocks.pop()
        k, v = torch.randn(2, length, num_kv_heads, head_dim, generator=generator).to(dtype)
        slots = [
            int(tables[row, p // block_size]) * block_size + p % block_size for p in range(length)
        ]
        keys[slots], values[slots] = k, v
        dense.append((k, v))
        rows += [row] * chunk[row]
        positions += range(length - chunk[row], length)
    meta = AttentionMeta(
        rows=torch.tensor(rows, dtype=torch.int32),
        positions=torch.tensor(positions, dtype=torch.int32),
        cache_slots=torch.empty(0, dtype=torch.int64),
        block_tables=tables,
        block_size=block_size,
    )
    q = torch.randn(len(rows), num_heads, head_dim, generator=generator).to(dtype)
    return q, keys, values, meta, dense


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize(("heads", "head_dim"), [((6, 2), 64), ((4, 4), 20), ((3, 1), 16)])
def test_paged_attention_equals_dense_attention(backend, window, softcap, heads, head_dim):
    q, keys, values, meta, dense = attention_case(*heads, head_dim, torch.float32)
    out = backend.paged_attention(q, keys, values, meta, 0.3, window, softcap)
    for token, (row, position) in enumerate(zip(meta.rows, meta.positions, strict=True)):
        begin = 0 if window is None else max(0, int(position) + 1 - window)
        k, v = (part[begin : position + 1].double() for part in dense[row])
        k, v = (part.repeat_interleave(heads[0] // heads[1], dim=1) for part in (k, v))
        scores = torch.einsum("hd,lhd->hl", q[token].double(), k) * 0.3
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        expected = torch.einsum("hl,lhd->hd", scores.softmax(1), v)
        torch.testing.assert_close(out[token].double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("window", [None, 6])
def test_a_token_at_a_negative_position_sees_nothing(backend, window):
    q, keys, values, meta, _ = attention_case(6, 2, 16, torch.float32)
    expected = backend.paged_attention(q, keys, values, meta, 0.25, window, None)
    padding = [1, 5]
    meta.positions[padding] = torch.tensor([-1, -9], dtype=torch.int32)
    expected[padding] = 0
    out = backend.paged_attention(q, keys, values, meta, 0.25, window, None)
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("head_dim", [1, 100, 512, 1000])
def test_heads_of_any_size_are_served(head_dim):
    q, keys = torch.randn(2, 4, head_dim), torch.randn(12, 2, head_dim)
    positions = torch.tensor([6, 7], dtype=torch.int32)
    rows, table = torch.zeros(2, dtype=torch.int32), torch.tensor([[2, 1]], dtype=torch.int32)
    meta = AttentionMeta(rows, positions, torch.zeros(2, dtype=torch.int64), table, block_size=4)
    y = kernels.paged_attention(q, keys, keys, meta, scale=head_dim**-0.5)
    seen = torch.cat([keys[8:12], keys[4:8]]).double().repeat_interleave(2, dim=1)
    for token, count in enumerate((7, 8)):
        scores = torch.einsum("hd,jhd->hj", q[token].double(), seen[:count]) * head_dim**-0.5
        expected = torch.einsum("hj,jhd->hd", scores.softmax(1), seen[:count])
        torch.testing.assert_close(y[token].double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("length", [40, 7_000])
@pytest.mark.parametrize("num_heads", [2, 6, 10])
def test_a_token_s_attention_has_the_same_bits_alone(num_heads, length):
    """Alone its heads are tasks of their own; of a long row some heads at a time."""
    generator = torch.Generator().manual_seed(length + num_heads)
    keys, values = torch.randn(2, length, 2, 24, generator=generator)
    q = torch.randn(17, num_heads, 24, generator=generator)
    tables = torch.randperm(length // 4, generator=generator).int()[None]
    positions = torch.arange(length - 17, length, dtype=torch.int32)

    def attention(first: int, last: int) -> torch.Tensor:
        count = last - first
        rows, none = torch.zeros(count, dtype=torch.int32), torch.empty(0, dtype=torch.int64)
        meta = AttentionMeta(rows, positions[first:last], none, tables, block_size=4)
        return kernels.paged_attention(q[first:last], keys, values, meta, scale=0.2)

    num_threads, together = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            together.append(attention(0, 17))
            alone = torch.cat([attention(token, token + 1) for token in range(17)])
            assert torch.equal(alone, together[0])
    finally:
        torch.set_num_threads(num_threads)
    assert torch.equal(*together)
    order = (tables[0].long()[:, None] * 4 + torch.arange(4)).flatten()
    seen, paid = (
        part[order].double().repeat_interleave(num_heads // 2, dim=1) for part in (keys, values)
    )
    weights = (torch.einsum("hd,jhd->hj", q[-1].double(), seen) * 0.2).softmax(1)
    expected = torch.einsum("hj,jhd->hd", weights, paid)
    torch.testing.assert_close(together[0][-1].double(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_paged_attention_in_bfloat16_is_within_rounding_of_torch(backend):
    q, keys, values, meta, dense = attention_case(6, 2, 64, torch.bfloat16)
    out = backend.paged_attention(q, keys, values, meta, 0.125, None, None)
    k, v = (part.transpose(0, 1)[None] for part in dense[2])
    chunk = q[2:].transpose(0, 1)[None]
    mask = torch.ones(11, 30, dtype=torch.bool).tril(19)
    expected = F.scaled_dot_product_attention(chunk, k, v, mask, scale=0.125, enable_gqa=True)
    torch.testing.assert_close(out[2:].transpose(0, 1), expected[0], rtol=0.02, atol=0.02)


def test_write_kv_touches_only_its_slots():
    keys, values = torch.zeros(2, 10, 2, 3)
    k, v = torch.randn(2, 3, 2, 3)
    kernels.write_kv(keys, values, k, v, torch.tensor([7, -1, 2]))
    assert torch.equal(keys[[7, 2]], k[[0, 2]]) and torch.equal(values[[7, 2]], v[[0, 2]])
    assert not keys[[0, 1, 3, 4, 5, 6, 8, 9]].any()

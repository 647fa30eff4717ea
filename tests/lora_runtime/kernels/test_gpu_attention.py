"""Paged attention in Triton against torch's own attention in float64, row by row."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from lora_runtime import kernels
from lora_runtime.kernels import AttentionMeta, gpu
from lora_runtime.kernels.counters import counters
from lora_runtime.kernels.triton import attention as triton_attention
from tests.lora_runtime.kernels.on_triton import DEVICE

pytestmark = pytest.mark.usefixtures("poisoned_outputs")

BLOCK_SIZE = 4
TOLERANCES = {torch.float32: dict(rtol=2e-5, atol=2e-5), torch.bfloat16: dict(rtol=0, atol=2e-2)}


@pytest.fixture(autouse=True)
def triton_takes_the_device(monkeypatch):
    monkeypatch.setattr(gpu, "DEVICES", {DEVICE})


def step(rows, heads, head_dim, dtype=torch.float32, seed=0):
    """Rows of (cached, new) tokens in scattered blocks; what no row owns is NaN, and q, k and v are
    slices of one product. Returns (q, keys, values, meta) and each row's own (q, k, v).
    """
    generator = torch.Generator().manual_seed(seed)
    num_heads, num_groups = heads
    counts = [-(-(cached + new) // BLOCK_SIZE) for cached, new in rows]
    blocks = torch.randperm(sum(counts) + 3, generator=generator).tolist()
    size = (len(blocks) * BLOCK_SIZE, num_groups, head_dim)
    cache = [torch.full(size, float("nan"), dtype=dtype) for _ in range(2)]
    tables = torch.zeros(len(rows), max(counts), dtype=torch.int32)
    fused, positions, slots, own = [], [], [], []
    for row, ((cached, new), count) in enumerate(zip(rows, counts, strict=True)):
        mine = [blocks.pop() for _ in range(count)]
        tables[row, :count] = torch.tensor(mine)
        total = cached + new
        places = [mine[p // BLOCK_SIZE] * BLOCK_SIZE + p % BLOCK_SIZE for p in range(total)]
        width = (num_heads + 2 * num_groups) * head_dim
        qkv = torch.randn(total, width, generator=generator).to(dtype)
        q, k, v = split(qkv, heads, head_dim)
        for memory, part in zip(cache, (k, v), strict=True):
            memory[places[:cached]] = part[:cached]
        fused.append(qkv[cached:])
        positions += range(cached, total)
        slots += places[cached:]
        own.append((q[cached:], k, v))
    row_of_token = [row for row, (_, new) in enumerate(rows) for _ in range(new)]
    meta = AttentionMeta(
        rows=torch.tensor(row_of_token, dtype=torch.int32, device=DEVICE),
        positions=torch.tensor(positions, dtype=torch.int32, device=DEVICE),
        cache_slots=torch.tensor(slots, device=DEVICE),
        block_tables=tables.to(DEVICE),
        block_size=BLOCK_SIZE,
    )
    q, k, v = split(torch.cat(fused).to(DEVICE), heads, head_dim)
    keys, values = (memory.to(DEVICE) for memory in cache)
    kernels.write_kv(keys, values, k, v, meta.cache_slots)
    return (q, keys, values, meta), own


def split(qkv, heads, head_dim):
    q, k, v = qkv.split([n * head_dim for n in (heads[0], heads[1], heads[1])], 1)
    return (part.unflatten(1, (-1, head_dim)) for part in (q, k, v))


def alone(q, k, v, scale, window=None, softcap=None):
    """One row in float64: by torch's attention, or written out where that has no soft cap."""
    q, k, v = (part.double().transpose(0, 1) for part in (q, k, v))
    k, v = (part.repeat_interleave(len(q) // len(part), 0) for part in (k, v))
    distance = torch.arange(k.shape[1] - q.shape[1], k.shape[1])[:, None] - torch.arange(k.shape[1])
    is_seen = (distance >= 0) & (distance < (window or k.shape[1]))
    if softcap is None:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=is_seen, scale=scale)
    else:
        scores = softcap * torch.tanh(q @ k.transpose(1, 2) * scale / softcap)
        out = torch.softmax(scores.masked_fill(~is_seen, float("-inf")), 2) @ v
    return out.transpose(0, 1)


def check(rows, heads, head_dim, dtype=torch.float32, window=None, softcap=None):
    arguments, own = step(rows, heads, head_dim, dtype)
    scale = head_dim**-0.5
    y = kernels.paged_attention(*arguments, scale, window, softcap)
    expected = torch.cat([alone(*parts, scale, window, softcap) for parts in own])
    assert y.dtype == dtype
    torch.testing.assert_close(y.cpu().double(), expected, **TOLERANCES[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("heads", "head_dim"), [((2, 2), 16), ((6, 2), 64), ((4, 1), 80), ((16, 2), 96)]
)
def test_decode_steps(heads, head_dim, dtype):
    check([(0, 1), (1, 1), (14, 1), (15, 1), (16, 1), (132, 1)], heads, head_dim, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "head_dim"), [((3, 1), 16), ((2, 2), 80)])
def test_prompts_chunks_and_decode_rows_in_one_step(heads, head_dim, dtype):
    check([(0, 5), (9, 1), (30, 2), (0, 1), (3, 70), (70, 1), (0, 64)], heads, head_dim, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_heads(dtype):
    check([(6, 1), (40, 1)], (2, 1), 256, dtype, window=30, softcap=20.0)
    check([(6, 1), (30, 20)], (2, 1), 256, dtype, window=30, softcap=20.0)


@pytest.mark.parametrize("options", [{"window": 1}, {"window": 7}, {"softcap": 2.0}])
def test_windows_and_soft_caps(options):
    check([(0, 1), (5, 1), (40, 1)], (4, 2), 32, **options)
    check([(0, 9), (5, 1), (30, 40)], (4, 2), 32, **options)


@pytest.mark.parametrize("window", [None, 300])
def test_long_rows_are_split_and_joined(monkeypatch, window):
    """A split begins and ends anywhere; some rows are shorter than the number of splits. Twenty
    query heads of one key head are two programs, each of which joins its heads eight at a time.
    """
    check([(700, 1), (0, 1), (2, 1)], (2, 1), 16, window=window)
    monkeypatch.setattr(triton_attention, "MIN_SPLIT_KEYS", 4)
    check([(130, 1), (0, 1), (66, 1)], (2, 1), 16, window=window)
    check([(130, 1), (0, 1), (66, 3)], (2, 1), 16, window=window)
    check([(130, 1), (3, 1)], (20, 1), 64, window=window)
    assert not counters(torch.empty(0, device=DEVICE).device).any(), "a launch resets them"


@pytest.mark.parametrize("num_new", [1, 3])
def test_padding_rows_store_and_see_nothing(monkeypatch, num_new):
    """Also among rows that are split; with three tokens the row is a tile of the prefill."""
    monkeypatch.setattr(triton_attention, "MIN_SPLIT_KEYS", 4)
    (q, keys, values, meta), own = step([(130, 1), (3, num_new), (9, 1)], (4, 2), 16)
    is_padding = meta.rows == 1
    padded = replace(
        meta,
        positions=torch.where(is_padding, -1, meta.positions),
        cache_slots=torch.where(is_padding, -1, meta.cache_slots),
        derived={},
    )
    q[is_padding] = float("nan")
    for cache in (keys, values):
        cache[meta.cache_slots[is_padding]] = float("nan")
    before = keys.clone(), values.clone()
    garbage = torch.full((len(q), 2, 16), 5.0, device=DEVICE)
    kernels.write_kv(keys, values, garbage, garbage, torch.full_like(meta.cache_slots, -1))
    for now, then in zip((keys, values), before, strict=True):
        torch.testing.assert_close(now, then, rtol=0, atol=0, equal_nan=True)
    y = kernels.paged_attention(q, keys, values, padded, 0.25).cpu()
    expected = [alone(*own[0], 0.25), torch.zeros(num_new, 4, 16), alone(*own[2], 0.25)]
    torch.testing.assert_close(y.double(), torch.cat(expected).double(), rtol=2e-5, atol=2e-5)


def test_non_finite_values_stay_in_their_row():
    rows = [(5, 1), (30, 1), (6, 4)]
    (q, keys, values, meta), own = step(rows, (4, 2), 16)
    keys[meta.cache_slots[1]] = float("nan")
    values[meta.cache_slots[1]] = float("inf")
    y = kernels.paged_attention(q, keys, values, meta, 0.25).cpu()
    expected = torch.cat([alone(*own[row], 0.25) for row in (0, 2)])
    torch.testing.assert_close(y[[0, 2, 3, 4, 5]].double(), expected, rtol=2e-5, atol=2e-5)
    assert y[1].isnan().all()


def test_a_step_reads_no_value_on_the_host(monkeypatch):
    """Grids come from shapes alone: 3 rows of up to 10 blocks, 2 key heads, 3 or 18 tokens."""
    grids = []

    class Launch:
        def __getitem__(self, grid):
            grids.append(grid)
            return lambda *args, **options: None

    for name in ("decode_kernel", "prefill_kernel", "write_kv_kernel"):
        monkeypatch.setattr(triton_attention, name, Launch())
    with FakeTensorMode():
        for num_tokens in (3, 18):
            ints = torch.empty(num_tokens, dtype=torch.int32)
            tables = torch.empty(3, 10, dtype=torch.int32)
            meta = AttentionMeta(ints, ints, ints.long(), tables, 128)
            q, k = torch.empty(num_tokens, 8, 64), torch.empty(num_tokens, 2, 64)
            cache = torch.empty(4000, 2, 64)
            triton_attention.write_kv(cache, cache, k, k, meta.cache_slots)
            triton_attention.paged_attention(q, cache, cache, meta, 0.1, None, None)
    assert grids == [(3, 1), (3, 2, 16), (18, 1), (3, 2, 16), (3 + 1, 8)]

"""How many cache blocks fit: the sum in plain numbers, and the step whose memory is measured."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lora_runtime.adapters.pool import AdapterPool
from lora_runtime.config import AdapterConfig, CacheConfig, EngineConfig, SchedulerConfig
from lora_runtime.engine import memory_budget
from lora_runtime.engine.engine import Engine
from lora_runtime.engine.memory_budget import (
    DeviceMemory,
    blocks_that_fit,
    largest_step,
    measure,
    num_kv_blocks,
)
from lora_runtime.errors import ConfigError
from tests.tiny import tiny_base

GIB = 1 << 30


@pytest.fixture(scope="module")
def base():
    return tiny_base("llama")


def settings(*, max_num_seqs=4, max_num_batched_tokens=32, max_model_len=None, **cache):
    return EngineConfig(
        cache=CacheConfig(**{"block_size": 4, **cache}),
        scheduler=SchedulerConfig(
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            max_model_len=max_model_len,
        ),
        adapters=AdapterConfig(pool_bytes=1 << 20, max_slots=4),
    )


@pytest.mark.parametrize(
    ("total", "utilization", "in_use", "activations", "graphs", "expected"),
    [
        (80 * GIB, 0.9, 6 * GIB, 2 * GIB, 0, 64 * 1024),
        (80 * GIB, 0.9, 6 * GIB, 2 * GIB, GIB, 63 * 1024),
        (80 * GIB, 0.5, 6 * GIB, 2 * GIB, 0, 32 * 1024),
        (80 * GIB, 1.0, 0, 0, 0, 80 * 1024),
        (1000, 1.0, 900, 1, 3, None),
        (GIB + 63 * GIB // 1024, 1.0, 0, GIB, 0, 63),
        (GIB + 64 * GIB // 1024 - 1, 1.0, 0, GIB - 5, 5, None),
        (GIB + 64 * GIB // 1024, 1.0, 0, GIB - 5, 5, 64),
    ],
)
def test_the_cache_gets_what_is_left(total, utilization, in_use, activations, graphs, expected):
    """Blocks of 1 MiB and 4 tokens; a step of 256 tokens takes 64 of them, one of 252 takes 63."""
    num_tokens = 252 if expected == 63 else 256
    config = settings(max_num_batched_tokens=num_tokens, gpu_memory_utilization=utilization)
    memory = DeviceMemory(total=total, in_use=in_use, activations=activations, graphs=graphs)
    if expected is not None:
        assert blocks_that_fit(memory, 1 << 20, config) == expected
        return
    with pytest.raises(ConfigError, match="max_num_seqs or the adapter") as caught:
        blocks_that_fit(memory, 1 << 20, config)
    assert caught.value.field == "gpu_memory_utilization"
    numbers = (utilization, total, in_use, activations, graphs, num_tokens, 64 << 20)
    assert all(str(number) in str(caught.value) for number in numbers)


def test_settings_come_before_measuring(base):
    block_bytes = base.kv_bytes_per_token() * 4
    assert num_kv_blocks(base, settings(num_blocks=7)) == 7
    with pytest.raises(ConfigError, match="remove one"):
        settings(num_blocks=7, kv_bytes=1)
    assert num_kv_blocks(base, settings(kv_bytes=10 * block_bytes - 1)) == 9
    assert num_kv_blocks(base, settings()) == GIB // block_bytes
    with pytest.raises(ConfigError) as caught:
        num_kv_blocks(base, settings(kv_bytes=block_bytes - 1))
    assert caught.value.field == "kv_bytes"


@pytest.mark.parametrize("utilization", [0, -0.1, 1.01, float("nan")])
def test_a_share_that_is_none_is_refused(utilization):
    with pytest.raises(ConfigError) as caught:
        CacheConfig(gpu_memory_utilization=utilization)
    assert caught.value.field == "gpu_memory_utilization"


@pytest.mark.parametrize(
    ("max_num_seqs", "num_tokens", "max_model_len", "lengths"),
    [
        (3, 32, None, [30, 1, 1]),
        (3, 3, None, [1, 1, 1]),
        (3, 30, 12, [12, 12, 6]),
        (2, 600, None, [512, 88]),
        (2, 4000, None, [512, 512]),
        (2, 90, 9000, [89, 1]),
    ],
)
def test_the_largest_step(base, max_num_seqs, num_tokens, max_model_len, lengths):
    config = settings(
        max_num_seqs=max_num_seqs, max_num_batched_tokens=num_tokens, max_model_len=max_model_len
    )
    plan = largest_step(base, config)
    assert [scheduled.num_tokens for scheduled in plan.rows] == lengths
    assert all(scheduled.samples for scheduled in plan.rows)
    blocks = [block for scheduled in plan.rows for block in scheduled.row.block_table]
    assert blocks == list(range(sum(-(-length // 4) for length in lengths)))


class Device:
    """torch.cuda's view of a device, in numbers; the base really runs, on the CPU."""

    def __init__(self, monkeypatch):
        self.num_forwards_before_reset = None
        self.forwards = []
        for name in (
            "reset_peak_memory_stats",
            "memory_allocated",
            "max_memory_allocated",
            "empty_cache",
            "mem_get_info",
        ):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))

    def reset_peak_memory_stats(self, device):
        self.num_forwards_before_reset = len(self.forwards)

    def memory_allocated(self, device):
        return 300

    def max_memory_allocated(self, device):
        return 300 + 50 * (len(self.forwards) - self.num_forwards_before_reset)

    def empty_cache(self):
        self.was_emptied = True

    def mem_get_info(self, device):
        assert self.was_emptied
        return 600, 1000


@pytest.mark.parametrize("cuda_graphs", [True, False])
def test_what_is_measured_are_real_steps_with_adapters(base, monkeypatch, cuda_graphs):
    """A largest step with everything it draws, and the forward of the largest decode graph."""
    device, config = Device(monkeypatch), replace(settings(), cuda_graphs=cuda_graphs)
    forward = memory_budget.ModelRunner.forward

    def recorded(runner, batch, layer_steps=None):
        device.forwards.append(batch)
        paths = {*base.spec.linears, base.spec.head}
        assert paths == set(runner.pool.bindings)
        logits = forward(runner, batch, layer_steps)
        assert logits.shape == (4, base.spec.vocab_size) and logits.isfinite().all()
        return logits

    monkeypatch.setattr(memory_budget.ModelRunner, "forward", recorded)
    logits_bytes = 4 * base.spec.vocab_size * base.dtype.itemsize
    assert measure(base, config) == DeviceMemory(
        total=1000, in_use=400, activations=50, graphs=50 + logits_bytes if cuda_graphs else 0
    )
    steps = [32, 32, 4, 4, 4] if cuda_graphs else [32, 32]
    assert [len(batch.token_ids) for batch in device.forwards] == steps
    for batch in device.forwards:
        assert sorted(batch.adapters.tokens.tolist()) == list(range(len(batch.token_ids)))
        assert sorted(batch.head_adapters.tokens.tolist()) == [0, 1, 2, 3]


def test_the_pool_is_there_before_the_cache_is_sized(base, monkeypatch):
    made = []

    def sized(base, config):
        made.append("cache")
        return 40

    def pool(*args, **kwargs):
        made.append("pool")
        return AdapterPool(*args, **kwargs)

    monkeypatch.setattr("lora_runtime.engine.engine.AdapterPool", pool)
    monkeypatch.setattr("lora_runtime.engine.engine.num_kv_blocks", sized)
    engine = Engine(base, settings())
    assert made == ["pool", "cache"]
    assert engine.info.num_blocks == engine.blocks.num_blocks == 40
    assert engine.runner.cache.num_cache_slots == 160


@pytest.mark.parametrize(
    ("field", "own", "pool"),
    [
        ("num_blocks", {"num_blocks": 1 << 22, "block_size": 65_536}, 1 << 20),
        ("kv_bytes", {"kv_bytes": 1 << 50}, 1 << 20),
        ("adapter_pool_bytes", {"num_blocks": 8}, 1 << 50),
    ],
)
def test_more_memory_than_there_is_is_named_before_it_is_taken(base, field, own, pool):
    config = replace(settings(**own), adapters=AdapterConfig(pool_bytes=pool))
    with pytest.raises(ConfigError, match=f"{field} takes .* and cpu has .* in all") as caught:
        Engine(base, config)
    assert caught.value.field == field

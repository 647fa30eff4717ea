"""How many cache blocks there are: as many as were asked for, or as fit beside everything else.

On a CUDA device with neither `num_blocks` nor `kv_bytes` set:

    KV bytes = gpu_memory_utilization · total − in use − activations

in use: the base, the adapter pool, CUDA itself and other processes; activations: the peak of a
largest step. Decode graphs, and adapters that are being checked, take from the share left over.
Source: vLLM's memory profiling. Unmeasured on a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lora_runtime.adapters.host_cache import HostCache
from lora_runtime.adapters.pool import AdapterPool
from lora_runtime.base.loader import Base
from lora_runtime.config import EngineConfig
from lora_runtime.core import Request, SamplingParams, ScheduledBatch, ScheduledSequence, Sequence
from lora_runtime.engine.model_runner import ModelRunner
from lora_runtime.errors import ConfigError

DEFAULT_KV_BYTES = 1 << 30
"""Where nothing is measured."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceMemory:
    """Bytes of a device that has no cache yet."""

    total: int
    in_use: int
    activations: int
    """What a largest step takes beyond `in_use`."""


def num_kv_blocks(base: Base, config: EngineConfig, pool: AdapterPool) -> int:
    """Blocks of the cache; call it when all else that stays on the device is there.

    Raises ConfigError naming `kv_bytes` or `gpu_memory_utilization` when they leave too little.
    """
    cache = config.cache
    block_bytes = base.kv_bytes_per_token() * cache.block_size
    if cache.num_blocks is not None:
        return cache.num_blocks
    if cache.kv_bytes is None and base.device.type == "cuda":
        return blocks_that_fit(measure(base, config, pool), block_bytes, config)
    kv_bytes = cache.kv_bytes or DEFAULT_KV_BYTES
    if kv_bytes < block_bytes:
        raise ConfigError(
            f"kv_bytes is {kv_bytes}; one block takes {block_bytes}", field="kv_bytes"
        )
    return kv_bytes // block_bytes


def blocks_that_fit(memory: DeviceMemory, block_bytes: int, config: EngineConfig) -> int:
    """Blocks of `block_bytes` in what the settings leave of `memory`.

    Raises ConfigError (field `gpu_memory_utilization`) when a largest step would not fit.
    """
    utilization = config.cache.gpu_memory_utilization
    left = int(utilization * memory.total) - memory.in_use - memory.activations
    num_tokens = config.scheduler.max_num_batched_tokens
    least = -(-num_tokens // config.cache.block_size) * block_bytes
    if left < least:
        raise ConfigError(
            f"gpu_memory_utilization is {utilization}: of {memory.total} bytes, {memory.in_use} of "
            f"them in use and {memory.activations} needed by a step, it leaves {max(left, 0)} for "
            f"keys and values, and a step's {num_tokens} tokens take {least}; raise it, or lower "
            "max_num_batched_tokens or the adapter pool's bytes",
            field="gpu_memory_utilization",
        )
    return left // block_bytes


def measure(base: Base, config: EngineConfig, pool: AdapterPool) -> DeviceMemory:
    """Run a largest step over a small cache of its own and see what it took.

    Twice: the first run compiles kernels and sets up what libraries keep, which counts as in use.
    """
    plan, block_size = largest_step(base, config), config.cache.block_size
    num_blocks = sum(len(row.sequence.block_table) for row in plan.sequences)
    cache = base.allocate_kv(num_blocks * block_size)
    runner = ModelRunner(base, cache, block_size, pool, HostCache(), len(plan.sequences))
    runner.start(plan).result()
    torch.cuda.reset_peak_memory_stats(base.device)
    before = torch.cuda.memory_allocated(base.device)
    runner.start(plan).result()
    activations = torch.cuda.max_memory_allocated(base.device) - before
    del runner, cache
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(base.device)
    return DeviceMemory(total=total, in_use=total - free, activations=activations)


def largest_step(base: Base, config: EngineConfig) -> ScheduledBatch:
    """As many rows and tokens as a step may have, the first rows as long as can be; all sample,
    in the way that takes most memory.
    """
    limits, longest = config.scheduler, base.spec.max_model_len
    longest = min(limits.max_model_len or longest, longest)
    left, first_block, rows = limits.max_num_batched_tokens - limits.max_num_seqs, 0, []
    for index in range(limits.max_num_seqs):
        length = 1 + min(left, longest - 1)
        left -= length - 1
        row = Sequence.of(_request(str(index), length))
        num_blocks = -(-length // config.cache.block_size)
        row.block_table = list(range(first_block, first_block + num_blocks))
        first_block += num_blocks
        rows.append(ScheduledSequence(row, 0, length))
    return ScheduledBatch(tuple(rows))


def _request(request_id: str, num_tokens: int) -> Request:
    sampling = SamplingParams(max_tokens=1, top_p=0.9, num_logprobs=20)
    return Request(request_id=request_id, prompt_token_ids=(0,) * num_tokens, sampling=sampling)

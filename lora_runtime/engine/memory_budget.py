"""How many cache blocks there are: as many as were asked for, or as fit beside everything else.

On a CUDA device with neither `num_blocks` nor `kv_bytes` set:

    KV bytes = gpu_memory_utilization · total − in use − activations − graphs − states

in use: the base, the adapter pool, CUDA itself and other processes; activations: the peak of a
largest step; graphs: memory of the largest decode graph, which the others reuse, and its logits;
states: of a base with recurrent layers, those of as many rows as may run, and snapshots.
Both are measured with an adapter on every linear of every row. CUDA's own bookkeeping of each
graph, the graphs' block tables and adapters that are being checked must fit into the share left
over, 1 − gpu_memory_utilization.
Source: vLLM's memory profiling. Unmeasured on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from lora_runtime.adapters.facts import AdapterFacts
from lora_runtime.adapters.host_cache import HostCache
from lora_runtime.adapters.packed_adapter import pack_for
from lora_runtime.adapters.pool import AdapterPool
from lora_runtime.adapters.serving_form import ModuleForm, ModuleKey, ServingForm
from lora_runtime.base.device import check_memory, memory_bytes
from lora_runtime.base.loader import Base
from lora_runtime.config import EngineConfig
from lora_runtime.core import (
    AdapterPlacement,
    AdapterUse,
    Request,
    Row,
    SamplingParams,
    ScheduledBatch,
    ScheduledRow,
)
from lora_runtime.engine.decode_graphs import buckets
from lora_runtime.engine.model_runner import ModelRunner
from lora_runtime.engine.state_slots import num_snapshots
from lora_runtime.errors import ConfigError

DEFAULT_KV_BYTES = 1 << 30
"""Bytes of the KV cache on a device whose memory is not measured."""
MEASURED_RANK = 16
"""Rank of the adapter in a measured step; ranks take little beside the outputs of its linears."""
MEASURED_DIGEST = "measured"
"""Names that adapter; no content has a digest like it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceMemory:
    """Bytes of a device that has no cache yet."""

    total: int
    in_use: int
    activations: int
    """Bytes that a largest step takes beyond `in_use`."""
    graphs: int
    """Bytes that decode graphs will hold beyond `in_use`; 0 without graphs."""


def num_kv_blocks(base: Base, config: EngineConfig) -> int:
    """Blocks of the cache; call it when base, adapter pool and all else that stays are there.

    Raises ConfigError naming `kv_bytes` or `gpu_memory_utilization` when they leave too little,
    `kv_bytes` or `num_blocks` when they ask for more than there is.
    """
    cache = config.cache
    block_bytes = base.kv_bytes_per_token() * cache.block_size
    check_states(base.spec.state_bytes, base.device, config)
    states = num_state_slots(base.spec.state_bytes, config) * base.spec.state_bytes
    if cache.num_blocks is not None:
        check_memory(base.device, cache.num_blocks * block_bytes, "num_blocks")
        return cache.num_blocks
    if cache.kv_bytes is None and base.device.type == "cuda":
        return blocks_that_fit(measure(base, config), block_bytes, config, states)
    kv_bytes = cache.kv_bytes or DEFAULT_KV_BYTES
    if kv_bytes < block_bytes:
        raise ConfigError(
            f"kv_bytes is {kv_bytes}; one block takes {block_bytes}", field="kv_bytes"
        )
    check_memory(base.device, kv_bytes, "kv_bytes")
    return kv_bytes // block_bytes


def check_states(state_bytes: int, device: torch.device, config: EngineConfig) -> None:
    """Raise ConfigError where recurrent states, of `state_bytes` each, take more memory than there
    is; `field` is the setting that asks for more of them.
    """
    num_rows, num_kept = config.scheduler.max_num_seqs, num_snapshots(config)
    needed, total = num_state_slots(state_bytes, config) * state_bytes, memory_bytes(device)
    if needed > total:
        raise ConfigError(
            f"max_num_seqs is {num_rows} and state_snapshots {num_kept}: as many recurrent states "
            f"of {state_bytes} bytes take {needed} bytes of memory, and {device} has {total} in "
            "all; lower them",
            field="max_num_seqs" if num_rows >= num_kept else "state_snapshots",
        )


def num_state_slots(state_bytes: int, config: EngineConfig) -> int:
    """Slots of the state pool, of `state_bytes` each: one for each row that may run, and those for
    snapshots.
    """
    if not state_bytes:
        return 0
    return config.scheduler.max_num_seqs + num_snapshots(config)


def blocks_that_fit(
    memory: DeviceMemory, block_bytes: int, config: EngineConfig, states: int = 0
) -> int:
    """Blocks of `block_bytes` in what the settings and recurrent `states` leave of `memory`.

    Raises ConfigError (field `gpu_memory_utilization`) when a largest step would not fit.
    """
    utilization = config.cache.gpu_memory_utilization
    needed = memory.activations + memory.graphs
    left = int(utilization * memory.total) - memory.in_use - needed - states
    num_tokens = config.scheduler.max_num_batched_tokens
    least = -(-num_tokens // config.cache.block_size) * block_bytes
    if left < least:
        raise ConfigError(
            f"gpu_memory_utilization is {utilization}: of {memory.total} bytes, {memory.in_use} of "
            f"them in use, {memory.activations} needed by a step, {memory.graphs} by decode "
            f"graphs and {states} by recurrent states, it leaves {max(left, 0)} for keys and "
            f"values, and the {num_tokens} tokens of a step take {least}; raise it, or lower "
            "max_num_batched_tokens, max_num_seqs"
            f"{', state_snapshots' if states else ''} or the adapter pool's bytes",
            field="gpu_memory_utilization",
        )
    return left // block_bytes


def measure(base: Base, config: EngineConfig) -> DeviceMemory:
    """Run a largest step, and a largest decode step, over a small cache of their own, and see what
    they took.
    """
    activations, graphs = _largest_steps(base, config)
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(base.device)
    return DeviceMemory(total=total, in_use=total - free, activations=activations, graphs=graphs)


@torch.inference_mode()
def _largest_steps(base: Base, config: EngineConfig) -> tuple[int, int]:
    """Bytes of activations and of graphs; nothing stays on the device."""
    plan, block_size = largest_step(base, config), config.cache.block_size
    num_blocks = sum(len(scheduled.row.block_table) for scheduled in plan.rows)
    cache = base.allocate_kv(num_blocks * block_size)
    pool = _pool_with_an_adapter(base)
    states = base.allocate_states(len(plan.rows))
    runner = ModelRunner(base, cache, block_size, pool, HostCache(), len(plan.rows), states)
    activations = _peak(base.device, lambda: runner.start(plan).result())
    return activations, _graph_bytes(runner, plan) if config.cuda_graphs else 0


def _graph_bytes(runner: ModelRunner, plan: ScheduledBatch) -> int:
    """Bytes that the graph of the most rows will hold: those of its forward and its logits."""
    rows = plan.rows[: buckets(len(plan.rows))[-1]]
    last = tuple(ScheduledRow(scheduled.row, scheduled.end - 1, 1) for scheduled in rows)
    decode = ScheduledBatch(last)
    logits = runner.logits(decode)
    return logits.nbytes + _peak(runner.base.device, lambda: runner.logits(decode))


def _peak(device: torch.device, run: Callable[[], object]) -> int:
    """Bytes that `run` takes while it runs.

    It runs twice: the first time compiles kernels and sets up what libraries keep, which counts as
    in use.
    """
    run()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    return torch.cuda.max_memory_allocated(device) - before


def _pool_with_an_adapter(base: Base) -> AdapterPool:
    """A pool whose slot 0 has an adapter for all inner linears and the output layer, but not for
    experts, whose adapters are as large as hundreds of others.
    """
    inner = (path for path, shape in base.spec.linears.items() if shape.experts is None)
    paths = (*inner, base.spec.head)
    modules = {}
    for path in paths:
        shape = base.spec.shapes[path]
        a = torch.zeros(MEASURED_RANK, shape.in_features)
        b = torch.zeros(shape.out_features, MEASURED_RANK)
        modules[ModuleKey(path)] = ModuleForm(a=a, b=b)
    facts = AdapterFacts(digest=MEASURED_DIGEST, variant="lora")
    form = ServingForm(facts=facts, modules=modules)
    adapter = pack_for(base, form)
    like = torch.empty(0, dtype=adapter.dtype, device=base.device)
    pool = AdapterPool(base.spec.shapes, adapter.nbytes, 1, like)
    pool.load(AdapterPlacement(MEASURED_DIGEST, slot=0, address=0), adapter)
    return pool


def largest_step(base: Base, config: EngineConfig) -> ScheduledBatch:
    """As many rows and tokens as a step may have, the first rows as long as can be; all sample,
    in the way that takes most memory, and have the adapter of slot 0.
    """
    limits, longest = config.scheduler, base.spec.max_model_len
    longest = min(limits.max_model_len or longest, longest)
    left, first_block, rows = limits.max_num_batched_tokens - limits.max_num_seqs, 0, []
    for index in range(limits.max_num_seqs):
        length = 1 + min(left, longest - 1)
        left -= length - 1
        row = Row.of(_request(str(index), length))
        num_blocks = -(-length // config.cache.block_size)
        row.block_table = list(range(first_block, first_block + num_blocks))
        row.slots, row.state_slot = (0,), index
        first_block += num_blocks
        rows.append(ScheduledRow(row, 0, length))
    return ScheduledBatch(tuple(rows))


def _request(request_id: str, num_tokens: int) -> Request:
    sampling = SamplingParams(  # a cut row takes less on a GPU
        max_tokens=1,
        num_logprobs=20,
        num_prompt_logprobs=20,
        presence_penalty=1.0,
        repetition_penalty=2.0,
    )
    return Request(
        request_id=request_id,
        prompt_token_ids=(0,) * num_tokens,
        sampling=sampling,
        adapters=(AdapterUse(digest=MEASURED_DIGEST),),
    )

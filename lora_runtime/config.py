"""Frozen settings of the runtime. Values are checked here once and never changed afterwards."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal

from lora_runtime.errors import ConfigError

Quantization = Literal["nf4", "nf4-double", "fp4", "int8", "none"]
"""bitsandbytes' 4-bit formats, `nf4` also with quantised scales; LLM.int8's weights; none."""
DtypeName = Literal["auto", "float32", "bfloat16"]
DEVICE_NAME = re.compile(r"auto|cpu|cuda(:(0|[1-9][0-9]*))?")
DEVICE_RULE = "auto, cpu, cuda or cuda:N with the number of a GPU, counted from 0"


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceDefaults:
    """The settings whose default follows the device."""

    max_num_seqs: int
    max_num_batched_tokens: int
    pool_bytes: int


CPU_DEFAULTS = DeviceDefaults(max_num_seqs=64, max_num_batched_tokens=512, pool_bytes=512 << 20)
"""Also what settings have that are made in code, without a device in mind."""
LARGE_DEVICE_BYTES = 40_000_000_000
"""Memory from which on a GPU counts as a data centre's."""
MAX_REPLICATION = 4
"""Times the base's layers that an adapter may make of them where no setting says otherwise."""
POOL_SHARE = 8
"""One part in so many of a GPU's memory is for adapters."""


def cuda_defaults(total_bytes: int) -> DeviceDefaults:
    """The defaults for a CUDA device of that much memory.

    A step of more tokens than the packed products take dequantises the whole base once, however
    many tokens it has: with few it spends longer on that than on multiplying. More tokens make
    other rows of the step wait longer for theirs.
    """
    is_large = total_bytes >= LARGE_DEVICE_BYTES
    return DeviceDefaults(
        max_num_seqs=256 if is_large else 128,
        max_num_batched_tokens=4096 if is_large else 2048,
        pool_bytes=total_bytes // POOL_SHARE >> 20 << 20,
    )


def _require(condition: bool, name: str, value: object, rule: str) -> None:
    if not condition:
        raise ConfigError(f"{name} is {value!r}; it must be {rule}", field=name)


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseConfig:
    """Which base model to hold, and how."""

    model: str = "smollm2-135m"
    """Catalog name, local folder, GGUF file or hub id."""
    quantization: Quantization = "nf4"
    """Format of the inner linear layers; embeddings and lm_head stay unquantised."""
    dtype: DtypeName = "auto"
    """Compute dtype. `auto`: bfloat16 where the device multiplies it natively, else float32."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda` or `cuda:N`."""
    dequantized_cache: bool = True
    """CPU only: keep a private dequantised copy of the weights for speed (counted as resident)."""

    def __post_init__(self) -> None:
        is_known = DEVICE_NAME.fullmatch(self.device) is not None
        _require(is_known, "device", self.device, DEVICE_RULE)


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheConfig:
    """The paged KV cache."""

    block_size: int = 16
    """Tokens in one block."""
    num_blocks: int | None = None
    """Blocks in the cache; None derives it from `kv_bytes`."""
    kv_bytes: int | None = None
    """Bytes for keys and values when `num_blocks` is None; None: on CUDA what
    `gpu_memory_utilization` leaves for them, 1 GiB elsewhere."""
    gpu_memory_utilization: float = 0.9
    """Share of a CUDA device's memory that base, adapters, steps and cache may take together."""
    prefix_cache: bool = True
    """Keep full blocks after their request, and share them with requests that begin alike."""

    def __post_init__(self) -> None:
        _require(self.block_size > 0, "block_size", self.block_size, "positive")
        _require(
            self.num_blocks is None or self.num_blocks > 0,
            "num_blocks",
            self.num_blocks,
            "positive",
        )
        _require(self.kv_bytes is None or self.kv_bytes > 0, "kv_bytes", self.kv_bytes, "positive")
        _require(
            0 < self.gpu_memory_utilization <= 1,
            "gpu_memory_utilization",
            self.gpu_memory_utilization,
            "above 0 and at most 1",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig:
    """Limits of one engine step and of the queue."""

    max_num_seqs: int = CPU_DEFAULTS.max_num_seqs
    """Sequences that run at once."""
    max_num_batched_tokens: int = CPU_DEFAULTS.max_num_batched_tokens
    """Tokens in one step, decode rows and prefill chunks together."""
    max_model_len: int | None = None
    """Longest prompt + output; None takes the base's own limit."""
    max_queued_requests: int = 1024
    """Requests that may wait, three quarters of them of one client; one more is refused as
    overloaded."""

    def __post_init__(self) -> None:
        _require(self.max_num_seqs > 0, "max_num_seqs", self.max_num_seqs, "positive")
        _require(
            self.max_num_batched_tokens >= self.max_num_seqs,
            "max_num_batched_tokens",
            self.max_num_batched_tokens,
            f"at least max_num_seqs ({self.max_num_seqs})",
        )
        _require(
            self.max_model_len is None or self.max_model_len > 1,
            "max_model_len",
            self.max_model_len,
            "at least 2",
        )
        _require(
            self.max_queued_requests > 0,
            "max_queued_requests",
            self.max_queued_requests,
            "positive",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterConfig:
    """The device pool that holds adapters, and its bookkeeping."""

    pool_bytes: int = CPU_DEFAULTS.pool_bytes
    """Device bytes for adapters; each takes the bytes of its own tensors, whatever its rank."""
    max_slots: int = 256
    """Adapters resident on the device at once."""
    max_layers: int | None = None
    """Layers to which an adapter may replicate the base's; every row of a step waits for the
    deepest one. None: four times the base's."""
    host_bytes: int | None = None
    """Host bytes for all adapters that are kept; None: half of the machine's memory."""

    def __post_init__(self) -> None:
        host_bytes = self.host_bytes
        is_positive = host_bytes is None or host_bytes > 0
        _require(is_positive, "host_adapter_bytes", host_bytes, "positive")
        _require(self.pool_bytes > 0, "pool_bytes", self.pool_bytes, "positive")
        _require(self.max_slots > 0, "max_slots", self.max_slots, "positive")
        _require(
            self.max_layers is None or self.max_layers > 0,
            "max_layers",
            self.max_layers,
            "positive",
        )

    def layer_limit(self, num_base_layers: int) -> int:
        """Most layers of a row, over a base of so many. The base's own are always allowed."""
        return max(num_base_layers, self.max_layers or MAX_REPLICATION * num_base_layers)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Everything an engine is built from."""

    base: BaseConfig = field(default_factory=BaseConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    cuda_graphs: bool = True
    """CUDA only: capture decode steps as graphs, which saves the time of their launches."""
    adapters: AdapterConfig = field(default_factory=AdapterConfig)

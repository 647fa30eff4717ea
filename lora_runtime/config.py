"""Frozen settings of the runtime. Values are checked here once and never changed afterwards.

`ServerConfig` and `TrainConfig` are made of these, so each setting stands here only.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import AfterValidator

from lora_runtime.errors import ConfigError
from lora_runtime.settings import Bytes, Float, Int, setting, settings

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

    def by_part(
        self, given_num_seqs: int | None = None, given_num_tokens: int | None = None
    ) -> dict[str, dict[str, int]]:
        """Return them as EngineConfig has them, by part. Rows of a step that are not given follow
        its tokens if those are, and the other way round: a row takes a token at least.
        """
        num_seqs = min(self.max_num_seqs, given_num_tokens or self.max_num_seqs)
        num_tokens = max(self.max_num_batched_tokens, given_num_seqs or 0)
        return {
            "scheduler": {"max_num_seqs": num_seqs, "max_num_batched_tokens": num_tokens},
            "adapters": {"pool_bytes": self.pool_bytes},
        }


CPU_DEFAULTS = DeviceDefaults(max_num_seqs=64, max_num_batched_tokens=512, pool_bytes=512 << 20)
"""Also what settings have that are made in code, without a device in mind."""
LARGE_DEVICE_BYTES = 40_000_000_000
"""Memory from which on a GPU counts as a data centre's."""
MAX_BYTES = 1 << 50
"""1 PiB. What a machine has is smaller, and is asked of it when memory is taken."""
MAX_TOKENS = 1 << 24
"""Longest sequence that a setting may ask for; bases end long before."""
MAX_DEPTH = 1024
"""Layers of a replicated model."""
MAX_RANK = 1 << 16
MAX_ALPHA = 1e12
"""Of an adapter, trained or served."""
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


def _checked_device(name: str) -> str:
    if DEVICE_NAME.fullmatch(name) is None:
        raise ValueError(DEVICE_RULE)
    return name


DeviceName = Annotated[str, AfterValidator(_checked_device)]

BASE, MEMORY, LIMITS = "Base model", "Memory", "Batching and limits"
"""Groups of settings, and headings of the help."""


@settings
class BaseConfig:
    """Which base model to hold, and how."""

    model: str = setting(
        default="smollm2-135m",
        group=BASE,
        key="base",
        also=("model_name_or_path",),
        min_length=1,
    )
    """Catalog name, local folder, GGUF file or hub id."""
    quantization: Quantization = setting(default="nf4", group=BASE)
    """Format of the inner linear layers; embeddings and lm_head stay unquantised."""
    dtype: DtypeName = setting(default="auto", group=BASE)
    """Compute dtype. `auto`: bfloat16 where the device multiplies it natively, else float32."""
    device: DeviceName = setting(default="auto", group=BASE)
    """`auto`, `cpu`, `cuda` or `cuda:N`."""
    dequantized_cache: bool = setting(default=True, group=BASE)
    """CPU only, in float32: keep a private copy of layers that no kernel multiplies as they are,
    which are those that are not quantised and without AVX2 all; faster, more memory. In bfloat16
    there is none; the output layer and routers have one in float32 whatever is set."""


@settings
class CacheConfig:
    """The paged KV cache."""

    block_size: Int = setting(default=16, gt=0, le=65_536, group=MEMORY)
    """Tokens in one KV block."""
    num_blocks: Int | None = setting(default=None, gt=0, le=1 << 22, group=MEMORY)
    """Blocks in the KV cache; none: as many as `kv_bytes` holds."""
    kv_bytes: Bytes | None = setting(default=None, gt=0, le=MAX_BYTES, group=MEMORY)
    """Bytes of the KV cache; none: on CUDA what `gpu_memory_utilization` leaves, else 1 GiB."""
    gpu_memory_utilization: Float = setting(default=0.9, gt=0, le=1, group=MEMORY)
    """CUDA only: share of the device's memory for base, adapters, steps and KV cache together."""
    prefix_cache: bool = setting(default=True, group=MEMORY)
    """Keep the KV blocks of ended requests for requests that begin with the same tokens."""
    state_snapshots: Int | None = setting(default=None, ge=0, le=1 << 20, group=MEMORY)
    """Bases with recurrent layers only: their states that are kept for requests that begin with the
    same tokens, beside those of running requests; none: as many as `max_num_seqs`, at least 16.
    Memory is taken for all of them, and for `max_num_seqs` running requests, at the start."""

    def __post_init__(self) -> None:
        if self.num_blocks is not None and self.kv_bytes is not None:
            raise ConfigError(
                f"num_blocks is {self.num_blocks} and kv_bytes is {self.kv_bytes}; each says how "
                "large the KV cache is: remove one",
                field="num_blocks",
            )


@settings
class SchedulerConfig:
    """Limits of one engine step and of the queue."""

    max_num_seqs: Int = setting(default=CPU_DEFAULTS.max_num_seqs, gt=0, le=65_536, group=LIMITS)
    """Requests that run at once. On CUDA 128, or 256 from 40 GB of memory on."""
    max_num_batched_tokens: Int = setting(
        default=CPU_DEFAULTS.max_num_batched_tokens, gt=0, le=1 << 20, group=LIMITS
    )
    """Tokens in one engine step, decode rows and prefill chunks together. On CUDA 2048, or 4096
    from 40 GB of memory on."""
    max_model_len: Int | None = setting(default=None, ge=2, le=MAX_TOKENS, group=LIMITS)
    """Longest prompt + output; none: the base's own limit."""
    max_queued_requests: Int = setting(default=1024, gt=0, le=1_000_000, group=LIMITS)
    """Requests that may wait, of which one client may have three quarters; a further one is
    refused as overloaded."""

    def __post_init__(self) -> None:
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ConfigError(
                f"max_num_batched_tokens is {self.max_num_batched_tokens}; it must be at least "
                f"max_num_seqs ({self.max_num_seqs})",
                field="max_num_batched_tokens",
            )


@settings
class AdapterConfig:
    """The device pool that holds adapters, and its bookkeeping."""

    pool_bytes: Bytes = setting(
        default=CPU_DEFAULTS.pool_bytes,
        gt=0,
        le=MAX_BYTES,
        group=MEMORY,
        key="adapter_pool_bytes",
    )
    """Bytes of device memory for adapters; an adapter takes as many as its own tensors have. On
    CUDA an eighth of the device's."""
    max_slots: Int = setting(default=256, gt=0, le=16_384, group=LIMITS, key="max_adapter_slots")
    """Adapters resident on the device at once."""
    max_layers: Int | None = setting(
        default=None, gt=0, le=MAX_DEPTH, group=LIMITS, key="max_adapter_layers"
    )
    """The most layers that an adapter may have by replicating the base's; all requests of a step
    take as long as the deepest. None: four times the base's."""
    host_bytes: Bytes | None = setting(
        default=None, gt=0, le=MAX_BYTES, group=MEMORY, key="host_adapter_bytes"
    )
    """Bytes of host memory for loaded adapters and their former contents; a further adapter is
    refused. None: half of the machine's memory."""

    def layer_limit(self, num_base_layers: int) -> int:
        """Most layers of a row, over a base of so many. The base's own are always allowed."""
        return max(num_base_layers, self.max_layers or MAX_REPLICATION * num_base_layers)


@settings
class EngineConfig:
    """Everything an engine is built from."""

    base: BaseConfig = setting(default_factory=BaseConfig)
    cache: CacheConfig = setting(default_factory=CacheConfig)
    scheduler: SchedulerConfig = setting(default_factory=SchedulerConfig)
    adapters: AdapterConfig = setting(default_factory=AdapterConfig)
    cuda_graphs: bool = setting(default=True, group=BASE)
    """CUDA only: capture decode steps as graphs at the start, which makes each step faster."""

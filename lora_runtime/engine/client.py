"""How everything else talks to an engine, on whichever thread or process it runs."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from lora_runtime.adapters.facts import AdapterFacts
from lora_runtime.core import ANY_FOLDER, BaseSpec, FolderRules, Request, StepOutput
from lora_runtime.errors import Unavailable


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineInfo:
    """Facts that stay the same while an engine lives."""

    base: BaseSpec
    kernel_backend: str
    """`torch`, `cpu-avx2`, … as chosen at import."""
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    block_size: int
    num_blocks: int
    pool_bytes: int
    max_slots: int
    max_adapter_layers: int
    """The most layers that an adapter may have by replicating the base's."""
    num_snapshots: int = 0
    """Recurrent states that the prefix cache keeps, of `base.state_bytes` each, beside those of
    `max_num_seqs` rows; 0 for a base without recurrent layers."""
    max_queued_requests: int = 1024
    """Requests that may wait; at most three quarters of them may be one client's. A further one
    is refused as overloaded."""

    def token_limit(self, num_layers: int = 0) -> int:
        """Return the most tokens one request may have: the model's limit, or the KV cache's.

        A block has room for the keys and values of as many layers as the base has. A request with
        `num_layers` layers (0: the base's) takes several blocks for the same tokens if they are
        more.
        """
        blocks_per_token = max(1, -(-num_layers // self.base.num_layers))
        return min(self.max_model_len, self.num_blocks // blocks_per_token * self.block_size)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedAdapter:
    """An adapter that an engine has read, checked and kept."""

    facts: AdapterFacts
    ranks: tuple[int, ...]
    target_modules: tuple[str, ...]
    """Last path components of the modules it touches, sorted."""
    num_parameters: int
    nbytes: int
    """Bytes it takes in the device pool."""
    text_files: Mapping[str, bytes] = field(default_factory=dict, repr=False, compare=False)
    """Its own text files by name, which the engine does not read."""

    @property
    def digest(self) -> str:
        return self.facts.digest


@dataclass(frozen=True, slots=True, kw_only=True)
class StateStats:
    """Slots of the pool of recurrent states, of `base.state_bytes` each, and what they were good
    for.
    """

    num_rows: int
    """Slots of running rows."""
    num_rows_free: int
    num_snapshots: int
    """Slots that hold the state behind a prefix, for rows that begin with it."""
    num_snapshots_free: int
    num_snapshot_hits: int
    """Rows that began with a snapshot, resumed ones included."""
    num_snapshot_evictions: int
    """Snapshots that went for want of slots."""
    num_recomputed_tokens: int
    """Tokens whose keys and values were found in the prefix cache and that were computed again, as
    no snapshot was held behind them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStats:
    """A snapshot of a running engine."""

    is_alive: bool
    num_running: int
    num_waiting: int
    """In the queue, or on their way to it."""
    kv_blocks_used: int
    kv_blocks_total: int
    pool_bytes_used: int
    pool_bytes_total: int
    num_preemptions: int
    num_prefix_queries: int
    """Tokens of all admissions, resumed rows included."""
    num_prefix_hits: int
    """Of `num_prefix_queries`, tokens whose keys and values were found in the prefix cache."""
    num_steps: int
    running_adapters: tuple[str, ...]
    """Digests with at least one running request."""
    waiting_adapters: tuple[str, ...]
    resident_adapters: tuple[str, ...]
    """Digests in the device pool."""
    is_busy: bool = False
    """The engine's thread has work and compiles no kernel: `num_beats` must change."""
    num_beats: int = 0
    """Grows with every step, every command and every call of a layer, so several times within a
    long step. An engine that is busy while this stands still may be stuck."""
    waiting_by_client: Mapping[str, int] = field(default_factory=dict)
    """Client → its requests among `num_waiting`; clients without any are left out."""
    num_failed_in_a_row: int = 0
    """Requests that ended by an unforeseen error since a request last got a token."""
    num_adapter_loads: int = 0
    """Times that an adapter was copied into the device pool."""
    num_adapter_evictions: int = 0
    """Times that one lost its place there to another."""
    states: StateStats | None = None
    """None for a base without recurrent layers."""


class EngineClient(Protocol):
    """Every method is safe to call from one asyncio event loop; none blocks it."""

    @property
    def info(self) -> EngineInfo: ...

    def stats(self) -> EngineStats: ...

    def generate(self, request: Request) -> AsyncGenerator[StepOutput, None]:
        """Stream a request's outputs; the last one, and only it, has a finish_reason.

        Raises before the first output: InvalidRequest (prompt empty or too long, max_tokens too
        large), AdapterNotFound (unknown digest), Overloaded (queue full), Unavailable. After that
        every failure is a terminal output with `error`. Closing the iterator cancels the request.
        """
        ...

    async def load_adapter(self, folder: Path, rules: FolderRules = ANY_FOLDER) -> LoadedAdapter:
        """Read, check and keep an adapter. Content that is loaded already only gains a reference.

        All files are of one moment: a folder that changes meanwhile is read as it was before or
        after the change, or refused.

        Raises AdapterRefused (and its kinds), AdapterTooLarge, Overloaded, Unavailable.
        """
        ...

    async def unload_adapter(self, digest: str, *, ending: Collection[str] = ()) -> None:
        """Drop one reference, and end the running requests of these ids as CANCELLED.

        After the last reference new requests for the adapter fail at once, and its memory is free
        when its requests have ended. Returns then; while there are other references, at once.
        """
        ...

    async def pin_adapter(self, digest: str, *, is_pinned: bool = True) -> None:
        """Keep an adapter in the device pool whether or not requests use it, or no longer.

        Raises AdapterNotFound, AdapterTooLarge (field `pin`) where others would find no place any
        more, and Overloaded while running requests fill the pool.
        """
        ...

    def abandon(self, error: Unavailable) -> None:
        """End every request and refuse every later call with `error`, without the engine's help."""
        ...

    async def close(self, *, drain_s: float) -> None:
        """Stop admitting, let running requests finish for `drain_s` seconds, cancel the rest.

        Returns within seconds after that even if the engine's thread hangs, which is then left
        behind.
        """
        ...

"""What the ops take: the memory that holds adapters, and the tables of one step.

Names: T tokens of the step, E entries (one token under one adapter), K segments (consecutive
entries of one adapter), S slots, R replicas.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor


def wants_gradient(*tensors: Tensor) -> bool:
    """True when autograd follows what is made of these tensors; fast backends have no backward."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


class NestedScales(NamedTuple):
    """How the absmax of 4-bit blocks is kept as 8-bit codes c (double quantisation): block i's is
    code[c_i] × absmax[i // 256], rounded to float32, + offset[i // 256].

    absmax and offset (⌈blocks / 256⌉,) float32, code (256,) float32.
    Source: QLoRA, arXiv:2305.14314 §3.
    """

    absmax: Tensor
    code: Tensor
    offset: Tensor


@dataclass(frozen=True, slots=True)
class AdapterMemory:
    """All adapters' tensors, flat: weights in the pool's dtype, vectors float32, indices int32.

    The three may be views of the same bytes; an Extent says which elements of each belong to whom.
    """

    weights: Tensor
    vectors: Tensor
    indices: Tensor
    max_rank: int | None = None
    """Upper bound of all ranks. None: a backend has to read the extent tables, and on a GPU to wait
    for them."""
    alignment: int = 1
    """Bytes; every part of an extent lies at a multiple."""
    max_rows: int | None = None
    """Upper bound of the vocabulary rows that one extent replaces. None: as with `max_rank`."""

    @classmethod
    def over(cls, storage: Tensor, dtype: torch.dtype, alignment: int) -> AdapterMemory:
        """Three views of one byte buffer (n,) uint8, n a multiple of 8; no extent in it yet."""
        return cls(
            weights=storage.view(dtype),
            vectors=storage.view(torch.float32),
            indices=storage.view(torch.int32),
            max_rank=0,
            max_rows=0,
            alignment=alignment,
        )


class PooledAdapters(NamedTuple):
    """The adapters of a step at up to three modules that share x: their memory, the modules' run
    tables (P, S, R, 8) int64, and which of them act on which tokens.
    """

    memory: AdapterMemory
    extents: Tensor
    meta: StepMeta


class Extent(NamedTuple):
    """Where one adapter's parts of one module lie: element offsets, −1 for a part it lacks.

    In `weights`: a (rank, in), b (rank, out) = B' transposed with every scaling folded in, and
    rows (num_rows, width), which replace rows of a vocabulary matrix. In `vectors`: gain (out,)
    and bias (out,). In `indices`: row_ids (num_rows,) ascending; −1 with rows: all rows in order.
    """

    rank: int = 0
    a: int = -1
    b: int = -1
    gain: int = -1
    bias: int = -1
    num_rows: int = 0
    rows: int = -1
    row_ids: int = -1


NO_EXTENT = Extent()
"""Entry of an extent table for a module that an adapter does not touch."""


class HeadNorm(NamedTuple):
    """The norms of queries and of keys over each head's values: weights (D,), see `rms_norm`."""

    q_weight: Tensor
    k_weight: Tensor
    eps: float
    plus_one: bool


def to_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """A host tensor on `device`. On CUDA the host does not wait for the copy."""
    is_cuda = torch.device(device).type == "cuda"
    return (tensor.pin_memory() if is_cuda else tensor).to(device, non_blocking=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """`num_tokens` tokens from row `first_token` of the step, under the adapter in `slot`.

    `replica` counts how often the row's own layer map has visited this layer before.
    """

    slot: int
    first_token: int
    num_tokens: int
    weight: float = 1.0
    replica: int = 0

    @property
    def rows(self) -> slice:
        """The rows of the step's tensors that the span covers."""
        return slice(self.first_token, self.first_token + self.num_tokens)


class SlotUse(NamedTuple):
    """The use of the adapter in `slot` by a row, from the row's token `start` of the step on."""

    slot: int
    weight: float = 1.0
    start: int = 0
    """Below 0, or beyond the row's tokens: on all of them, or on none."""


def spans_of_rows(
    lengths: Sequence[int],
    uses: Sequence[Sequence[SlotUse]],
    replicas: Sequence[int] | None = None,
) -> list[Span]:
    """Spans of rows laid end to end: row i has lengths[i] tokens under each adapter of uses[i].

    `replicas`: how often each row has visited the layer before; None: never.
    """
    found, first_token = [], 0
    for row, length in enumerate(lengths):
        for slot, weight, start in uses[row]:
            num_skipped = min(max(start, 0), length)
            span = Span(
                slot=slot,
                first_token=first_token + num_skipped,
                num_tokens=length - num_skipped,
                weight=weight,
                replica=0 if replicas is None else replicas[row],
            )
            found.append(span)
        first_token += length
    return found


@dataclass(frozen=True, slots=True)
class StepMeta:
    """Which adapters act on which tokens; shared by all modules of one step of the layer order.

    tokens, slots, replicas (E,) int32 and weights (E,) float32, sorted by (slot, replica, token);
    segment_starts (K + 1,) int32: entries of one (slot, replica) are consecutive. A token may
    have several entries (a composition) or none (a base row, or before an aLoRA's start).
    """

    tokens: Tensor
    slots: Tensor
    replicas: Tensor
    weights: Tensor
    segment_starts: Tensor
    end_slot: int = 0
    """Above every entry of `slots`, known on the host: ops compare it with their tables. 0 where
    the tables are rewritten in place; whoever writes them keeps to the slots of the pool."""
    end_replica: int = 0
    """Above every entry of `replicas`."""
    derived: dict[Any, Any] = field(default_factory=dict, compare=False, repr=False)
    """Tables that a backend computes from the others, once a step. A captured graph's tables are
    changed in place, so a capture needs a StepMeta of its own."""

    @classmethod
    def build(cls, spans: Iterable[Span], device: torch.device | str = "cpu") -> StepMeta | None:
        """Tables of a step from its spans, or None when every row is the base's."""
        ordered = sorted(
            (span for span in spans if span.num_tokens > 0),
            key=lambda span: (span.slot, span.replica, span.first_token),
        )
        if not ordered:
            return None
        if min(min(span.slot, span.replica) for span in ordered) < 0:
            raise IndexError("a span's slot or replica is negative")
        lengths = torch.tensor([span.num_tokens for span in ordered])
        ends = torch.cumsum(lengths, 0)
        first = torch.tensor([span.first_token for span in ordered])
        tokens = torch.arange(int(ends[-1])) + torch.repeat_interleave(
            first - (ends - lengths), lengths
        )

        def per_entry(values: list[int] | list[float], dtype: torch.dtype) -> Tensor:
            entries = torch.repeat_interleave(torch.tensor(values, dtype=dtype), lengths)
            return to_device(entries, device)

        first_entries = (ends - lengths).tolist()
        keys = [(span.slot, span.replica) for span in ordered]
        starts = torch.tensor(
            [*segment_starts(keys, first_entries), len(tokens)], dtype=torch.int32
        )

        return cls(
            tokens=to_device(tokens.int(), device),
            slots=per_entry([span.slot for span in ordered], torch.int32),
            replicas=per_entry([span.replica for span in ordered], torch.int32),
            weights=per_entry([span.weight for span in ordered], torch.float32),
            segment_starts=to_device(starts, device),
            end_slot=1 + max(span.slot for span in ordered),
            end_replica=1 + max(span.replica for span in ordered),
        )

    def check_within(self, extents: Tensor) -> None:
        """Raise IndexError unless extent tables (…, S, R, 8) have all slots and replicas of this.

        A kernel that read beyond a slot's R extents would apply the next slot's: another adapter.
        """
        num_slots, num_replicas = extents.shape[-3:-1]
        if self.end_slot > num_slots or self.end_replica > num_replicas:
            raise IndexError(
                f"the step has slots below {self.end_slot} and replicas below {self.end_replica}; "
                f"the extent tables have {num_slots} and {num_replicas}"
            )


def segment_starts(keys: Sequence[object], first_entries: Sequence[int]) -> list[int]:
    """Where segments of sorted entries begin: first_entries[i] of each keys[i] unlike the last."""
    return [first_entries[i] for i, key in enumerate(keys) if i == 0 or key != keys[i - 1]]


@dataclass(frozen=True, slots=True)
class AttentionMeta:
    """Where each token of the step reads and writes keys and values.

    rows (T,) int32, ascending: the row of each token. positions (T,) int32: its position in
    that sequence. cache_slots (T,) int64: cache slot (block · block_size + offset) its key and
    value go to. block_tables (N, M) int32: blocks of each row, padded with 0 (never read).
    """

    rows: Tensor
    positions: Tensor
    cache_slots: Tensor
    block_tables: Tensor
    block_size: int
    derived: dict[Any, Any] = field(default_factory=dict, compare=False, repr=False)
    """See `StepMeta.derived`."""

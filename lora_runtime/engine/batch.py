"""From the plan of a step to the tensors of its forward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_runtime.base.model.recurrence import Recurrence, StatePool
from lora_runtime.core import ScheduledBatch, ScheduledRow
from lora_runtime.engine.recurrent_batch import pieces
from lora_runtime.kernels import AttentionMeta, SlotUse, Span, StepMeta, spans_of_rows, to_device

Rows = tuple[ScheduledRow, ...]

MAX_SCORED = 128
"""Prompt tokens that are scored at a time: each takes logits of the whole vocabulary."""


@dataclass(frozen=True, slots=True)
class ScoredTokens:
    """Up to MAX_SCORED tokens g of a step after which the prompt's own next token is scored.

    rows: the parts of rows that they are. positions (g,) int64: where they lie in the step;
    next_tokens (g,) int64: the tokens to score; num_top: how many most likely ones beside each;
    head_adapters: on these g tokens.
    """

    rows: Rows
    positions: Tensor
    next_tokens: Tensor
    num_top: int
    head_adapters: StepMeta | None


@dataclass(frozen=True, slots=True)
class ForwardBatch:
    """All rows of a step laid end to end: T tokens, n of them sampled.

    token_ids, positions (T,) int64; logits_at (n,) int64: the last token of each row that samples.
    attention: where rows without a layer map keep keys and values. adapters: on all tokens;
    head_adapters: on the n sampled ones.
    """

    token_ids: Tensor
    positions: Tensor
    attention: AttentionMeta
    adapters: StepMeta | None
    logits_at: Tensor
    head_adapters: StepMeta | None
    scored: tuple[ScoredTokens, ...] = ()
    """The tokens behind which prompts are scored, in groups."""
    recurrence: Recurrence | None = None
    """Where rows keep the states of recurrent layers, if the base has such."""


def build_batch(
    plan: ScheduledBatch, block_size: int, device: torch.device, states: StatePool | None = None
) -> ForwardBatch:
    """Lay out the rows of `plan`. Host lists first, then one copy a tensor, unwaited for.

    `states`: the pool of a base with recurrent layers.
    """
    rows = plan.rows
    token_ids = [t for scheduled in rows for t in _tokens(scheduled)]
    positions = [p for scheduled in rows for p in range(scheduled.start, scheduled.end)]
    starts = first_tokens(rows)
    attention = AttentionMeta(
        rows=to_device(row_of_token(rows).int(), device),
        positions=to_device(torch.tensor(positions, dtype=torch.int32), device),
        cache_slots=to_device(cache_slots(rows, block_size), device),
        block_tables=to_device(block_tables(rows).int(), device),
        block_size=block_size,
    )
    ends = [end - 1 for scheduled, end in zip(rows, starts[1:], strict=True) if scheduled.samples]
    return ForwardBatch(
        token_ids=to_device(torch.tensor(token_ids), device),
        positions=to_device(torch.tensor(positions), device),
        attention=attention,
        adapters=StepMeta.build(spans(rows), device),
        logits_at=to_device(torch.tensor(ends, dtype=torch.int64), device),
        head_adapters=StepMeta.build(spans(sampled_tokens(rows)), device),
        scored=tuple(_scored(group, device) for group in _groups(rows)),
        recurrence=None if states is None else Recurrence(pieces(rows), device, states),
    )


def _groups(rows: Rows) -> list[list[tuple[ScheduledRow, int]]]:
    """Parts of rows to be scored, and where each begins in the step: in groups of up to MAX_SCORED
    tokens.
    """
    groups: list[list[tuple[ScheduledRow, int]]] = []
    room = 0
    for scheduled, first in zip(rows, first_tokens(rows)[:-1], strict=True):
        done = 0
        while done < scheduled.num_scored:
            if room == 0:
                groups.append([])
                room = MAX_SCORED
            size = min(room, scheduled.num_scored - done)
            part = ScheduledRow(scheduled.row, scheduled.start + done, size)
            groups[-1].append((part, first + done))
            done, room = done + size, room - size
    return groups


def _scored(group: list[tuple[ScheduledRow, int]], device: torch.device) -> ScoredTokens:
    rows = tuple(part for part, _ in group)
    positions = [p for part, first in group for p in range(first, first + part.num_tokens)]
    next_tokens = [t for part in rows for t in part.row.token_ids[part.start + 1 : part.end + 1]]
    return ScoredTokens(
        rows=rows,
        positions=to_device(torch.tensor(positions), device),
        next_tokens=to_device(torch.tensor(next_tokens), device),
        num_top=max(part.row.request.sampling.num_prompt_logprobs or 0 for part in rows),
        head_adapters=StepMeta.build(spans(rows), device),
    )


def first_tokens(rows: Rows) -> list[int]:
    """Where each row's tokens start in the step, and the step's end."""
    starts = [0]
    for scheduled in rows:
        starts.append(starts[-1] + scheduled.num_tokens)
    return starts


def row_of_token(rows: Rows) -> Tensor:
    """(T,) int64: index of each token's row."""
    return torch.tensor(
        [index for index, scheduled in enumerate(rows) for _ in range(scheduled.num_tokens)]
    )


def cache_slots(rows: Rows, block_size: int, plane: int = 0) -> Tensor:
    """(T,) int64: cache slot of each token in one plane of its row; 0 where the row has it not."""
    slots = []
    for scheduled in rows:
        table = _table(scheduled, plane)
        for position in range(scheduled.start, scheduled.end):
            block = table[position // block_size] if table else 0
            slots.append(block * block_size + position % block_size)
    return torch.tensor(slots)


def block_tables(rows: Rows, plane: int = 0) -> Tensor:
    """(N, M) int64: each row's blocks of one plane, padded with 0."""
    tables = [_table(scheduled, plane) for scheduled in rows]
    longest = max(len(_table(scheduled, 0)) for scheduled in rows)
    return torch.tensor([table + [0] * (longest - len(table)) for table in tables])


def spans(rows: Rows, replicas: Sequence[int] | None = None) -> list[Span]:
    """One span per row and adapter, cut to the tokens from the adapter's start position on.

    `replicas`: how often each row has visited the layer before; None: never.
    """
    uses = [
        [
            SlotUse(slot, use.weight, use.start_position - scheduled.start)
            for use, slot in zip(scheduled.row.request.adapters, scheduled.row.slots, strict=True)
        ]
        for scheduled in rows
    ]
    return spans_of_rows([scheduled.num_tokens for scheduled in rows], uses, replicas)


def sampled_tokens(rows: Rows) -> Rows:
    """The last token alone of every row that samples."""
    return tuple(
        ScheduledRow(scheduled.row, scheduled.end - 1, 1) for scheduled in rows if scheduled.samples
    )


def _tokens(scheduled: ScheduledRow) -> list[int]:
    return scheduled.row.token_ids[scheduled.start : scheduled.end]


def _table(scheduled: ScheduledRow, plane: int) -> list[int]:
    row = scheduled.row
    return row.block_table[plane :: row.num_planes] if plane < row.num_planes else []

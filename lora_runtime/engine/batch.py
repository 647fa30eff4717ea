"""From the plan of a step to the tensors of its forward."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lora_runtime.core import ScheduledBatch, ScheduledSequence
from lora_runtime.kernels import AttentionMeta, Span, StepMeta


@dataclass(frozen=True, slots=True)
class ForwardBatch:
    """All rows of a step laid end to end: T tokens, n of them sampled.

    token_ids, positions (T,) int64; logits_at (n,) int64: the last token of each row that samples.
    """

    token_ids: Tensor
    positions: Tensor
    attention: AttentionMeta
    adapters: StepMeta | None
    logits_at: Tensor


def build_batch(plan: ScheduledBatch, block_size: int, device: torch.device) -> ForwardBatch:
    """Lay out the rows of `plan`. Host lists first, then one copy a tensor to the device."""
    rows = plan.sequences
    token_ids = [t for row in rows for t in _tokens(row)]
    positions = [p for row in rows for p in range(row.start, row.start + row.num_tokens)]
    row_of_token = [index for index, row in enumerate(rows) for _ in range(row.num_tokens)]
    starts = [0]
    for row in rows:
        starts.append(starts[-1] + row.num_tokens)
    attention = AttentionMeta(
        rows=torch.tensor(row_of_token, dtype=torch.int32).to(device),
        positions=torch.tensor(positions, dtype=torch.int32).to(device),
        slot_mapping=torch.tensor(_slot_mapping(rows, block_size)).to(device),
        block_tables=_block_tables(rows).to(device),
        block_size=block_size,
    )
    ends = [end - 1 for row, end in zip(rows, starts[1:], strict=True) if row.samples]
    return ForwardBatch(
        token_ids=torch.tensor(token_ids).to(device),
        positions=torch.tensor(positions).to(device),
        attention=attention,
        adapters=StepMeta.build(_spans(rows, starts), device),
        logits_at=torch.tensor(ends, dtype=torch.int64).to(device),
    )


def _tokens(row: ScheduledSequence) -> list[int]:
    return row.sequence.token_ids[row.start : row.start + row.num_tokens]


def _slot_mapping(rows: tuple[ScheduledSequence, ...], block_size: int) -> list[int]:
    slots = []
    for row in rows:
        table = row.sequence.block_table
        for position in range(row.start, row.start + row.num_tokens):
            slots.append(table[position // block_size] * block_size + position % block_size)
    return slots


def _block_tables(rows: tuple[ScheduledSequence, ...]) -> Tensor:
    tables = [row.sequence.block_table for row in rows]
    longest = max(len(table) for table in tables)
    return torch.tensor(
        [table + [0] * (longest - len(table)) for table in tables], dtype=torch.int32
    )


def _spans(rows: tuple[ScheduledSequence, ...], starts: list[int]) -> list[Span]:
    """One span per row and adapter, cut to the tokens from the adapter's start position on."""
    spans = []
    for row, first_token in zip(rows, starts, strict=False):
        for use, slot in zip(row.sequence.request.adapters, row.sequence.slots, strict=True):
            num_skipped = min(max(use.start_position - row.start, 0), row.num_tokens)
            spans.append(
                Span(
                    slot=slot,
                    first_token=first_token + num_skipped,
                    num_tokens=row.num_tokens - num_skipped,
                    weight=use.weight,
                )
            )
    return spans

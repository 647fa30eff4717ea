"""The tables of a decode step at fixed addresses, as a captured graph wants them.

All but the block tables lie in one run of bytes, twice: on the host, where a step is written down,
and on the device, where the graph reads it. One copy brings a step over, and one more the blocks
that its rows have got since. What is copied lies in pinned memory that nothing is written to again
before the copy is done, so the next step can be written down while this one runs.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lora_runtime.base.model.recurrence import Recurrence, StatePool
from lora_runtime.core import Row, ScheduledRow
from lora_runtime.engine.batch import ForwardBatch, Rows
from lora_runtime.engine.recurrent_batch import held_slots
from lora_runtime.kernels import AttentionMeta, StepMeta, segment_starts

INT32, INT64, FLOAT32 = torch.int32, torch.int64, torch.float32
PADDING = {
    "token_ids": 0, "positions": 0, "seen": -1, "cache_slots": -1, "state_slots": -1,
    "state_copies": -1,
}  # fmt: skip
ALIGNMENT = 16
"""Bytes. Kernels compiled for tables at multiples of it then serve every number of rows."""


class StepBuffers:
    """Room for a step of up to `num_rows` rows of one token each, of `num_blocks` cache blocks.

    What a step does not fill is padding: rows that store nothing, see nothing and have no adapter.
    `states`: the pool of a base with recurrent layers.
    """

    def __init__(
        self,
        num_rows: int,
        num_blocks: int,
        block_size: int,
        device: torch.device,
        states: StatePool | None = None,
    ) -> None:
        self.num_rows, self.block_size = num_rows, block_size
        self._sections = _sections(num_rows)
        size = sum(_num_bytes(*section) for section in self._sections.values())
        self._host = torch.zeros(size, dtype=torch.uint8)
        self._device = torch.zeros(size, dtype=torch.uint8, device=device)
        self._host_views = {name: t.numpy() for name, t in self._views(self._host).items()}
        self._rows = torch.arange(num_rows, dtype=INT32, device=device)
        self._block_tables = torch.zeros(num_rows, num_blocks, dtype=INT32, device=device)
        views = self._views(self._device)
        self._recurrence = (
            None
            if states is None
            else Recurrence.of_held(views["state_slots"], views["state_copies"], states)
        )
        self._tables: dict[int, tuple[tuple[Row, int] | None, int]] = {}
        """Place → ((the row there, that row's preemptions when it was copied), blocks copied)."""
        self.fill(())

    def takes(self, rows: Rows) -> bool:
        """True when every row is one sampled token of a plain layer order, and all fit; of a base
        with recurrent layers only rows that have begun.
        """
        num_entries = sum(len(scheduled.row.slots) for scheduled in rows)
        return (
            max(len(rows), num_entries) <= self.num_rows
            and all(map(_is_decode, rows))
            and (self._recurrence is None or None not in map(held_slots, rows))
        )

    def fill(self, rows: Rows) -> int:
        """Write a step to the host tables and start their copy to the device.

        Returns the number of segments: the different adapters in the step. The host tables may be
        filled again at once, because what is copied is a pinned copy of them.
        """
        host, n = self._host_views, len(rows)
        for name, padding in PADDING.items():
            host[name][n:] = padding
        host["token_ids"][:n] = [scheduled.row.token_ids[scheduled.start] for scheduled in rows]
        starts = [scheduled.start for scheduled in rows]
        host["positions"][:n] = starts
        # Attention sees the keys up to `seen`: of padding −1, none, while its position must be one.
        host["seen"][:n] = starts
        host["cache_slots"][:n] = [self._cache_slot(scheduled) for scheduled in rows]
        if self._recurrence is not None:
            held = [slots for slots in map(held_slots, rows) if slots is not None]
            host["state_slots"][:n] = [own for own, _ in held]
            host["state_copies"][:n] = [copy for _, copy in held]
        self._fill_tables(rows)
        num_segments = self._fill_adapters(rows)
        self._device.copy_(_staged(self._host, self._device), non_blocking=True)
        return num_segments

    def batch(self, max_segments: int) -> ForwardBatch:
        """The step on the device, as new table objects, so that nothing derived from others is
        reused; it has at most `max_segments` segments, and with 0 it is the base's alone.
        """
        views = self._views(self._device)
        adapters = None
        if max_segments > 0:
            adapters = StepMeta(
                tokens=views["tokens"],
                slots=views["slots"],
                replicas=views["replicas"],
                weights=views["weights"],
                segment_starts=views["segment_starts"][: max_segments + 1],
            )
        attention = AttentionMeta(
            rows=self._rows,
            positions=views["seen"],
            cache_slots=views["cache_slots"],
            block_tables=self._block_tables,
            block_size=self.block_size,
        )
        return ForwardBatch(
            token_ids=views["token_ids"],
            positions=views["positions"],
            attention=attention,
            adapters=adapters,
            logits_at=self._rows.long(),
            head_adapters=adapters,
            recurrence=self._recurrence,
        )

    def _cache_slot(self, scheduled: ScheduledRow) -> int:
        block, offset = divmod(scheduled.start, self.block_size)
        return scheduled.row.block_table[block] * self.block_size + offset

    def _fill_tables(self, rows: Rows) -> None:
        """Bring over the blocks that rows have got since. A running row's table only grows, so what
        an earlier step wrote of it still holds. When a row ends, all rows behind it move up and are
        written anew. One copy takes all of it.
        """
        places: list[int] = []
        blocks: list[int] = []
        held: dict[int, tuple[tuple[Row, int] | None, int]] = {}
        width = self._block_tables.shape[1]
        for index, scheduled in enumerate(rows):
            row = scheduled.row
            table, owner = row.block_table, (row, row.num_preemptions)
            known = self._tables.get(index, (None, 0))
            begin = known[1] if known[0] == owner else 0
            if begin < len(table):
                places += range(index * width + begin, index * width + len(table))
                blocks += table[begin:]
                held[index] = owner, len(table)
        if places:
            staged = _staged(torch.tensor([places, blocks]), self._device)
            at, new = staged.to(self._device.device, non_blocking=True)
            self._block_tables.view(-1).index_copy_(0, at, new.int())
        self._tables |= held  # only now: a copy that fails is made again

    def _fill_adapters(self, rows: Rows) -> int:
        """Entries sorted as StepMeta wants them. Unused places at the end, and unused segments, are
        empty.
        """
        entries = sorted(
            (slot, index, use.weight)
            for index, scheduled in enumerate(rows)
            for use, slot in zip(scheduled.row.request.adapters, scheduled.row.slots, strict=True)
            if use.start_position <= scheduled.start
        )
        host, n = self._host_views, len(entries)
        starts = segment_starts([slot for slot, _, _ in entries], range(n))
        host["segment_starts"][: len(starts)] = starts
        host["segment_starts"][len(starts) :] = n
        for name, column in (("slots", 0), ("tokens", 1), ("weights", 2)):
            host[name][:n] = [entry[column] for entry in entries]
        return len(starts)

    def _views(self, buffer: Tensor) -> dict[str, Tensor]:
        views, start = {}, 0
        for name, (shape, dtype) in self._sections.items():
            end = start + math.prod(shape) * dtype.itemsize
            views[name] = buffer[start:end].view(dtype).view(shape)
            start += _num_bytes(shape, dtype)
        return views


def _staged(source: Tensor, target: Tensor) -> Tensor:
    """A copy source for `target`: on CUDA a pinned copy, so that `source` may be reused at once."""
    return source.pin_memory() if target.is_cuda else source


def _num_bytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """Bytes of a section, its padding included."""
    return -(-math.prod(shape) * dtype.itemsize // ALIGNMENT) * ALIGNMENT


def _sections(num_rows: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Name → shape and dtype."""
    per_row = (num_rows,)
    return {
        "token_ids": (per_row, INT64),
        "positions": (per_row, INT64),
        "cache_slots": (per_row, INT64),
        "state_slots": (per_row, INT64),
        "state_copies": (per_row, INT64),
        "seen": (per_row, INT32),
        "tokens": (per_row, INT32),
        "slots": (per_row, INT32),
        "replicas": (per_row, INT32),
        "weights": (per_row, FLOAT32),
        "segment_starts": ((num_rows + 1,), INT32),
    }


def _is_decode(scheduled: ScheduledRow) -> bool:
    return scheduled.num_tokens == 1 and scheduled.samples and scheduled.row.layer_map is None

"""The tables of a decode step at fixed addresses, as a captured graph wants them.

All but the block tables lie in one run of bytes, twice: on the host, where a step is written down,
and on the device, where the graph reads it. One copy brings a step over, and one more for every row
that has got blocks since. What is copied lies in pinned memory that nothing is written to again
before the copy is done, so the next step can be written down while this one runs.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lora_runtime.core import ScheduledSequence, Sequence
from lora_runtime.engine.batch import ForwardBatch, Rows
from lora_runtime.kernels import AttentionMeta, StepMeta

INT32, INT64, FLOAT32 = torch.int32, torch.int64, torch.float32
PADDING = {"token_ids": 0, "positions": 0, "seen": -1, "cache_slots": -1}


class StepBuffers:
    """Room for a step of up to `num_rows` rows of one token each, of `num_blocks` cache blocks.

    What a step does not fill is padding: rows that store nothing, see nothing and have no adapter.
    """

    def __init__(
        self, num_rows: int, num_blocks: int, block_size: int, device: torch.device
    ) -> None:
        self.num_rows, self.block_size = num_rows, block_size
        self._sections = _sections(num_rows)
        size = sum(math.prod(shape) * dtype.itemsize for shape, dtype in self._sections.values())
        self._host = torch.zeros(size, dtype=torch.uint8)
        self._device = torch.zeros(size, dtype=torch.uint8, device=device)
        self._host_views = {name: t.numpy() for name, t in self._views(self._host).items()}
        self._rows = torch.arange(num_rows, dtype=INT32, device=device)
        self._block_tables = torch.zeros(num_rows, num_blocks, dtype=INT32, device=device)
        self._tables: dict[int, tuple[tuple[Sequence, int] | None, int]] = {}
        """Whose table a row holds, after how many preemptions, and how much of it."""
        self.fill(())

    def takes(self, rows: Rows) -> bool:
        """True when every row is one sampled token of a plain layer order, and all fit."""
        num_entries = sum(len(row.sequence.slots) for row in rows)
        return max(len(rows), num_entries) <= self.num_rows and all(map(_is_decode, rows))

    def fill(self, rows: Rows) -> bool:
        """Write a step down and start its copy to the device; True when it has adapters."""
        host, n = self._host_views, len(rows)
        for name, padding in PADDING.items():
            host[name][n:] = padding
        host["token_ids"][:n] = [row.sequence.token_ids[row.start] for row in rows]
        host["positions"][:n] = host["seen"][:n] = [row.start for row in rows]
        host["cache_slots"][:n] = [self._cache_slot(row) for row in rows]
        for index, row in enumerate(rows):
            self._fill_table(index, row.sequence)
        has_adapters = self._fill_adapters(rows)
        _copy(self._host, self._device)
        return has_adapters

    def batch(self, *, has_adapters: bool) -> ForwardBatch:
        """The step on the device, under tables that nothing has been derived from yet."""
        views = self._views(self._device)
        adapters = None
        if has_adapters:
            names = ("tokens", "slots", "replicas", "weights", "segment_starts")
            adapters = StepMeta(**{name: views[name] for name in names})
        attention = AttentionMeta(
            rows=self._rows,
            positions=views["seen"],
            slot_mapping=views["cache_slots"],
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
        )

    def _cache_slot(self, row: ScheduledSequence) -> int:
        block, offset = divmod(row.start, self.block_size)
        return row.sequence.block_table[block] * self.block_size + offset

    def _fill_table(self, index: int, sequence: Sequence) -> None:
        """A running row's table only grows, so what an earlier step wrote of it holds."""
        table, row = sequence.block_table, (sequence, sequence.num_preemptions)
        known = self._tables.get(index, (None, 0))
        begin = known[1] if known[0] == row else 0
        if begin < len(table):
            blocks = torch.tensor(table[begin:], dtype=INT32)
            _copy(blocks, self._block_tables[index, begin : len(table)])
            self._tables[index] = row, len(table)

    def _fill_adapters(self, rows: Rows) -> bool:
        """Entries in the order of StepMeta; those beyond the last segment's end are padding, and
        so are segments without any.
        """
        entries = sorted(
            (slot, index, use.weight)
            for index, row in enumerate(rows)
            for use, slot in zip(row.sequence.request.adapters, row.sequence.slots, strict=True)
            if use.start_position <= row.start
        )
        host, n = self._host_views, len(entries)
        starts = [i for i in range(n) if not i or entries[i][0] != entries[i - 1][0]]
        host["segment_starts"][: len(starts)] = starts
        host["segment_starts"][len(starts) :] = n
        for name, column in (("slots", 0), ("tokens", 1), ("weights", 2)):
            host[name][:n] = [entry[column] for entry in entries]
        return n > 0

    def _views(self, buffer: Tensor) -> dict[str, Tensor]:
        views, start = {}, 0
        for name, (shape, dtype) in self._sections.items():
            end = start + math.prod(shape) * dtype.itemsize
            views[name] = buffer[start:end].view(dtype).view(shape)
            start = end
        return views


def _copy(source: Tensor, target: Tensor) -> None:
    """From the host, which may change `source` at once."""
    staged = source.pin_memory() if target.is_cuda else source
    target.copy_(staged, non_blocking=True)


def _sections(num_rows: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Name → shape and dtype; the widest first, so that every one is aligned."""
    per_row = (num_rows,)
    return {
        "token_ids": (per_row, INT64),
        "positions": (per_row, INT64),
        "cache_slots": (per_row, INT64),
        "seen": (per_row, INT32),
        "tokens": (per_row, INT32),
        "slots": (per_row, INT32),
        "replicas": (per_row, INT32),
        "weights": (per_row, FLOAT32),
        "segment_starts": ((num_rows + 1,), INT32),
    }


def _is_decode(row: ScheduledSequence) -> bool:
    return row.num_tokens == 1 and row.samples and row.sequence.layer_map is None

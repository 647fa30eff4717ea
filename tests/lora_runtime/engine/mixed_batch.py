"""Engines with adapters, and requests that mix them."""

from __future__ import annotations

import torch

from lora_runtime.core import AdapterUse, Row, ScheduledRow
from tests.driver import greedy, tiny_engine
from tests.tiny import VOCAB_SIZE


def prompt(length, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB_SIZE, (length,), generator=generator).tolist()


def mixed_requests(forms, max_tokens=24):
    """Two rows of each adapter and two base rows, of very different lengths."""
    digests = [None, *(form.digest for form in forms)] * 2
    lengths = [4, 9, 120, 2, 31, 5, 17, 3, 60, 8]
    return [
        greedy(str(i), prompt(length, seed=i), digest, max_tokens)
        for i, (length, digest) in enumerate(zip(lengths, digests, strict=True))
    ]


def with_adapters(base, forms, **options):
    engine = tiny_engine(base, **options)
    for form in forms:
        engine.add_adapter(form)
    return engine


def tokens(traces):
    return {request_id: trace.token_ids for request_id, trace in traces.items()}


def rows_of(specs, slots):
    """(block table, number of tokens) a row."""
    rows = []
    for (table, length), slot in zip(specs, slots, strict=True):
        uses = () if slot is None else (AdapterUse(digest=f"{slot:064d}", weight=0.5 + slot),)
        request = greedy("r", list(range(40, 40 + length)), adapters=uses)
        sequence = Row.of(request)
        sequence.block_table, sequence.slots = table, () if slot is None else (slot,)
        rows.append(ScheduledRow(sequence, length - 1, 1))
    return tuple(rows)

"""What a unit learns from: token losses of its rows, from one forward of all units' rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lora_runtime.adapters.parity import Logits
from lora_runtime.base.loader import Base
from lora_runtime.base.varlen_attention import Rows
from lora_runtime.training.binding import bind
from lora_runtime.training.data import Example, PackedBatch
from lora_runtime.training.forward import Bindings, UnitRows, hidden_states, logits
from lora_runtime.training.units import Unit

CHUNK_LOGITS = 1 << 25
"""Logits that are alive at once. More are made in chunks, and again for the gradient."""


def window_losses(
    base: Base, units: Sequence[Unit], batches: Sequence[Sequence[Example]]
) -> Tensor:
    """Each unit's share of its window's mean loss (N,), from one forward of all their rows.

    Share = sum of the micro-batch's token losses / target tokens of the whole window, so that
    micro-batches of any lengths add up to the mean over the window.
    """
    sums = loss_sums(base, units, batches)
    return sums / sums.new_tensor([unit.window_target_tokens for unit in units])


def loss_sums(base: Base, units: Sequence[Unit], batches: Sequence[Sequence[Example]]) -> Tensor:
    """Each unit's sum of the token losses of its examples (N,), from one forward of all rows."""
    counts = [sum(len(example.predictors) for example in examples) for examples in batches]
    losses = token_losses(base, units, batches)
    return torch.stack([part.sum() for part in losses.split(counts)])


def token_losses(base: Base, units: Sequence[Unit], batches: Sequence[Sequence[Example]]) -> Tensor:
    """−log p of every target token under its unit's adapter, (n,) in float32 or better."""
    batch = PackedBatch.of(batches, base.device)
    rows = [UnitRows(r, unit.layer_map) for unit, r in zip(units, batch.rows, strict=True)]
    bindings = bind(units, base)
    states = hidden_states(base, rows, bindings, batch.token_ids, batch.position_ids)
    counts = [sum(len(example.predictors) for example in examples) for examples in batches]
    return _chunked(base, bindings, states[batch.logits_at], batch.labels, counts)


def _chunked(
    base: Base, bindings: Bindings, states: Tensor, labels: Tensor, counts: Sequence[int]
) -> Tensor:
    size = max(1, CHUNK_LOGITS // base.spec.vocab_size)
    if len(labels) <= size:
        return _losses(base, bindings, states, labels, counts)
    slots = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    chunks = zip(states.split(size), labels.split(size), slots.split(size), strict=True)
    losses = [
        checkpoint(
            _losses, base, bindings, some, wanted, own.bincount(minlength=len(counts)).tolist(),
            use_reentrant=False, preserve_rng_state=False,
        )
        for some, wanted, own in chunks
    ]  # fmt: skip
    return torch.cat(losses)


def _losses(
    base: Base, bindings: Bindings, states: Tensor, labels: Tensor, counts: Sequence[int]
) -> Tensor:
    found = logits(base, bindings, states, counts)
    found = found.to(torch.promote_types(found.dtype, torch.float32))
    return F.cross_entropy(found, labels, reduction="none")


def unit_logits(base: Base, unit: Unit) -> Logits:
    """The logits of a unit as its training computes them: what the parity gate compares with."""

    @torch.no_grad()
    def measured(rows: Sequence[Sequence[int]], with_adapter: bool) -> Sequence[Tensor]:
        lengths = [len(row) for row in rows]
        token_ids = torch.tensor([token for row in rows for token in row], device=base.device)
        positions = torch.cat([torch.arange(length) for length in lengths]).to(base.device)
        own = UnitRows(Rows(lengths), unit.layer_map if with_adapter else None)
        bindings = bind([unit], base) if with_adapter else {}
        states = hidden_states(base, [own], bindings, token_ids, positions)
        return logits(base, bindings, states, [len(token_ids)]).split(lengths)

    return measured

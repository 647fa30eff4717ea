"""Held-out loss of several units at once, while they train."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lora_runtime.base.loader import Base
from lora_runtime.training.data import Example, micro_batches
from lora_runtime.training.held_out import EvalRecord, HeldOut
from lora_runtime.training.units import Unit, UnitStatus

LossSums = Callable[[Base, Sequence[Unit], Sequence[Sequence[Example]]], Tensor]
"""Each unit's sum of the token losses of its examples (N,), from one forward of all rows."""


def evaluate_due(base: Base, units: Sequence[Unit], loss_sums: LossSums) -> None:
    """Evaluate the units whose last update asks for it; one out of patience is done early."""
    due = [(unit, unit.held_out) for unit in units if unit.held_out and _is_due(unit)]
    if not due:
        return
    started = time.perf_counter()
    losses = held_out_losses(base, due, loss_sums)
    seconds = time.perf_counter() - started
    for (unit, held_out), loss in zip(due, losses, strict=True):
        held_out.note(EvalRecord(unit.step, loss, seconds), unit.parameters)
        if unit.is_running and held_out.is_out_of_patience:
            unit.end(UnitStatus.DONE, "the held-out loss no longer falls")


@torch.no_grad()
def held_out_losses(
    base: Base, units: Sequence[tuple[Unit, HeldOut]], loss_sums: LossSums
) -> list[float]:
    """Mean loss over each unit's held-out target tokens; the units share the forwards."""
    waiting = [(unit, _micro_batches(unit, held_out)) for unit, held_out in units]
    totals = {unit.name: 0.0 for unit, _ in units}
    for index in range(max(len(batches) for _, batches in waiting)):
        rows = [(unit, batches[index]) for unit, batches in waiting if index < len(batches)]
        sums = loss_sums(base, [unit for unit, _ in rows], [examples for _, examples in rows])
        for (unit, _), value in zip(rows, sums.tolist(), strict=True):
            totals[unit.name] += value
    return [totals[unit.name] / held_out.dataset.num_target_tokens for unit, held_out in units]


def _is_due(unit: Unit) -> bool:
    if unit.held_out is None or unit.status is UnitStatus.FAILED or unit.window.num_micro_batches:
        return False
    return unit.held_out.is_due(unit.step, is_last=not unit.is_running)


def _micro_batches(unit: Unit, held_out: HeldOut) -> list[list[Example]]:
    """Examples of like length side by side, so that attention pads little."""
    examples = sorted(held_out.dataset.examples, key=lambda example: len(example.token_ids))
    return micro_batches(examples, unit.config.micro_batch_size, unit.config.max_tokens_per_batch)

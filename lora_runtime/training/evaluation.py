"""Held-out loss of several units at once, while they train."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import chain

import torch
from torch import Tensor

from lora_runtime.base.loader import Base
from lora_runtime.training.data import Example, Limits, num_tokens
from lora_runtime.training.distributed import ALONE, World
from lora_runtime.training.held_out import EvalRecord, HeldOut
from lora_runtime.training.memory import Say, in_forwards
from lora_runtime.training.units import Unit, UnitStatus

LossSums = Callable[[Base, Sequence[Unit], Sequence[Sequence[Example]]], Tensor]
"""Each unit's sum of the token losses of its examples (N,), from one forward of all rows."""


def evaluate_due(
    base: Base,
    units: Sequence[Unit],
    loss_sums: LossSums,
    world: World = ALONE,
    say: Say = lambda _: None,
) -> None:
    """Evaluate the units whose last update asks for it; one out of patience is done early."""
    due = [(unit, unit.held_out) for unit in units if unit.held_out and _is_due(unit)]
    if not due:
        return
    started = time.perf_counter()
    losses = held_out_losses(base, due, loss_sums, world, say)
    seconds = time.perf_counter() - started
    for (unit, held_out), loss in zip(due, losses, strict=True):
        if unit.status is UnitStatus.FAILED:
            continue
        held_out.note(EvalRecord(unit.step, loss, seconds), unit.parameters)
        if unit.is_running and held_out.is_out_of_patience:
            unit.end(UnitStatus.DONE, "the held-out loss no longer falls")


@torch.no_grad()
def held_out_losses(
    base: Base,
    units: Sequence[tuple[Unit, HeldOut]],
    loss_sums: LossSums,
    world: World = ALONE,
    say: Say = lambda _: None,
) -> list[float]:
    """Mean loss over each unit's held-out target tokens; the units share the forwards."""
    waiting = {unit.name: _Waiting(unit, held_out) for unit, held_out in units}
    totals = {unit.name: 0.0 for unit, _ in units}

    while left := [unit for unit, _ in units if waiting[unit.name].groups and not unit.error]:
        forwards = in_forwards(
            left,
            lambda unit, rank: waiting[unit.name].next(rank),
            lambda group, batches: (loss_sums(base, group, batches).tolist(), ()),
            world,
            say,
        )
        for group, sums in forwards:
            for unit, value in zip(group, sums, strict=True):
                totals[unit.name] += value
                del waiting[unit.name].groups[: world.size]
    return [totals[unit.name] / held_out.dataset.num_target_tokens for unit, held_out in units]


def _is_due(unit: Unit) -> bool:
    if unit.held_out is None or unit.status is UnitStatus.FAILED or unit.window.done:
        return False
    return unit.held_out.is_due(unit.step, is_last=not unit.is_running)


class _Waiting:
    """What of a unit's held-out examples is still to be computed, in groups for one forward each.

    Those of like length are side by side, so that attention pads little.
    """

    def __init__(self, unit: Unit, held_out: HeldOut) -> None:
        self._unit = unit
        self._limits: Limits | None = None
        self.groups = [sorted(held_out.dataset.examples, key=num_tokens)]

    def next(self, rank: int) -> list[Example]:
        """The group of one process, empty if there are not as many."""
        if self._limits != self._unit.limits:
            self._limits = replace(self._unit.limits)
            self.groups = self._limits.groups(list(chain.from_iterable(self.groups)))
        return self.groups[rank] if rank < len(self.groups) else []

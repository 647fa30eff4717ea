"""Held-out loss of several units at once, while they train."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import chain

import torch
from torch import Tensor

from lora_runtime.base.loader import Base
from lora_runtime.training.data import Item, Limits, num_tokens
from lora_runtime.training.distributed import ALONE, World
from lora_runtime.training.held_out import EvalRecord, HeldOut
from lora_runtime.training.out_of_memory import Say, in_forwards
from lora_runtime.training.preferences import NOTHING, Signal
from lora_runtime.training.units import Unit, UnitStatus

LossSums = Callable[[Base, Sequence[Unit], Sequence[Sequence[Item]]], Tensor]
"""The sums of a `Signal` over each unit's items (N, 3), from one forward of all rows."""


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
    signals = held_out_signals(base, due, loss_sums, world, say)
    seconds = time.perf_counter() - started
    for (unit, held_out), signal in zip(due, signals, strict=True):
        if unit.status is UnitStatus.FAILED:
            continue
        accuracy = signal.accuracy if unit.dataset.is_preference else None
        held_out.note(EvalRecord(unit.step, signal.loss, accuracy, seconds), unit.parameters)
        if unit.is_running and held_out.is_out_of_patience:
            unit.end(UnitStatus.DONE, "the held-out loss no longer falls")


@torch.no_grad()
def held_out_signals(
    base: Base,
    units: Sequence[tuple[Unit, HeldOut]],
    loss_sums: LossSums,
    world: World = ALONE,
    say: Say = lambda _: None,
) -> list[Signal]:
    """Means over each unit's held-out target tokens, or pairs; the units share the forwards."""
    waiting = {unit.name: _Waiting(unit, held_out) for unit, held_out in units}
    totals = {unit.name: NOTHING for unit, _ in units}
    while left := [unit for unit, _ in units if waiting[unit.name].groups and not unit.error]:
        forwards = in_forwards(
            left,
            lambda unit: waiting[unit.name].next(world.size),
            lambda group, batches: (Signal.rows(loss_sums(base, group, batches)), ()),
            world,
            say,
        )
        for group, signals, _ in forwards:
            for unit, signal in zip(group, signals, strict=True):
                totals[unit.name] = totals[unit.name].plus(signal)
                del waiting[unit.name].groups[: world.size]
    return [
        Signal._make(value / held_out.dataset.weight for value in totals[unit.name])
        for unit, held_out in units
    ]


def _is_due(unit: Unit) -> bool:
    if unit.held_out is None or unit.status is UnitStatus.FAILED or unit.window.done:
        return False
    return unit.held_out.is_due(unit.step, is_last=not unit.is_running)


class _Waiting:
    """A unit's held-out examples that are not computed yet, in groups for one forward each.

    They are sorted by length, so that attention pads little.
    """

    def __init__(self, unit: Unit, held_out: HeldOut) -> None:
        self._unit = unit
        self._limits: Limits | None = None
        self.groups = [sorted(held_out.dataset.items, key=num_tokens)]

    def next(self, num_processes: int) -> list[list[Item]]:
        """Per process, its next group; empty for processes that none is left for."""
        if self._limits != self._unit.limits:
            self._limits = replace(self._unit.limits)
            self.groups = self._limits.groups(list(chain.from_iterable(self.groups)))
        own = self.groups[:num_processes]
        return own + [[] for _ in range(num_processes - len(own))]

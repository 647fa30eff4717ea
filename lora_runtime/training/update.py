"""The heart of training: forward → loss → gradient → clip → step, for all units at once.

Adapters share no parameter and rows do not touch each other, so one backward of the summed losses
gives every unit exactly the gradient that it would have alone.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from lora_runtime.base.loader import Base
from lora_runtime.training.data import Item
from lora_runtime.training.distributed import ALONE, World
from lora_runtime.training.losses import window_losses
from lora_runtime.training.optimizers import decay_starts
from lora_runtime.training.out_of_memory import Gradients, Say, in_forwards
from lora_runtime.training.preferences import Signal
from lora_runtime.training.units import LOWER_RATE, Unit


def run_pass(
    base: Base, units: Sequence[Unit], world: World = ALONE, say: Say = lambda _: None
) -> list[Unit]:
    """Add the gradient of every unit's next micro-batch; where a window ends, clip and step.

    A unit whose loss or gradient is not finite fails alone. Returns the units that changed.
    """

    def losses_and_gradients(
        group: Sequence[Unit], batches: Sequence[Sequence[Item]]
    ) -> tuple[list[Signal], Gradients]:
        losses = window_losses(base, group, batches)  # (N, 3): forward and loss of every unit
        parameters = [parameter for unit in group for parameter in unit.parameters]
        # Not losses.sum().backward(): out of memory half-way, it would leave half-filled .grads.
        found = torch.autograd.grad(losses[:, 0].sum(), parameters, allow_unused=True)
        pairs = [(p, grad) for p, grad in zip(parameters, found, strict=True) if grad is not None]
        # The losses are read last, so that a GPU need not wait between forward and backward.
        return Signal.rows(losses), pairs

    _make_gradients(units)
    started = time.perf_counter()
    results: list[tuple[Unit, Signal]] = []
    forwards = in_forwards(units, Unit.next_micro_batches, losses_and_gradients, world, say)
    for group, signals, gradients in forwards:
        if gradients:
            sums = [grad_of(parameter) for parameter, _ in gradients]
            torch._foreach_add_(sums, [gradient for _, gradient in gradients])
        del gradients  # or they would stay alive during the next forward
        results += zip(group, signals, strict=True)
    seconds = time.perf_counter() - started
    for unit, signal in results:
        if math.isfinite(signal.loss):
            unit.advance(signal, seconds)
        else:
            unit.fail(f"the loss of update {unit.step + 1} is {signal.loss}; {LOWER_RATE}")
    update_complete(units, world)
    return [unit for unit in units if not unit.is_running or not unit.window.done]


def update_complete(units: Sequence[Unit], world: World = ALONE) -> None:
    """Clip and step every unit whose window is complete."""
    complete = [unit for unit in units if unit.is_complete]
    if not complete:
        return
    for unit in complete:  # each process has the gradient of its own examples so far
        world.sum_([grad_of(parameter) for parameter in unit.parameters])
    norms = [
        clip_grad_norm_(unit.parameters, unit.config.max_grad_norm or math.inf) for unit in complete
    ]
    # All lengths are read at once: a read waits for everything that a GPU has to do.
    for unit, norm in zip(complete, torch.stack(norms).tolist(), strict=True):
        if math.isfinite(norm):
            step(unit, norm)
        else:
            unit.fail(f"the gradient of update {unit.step + 1} is not finite; {LOWER_RATE}")


def step(unit: Unit, grad_norm: float) -> None:
    """Change a unit's weights by its clipped gradient, whose length was `grad_norm`."""
    record = unit.step_record(grad_norm)
    unit.optimizer.step()
    decay_starts(unit.optimizer, unit.modules)
    unit.schedule.step()
    unit.optimizer.zero_grad()
    unit.end_window(record)


def _make_gradients(units: Sequence[Unit]) -> None:
    """Zeros where there is no gradient yet: a parameter without one would not even decay."""
    parameters = [p for unit in units for p in unit.parameters if p.grad is None]
    for parameter in parameters:
        parameter.grad = torch.empty_like(parameter)
    if parameters:
        torch._foreach_zero_([grad_of(parameter) for parameter in parameters])


def grad_of(parameter: torch.nn.Parameter) -> Tensor:
    """A parameter's gradient, which must have been made."""
    assert parameter.grad is not None
    return parameter.grad

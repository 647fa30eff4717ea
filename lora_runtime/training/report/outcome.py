"""Warnings about a finished unit: that it changes nothing, or that its loss rose."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

from lora_runtime.training.report.losses import first_of, last_of, mean
from lora_runtime.training.trained_modules import TrainedModule
from lora_runtime.training.units import Unit


def warnings_of(unit: Unit) -> tuple[str, ...]:
    """A sentence for each reason to doubt the unit's weights as they are now."""
    return tuple(_idle_warnings(unit)) + tuple(_loss_warnings(unit))


def _idle_warnings(unit: Unit) -> Iterator[str]:
    """ΔW = s·BA is 0 as long as the factor that starts at 0 is: B, or A of an embedding."""
    adapted = [m for m in unit.modules.values() if isinstance(m, TrainedModule)]
    idle = [module for module in adapted if _is_idle(module)]
    has_more = len(adapted) < len(unit.modules) or any(m.magnitude is not None for m in adapted)
    was_updated = any(r.learning_rate * r.grad_norm > 0 for r in unit.records)
    if len(idle) == len(adapted) and not (has_more and was_updated):
        yield (
            "it changes nothing: B·A is 0 in every module, and the model answers as the base does; "
            "see that learning_rate, the number of updates and the gradients are above 0"
        )
    elif idle:
        yield f"B·A is 0 in {len(idle)} of {len(adapted)} modules, {idle[0].path} the first of them"


def _is_idle(module: TrainedModule) -> bool:
    """True when ΔW is 0: if A or B is 0, or if both are and count from a start other than 0."""
    is_zero = [not bool(factor.any()) for factor in (module.a, module.b)]
    return all(is_zero) if module.start is not None else any(is_zero)


class _Rise(NamedTuple):
    first: float
    last: float

    @property
    def is_real(self) -> bool:
        """True when the loss rose to a finite value; a unit whose loss is not finite has failed."""
        return math.isfinite(self.last) and self.last > self.first


def _loss_warnings(unit: Unit) -> Iterator[str]:
    losses = [record.loss for record in unit.records]
    first, last = first_of(losses), last_of(losses)
    if losses and (rise := _Rise(mean(first), mean(last))).is_real:
        yield (
            f"its loss rose from {rise.first:.4f} to {rise.last:.4f} (means over the first and "
            f"the last {len(last)} updates); a lower learning_rate or more data may help"
        )
    evaluations = unit.held_out.records if unit.held_out else []
    if evaluations and (rise := _Rise(evaluations[0].loss, evaluations[-1].loss)).is_real:
        yield (
            f"its held-out loss rose from {rise.first:.4f} after update {evaluations[0].step} to "
            f"{rise.last:.4f} after update {evaluations[-1].step}; the weights of update "
            f"{unit.exported_step} are written"
        )

"""A unit's held-out data, the losses measured on it, and the weights of the lowest loss."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor
from torch.nn import Parameter

from lora_runtime.training.config import UnitConfig
from lora_runtime.training.data import Dataset


class EvalRecord(NamedTuple):
    """One evaluation: `loss` is the mean over all held-out target tokens, or pairs, after update
    `step`.
    """

    step: int
    loss: float
    accuracy: float | None
    """See `Signal`; None unless the data are preferences."""
    seconds: float
    """Wall time, which other units may share."""


class HeldOut:
    """One unit's held-out examples and the losses measured on them.

    `best` holds the weights of the lowest loss on the CPU, in the order of the unit's parameters;
    it is empty before the first evaluation. A loss that is not finite is never the lowest.
    """

    def __init__(self, config: UnitConfig, dataset: Dataset, rungs: Sequence[int] = ()) -> None:
        """`rungs`: updates after which there is an evaluation whatever the interval."""
        self.dataset, self.rungs = dataset, tuple(rungs)
        self.num_rungs_passed = 0
        self.records: list[EvalRecord] = []
        self.best: list[Tensor] = []
        self._interval, self._patience = config.eval_interval, config.patience

    @property
    def best_record(self) -> EvalRecord | None:
        """The first of the lowest losses."""
        return min(self._finite, key=lambda record: record.loss, default=None)

    @property
    def is_out_of_patience(self) -> bool:
        """True when the last `patience` losses were no lower than the best before them."""
        best = self.best_record
        num_since = sum(best is None or record.step > best.step for record in self.records)
        return self._patience is not None and num_since >= self._patience

    def lowest_loss(self, last_step: int) -> float:
        """The lowest loss up to update `last_step`; inf when there is none."""
        return min((r.loss for r in self._finite if r.step <= last_step), default=math.inf)

    def is_due(self, step: int, is_last: bool) -> bool:
        """True when the weights after update `step` are to be evaluated and were not yet."""
        if not step or (self.records and self.records[-1].step == step):
            return False
        return is_last or step % self._interval == 0 or step in self.rungs

    def note(self, record: EvalRecord, parameters: Sequence[Parameter]) -> None:
        """Add an evaluation; copy the weights when it is the best so far."""
        self.records.append(record)
        # The first of equal losses is the best, so a later equal one does not replace its weights.
        if self.best_record is record:
            self.best = [parameter.detach().to("cpu", copy=True) for parameter in parameters]

    def restore_best(self, parameters: Sequence[Parameter]) -> None:
        """Put the best weights in place of the last, if there are any."""
        if self.best:
            for parameter, values in zip(parameters, self.best, strict=True):
                parameter.data.copy_(values)

    @property
    def _finite(self) -> list[EvalRecord]:
        return [record for record in self.records if math.isfinite(record.loss)]

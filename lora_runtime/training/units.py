"""One adapter being trained: its weights, optimizer, schedule and place in its data.

A unit knows nothing of the other units; `binding.py` alone puts several side by side on one base.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from lora_runtime.base.loader import Base
from lora_runtime.training.config import UnitConfig
from lora_runtime.training.data import Dataset, ExampleStream, Item, Limits, balanced, num_tokens
from lora_runtime.training.held_out import HeldOut
from lora_runtime.training.optimizers import create_optimizer
from lora_runtime.training.preferences import NOTHING, References, Signal, check_settings
from lora_runtime.training.schedule import create_schedule
from lora_runtime.training.starts import adapter_spec, start_alike, start_modules
from lora_runtime.training.trained_modules import Trained

LOWER_RATE = "a lower learning_rate usually helps"


class UnitStatus(StrEnum):
    """Whether a unit still trains, and how it ended."""

    RUNNING = "running"
    DONE = "done"
    STOPPED = "stopped"
    """Lost its sweep."""
    FAILED = "failed"


class StepRecord(NamedTuple):
    """Facts of one update. `loss` is the mean over its target tokens, or over its preference pairs,
    before the optimizer's step.
    """

    step: int
    loss: float
    accuracy: float | None
    """See `Signal`; None unless the data are preferences."""
    margin: float | None
    learning_rate: float
    grad_norm: float
    """Length of the gradient before clipping."""
    num_tokens: int
    num_target_tokens: int
    seconds: float
    """Wall time of the update's passes, which other units may share."""


@dataclass(slots=True)
class Window:
    """Progress of the current update: the items that are done, their signal and wall time."""

    done: list[int] = field(default_factory=list)
    """Indices of the items that are done, in the window's items."""
    signal: Signal = NOTHING
    seconds: float = 0.0


class Unit:
    """One adapter being trained. Weights are float32, or float64 on a float64 base.

    An update takes the next `micro_batch_size · gradient_accumulation` items of the stream: its
    window. They go through the model one micro-batch at a time, with several processes one on each.
    """

    def __init__(
        self,
        config: UnitConfig,
        dataset: Dataset,
        base: Base,
        *,
        seed: int,
        num_processes: int = 1,
        others: Sequence[Unit] = (),
    ) -> None:
        """`others`: units of the same run that have made no update. If one of them starts from the
        same weights, they are copied: factorising takes long, and members of a sweep often start
        alike.

        Raises ConfigError for settings that the base or the data cannot follow.
        """
        check_settings(config, dataset)
        self.config, self.dataset, self.seed = config, dataset, seed
        self.num_processes = num_processes
        self.limits = Limits(config.micro_batch_size, config.max_tokens_per_batch)
        items = dataset.items
        self._num_items = len(items)
        self.num_steps = config.num_steps(len(items))
        spec = adapter_spec(config, base.spec)
        self.layer_map = spec.layer_map
        twins = [unit for unit in others if unit.seed == seed and start_alike(unit.config, config)]
        self.modules: dict[str, Trained] = (
            deepcopy(twins[0].modules)
            if twins
            else start_modules(config, spec, base, seed, dataset.examples)
        )
        self.optimizer = create_optimizer(config, self.modules)
        self.schedule = create_schedule(config, self.optimizer, self.num_steps)
        self.records: list[StepRecord] = []
        self.status = UnitStatus.RUNNING
        self.error: str | None = None
        self.note: str | None = None
        self.held_out: HeldOut | None = None
        self.window = Window()
        self.references: References = {}
        self._stream = ExampleStream(items, seed)

    @property
    def name(self) -> str:
        return self.config.name

    @property
    def step(self) -> int:
        """Updates done."""
        return len(self.records)

    @property
    def is_running(self) -> bool:
        return self.status is UnitStatus.RUNNING

    @property
    def device(self) -> torch.device:
        return self.parameters[0].device

    @property
    def parameters(self) -> list[Parameter]:
        return list(self.named_parameters().values())

    def named_parameters(self) -> dict[str, Parameter]:
        """The trained tensors: `<module>.<part>` → parameter, in a fixed order."""
        parts = {name: module.parameters for name, module in self.modules.items()}
        return {f"{name}.{part}": value for name in parts for part, value in parts[name].items()}

    def named_constants(self) -> dict[str, Tensor]:
        """Fixed tensors (A₀, B₀) that must be checkpointed: `<module>.<part>` → tensor."""
        parts = {name: module.constants for name, module in self.modules.items()}
        return {f"{name}.{part}": value for name in parts for part, value in parts[name].items()}

    @property
    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters)

    def next_micro_batches(self) -> list[list[Item]]:
        """For each process, the items of its next forward; none when its share is done.

        The shares have about equally many tokens.
        """
        items = self._window()
        return [[items[place] for place in places] for places in self._next_places(items)]

    @property
    def window_weight(self) -> int:
        """Target tokens of the window, or its preference pairs: losses are divided by it."""
        return sum(item.weight for item in self._window())

    def advance(self, signal: Signal, seconds: float) -> None:
        """Count a forward of all processes whose gradients have been added. `signal` is what it
        adds to the window's means.
        """
        window, items = self.window, self._window()
        window.done += chain.from_iterable(self._next_places(items))
        window.signal = window.signal.plus(signal)
        window.seconds += seconds

    @property
    def is_complete(self) -> bool:
        """True when all of the window is done and the update is due."""
        return self.is_running and len(self.window.done) == len(self._window())

    def fail(self, error: str) -> None:
        """Stop this unit; its weights stay as they were after the last update."""
        self.status, self.error = UnitStatus.FAILED, error
        self.optimizer.zero_grad()

    def end(self, status: UnitStatus, note: str) -> None:
        """Stop this unit before its last update, without an error; `note` says why."""
        self.status, self.note = status, note
        self.optimizer.zero_grad()

    @property
    def exports_best(self) -> bool:
        """True when the weights of the lowest held-out loss are exported, not the last ones."""
        return self.config.export == "best" and bool(self.held_out and self.held_out.best)

    @property
    def exported_step(self) -> int:
        """The update whose weights are exported."""
        best = self.held_out.best_record if self.held_out and self.exports_best else None
        return best.step if best else self.step

    def step_record(self, grad_norm: float) -> StepRecord:
        """The record of the update that ends the window. It must be made before the optimizer's
        step, after which the schedule has the next learning rate.
        """
        signal = self.window.signal
        examples = [example for item in self._window() for example in item.examples]
        return StepRecord(
            step=self.step + 1,
            loss=signal.loss,
            accuracy=signal.accuracy if self.dataset.is_preference else None,
            margin=signal.margin if self.dataset.is_preference else None,
            learning_rate=float(self.schedule.get_last_lr()[0]),
            grad_norm=grad_norm,
            num_tokens=sum(len(example.token_ids) for example in examples),
            num_target_tokens=sum(len(example.predictors) for example in examples),
            seconds=self.window.seconds,
        )

    def end_window(self, record: StepRecord) -> None:
        """Count an update; the next window begins, or the unit is done."""
        self.records.append(record)
        self.window = Window()
        if self.step == self.num_steps:
            self.status = UnitStatus.DONE

    def _next_places(self, items: Sequence[Item]) -> list[list[int]]:
        """For each process, the indices in the window of the items that it computes next."""
        lengths, done = list(map(num_tokens, items)), set(self.window.done)
        found = []
        for share in balanced(lengths, self.num_processes):
            left = [place for place in share if place not in done]
            group = self.limits.first_group([lengths[place] for place in left])
            found.append([left[index] for index in group])
        return found

    def _window(self) -> list[Item]:
        """The items of the current update; without `max_steps` the last update may have fewer."""
        size = self.config.examples_per_step
        start = self.step * size
        if self.config.max_steps is None:
            size = min(size, self._num_items * self.config.num_epochs - start)
        return self._stream.take(start, size)

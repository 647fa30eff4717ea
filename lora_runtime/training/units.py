"""One adapter being trained: its weights, optimizer, schedule and place in its data.

A unit knows nothing of the other units; `bind` alone puts several side by side on one base.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.nn.utils import clip_grad_norm_
from transformers import get_scheduler

from lora_runtime.base.adapted_linear import Binding
from lora_runtime.core import LinearShape
from lora_runtime.errors import ConfigError
from lora_runtime.kernels import NO_RUN, AdapterMemory, Run
from lora_runtime.training.config import UnitConfig, nearest
from lora_runtime.training.data import Dataset, Example, ExampleStream
from lora_runtime.training.inits import kaiming_uniform

LOWER_RATE = "a lower learning_rate usually helps"


class UnitStatus(StrEnum):
    """Where a unit stands."""

    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"


class Factors(NamedTuple):
    """a (rank, in), b (out, rank): ΔW = scaling · b a."""

    a: Parameter
    b: Parameter


class StepRecord(NamedTuple):
    """What one update did. `loss` is the mean over the update's target tokens, before it."""

    step: int
    loss: float
    learning_rate: float
    grad_norm: float
    """Length of the gradient before clipping."""
    num_tokens: int
    num_target_tokens: int
    seconds: float
    """Wall time of the update's forwards, which other units may share."""


@dataclass(slots=True)
class Window:
    """How far the current update is: micro-batches done, their loss and wall time."""

    num_micro_batches: int = 0
    loss: float = 0.0
    seconds: float = 0.0


class Unit:
    """One adapter being trained. Weights are float32, or float64 on a float64 base.

    An update takes the next `micro_batch_size · gradient_accumulation` examples of the stream, its
    window, one micro-batch at a time.
    """

    def __init__(
        self,
        config: UnitConfig,
        dataset: Dataset,
        linears: Mapping[str, LinearShape],
        *,
        seed: int,
        like: Tensor,
    ) -> None:
        """`like` gives the device, and its dtype decides that of the weights."""
        self.config, self.dataset, self.seed = config, dataset, seed
        self.num_steps = config.num_steps(len(dataset.examples))
        self.factors = _start(config, linears, seed, like)
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=config.learning_rate, weight_decay=config.weight_decay, fused=True
        )
        self.schedule = get_scheduler(
            config.schedule,
            self.optimizer,
            num_warmup_steps=config.num_warmup_steps(self.num_steps),
            num_training_steps=self.num_steps,
        )
        self.records: list[StepRecord] = []
        self.status = UnitStatus.RUNNING
        self.error: str | None = None
        self.window = Window()
        self._stream = ExampleStream(dataset.examples, seed)

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
        return [parameter for factors in self.factors.values() for parameter in factors]

    @property
    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters)

    def next_micro_batch(self) -> list[Example]:
        """The examples of this unit's next forward."""
        examples = self._window_examples()
        first = self.window.num_micro_batches * self.config.micro_batch_size
        return examples[first : first + self.config.micro_batch_size]

    @property
    def window_target_tokens(self) -> int:
        """Target tokens of the whole window: what its losses are divided by."""
        return sum(len(example.predictors) for example in self._window_examples())

    def advance(self, loss: float, seconds: float) -> None:
        """Count a micro-batch whose gradients are in place; update at the end of the window.

        `loss` is its share of the window's mean. The unit fails, its weights untouched, when the
        gradient is not finite.
        """
        window = self.window
        window.num_micro_batches += 1
        window.loss += loss
        window.seconds += seconds
        num_done = window.num_micro_batches * self.config.micro_batch_size
        if num_done >= len(self._window_examples()):
            self._update()

    def fail(self, error: str) -> None:
        """Stop this unit; its weights stay as they were after the last update."""
        self.status, self.error = UnitStatus.FAILED, error
        self.optimizer.zero_grad()

    def _update(self) -> None:
        limit = self.config.max_grad_norm or math.inf
        grad_norm = float(clip_grad_norm_(self.parameters, limit))
        if not math.isfinite(grad_norm):
            self.fail(f"the gradient of update {self.step + 1} is not finite; {LOWER_RATE}")
            return
        examples = self._window_examples()
        record = StepRecord(
            step=self.step + 1,
            loss=self.window.loss,
            learning_rate=self.schedule.get_last_lr()[0],
            grad_norm=grad_norm,
            num_tokens=sum(len(example.token_ids) for example in examples),
            num_target_tokens=self.window_target_tokens,
            seconds=self.window.seconds,
        )
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        self.records.append(record)
        self.window = Window()
        if self.step == self.num_steps:
            self.status = UnitStatus.DONE

    def _window_examples(self) -> list[Example]:
        size = self.config.examples_per_step
        start = self.step * size
        if self.config.max_steps is None:
            size = min(size, len(self.dataset.examples) * self.config.num_epochs - start)
        return self._stream.take(start, size)


def select_targets(config: UnitConfig, linears: Mapping[str, LinearShape]) -> list[str]:
    """Paths of the linears a unit adapts, in the base's order; names match as in PEFT's lists.

    Raises ConfigError when a name matches nothing.
    """
    if config.target_modules == "all-linear":
        return list(linears)
    for target in config.target_modules:
        if not any(_is_named(path, target) for path in linears):
            names = sorted({path.rpartition(".")[2] for path in linears})
            raise ConfigError(
                f"unit {config.name!r}: target_modules has {target!r}, which the base has not; "
                f"{nearest(target, names)}",
                field="target_modules",
            )
    return [
        path for path in linears if any(_is_named(path, target) for target in config.target_modules)
    ]


def _is_named(path: str, target: str) -> bool:
    """True when `target` is the whole path or follows one of its dots."""
    return f".{path}".endswith(f".{target}")


def bind(units: Sequence[Unit], linears: Mapping[str, LinearShape]) -> dict[str, Binding]:
    """The units' weights as one memory per module, differentiable; unit n has slot n.

    B' = scaling · B; a module that no unit adapts is left out.
    """
    return {
        path: _binding(units, path)
        for path in linears
        if any(path in unit.factors for unit in units)
    }


def _binding(units: Sequence[Unit], path: str) -> Binding:
    """Each unit's A and B' of one module end to end, and the run table (N, 1, 8) over them."""
    runs, parts, end = [], [], 0
    for unit in units:
        run = NO_RUN
        if path in unit.factors:
            a, b = unit.factors[path]
            parts += [a.flatten(), (unit.config.scaling * b.T).flatten()]
            run = Run(rank=len(a), a=end, b=end + a.numel())
            end += a.numel() + b.numel()
        runs.append([run])
    weights = torch.cat(parts)
    none = weights.new_empty(0, dtype=torch.float32)
    memory = AdapterMemory(weights, none, none.int())
    return Binding(memory, torch.tensor(runs, device=weights.device))


def _start(
    config: UnitConfig, linears: Mapping[str, LinearShape], seed: int, like: Tensor
) -> dict[str, Factors]:
    """Fresh weights, drawn on the CPU so that every device starts from the same ones."""
    generator = torch.Generator().manual_seed(seed)
    dtype = torch.promote_types(like.dtype, torch.float32)
    starts = {
        path: kaiming_uniform(linears[path], config.rank, generator)
        for path in select_targets(config, linears)
    }
    return {
        path: Factors(*(Parameter(part.to(like.device, dtype)) for part in pair))
        for path, pair in starts.items()
    }

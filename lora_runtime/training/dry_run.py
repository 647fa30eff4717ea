"""Estimate memory and time of a run from one micro-step; nothing is trained, nothing written."""

from __future__ import annotations

import math
import time
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from lora_runtime.base.loader import Base
from lora_runtime.base.recompute import recomputed
from lora_runtime.text.tokenizer import Tokenizer
from lora_runtime.training.config import TrainConfig
from lora_runtime.training.data import Dataset, Item, micro_batches, num_tokens
from lora_runtime.training.losses import loss_sums
from lora_runtime.training.sweep import expand
from lora_runtime.training.trainer import Data, create_units, load_all_of, read_data
from lora_runtime.training.units import Unit


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """Memory and time of one unit trained alone, or of all units trained at once."""

    name: str
    targets: tuple[str, ...]
    """Last names of the adapted modules; of a router the block's too, as `mlp.gate`."""
    num_parameters: int
    num_steps: int
    """Updates; of all units the most."""
    num_tokens: int
    """Tokens of all forwards of the run; evaluations are not counted."""
    weight_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    activation_bytes: int
    """Most bytes of tensors alive at once during a micro-step of the longest examples, beyond
    base, weights, gradients and optimizer."""
    seconds: float
    """Updates and evaluations, if all tokens take as long as those of the micro-step."""

    @property
    def total_bytes(self) -> int:
        """Without the base."""
        kept = self.weight_bytes + self.gradient_bytes + self.optimizer_bytes
        return kept + self.activation_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class DryRun:
    """The estimates of a run."""

    units: tuple[Estimate, ...]
    together: Estimate
    base_bytes: int
    """The base with its private copies, shared by all units."""
    data: tuple[tuple[str, Dataset, Dataset | None], ...]
    """(name, data to train on, held-out data) of every unit."""


def dry_run(config: TrainConfig, on_progress: Callable[[str], None] | None = None) -> DryRun:
    """Load a run's data and base and measure. Raises ConfigError, DataError, BaseRefused."""
    expand(config.units)
    base, _, data = load_all_of(config, config.base, on_progress or (lambda _: None))
    return _measured(base, data, config)


def estimate(base: Base, tokenizer: Tokenizer, config: TrainConfig) -> DryRun:
    """Measure each unit alone, then all of them in one micro-step."""
    return _measured(base, read_data(config, tokenizer), config)


def _measured(base: Base, data: Data, config: TrainConfig) -> DryRun:
    unit_configs, sweeps = expand(config.units)
    units = create_units(base, data, replace(config, units=unit_configs), sweeps)
    base = recomputed(base) if config.activation_checkpointing else base
    alone = tuple(_estimate(base, [unit]) for unit in units)
    together = _estimate(base, units) if len(units) > 1 else alone[0]
    named = ((unit.name, *datasets) for unit, datasets in zip(units, data, strict=True))
    return DryRun(units=alone, together=together, base_bytes=base.nbytes, data=tuple(named))


def _estimate(base: Base, units: Sequence[Unit]) -> Estimate:
    batches = [_longest(unit) for unit in units]
    for parameter in _parameters(units):
        parameter.grad = torch.zeros_like(parameter)
    _micro_step(base, units, batches)  # the base makes its private copies
    with PeakBytes() as peak:
        _micro_step(base, units, batches)
    step_s = _timed(base, lambda: _micro_step(base, units, batches))
    forward_s = _timed(base, lambda: _forward(base, units, batches))
    per_token = 1 / sum(num_tokens(item) for items in batches for item in items)
    num_trained = sum(map(_num_tokens, units))
    num_read = sum(map(_num_eval_tokens, units)) + sum(map(_num_reference_tokens, units))
    return Estimate(
        name=", ".join(unit.name for unit in units),
        targets=_targets(base, units),
        num_parameters=sum(unit.num_parameters for unit in units),
        num_steps=max(unit.num_steps for unit in units),
        num_tokens=num_trained,
        weight_bytes=sum(parameter.nbytes for parameter in _parameters(units)),
        gradient_bytes=sum(parameter.nbytes for parameter in _parameters(units)),
        optimizer_bytes=sum(map(_optimizer_bytes, units)),
        activation_bytes=peak.most,
        seconds=per_token * (num_trained * step_s + num_read * forward_s),
    )


class PeakBytes(TorchDispatchMode):
    """Follows the storages that torch's operations make: `most` bytes alive at once, of those made
    inside. What an operation allocates and frees by itself is not seen, nor what the allocator
    keeps: resident memory of SmolLM2's micro-step grew 1.4 times as much.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.most = self._alive = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run the operation, then count what it made; what it was given is known."""
        for tensor in _tensors((args, kwargs)):
            self._add(tensor, is_new=False)
        out = func(*args, **(kwargs or {}))
        for tensor in _tensors(out):
            self._add(tensor, is_new=True)
        return out

    def _add(self, tensor: Tensor, *, is_new: bool) -> None:
        storage = tensor.untyped_storage()
        key, nbytes = storage._cdata, storage.nbytes() if is_new else 0
        if key not in self._known:
            self._known.add(key)
            self._alive += nbytes
            self.most = max(self.most, self._alive)
            weakref.finalize(storage, self._remove, key, nbytes)

    def _remove(self, key: int, nbytes: int) -> None:
        self._known.discard(key)
        self._alive -= nbytes


def _tensors(tree: Any) -> Iterable[Tensor]:
    return (leaf for leaf in tree_iter(tree) if isinstance(leaf, Tensor))


def _micro_step(base: Base, units: Sequence[Unit], batches: Sequence[Sequence[Item]]) -> None:
    """Forward and gradients as `update.run_pass` asks for them: all are alive at once."""
    losses = loss_sums(base, units, batches)[:, 0]
    torch.autograd.grad(losses.sum(), _parameters(units), allow_unused=True)


@torch.no_grad()
def _forward(base: Base, units: Sequence[Unit], batches: Sequence[Sequence[Item]]) -> None:
    loss_sums(base, units, batches)


def _timed(base: Base, run: Callable[[], None]) -> float:
    started = time.perf_counter()
    run()
    if base.device.type == "cuda":
        torch.cuda.synchronize(base.device)
    return time.perf_counter() - started


def _longest(unit: Unit) -> list[Item]:
    """The most tokens that one of the unit's micro-batches can have."""
    config = unit.config
    by_length = sorted(unit.dataset.items, key=num_tokens, reverse=True)
    window = by_length[: config.examples_per_step]
    groups = micro_batches(window, config.micro_batch_size, config.max_tokens_per_batch)
    return max(groups, key=lambda group: sum(map(num_tokens, group)))


def _num_tokens(unit: Unit) -> int:
    num_items = unit.num_steps * unit.config.examples_per_step
    if unit.config.max_steps is None:
        num_items = unit.config.num_epochs * len(unit.dataset.items)
    return round(num_items * unit.dataset.num_tokens / len(unit.dataset.items))


def _num_eval_tokens(unit: Unit) -> int:
    if unit.held_out is None:
        return 0
    num_evaluations = math.ceil(unit.num_steps / unit.config.eval_interval)
    return num_evaluations * unit.held_out.dataset.num_tokens


def _num_reference_tokens(unit: Unit) -> int:
    """Tokens of preferences, which the base without adapter reads once as the reference."""
    if not unit.dataset.is_preference:
        return 0
    num_held_out = unit.held_out.dataset.num_tokens if unit.held_out else 0
    return min(_num_tokens(unit), unit.dataset.num_tokens) + num_held_out


def _optimizer_bytes(unit: Unit) -> int:
    """Bytes of the optimizer's state after a first step. The unit is thrown away afterwards."""
    unit.optimizer.step()
    states = unit.optimizer.state.values()
    tensors = [v for state in states for v in state.values() if isinstance(v, Tensor)]
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors}.values())


def _parameters(units: Sequence[Unit]) -> list[Tensor]:
    return [parameter for unit in units for parameter in unit.parameters]


def _targets(base: Base, units: Sequence[Unit]) -> tuple[str, ...]:
    paths = dict.fromkeys(module.path for unit in units for module in unit.modules.values())
    num_parts = {path: 2 if path in base.spec.routers else 1 for path in paths}
    return tuple(dict.fromkeys(".".join(path.split(".")[-n:]) for path, n in num_parts.items()))

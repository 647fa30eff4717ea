"""The units' weights laid out for the base's layers: unit n is slot n of every run table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lora_runtime.base.adapted_linear import Binding
from lora_runtime.base.layer_plan import replicas
from lora_runtime.base.loader import Base
from lora_runtime.kernels import NO_RUN, AdapterMemory, Run
from lora_runtime.training.units import Unit
from lora_runtime.training.variants import TrainedModule


def bind(units: Sequence[Unit], base: Base) -> dict[str, Binding]:
    """The modules of several units as one memory per layer of the base, differentiable.

    A layer that no unit adapts is left out.
    """
    found: dict[str, list[dict[int, TrainedModule]]] = {}
    for slot, unit in enumerate(units):
        for module in unit.modules.values():
            slots = found.setdefault(module.path, [{} for _ in units])
            slots[slot][module.replica] = module
    num_replicas = 1 + max(max(replicas(unit.layer_map or (0,))) for unit in units)
    return {path: _binding(slots, num_replicas, base) for path, slots in found.items()}


def _binding(
    slots: Sequence[Mapping[int, TrainedModule]], num_replicas: int, base: Base
) -> Binding:
    """Each unit's parts of one layer end to end, and the run table (N, R, 8) over them.

    slots: for each unit, the visits to the layer and what is trained there.
    """
    weights, vectors = _Flat(), _Flat()
    runs = []
    for visits in slots:
        own = [visits.get(replica) for replica in range(num_replicas)]
        runs.append([_run(module, base, weights, vectors) for module in own])
    flat = weights.tensor()
    indices = torch.empty(0, dtype=torch.int32, device=flat.device)
    memory = AdapterMemory(flat, vectors.tensor(like=flat), indices)
    return Binding(memory, torch.tensor(runs, device=flat.device))


class _Flat:
    """Tensors end to end."""

    def __init__(self) -> None:
        self._parts: list[Tensor] = []
        self._end = 0

    def add(self, part: Tensor | None) -> int:
        """The offset of `part`, or −1 without one."""
        if part is None:
            return -1
        self._parts.append(part.flatten())
        self._end += part.numel()
        return self._end - part.numel()

    def tensor(self, like: Tensor | None = None) -> Tensor:
        """All of it; empty, `like` another, where nothing was added."""
        if like is not None and not self._parts:
            return like.new_empty(0)
        return torch.cat(self._parts)


def _run(module: TrainedModule | None, base: Base, weights: _Flat, vectors: _Flat) -> Run:
    if module is None:
        return NO_RUN
    form = module.form(base.weights)
    assert form.a is not None and form.b is not None
    return Run(
        rank=form.rank,
        a=weights.add(form.a),
        b=weights.add(form.b.T),
        gain=vectors.add(form.gain),
    )

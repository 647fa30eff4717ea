"""The device memory that holds resident adapters: one buffer, and a run table per module.

An adapter is one run of bytes, its tensors end to end at their true sizes: nothing is padded to a
largest rank, and no module's memory is set aside for adapters that do not touch it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from lora_runtime.adapters.serving_form import ModuleForm, ServingForm
from lora_runtime.base.adapted_linear import PooledBinding
from lora_runtime.base.loader import Base
from lora_runtime.core import AdapterPlacement
from lora_runtime.kernels import NO_RUN, AdapterMemory, Run

ALIGNMENT = 16
"""Bytes; every tensor starts at a multiple, which vector loads want."""


class Place(NamedTuple):
    """Where a tensor lies within its adapter's run: bytes from its start, seen through `view`."""

    tensor: Tensor
    values: Tensor
    """What is stored: the tensor, or its transpose for B'."""
    view: str
    """The view of AdapterMemory: weights, vectors or indices."""
    start: int


def adapter_dtype(base: Base) -> torch.dtype:
    """Dtype of adapter weights in the pool: float32 on a CPU, where rounding them to bfloat16
    would cost more accuracy than the memory is worth; the compute dtype elsewhere.
    """
    return torch.float32 if base.device.type == "cpu" else base.dtype


def packed_bytes(form: ServingForm, weight_bytes: int) -> int:
    """Bytes an adapter takes in the pool: `weight_bytes` a weight, 4 a gain, bias or row id."""
    return sum(_aligned(p.tensor, p.view, weight_bytes) for p in _places(form, weight_bytes))


def num_replicas(form: ServingForm) -> int:
    """How often the adapter's layer map visits one layer at most."""
    return 1 + max((key.replica for key in form.modules), default=0)


class AdapterPool:
    """The buffer and the run tables. It never decides: it does what it is told.

    runs (modules, slots, replicas, 8) int64, a Run each.
    """

    def __init__(
        self,
        paths: Iterable[str],
        num_bytes: int,
        max_slots: int,
        like: torch.Tensor,
        *,
        bound: Iterable[str] | None = None,
        max_rank: int = 0,
    ) -> None:
        """`like` gives the device and the dtype of the weights.

        `bound`: modules that count as touched from the start; then what was touched once stays so,
        and `layout` only changes when an adapter needs more than any before. `max_rank`: the
        largest rank that is expected.
        """
        size = num_bytes // ALIGNMENT * ALIGNMENT
        storage = torch.empty(size, dtype=torch.uint8, device=like.device)
        self.nbytes = size
        self.memory = replace(AdapterMemory.over(storage, like.dtype, ALIGNMENT), max_rank=max_rank)
        self._index = {path: index for index, path in enumerate(paths)}
        self._touched: list[set[str]] = [set() for _ in range(max_slots)]
        self.runs = _empty_tables(len(self._index), max_slots, 1, like.device)
        self.bindings: dict[str, PooledBinding] = {}
        self._bound = None if bound is None else set(bound)
        self._bind()

    @property
    def layout(self) -> tuple[object, ...]:
        """Equal as long as a captured graph stays right: what it binds, its bounds and tables."""
        return self.memory.max_rank, frozenset(self.bindings), self.runs.data_ptr()

    def load(self, placement: AdapterPlacement, form: ServingForm) -> None:
        """Copy an adapter to its place and make its slot point at it, in place."""
        self._make_room_for(form)
        offsets = {}
        for place in _places(form, self.memory.weights.itemsize):
            target: Tensor = getattr(self.memory, place.view)
            offset = (placement.address + place.start) // target.itemsize
            target[offset : offset + place.values.numel()] = place.values.flatten()
            offsets[id(place.tensor)] = offset
        runs = _empty_tables(len(self._index), 1, self.runs.shape[2], torch.device("cpu"))[:, 0]
        for key, module in form.modules.items():
            runs[self._index[key.path], key.replica] = torch.tensor(_run(module, offsets))
        self.runs[:, placement.slot] = runs.to(self.runs.device)
        self._touched[placement.slot] = {key.path for key in form.modules}
        self._bind()

    def _make_room_for(self, form: ServingForm) -> None:
        replicas = num_replicas(form)
        max_rank = max((module.rank for module in form.modules.values()), default=0)
        if max_rank > self.memory.max_rank:
            self.memory = replace(self.memory, max_rank=max_rank)
        num_modules, max_slots, old_replicas, _ = self.runs.shape
        if replicas > old_replicas:
            tables = _empty_tables(num_modules, max_slots, replicas, self.runs.device)
            tables[:, :, :old_replicas] = self.runs
            self.runs = tables

    def _bind(self) -> None:
        """Leave out modules that no slot touches: they run as the base's own."""
        touched = set[str]().union(*self._touched)
        if self._bound is not None:
            touched = self._bound = self._bound | touched
        self.bindings = {
            path: PooledBinding(self.memory, self.runs, self._index[path]) for path in touched
        }


def _empty_tables(modules: int, slots: int, replicas: int, device: torch.device) -> Tensor:
    return torch.tensor(NO_RUN, device=device).repeat(modules, slots, replicas, 1)


def _places(form: ServingForm, weight_bytes: int) -> Iterator[Place]:
    """Every tensor once, in the order of the modules, though modules may share some."""
    start, seen = 0, set()
    for key in sorted(form.modules):
        for tensor, values, view in _parts(form.modules[key]):
            if id(tensor) not in seen:
                seen.add(id(tensor))
                yield Place(tensor, values, view, start)
                start += _aligned(tensor, view, weight_bytes)


def _parts(module: ModuleForm) -> Iterator[tuple[Tensor, Tensor, str]]:
    """(tensor, what is stored of it, view) of each part the module has."""
    if module.a is not None and module.b is not None:
        yield module.a, module.a, "weights"
        yield module.b, module.b.T, "weights"
    for vector in (module.gain, module.bias):
        if vector is not None:
            yield vector, vector, "vectors"
    if module.patch is not None:
        yield module.patch.values, module.patch.values, "weights"
        if module.patch.ids is not None:
            yield module.patch.ids, module.patch.ids, "indices"


def _aligned(tensor: Tensor, view: str, weight_bytes: int) -> int:
    num_bytes = tensor.numel() * (weight_bytes if view == "weights" else 4)
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT


def _run(module: ModuleForm, offsets: dict[int, int]) -> Run:
    patch = module.patch

    def offset(tensor: Tensor | None) -> int:
        return -1 if tensor is None else offsets[id(tensor)]

    return Run(
        rank=module.rank,
        a=offset(module.a),
        b=offset(module.b),
        gain=offset(module.gain),
        bias=offset(module.bias),
        num_rows=0 if patch is None else len(patch.values),
        rows=offset(patch and patch.values),
        row_ids=offset(patch and patch.ids),
    )

"""The device memory that holds resident adapters: one rank pool per module shape."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import torch

from lora_runtime.adapters.serving_form import ModuleKey, ServingForm
from lora_runtime.adapters.slot_table import Footprint
from lora_runtime.base.adapted_linear import Binding
from lora_runtime.core import AdapterPlacement, LinearShape
from lora_runtime.kernels import NO_RUN, RankPool


def rows_per_shape(
    linears: Mapping[str, LinearShape], pool_bytes: int, item_bytes: int
) -> dict[LinearShape, int]:
    """Pool rows of each shape, so that adapters on all linears fill every pool at once.

    rows[s] = (layers of shape s) · pool_bytes / (item_bytes · Σ over layers of (in + out)).
    """
    per_rank = sum(shape.in_features + shape.out_features for shape in linears.values())
    total_rank = pool_bytes // (per_rank * item_bytes)
    return {shape: count * total_rank for shape, count in Counter(linears.values()).items()}


def ordered_modules(form: ServingForm) -> list[ModuleKey]:
    """The adapter's modules in the order of its footprint and placements."""
    return sorted(form.modules)


def footprint(form: ServingForm, linears: Mapping[str, LinearShape]) -> Footprint:
    """(shape, rank) of every module of the adapter."""
    return tuple((linears[key.path], form.modules[key].rank) for key in ordered_modules(form))


class AdapterPool:
    """Rank pools and run tables of all linears. It never decides: it does what it is told."""

    def __init__(
        self,
        linears: Mapping[str, LinearShape],
        rows: Mapping[LinearShape, int],
        max_slots: int,
        like: torch.Tensor,
    ) -> None:
        self._index = {path: index for index, path in enumerate(linears)}
        self._linears = linears
        self.runs = torch.tensor(NO_RUN, dtype=torch.int32, device=like.device).repeat(
            len(linears), max_slots, 1, 1
        )
        self._pools = {
            shape: RankPool(
                a=like.new_empty(count, shape.in_features),
                b=like.new_empty(count, shape.out_features),
                gains=like.new_empty(0, shape.out_features, dtype=torch.float32),
                biases=like.new_empty(0, shape.out_features, dtype=torch.float32),
            )
            for shape, count in rows.items()
        }
        self.bindings = {
            path: Binding(self._pools[shape], self.runs[self._index[path]])
            for path, shape in linears.items()
        }

    @property
    def nbytes(self) -> int:
        return sum(pool.a.nbytes + pool.b.nbytes for pool in self._pools.values())

    def load(self, placement: AdapterPlacement, form: ServingForm) -> None:
        """Copy an adapter into its rows and make its slot point at them, in place."""
        runs = torch.tensor(NO_RUN, dtype=torch.int32).repeat(len(self._index), 1, 1)
        for key, start in zip(ordered_modules(form), placement.starts, strict=True):
            module = form.modules[key]
            pool = self._pools[self._linears[key.path]]
            pool.a[start : start + module.rank] = module.a
            pool.b[start : start + module.rank] = module.b.T
            runs[self._index[key.path], key.replica] = torch.tensor((start, module.rank, -1, -1))
        self.runs[:, placement.slot] = runs.to(self.runs.device)

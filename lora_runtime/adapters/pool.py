"""The device memory that holds resident adapters: one buffer, and an extent table per module.

An adapter's tensors lie end to end at their true sizes: nothing is padded to a largest rank, and no
memory is set aside for modules that an adapter does not touch.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch

from lora_runtime.adapters.packed_adapter import ALIGNMENT, PackedAdapter, empty_extents
from lora_runtime.base.model.adapted_linear import PooledBinding
from lora_runtime.core import AdapterPlacement
from lora_runtime.kernels import AdapterMemory, huge_pages

USUAL_MAX_ROWS = 64
"""The least bound of replaced vocabulary rows, once an adapter replaces any."""


class AdapterPool:
    """The buffer and the extent tables. Where adapters go is the slot table's decision.

    extents (modules, slots, replicas, 8) int64: an Extent for every module, slot and replica.
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
        """`like` gives the device and the dtype of the weights; `max_rank` is the largest expected.

        `bound`: modules that are bound from the start. If it is given, bindings are added and never
        taken away, so that captured graphs stay valid until an adapter needs more than any before
        it; see `layout`.
        """
        size = num_bytes // ALIGNMENT * ALIGNMENT
        self._storage = huge_pages.zeros(size, like.device)
        self.nbytes = size
        memory = AdapterMemory.over(self._storage, like.dtype, ALIGNMENT)
        self.memory = replace(memory, max_rank=max_rank)
        self._index = {path: index for index, path in enumerate(paths)}
        self._touched: list[set[str]] = [set() for _ in range(max_slots)]
        self.extents = empty_extents(len(self._index), max_slots, 1).to(like.device)
        self._no_extent = empty_extents().to(like.device)
        self.bindings: dict[str, PooledBinding] = {}
        self._bound = None if bound is None else set(bound)
        self._bind()

    @property
    def layout(self) -> tuple[object, ...]:
        """What a captured graph has fixed: bounds, bound modules, and where the extent tables lie.

        A graph may be replayed as long as this equals what it was at the capture.
        """
        bounds = self.memory.max_rank, self.memory.max_rows
        return *bounds, frozenset(self.bindings), self.extents.data_ptr(), self.extents.shape

    def all_bindings(self) -> dict[str, PooledBinding]:
        """The bindings as they are when adapters touch every module and replace vocabulary rows."""
        memory = replace(self.memory, max_rows=self.memory.max_rows or USUAL_MAX_ROWS)
        return {path: PooledBinding(memory, self.extents, i) for path, i in self._index.items()}

    @property
    def num_replicas(self) -> int:
        """Visits to one layer that the extent tables have room for."""
        return self.extents.shape[2]

    def load(self, placement: AdapterPlacement, adapter: PackedAdapter) -> None:
        """Copy an adapter to its place and make its slot point at it."""
        self.make_room_for(adapter)
        self.copy(placement, adapter)

    def make_room_for(self, adapter: PackedAdapter) -> None:
        """Raise the bounds to what the adapter needs; with more replicas the extent tables move.

        The bound of rows is rounded up to a power of two, so that most adapters leave `layout` as
        it is.
        """
        max_rank = max(adapter.max_rank, self.memory.max_rank or 0)
        rows = max(USUAL_MAX_ROWS, 1 << (adapter.max_rows - 1).bit_length())
        max_rows = max(rows if adapter.max_rows else 0, self.memory.max_rows or 0)
        self.memory = replace(self.memory, max_rank=max_rank, max_rows=max_rows)
        num_modules, max_slots, old_replicas, _ = self.extents.shape
        if adapter.num_replicas > old_replicas:
            tables = empty_extents(num_modules, max_slots, adapter.num_replicas).to(
                self.extents.device
            )
            tables[:, :, :old_replicas] = self.extents
            self.extents = tables
        self._bind()

    def copy(self, placement: AdapterPlacement, adapter: PackedAdapter) -> None:
        """Copy bytes and extents, in place and on the current CUDA stream, after `make_room_for`.

        From pinned memory the copies may still be under way on return. Nothing is written but the
        adapter's bytes and its slot's extents.
        """
        assert adapter.dtype == self.memory.weights.dtype and placement.address % ALIGNMENT == 0
        end = placement.address + adapter.nbytes
        self._storage[placement.address : end].copy_(adapter.storage, non_blocking=True)
        extents = empty_extents(len(self._index), self.num_replicas)
        rows = [self._index[path] for path in adapter.paths]
        extents[rows, : adapter.num_replicas] = adapter.extents_at(placement.address)
        if adapter.storage.is_pinned():
            extents = extents.pin_memory()
        self.extents[:, placement.slot] = extents.to(self.extents.device, non_blocking=True)
        self._touched[placement.slot] = set(adapter.paths)
        self._bind()

    def clear(self, slot: int) -> None:
        """Point a slot at no adapter, on the current CUDA stream."""
        self.extents[:, slot] = self._no_extent
        self._touched[slot] = set()
        self._bind()

    def _bind(self) -> None:
        """Leave out modules that no slot touches: they run as the base's own."""
        touched = set[str]().union(*self._touched)
        if self._bound is not None:
            # A graph replays the bindings it was captured with: none of them may go again.
            touched = self._bound = self._bound | touched
        self.bindings = {
            path: PooledBinding(self.memory, self.extents, self._index[path]) for path in touched
        }

"""An adapter packed once, when it is added: the bytes that the pool will hold, on the host.

A load is then one copy, and the host keeps one copy of the weights.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lora_runtime.adapters.facts import AdapterFacts
from lora_runtime.adapters.serving_form import ModuleForm, ServingForm
from lora_runtime.base.loader import Base
from lora_runtime.kernels import NO_EXTENT, AdapterMemory, Extent

ALIGNMENT = 16
"""Bytes; every tensor starts at a multiple, which vector loads want."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedAdapter:
    """The bytes of an adapter, where its parts lie in them, and what the engine reads of it.

    storage (n,) uint8: pinned for a CUDA device, so that it is copied while steps run.
    extents (k, R, 8) int64: an Extent for each of the k `paths` and each of R replicas, whose
    offsets count from the first byte. R is how often the layer map visits a layer at most: a visit
    without tensors has NO_EXTENT.
    """

    facts: AdapterFacts
    storage: Tensor
    dtype: torch.dtype
    """Dtype of the weights."""
    paths: tuple[str, ...]
    extents: Tensor
    max_rank: int
    max_rows: int
    """Most vocabulary rows that one module replaces."""
    has_whole_patch: bool
    """It replaces all rows of the embedding or the head."""

    @property
    def digest(self) -> str:
        return self.facts.digest

    @property
    def nbytes(self) -> int:
        return self.storage.nbytes

    @property
    def num_replicas(self) -> int:
        """How often the adapter's layer map visits one layer at most."""
        return self.extents.shape[1]

    def extents_at(self, address: int) -> Tensor:
        """`extents` once the bytes lie at `address` of the pool, a multiple of ALIGNMENT."""
        of_weights, of_words = address // self.dtype.itemsize, address // 4
        shift = Extent(
            rank=0,
            a=of_weights,
            b=of_weights,
            gain=of_words,
            bias=of_words,
            num_rows=0,
            rows=of_weights,
            row_ids=of_words,
        )
        # −1 says that a part is missing, wherever the adapter lies.
        return torch.where(self.extents < 0, self.extents, self.extents + torch.tensor(shift))


def adapter_dtype(base: Base) -> torch.dtype:
    """Dtype of adapter weights in the pool: float32 on a CPU, where rounding them to bfloat16
    would cost more accuracy than the memory is worth; the compute dtype elsewhere.
    """
    return torch.float32 if base.device.type == "cpu" else base.dtype


def pack_for(base: Base, form: ServingForm) -> PackedAdapter:
    """`form` as the pool of an engine over `base` holds it. Safe on any thread."""
    return pack(form, adapter_dtype(base), pin=base.device.type == "cuda")


def pack(form: ServingForm, dtype: torch.dtype, *, pin: bool = False) -> PackedAdapter:
    """Lay the tensors of `form` end to end, weights in `dtype`; `pin`: in page-locked memory."""
    size = packed_bytes(form, dtype.itemsize)
    storage = torch.empty(size, dtype=torch.uint8, pin_memory=pin)
    memory, offsets = AdapterMemory.over(storage, dtype, ALIGNMENT), {}
    for place in _places(form, dtype.itemsize):
        target: Tensor = getattr(memory, place.view)
        offset = place.start // target.itemsize
        target[offset : offset + place.values.numel()].view(place.values.shape).copy_(place.values)
        offsets[id(place.tensor)] = offset
    paths = tuple(sorted({key.path for key in form.modules}))
    return PackedAdapter(
        facts=form.facts,
        storage=storage,
        dtype=dtype,
        paths=paths,
        extents=_extents(form, paths, offsets),
        max_rank=max((module.rank for module in form.modules.values()), default=0),
        max_rows=max((len(m.patch.values) for m in form.modules.values() if m.patch), default=0),
        has_whole_patch=form.has_whole_patch,
    )


def packed_bytes(form: ServingForm, weight_bytes: int) -> int:
    """Bytes an adapter takes in the pool: `weight_bytes` a weight, 4 a gain, bias or row id."""
    return sum(_aligned(p.tensor, p.view, weight_bytes) for p in _places(form, weight_bytes))


def empty_extents(*shape: int) -> Tensor:
    """(*shape, 8) int64 on the host: NO_EXTENT everywhere."""
    return torch.tensor(NO_EXTENT).repeat(*shape, 1)


class _Place(NamedTuple):
    """Where a tensor lies in its adapter's storage: `start`, in bytes, as elements of `view`."""

    tensor: Tensor
    values: Tensor
    """The values that are stored: the tensor's, or those of B' transposed."""
    view: str
    """The view of AdapterMemory: weights, vectors or indices."""
    start: int


def _places(form: ServingForm, weight_bytes: int) -> Iterator[_Place]:
    """Every tensor once, in the order of the modules, though modules may share some."""
    start, seen = 0, set()
    # Sorted, so that equal content gives equal bytes. PEFT's visits of one layer share tensors.
    for key in sorted(form.modules):
        for tensor, values, view in _parts(form.modules[key]):
            if id(tensor) not in seen:
                seen.add(id(tensor))
                yield _Place(tensor, values, view, start)
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


def _extents(form: ServingForm, paths: tuple[str, ...], offsets: dict[int, int]) -> Tensor:
    index = {path: i for i, path in enumerate(paths)}
    layer_map = form.facts.layer_map
    num_visits = 1 if layer_map is None else max(Counter(layer_map).values())
    extents = empty_extents(len(paths), num_visits)
    for key, module in form.modules.items():
        extents[index[key.path], key.replica] = torch.tensor(_extent(module, offsets))
    return extents


def _extent(module: ModuleForm, offsets: dict[int, int]) -> Extent:
    patch = module.patch

    def offset(tensor: Tensor | None) -> int:
        return -1 if tensor is None else offsets[id(tensor)]

    return Extent(
        rank=module.rank,
        a=offset(module.a),
        b=offset(module.b),
        gain=offset(module.gain),
        bias=offset(module.bias),
        num_rows=0 if patch is None else len(patch.values),
        rows=offset(None if patch is None else patch.values),
        row_ids=offset(None if patch is None else patch.ids),
    )

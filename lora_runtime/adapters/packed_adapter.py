"""An adapter packed once, when it is added: the bytes that the pool will hold, on the host.

A load is then one copy, and the host keeps one copy of the weights.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lora_runtime.adapters.facts import AdapterFacts
from lora_runtime.adapters.serving_form import ModuleForm, ServingForm
from lora_runtime.base.loader import Base
from lora_runtime.base.model.finite import is_finite
from lora_runtime.errors import AdapterRefused
from lora_runtime.kernels import NO_EXTENT, AdapterMemory, Extent, adapter_dtype

ALIGNMENT = 16
"""Bytes; every tensor starts at a multiple, which vector loads want."""
MAX_DOUBLINGS = 126
"""Within float32 both 2ⁿ and 2⁻ⁿ are normal numbers."""


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


def pack_for(base: Base, form: ServingForm) -> PackedAdapter:
    """`form` as the pool of an engine over `base` holds it. Safe on any thread."""
    dtype = adapter_dtype(base.device, base.dtype)
    return pack(form, dtype, pin=base.device.type == "cuda")


def pack(form: ServingForm, dtype: torch.dtype, *, pin: bool = False) -> PackedAdapter:
    """Lay the tensors of `form` end to end, weights in `dtype`; `pin`: in page-locked memory.

    Raises AdapterRefused where float16 cannot hold them.
    """
    places = tuple(_places(form, dtype.itemsize))
    size = places[-1].end if places else 0
    storage = torch.empty(size, dtype=torch.uint8, pin_memory=pin)
    memory, offsets = AdapterMemory.over(storage, dtype, ALIGNMENT), {}
    scales = _scales(places) if dtype == torch.float16 else {}
    for place in places:
        target: Tensor = getattr(memory, place.part.view)
        offset = place.start // target.itemsize
        values = place.part.values
        room = target[offset : offset + values.numel()].view(values.shape)
        if dtype == torch.float16 and place.part.view == "weights":
            _write_halves(place, room, scales)
        else:
            room.copy_(values)
        offsets[place.part.key] = offset
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


def _write_halves(place: _Place, room: Tensor, scales: Mapping[Key, Tensor]) -> None:
    """Write weights in float16, those of a pair of factors times their scales."""
    values, scale = place.part.values, scales.get(place.part.key)
    if scale is None:
        room.copy_(values)
    else:
        torch.mul(values, scale, out=room)
    if not is_finite(room):
        raise AdapterRefused(
            f"the adapter of {place.path} holds values up to {float(values.abs().max()):.3g}: with "
            "what they are multiplied by they are too large for float16, in which a bfloat16 base "
            "on this processor holds adapters; serve with --dtype float32",
            field=place.path,
        )


def _scales(places: Sequence[_Place]) -> dict[Key, Tensor]:
    """What the rows (r, 1) of each pair of factors are multiplied by, by the keys of their parts.

    A row of A and its row of B' are multiplied and divided by a power of two that makes them
    equally large: their product is the same, and neither is too large or too small for float16 as
    long as the product is not.
    """
    pairs = {place.part.key[1:]: place.part.factors for place in places if place.part.factors}
    if not pairs:
        return {}
    of_a = torch.cat([a.abs().amax(1) for a, _ in pairs.values()])
    # Sizes along B's columns take four times as long as copying it and looking along rows.
    of_b = torch.cat([b.T.contiguous().abs().amax(1) for _, b in pairs.values()])
    doublings = _doublings(of_a, of_b)
    ranks = [len(a) for a, _ in pairs.values()]
    found: dict[Key, Tensor] = {}
    for name, exponents in (("a", doublings), ("b", -doublings)):
        scales = torch.ldexp(torch.ones(len(exponents)), exponents)[:, None].split(ranks)
        found |= {(name, *key): scale for key, scale in zip(pairs, scales, strict=True)}
    return found


def _doublings(largest_a: Tensor, largest_b: Tensor) -> Tensor:
    """n of each rank for which 2ⁿ · largest_a and 2⁻ⁿ · largest_b are about equal; beside a factor
    of zeros the other is about 1.
    """
    (_, of_a), (_, of_b) = torch.frexp(largest_a), torch.frexp(largest_b)
    found = torch.where(largest_a == 0, of_b, (of_b - of_a) // 2)
    return torch.where(largest_b == 0, -of_a, found).clamp(-MAX_DOUBLINGS, MAX_DOUBLINGS)


def empty_extents(*shape: int) -> Tensor:
    """(*shape, 8) int64 on the host: NO_EXTENT everywhere."""
    return torch.tensor(NO_EXTENT).repeat(*shape, 1)


Key = tuple[object, ...]
Offsets = Mapping[Key, int]


class _Part(NamedTuple):
    """What is stored of a module, of which others may share it."""

    key: Key
    """Equal for parts that are the same."""
    values: Tensor
    view: str
    """The view of AdapterMemory: weights, vectors or indices."""
    factors: tuple[Tensor, Tensor] | None = None
    """A and B', if this is one of them: only their product is given."""


class _Place(NamedTuple):
    """Where a part lies in its adapter's storage: bytes `start` to `end`, the last ones unused."""

    path: str
    part: _Part
    start: int
    end: int


def _places(form: ServingForm, weight_bytes: int) -> Iterator[_Place]:
    """Every part once, in the order of the modules, though modules may share some: `weight_bytes`
    a weight, 4 a gain, bias or row id.
    """
    start, seen = 0, set()
    # Sorted, so that equal content gives equal bytes. PEFT's visits of one layer share tensors.
    for key in sorted(form.modules):
        for part in _parts(form.modules[key]):
            if part.key not in seen:
                seen.add(part.key)
                end = start + _aligned(part, weight_bytes)
                yield _Place(key.path, part, start, end)
                start = end


def _parts(module: ModuleForm) -> Iterator[_Part]:
    a, b, patch = module.a, module.b, module.patch
    if a is not None and b is not None:
        yield _Part(("a", id(a), id(b)), a, "weights", (a, b))
        yield _Part(("b", id(a), id(b)), b.T, "weights", (a, b))
    for vector in (module.gain, module.bias):
        if vector is not None:
            yield _Part((id(vector),), vector, "vectors")
    if patch is not None:
        yield _Part((id(patch.values),), patch.values, "weights")
        if patch.ids is not None:
            yield _Part((id(patch.ids),), patch.ids, "indices")


def _aligned(part: _Part, weight_bytes: int) -> int:
    num_bytes = part.values.numel() * (weight_bytes if part.view == "weights" else 4)
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT


def _extents(form: ServingForm, paths: tuple[str, ...], offsets: Offsets) -> Tensor:
    index = {path: i for i, path in enumerate(paths)}
    layer_map = form.facts.layer_map
    num_visits = 1 if layer_map is None else max(Counter(layer_map).values())
    extents = empty_extents(len(paths), num_visits)
    if form.modules:
        rows, replicas = zip(*((index[key.path], key.replica) for key in form.modules), strict=True)
        found = [_extent(module, offsets) for module in form.modules.values()]
        extents[list(rows), list(replicas)] = torch.tensor(found)
    return extents


def _extent(module: ModuleForm, offsets: Offsets) -> Extent:
    a, b, patch = module.a, module.b, module.patch

    def offset(tensor: Tensor | None) -> int:
        return -1 if tensor is None else offsets[id(tensor),]

    return Extent(
        rank=module.rank,
        a=-1 if a is None else offsets["a", id(a), id(b)],
        b=-1 if a is None else offsets["b", id(a), id(b)],
        gain=offset(module.gain),
        bias=offset(module.bias),
        num_rows=0 if patch is None else len(patch.values),
        rows=offset(None if patch is None else patch.values),
        row_ids=offset(None if patch is None else patch.ids),
    )

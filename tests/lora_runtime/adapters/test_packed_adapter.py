"""What is packed is what every part of the form says, wherever in the pool it is put."""

from __future__ import annotations

import dataclasses
import gc
import weakref
from collections import Counter
from contextlib import nullcontext
from itertools import product

import pytest
import torch

from lora_runtime.adapters.host_cache import HostCache
from lora_runtime.adapters.packed_adapter import ALIGNMENT, pack
from lora_runtime.adapters.pool import AdapterPool
from lora_runtime.adapters.reduction import load_adapter
from lora_runtime.core import AdapterPlacement
from lora_runtime.errors import AdapterRefused, Overloaded
from lora_runtime.kernels import NO_EXTENT, Extent
from tests.driver import tiny_engine
from tests.tiny import tiny_base, tiny_checkpoint
from tests.variants import variant_names, write_variants

SHAPE = "llama-bias"
POISON = 0xFF
"""Bytes that are NaN as float32 and as bfloat16."""


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_base(SHAPE, folder=tiny_checkpoint(tmp_path_factory.mktemp("base"), SHAPE))


@pytest.fixture(scope="module")
def forms(base, tmp_path_factory):
    """Every kind of adapter."""
    written = write_variants(base, SHAPE, tmp_path_factory.mktemp("adapters"))
    return {v.name: load_adapter(v.folder, base.spec, base.weights) for v in written}


def poisoned_pool(base, dtype, num_bytes):
    pool = AdapterPool(base.spec.shapes, num_bytes, 3, torch.empty(0, dtype=dtype))
    bytes_of(pool).fill_(POISON)
    return pool


def test_few_more_replaced_rows_leave_the_layout_as_it_is(base, forms):
    """A captured graph holds for any number of rows up to the pool's bound."""
    pool = poisoned_pool(base, torch.float32, 1 << 20)
    packed, bounds, layouts = pack(forms["lora"], torch.float32), [], []
    for rows in (0, 1, 5, 64, 65, 128, 3):
        pool.make_room_for(dataclasses.replace(packed, max_rows=rows))
        bounds.append(pool.memory.max_rows)
        layouts.append(pool.layout)
    assert bounds == [0, 64, 64, 64, 128, 128, 128]
    assert len(set(layouts)) == 3


def bytes_of(pool):
    return pool.memory.indices.view(torch.uint8)


def part(view, offset, like, dtype):
    """`like`'s values as the pool has them at `offset`."""
    assert offset >= 0
    found = view[offset : offset + like.numel()]
    assert found.dtype == dtype
    return found.view(like.shape)


def assert_holds(pool, base, form, slot):
    """Read every part of `form` back through the runs of `slot`; the other modules have none."""
    memory, index = pool.memory, {path: i for i, path in enumerate(base.spec.shapes)}
    dtype, seen = memory.weights.dtype, set()
    for key, module in form.modules.items():
        extent = Extent(*pool.extents[index[key.path], slot, key.replica].tolist())
        seen.add((index[key.path], key.replica))
        patch = module.patch
        parts = [
            (memory.weights, extent.a, module.a, dtype),
            (memory.weights, extent.b, None if module.b is None else module.b.T, dtype),
            (memory.vectors, extent.gain, module.gain, torch.float32),
            (memory.vectors, extent.bias, module.bias, torch.float32),
            (memory.weights, extent.rows, patch and patch.values, dtype),
            (memory.indices, extent.row_ids, patch and patch.ids, torch.int32),
        ]
        for view, offset, values, stored in parts:
            if values is None:
                assert offset == -1
            else:
                assert offset * view.itemsize % ALIGNMENT == 0
                found = part(view, offset, values, stored)
                if stored == torch.float16 and offset != extent.rows:
                    assert_rounded_rows(found, values)
                else:
                    assert torch.equal(found, values.to(stored))
        if dtype == torch.float16 and module.a is not None:
            assert_product_holds(memory, extent, module.a, module.b)
        assert extent.rank == module.rank <= memory.max_rank
        assert extent.num_rows == (0 if patch is None else len(patch.values))
    for place in product(range(len(index)), range(pool.num_replicas)):
        if place not in seen:
            assert tuple(pool.extents[place[0], slot, place[1]].tolist()) == NO_EXTENT


def assert_product_holds(memory, extent, a, b):
    """BA from float16 is as far off as roundings of both factors move it."""
    found_a, found_b = (
        part(memory.weights, offset, values, torch.float16).double()
        for offset, values in ((extent.a, a), (extent.b, b.T))
    )
    a, b = a.double(), b.double()
    sizes = b.abs() @ a.abs()
    bound = 1.01 * 2.0**-10 * sizes + 2.0**-23 * sizes.max()
    assert ((found_b.T @ found_a - b @ a).abs() <= bound).all()


def assert_rounded_rows(found, values):
    """Every row is the other's times a power of two, rounded to float16."""
    largest = values.abs().amax(1, keepdim=True)
    ratio = found.double().abs().amax(1, keepdim=True) / largest.clamp(min=1e-30)
    values = values * torch.exp2(torch.log2(ratio.clamp(min=1e-30)).round())
    assert torch.equal(found, values.to(torch.float16))


def bytes_of_parts(form, weight_bytes):
    """Of each part once, though modules share some: whole multiples of ALIGNMENT."""
    parts = {}
    for module in form.modules.values():
        for name in ("a", "b"):
            factor = getattr(module, name)
            if factor is not None:
                pair = name, id(module.a), id(module.b)
                parts[pair] = factor.numel() * weight_bytes
        vectors = [module.gain, module.bias]
        if module.patch is not None:
            values = module.patch.values
            parts["rows", id(values)] = values.numel() * weight_bytes
            vectors.append(module.patch.ids)
        parts |= {id(vector): 4 * vector.numel() for vector in vectors if vector is not None}
    return sum(-(-size // ALIGNMENT) * ALIGNMENT for size in parts.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", variant_names(has_bias=True))
def test_every_part_is_read_back_from_any_place(base, forms, name, dtype):
    form = forms[name]
    adapter = pack(form, dtype)
    size = adapter.nbytes
    assert size == bytes_of_parts(form, dtype.itemsize) and size % ALIGNMENT == 0
    pool = poisoned_pool(base, dtype, 2 * size + 5 * ALIGNMENT)
    first, second = 3 * ALIGNMENT, size + 4 * ALIGNMENT
    pool.load(AdapterPlacement(form.digest, 2, first), adapter)
    assert bytes_of(pool)[:first].eq(POISON).all() and bytes_of(pool)[second:].eq(POISON).all()
    pool.load(AdapterPlacement(form.digest, 0, second), adapter)
    for slot in (2, 0):
        assert_holds(pool, base, form, slot)
    assert pool.extents[:, 1].eq(torch.tensor(NO_EXTENT)).all()
    assert set(pool.bindings) == {key.path for key in form.modules}


@pytest.mark.parametrize("size", [1e-12, 1e-6, 1.0, 1e6, 1e12])
def test_float16_holds_any_factors_whose_product_it_can_show(base, forms, size):
    """Whether A is large and B small or the other way round; a row of zeros beside any other."""
    form = forms["lora"]
    key, module = next(iter(form.modules.items()))
    a, b = module.a * size, module.b / size
    a[0], b[:, 1] = 0, 0
    scaled = dataclasses.replace(module, a=a, b=b)
    packed = pack(dataclasses.replace(form, modules={key: scaled}), torch.float16)
    pool = poisoned_pool(base, torch.float16, packed.nbytes)
    pool.load(AdapterPlacement(form.digest, 0, 0), packed)
    extent = Extent(*pool.extents[list(base.spec.shapes).index(key.path), 0, 0].tolist())
    assert_product_holds(pool.memory, extent, a, b)


def test_what_float16_cannot_hold_is_refused_by_name(forms):
    form = forms["lora"]
    key, module = next(iter(form.modules.items()))
    huge = dataclasses.replace(module, a=module.a * 1e8, b=module.b * 1e8)
    form = dataclasses.replace(form, modules={key: huge})
    with pytest.raises(AdapterRefused, match="too large for float16.*--dtype float32") as refused:
        pack(form, torch.float16)
    assert refused.value.field == key.path
    pack(form, torch.float32)


def test_a_slot_forgets_all_of_its_last_adapter(base, forms):
    adapters = {name: pack(form, torch.float32) for name, form in forms.items()}
    pool = poisoned_pool(base, torch.float32, max(a.nbytes for a in adapters.values()))
    for name in ("replication-2", "bias-lora-only", "modules-to-save-head", "replication", "lora"):
        pool.load(AdapterPlacement(name, 1, 0), adapters[name])
        assert_holds(pool, base, forms[name], 1)


def test_what_the_engine_asks_of_an_adapter_is_the_forms(forms):
    for form in forms.values():
        adapter = pack(form, torch.bfloat16)
        assert adapter.facts is form.facts and adapter.has_whole_patch == form.has_whole_patch
        assert adapter.max_rank == max((0, *form.ranks))
        visits = Counter(form.facts.layer_map or [0])
        assert adapter.num_replicas == max(visits.values()), (
            "every visit has an extent, or NO_EXTENT"
        )


def test_the_host_keeps_one_copy_of_the_bytes_and_none_of_the_form(base, tmp_path):
    (variant,) = write_variants(base, SHAPE, tmp_path, ["dora-bias"])
    engine = tiny_engine(base)
    form = load_adapter(variant.folder, base.spec, base.weights)
    digest, size = form.digest, form.nbytes
    tensors = [weakref.ref(tensor) for tensor in form.tensors]
    engine.add_adapter(form)
    kept = engine.host[digest].storage.data_ptr()
    engine.add_adapter(form)
    del form
    gc.collect()
    assert not any(tensor() is not None for tensor in tensors)
    assert engine.host.nbytes == size == engine.host[digest].storage.untyped_storage().nbytes()
    assert engine.host[digest].storage.data_ptr() == kept


def test_host_memory_is_bounded_and_equal_content_takes_none(base, forms):
    one, other = forms["lora"], forms["dora"]
    size = pack(one, torch.float32).nbytes
    engine = tiny_engine(base, host_bytes=size)
    engine.add_adapter(one)
    engine.add_adapter(one)
    with pytest.raises(Overloaded, match=f"{size} are allowed; unload"):
        engine.add_adapter(other)
    assert engine.host.nbytes == size
    for _ in range(2):
        engine.drop_adapter(one.digest)
    engine.collect()
    with pytest.raises(Overloaded) if pack(other, torch.float32).nbytes > size else nullcontext():
        engine.add_adapter(other)
    engine.check_integrity()


def test_equal_content_is_counted_and_kept_until_it_is_removed(forms):
    host, adapter = HostCache(), pack(forms["lora"], torch.float32)
    host.add(adapter)
    host.add(pack(forms["lora"], torch.float32))
    assert host[adapter.digest] is adapter and host.nbytes == adapter.nbytes
    host.drop(adapter.digest)
    assert host.is_referenced(adapter.digest)
    host.drop(adapter.digest)
    assert not host.is_referenced(adapter.digest)
    assert host.unreferenced() == [adapter.digest] and adapter.digest in host
    host.remove(adapter.digest)
    assert adapter.digest not in host and host.nbytes == 0

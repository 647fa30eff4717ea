"""A step whose rows visit the base's layers in different orders: which tokens run at which layer.

Rows with a layer map (PEFT's layer replication) and plain rows share one forward over the shortest
common supersequence of their maps; see `base/layer_order.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_runtime.base.model.attention import KVCache, PagedAttention
from lora_runtime.base.model.layer_order import LayerMap, OrderStep, replicas, shortest_order
from lora_runtime.base.model.reordered_model import LayerStep, LayerSteps
from lora_runtime.core import ScheduledBatch
from lora_runtime.engine.batch import (
    ForwardBatch,
    Rows,
    block_tables,
    cache_slots,
    row_of_token,
    spans,
)
from lora_runtime.kernels import AttentionMeta, StepMeta, to_device


@dataclass(frozen=True, slots=True)
class Planes:
    """Where the rows keep keys and values. A block has room for L layers, the base's number. A row
    whose map is longer uses several sets of blocks, called planes: position p of its map is stored
    in plane p // L, as layer p mod L.

    cache: all layers as one, L · num_blocks blocks. slots (K, T), tables (K, N, M) int64 for each
    plane, within one layer.
    """

    cache: KVCache
    slots: Tensor
    tables: Tensor
    num_layers: int
    block_size: int


@dataclass(frozen=True, slots=True)
class ReorderedBatch:
    """The base layers to run, in order, and which tokens run at each."""

    layers: tuple[int, ...]
    batch: LayerSteps


def reordered_batch(
    plan: ScheduledBatch, batch: ForwardBatch, cache: KVCache
) -> ReorderedBatch | None:
    """Lay out the layers of a step; None when every row visits each layer of the base once."""
    rows = plan.rows
    if all(scheduled.row.layer_map is None for scheduled in rows):
        return None
    num_layers = cache.keys.shape[0]
    maps = [scheduled.row.layer_map or tuple(range(num_layers)) for scheduled in rows]
    steps = shortest_order(frozenset(maps))
    num_planes = max(scheduled.row.num_planes for scheduled in rows)
    block_size = batch.attention.block_size
    planes = Planes(
        cache=cache.as_one_layer(),
        slots=torch.stack([cache_slots(rows, block_size, k) for k in range(num_planes)]),
        tables=torch.stack([block_tables(rows, k) for k in range(num_planes)]),
        num_layers=num_layers,
        block_size=block_size,
    )
    adapters: dict[tuple, StepMeta | None] = {}
    layer_steps = [_layer_step(step, rows, maps, planes, batch, adapters) for step in steps]
    return ReorderedBatch(tuple(step.layer for step in steps), LayerSteps(layer_steps))


def _layer_step(
    step: OrderStep,
    rows: Rows,
    maps: list[LayerMap],
    planes: Planes,
    batch: ForwardBatch,
    adapters: dict[tuple, StepMeta | None],
) -> LayerStep:
    """`adapters` keeps the tables of steps with the same rows at the same visits."""
    device = batch.token_ids.device
    places: Mapping[LayerMap, int] = dict(step.positions)
    here = [index for index, layer_map in enumerate(maps) if layer_map in places]
    own_rows = tuple(rows[index] for index in here)
    visits = tuple(replicas(maps[index])[places[maps[index]]] for index in here)
    if (key := (tuple(here), visits)) not in adapters:
        adapters[key] = StepMeta.build(spans(own_rows, visits), device)
    positions = torch.tensor([places[maps[index]] for index in here])
    tokens = torch.isin(row_of_token(rows), torch.tensor(here)).nonzero()[:, 0]
    meta = _attention(own_rows, here, positions, tokens, planes, batch)
    everyone = len(here) == len(rows)
    return LayerStep(
        tokens=None if everyone else to_device(tokens, device),
        attention=PagedAttention(planes.cache, meta, layer=0),
        adapters=adapters[key],
    )


def _attention(
    own_rows: Rows,
    here: list[int],
    positions: Tensor,
    tokens: Tensor,
    planes: Planes,
    batch: ForwardBatch,
) -> AttentionMeta:
    """The tables of one layer step: rows `here`, each at its own position (n,) of its map."""
    device = batch.token_ids.device
    plane, layer = positions // planes.num_layers, positions % planes.num_layers
    own_row = row_of_token(own_rows)
    slots_in_layer = planes.cache.num_cache_slots // planes.num_layers
    slots = planes.slots[plane[own_row], tokens] + layer[own_row] * slots_in_layer
    tables = planes.tables[plane, torch.tensor(here)]
    tables = tables + layer[:, None] * (slots_in_layer // planes.block_size)
    return AttentionMeta(
        rows=to_device(own_row.int(), device),
        positions=batch.attention.positions[to_device(tokens, device)],
        cache_slots=to_device(slots, device),
        block_tables=to_device(tables.int(), device),
        block_size=planes.block_size,
    )

"""A step whose rows visit the base's layers in different orders: which tokens run at which layer.

Rows with a layer map (PEFT's layer replication) and plain rows share one forward over the shortest
common supersequence of their maps; see `base/layer_order.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lora_runtime.base.model.attention import KVCache, PagedAttention
from lora_runtime.base.model.layer_steps import RowsAtStep, layer_steps
from lora_runtime.base.model.reordered_model import LayerSteps
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


def reordered_batch(plan: ScheduledBatch, batch: ForwardBatch, cache: KVCache) -> LayerSteps | None:
    """Lay out the layers of a step; None when every row visits each layer of the base once."""
    rows, device = plan.rows, batch.token_ids.device
    if all(scheduled.row.layer_map is None for scheduled in rows):
        return None
    num_layers = len(cache.layout.shapes)
    maps = [scheduled.row.layer_map or tuple(range(num_layers)) for scheduled in rows]
    num_planes = max(scheduled.row.num_planes for scheduled in rows)
    block_size = batch.attention.block_size
    planes = Planes(
        cache=cache.as_one_layer(),
        slots=torch.stack([cache_slots(rows, block_size, k) for k in range(num_planes)]),
        tables=torch.stack([block_tables(rows, k) for k in range(num_planes)]),
        num_layers=num_layers,
        block_size=block_size,
    )

    def attention(here: RowsAtStep) -> PagedAttention:
        return PagedAttention(planes.cache, _attention(rows, here, planes, batch), layer=0)

    def adapters(own: tuple[int, ...], visits: tuple[int, ...]) -> StepMeta | None:
        return StepMeta.build(spans(tuple(rows[index] for index in own), visits), device)

    lengths = [scheduled.num_tokens for scheduled in rows]
    return layer_steps(maps, lengths, device, attention, adapters)


def _attention(rows: Rows, here: RowsAtStep, planes: Planes, batch: ForwardBatch) -> AttentionMeta:
    """The tables of one layer step: of each row `here` at its own position of its map."""
    device, tokens = batch.token_ids.device, here.tokens
    positions = torch.tensor(here.positions)
    plane, layer = positions // planes.num_layers, positions % planes.num_layers
    own_row = row_of_token(tuple(rows[index] for index in here.rows))
    slots_in_layer = planes.cache.num_cache_slots // planes.num_layers
    slots = planes.slots[plane[own_row], tokens] + layer[own_row] * slots_in_layer
    tables = planes.tables[plane, torch.tensor(here.rows)]
    tables = tables + layer[:, None] * (slots_in_layer // planes.block_size)
    return AttentionMeta(
        rows=to_device(own_row.int(), device),
        positions=batch.attention.positions[to_device(tokens, device)],
        cache_slots=to_device(slots, device),
        block_tables=to_device(tables.int(), device),
        block_size=planes.block_size,
    )

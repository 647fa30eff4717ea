"""Logits of the base and of one adapter, outside the pool and the cache: for the parity gate."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lora_runtime.adapters.packed_adapter import PackedAdapter, pack_for
from lora_runtime.adapters.parity import Logits
from lora_runtime.adapters.pool import AdapterPool
from lora_runtime.adapters.serving_form import ServingForm
from lora_runtime.base.layer_plan import replicas
from lora_runtime.base.loader import Base
from lora_runtime.base.planned_model import LayerStep, PlannedBatch
from lora_runtime.base.varlen_attention import Rows, VarlenAttention
from lora_runtime.core import AdapterPlacement, activation_start
from lora_runtime.kernels import Span, StepMeta

TokenRows = Sequence[Sequence[int]]


def effect_of(base: Base, adapter: PackedAdapter) -> Logits:
    """What the parity gate asks: logits with and without the adapter."""
    return lambda rows, with_adapter: _logits(base, adapter if with_adapter else None, rows)


def probe_logits(base: Base, form: ServingForm | None, rows: TokenRows) -> list[Tensor]:
    """Logits (len(row), vocab) at every token of each row, under the adapter or the base.

    Runs on the caller's thread, which must be the only one that runs the base.
    """
    return _logits(base, None if form is None else pack_for(base, form), rows)


@torch.inference_mode()
def _logits(base: Base, adapter: PackedAdapter | None, rows: TokenRows) -> list[Tensor]:
    lengths = [len(row) for row in rows]
    attention = VarlenAttention([Rows(lengths)], base.device)
    token_ids = torch.tensor([token for row in rows for token in row])
    positions = torch.cat([torch.arange(length) for length in lengths])
    everywhere = torch.arange(len(token_ids), device=base.device)
    inputs = (token_ids.to(base.device), positions.to(base.device))
    if adapter is None:
        return list(base.forward(*inputs, attention, everywhere).split(lengths))
    meta = StepMeta.build(_spans(adapter, rows), base.device)
    layer_map = adapter.layer_map
    batch = attention if layer_map is None else _planned(layer_map, adapter, rows, base)
    with base.context.effect(meta, _pool_of(adapter, base).bindings, meta):
        logits = base.forward(*inputs, batch, everywhere, layer_map)
    return list(logits.split(lengths))


def _pool_of(adapter: PackedAdapter, base: Base) -> AdapterPool:
    like = torch.empty(0, dtype=adapter.dtype, device=base.device)
    pool = AdapterPool(base.spec.shapes, adapter.nbytes, 1, like)
    pool.load(AdapterPlacement(adapter.digest, slot=0, address=0), adapter)
    return pool


def _planned(
    layer_map: tuple[int, ...], adapter: PackedAdapter, rows: TokenRows, base: Base
) -> PlannedBatch:
    """Every row at every step of the one map."""
    attention = VarlenAttention([Rows([len(row) for row in rows])], base.device)
    return PlannedBatch(
        [
            LayerStep(None, attention, StepMeta.build(_spans(adapter, rows, visit), base.device))
            for visit in replicas(layer_map)
        ]
    )


def _spans(adapter: PackedAdapter, rows: TokenRows, replica: int = 0) -> list[Span]:
    """One span a row, from where the adapter acts."""
    spans, first_token = [], 0
    for row in rows:
        invocation = adapter.invocation_tokens
        start = activation_start(row, invocation) if invocation else 0
        if start is not None:
            span = Span(
                slot=0,
                first_token=first_token + start,
                num_tokens=len(row) - start,
                replica=replica,
            )
            spans.append(span)
        first_token += len(row)
    return spans

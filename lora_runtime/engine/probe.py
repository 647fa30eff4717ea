"""Logits of the base and of one adapter, outside the pool and the cache: for the parity gate."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lora_runtime.adapters.parity import Logits
from lora_runtime.adapters.pool import AdapterPool, adapter_dtype, packed_bytes
from lora_runtime.adapters.serving_form import ServingForm
from lora_runtime.base.layer_plan import replicas
from lora_runtime.base.loader import Base
from lora_runtime.base.planned_model import LayerStep, PlannedBatch
from lora_runtime.base.varlen_attention import Rows, VarlenAttention
from lora_runtime.core import AdapterPlacement, activation_start
from lora_runtime.kernels import Span, StepMeta

TokenRows = Sequence[Sequence[int]]


def effect_of(base: Base, form: ServingForm) -> Logits:
    """What the parity gate asks: logits with and without the adapter."""
    return lambda rows, with_adapter: probe_logits(base, form if with_adapter else None, rows)


@torch.inference_mode()
def probe_logits(base: Base, form: ServingForm | None, rows: TokenRows) -> list[Tensor]:
    """Logits (len(row), vocab) at every token of each row, under the adapter or the base.

    Runs on the caller's thread, which must be the only one that runs the base.
    """
    lengths = [len(row) for row in rows]
    attention = VarlenAttention([Rows(lengths)], base.device)
    token_ids = torch.tensor([token for row in rows for token in row])
    positions = torch.cat([torch.arange(length) for length in lengths])
    everywhere = torch.arange(len(token_ids), device=base.device)
    inputs = (token_ids.to(base.device), positions.to(base.device))
    if form is None:
        return list(base.forward(*inputs, attention, everywhere).split(lengths))
    meta = StepMeta.build(_spans(form, rows), base.device)
    batch = attention if form.layer_map is None else _planned(form.layer_map, form, rows, base)
    with base.context.effect(meta, _pool_of(form, base).bindings, meta):
        logits = base.forward(*inputs, batch, everywhere, form.layer_map)
    return list(logits.split(lengths))


def _pool_of(form: ServingForm, base: Base) -> AdapterPool:
    like = torch.empty(0, dtype=adapter_dtype(base), device=base.device)
    pool = AdapterPool(base.spec.shapes, packed_bytes(form, like.itemsize), 1, like)
    pool.load(AdapterPlacement(form.digest, slot=0, address=0), form)
    return pool


def _planned(
    layer_map: tuple[int, ...], form: ServingForm, rows: TokenRows, base: Base
) -> PlannedBatch:
    """Every row at every step of the one map."""
    attention = VarlenAttention([Rows([len(row) for row in rows])], base.device)
    return PlannedBatch(
        [
            LayerStep(None, attention, StepMeta.build(_spans(form, rows, visit), base.device))
            for visit in replicas(layer_map)
        ]
    )


def _spans(form: ServingForm, rows: TokenRows, replica: int = 0) -> list[Span]:
    """One span a row, from where the adapter acts."""
    spans, first_token = [], 0
    for row in rows:
        start = activation_start(row, form.invocation_tokens) if form.invocation_tokens else 0
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

"""Logits of base and adapter for the parity gate, outside the engine's pool and cache."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from lora_runtime.adapters.packed_adapter import PackedAdapter, pack_for
from lora_runtime.adapters.parity import Logits
from lora_runtime.adapters.pool import AdapterPool
from lora_runtime.adapters.serving_form import ServingForm
from lora_runtime.base.loader import Base
from lora_runtime.base.model.layer_order import LayerMap
from lora_runtime.base.model.layer_steps import layer_steps
from lora_runtime.base.model.reordered_model import LayerSteps
from lora_runtime.base.model.varlen_attention import RowLengths, VarlenAttention
from lora_runtime.core import AdapterPlacement, activation_start
from lora_runtime.kernels import SlotUse, Span, StepMeta, spans_of_rows

TokenRows = Sequence[Sequence[int]]


def adapter_logits(base: Base, adapter: PackedAdapter) -> Logits:
    """A function from token ids to logits for the parity gate, computed by the kernels that serve.

    The function must be called on the thread that runs the base. The first call with the adapter
    copies it to the device.
    """
    pool = cache(lambda: _pool_of(adapter, base))

    def logits(row: Sequence[int], positions: Sequence[int], with_adapter: bool) -> Tensor:
        bound = _Bound(adapter, pool()) if with_adapter else None
        return _logits(base, bound, [row], positions)

    return logits


def probe_logits(base: Base, form: ServingForm | None, rows: TokenRows) -> list[Tensor]:
    """Logits (len(row), vocab) at every token of each row, under the adapter or the base.

    Runs on the caller's thread, which must be the only one that runs the base.
    """
    adapter = None if form is None else pack_for(base, form)
    bound = None if adapter is None else _Bound(adapter, _pool_of(adapter, base))
    lengths = [len(row) for row in rows]
    return list(_logits(base, bound, rows, range(sum(lengths))).split(lengths))


class _Bound(NamedTuple):
    """An adapter, and a pool of its own that holds it."""

    adapter: PackedAdapter
    pool: AdapterPool


@torch.inference_mode()
def _logits(base: Base, bound: _Bound | None, rows: TokenRows, logits_at: Sequence[int]) -> Tensor:
    """Logits (n, vocab) at the tokens `logits_at` of all rows laid end to end."""
    lengths = [len(row) for row in rows]
    attention = VarlenAttention([RowLengths(lengths)], base.device)
    token_ids = torch.tensor([token for row in rows for token in row])
    positions = torch.cat([torch.arange(length) for length in lengths])
    wanted = torch.tensor(logits_at, device=base.device)
    inputs = (token_ids.to(base.device), positions.to(base.device))
    if bound is None:
        return base.forward(*inputs, attention, wanted)
    spans = _spans(bound.adapter, rows)
    meta = StepMeta.build(spans, base.device)
    head_meta = StepMeta.build(_spans_of_wanted(spans, logits_at), base.device)
    layer_map = bound.adapter.facts.layer_map
    steps = None if layer_map is None else _layer_steps(layer_map, bound.adapter, rows, base)
    with base.context.adapters(meta, bound.pool.bindings, head_meta):
        return base.forward(*inputs, steps or attention, wanted)


def _pool_of(adapter: PackedAdapter, base: Base) -> AdapterPool:
    like = torch.empty(0, dtype=adapter.dtype, device=base.device)
    pool = AdapterPool(base.spec.shapes, adapter.nbytes, 1, like)
    pool.load(AdapterPlacement(adapter.digest, slot=0, address=0), adapter)
    return pool


def _layer_steps(
    layer_map: LayerMap, adapter: PackedAdapter, rows: TokenRows, base: Base
) -> LayerSteps:
    """The steps of one layer map that all rows share."""
    lengths = [len(row) for row in rows]
    attention = VarlenAttention([RowLengths(lengths)], base.device)

    def adapters(_: tuple[int, ...], visits: tuple[int, ...]) -> StepMeta | None:
        return StepMeta.build(_spans(adapter, rows, visits), base.device)

    maps = [layer_map] * len(rows)
    return layer_steps(maps, lengths, base.device, lambda _: attention, adapters)


def _spans(
    adapter: PackedAdapter, rows: TokenRows, replicas: Sequence[int] | None = None
) -> list[Span]:
    """A span for each row on which the adapter acts, from the first token on which it does."""
    invocation = adapter.facts.invocation_tokens
    starts = [activation_start(row, invocation) if invocation else 0 for row in rows]
    uses = [[] if start is None else [SlotUse(0, start=start)] for start in starts]
    return spans_of_rows([len(row) for row in rows], uses, replicas)


def _spans_of_wanted(spans: Sequence[Span], logits_at: Sequence[int]) -> list[Span]:
    """The spans of the tokens `logits_at` alone, which are numbered by their place in it."""
    adapted = {token for span in spans for token in range(span.rows.start, span.rows.stop)}
    return [
        Span(slot=0, first_token=index, num_tokens=1)
        for index, token in enumerate(logits_at)
        if token in adapted
    ]

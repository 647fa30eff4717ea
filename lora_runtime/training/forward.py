"""One forward of several units' rows, each under its own adapter and in its own order of layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor

from lora_runtime.base.adapted_linear import Binding
from lora_runtime.base.attention import VarlenAttention
from lora_runtime.base.layer_plan import LayerMap, PlanStep, replicas, shortest_plan
from lora_runtime.base.loader import Base
from lora_runtime.base.planned_model import LayerStep, PlannedBatch
from lora_runtime.kernels import Span, StepMeta


@dataclass(frozen=True, slots=True)
class UnitRows:
    """Consecutive rows of one unit: their lengths, and the base layers in the order in which they
    visit them, None for each once.
    """

    lengths: Sequence[int]
    layer_map: LayerMap | None = None


def forward(
    base: Base,
    units: Sequence[UnitRows],
    bindings: Mapping[str, Binding],
    token_ids: Tensor,
    position_ids: Tensor,
    logits_at: Tensor,
) -> Tensor:
    """Logits (n, vocab) of the tokens `logits_at` (n,) of all rows end to end, token_ids (T,).

    Unit n is slot n of `bindings`. Differentiable in what they hold.
    """
    lengths = [length for unit in units for length in unit.lengths]
    tokens = token_ids, position_ids
    with base.context.effect(StepMeta.build(_spans(units), base.device), bindings):
        if all(unit.layer_map is None for unit in units):
            return base.forward(*tokens, VarlenAttention(lengths), logits_at)
        plain = tuple(range(base.spec.num_layers))
        maps = [unit.layer_map or plain for unit in units]
        plan = shortest_plan(frozenset(maps))
        batch = PlannedBatch([_layer_step(step, units, maps, base.device) for step in plan])
        return base.forward(*tokens, batch, logits_at, tuple(step.layer for step in plan))


def _spans(units: Sequence[UnitRows]) -> list[Span]:
    """Unit n's rows follow those of unit n - 1."""
    sizes = [sum(unit.lengths) for unit in units]
    starts = accumulate(sizes, initial=0)
    return [
        Span(slot=slot, first_token=start, num_tokens=size)
        for slot, (start, size) in enumerate(zip(starts, sizes, strict=False))
    ]


def _layer_step(
    step: PlanStep, units: Sequence[UnitRows], maps: Sequence[LayerMap], device: torch.device
) -> LayerStep:
    """The rows whose map takes this step, and which visit of its layer it is for them."""
    places: Mapping[LayerMap, int] = dict(step.positions)
    spans = [span for span in _spans(units) if maps[span.slot] in places]
    starts = accumulate((span.num_tokens for span in spans), initial=0)
    own = [
        replace(span, first_token=start, replica=replicas(maps[span.slot])[places[maps[span.slot]]])
        for span, start in zip(spans, starts, strict=False)
    ]
    tokens = [torch.arange(s.first_token, s.first_token + s.num_tokens) for s in spans]
    return LayerStep(
        tokens=None if len(spans) == len(units) else torch.cat(tokens).to(device),
        attention=VarlenAttention([n for span in spans for n in units[span.slot].lengths]),
        adapters=StepMeta.build(own, device),
    )

"""One forward of several units' rows, each under its own adapter and in its own order of layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import accumulate

import torch
from torch import Tensor

from lora_runtime.base.loader import Base
from lora_runtime.base.model.adapted_linear import Binding
from lora_runtime.base.model.layer_order import LayerMap, OrderStep, replicas, shortest_order
from lora_runtime.base.model.reordered_model import LayerStep, LayerSteps
from lora_runtime.base.model.varlen_attention import RowLengths, VarlenAttention
from lora_runtime.kernels import Span

Bindings = Mapping[str, Binding]


@dataclass(frozen=True, slots=True)
class UnitRows:
    """Consecutive rows of one unit, and the base layers in the order in which they visit them, None
    for each once.
    """

    rows: Sequence[RowLengths]
    layer_map: LayerMap | None = None


def hidden_states(
    base: Base,
    units: Sequence[UnitRows],
    bindings: Bindings,
    token_ids: Tensor,
    position_ids: Tensor,
) -> Tensor:
    """What the output layer is given of every token (T, H): all rows end to end, token_ids (T,).

    Unit n is slot n of `bindings`. Differentiable in what they hold.
    """
    tokens = token_ids, position_ids

    @cache
    def attention(slots: tuple[int, ...]) -> VarlenAttention:
        return VarlenAttention([rows for s in slots for rows in units[s].rows], base.device)

    spans = _spans(units)
    with base.context.adapters(spans, bindings):
        if all(unit.layer_map is None for unit in units):
            return base.hidden_states(*tokens, attention(tuple(range(len(units)))))
        plain = tuple(range(base.spec.num_layers))
        maps = [unit.layer_map or plain for unit in units]
        plan = shortest_order(frozenset(maps))
        steps = [_layer_step(step, spans, maps, attention, base.device) for step in plan]
        batch = LayerSteps(steps)
        return base.hidden_states(*tokens, batch, tuple(step.layer for step in plan))


def logits(base: Base, bindings: Bindings, states: Tensor, counts: Sequence[int]) -> Tensor:
    """Logits (n, vocab) of tokens whose hidden states (n, H) are given, counts[u] of unit u in
    turn.
    """
    with base.context.adapters(None, bindings, list(spans_of(counts))):
        return base.logits(states)


def spans_of(sizes: Sequence[int]) -> Iterator[Span]:
    """Unit n's tokens follow those of unit n - 1."""
    for slot, (start, size) in enumerate(zip(accumulate(sizes, initial=0), sizes, strict=False)):
        yield Span(slot=slot, first_token=start, num_tokens=size)


def _spans(units: Sequence[UnitRows]) -> list[Span]:
    return list(spans_of([sum(rows.num_tokens for rows in unit.rows) for unit in units]))


def states_of_rows(
    base: Base, bindings: Bindings, rows: Sequence[Tensor], layer_map: LayerMap | None
) -> Tensor:
    """`hidden_states` of whole rows of token ids (n,) of one unit, end to end."""
    lengths = [len(row) for row in rows]
    positions = torch.cat([torch.arange(length) for length in lengths])
    unit = UnitRows([RowLengths(lengths)], layer_map)
    tokens = torch.cat(list(rows)).to(base.device), positions.to(base.device)
    return hidden_states(base, [unit], bindings, *tokens)


def _layer_step(
    step: OrderStep,
    every: Sequence[Span],
    maps: Sequence[LayerMap],
    attention: Callable[[tuple[int, ...]], VarlenAttention],
    device: torch.device,
) -> LayerStep:
    """The rows whose map takes this step, and which visit of its layer it is for them."""
    places: Mapping[LayerMap, int] = dict(step.positions)
    spans = [span for span in every if maps[span.slot] in places]
    starts = accumulate((span.num_tokens for span in spans), initial=0)
    own = [
        replace(span, first_token=start, replica=replicas(maps[span.slot])[places[maps[span.slot]]])
        for span, start in zip(spans, starts, strict=False)
    ]
    tokens = [torch.arange(span.rows.start, span.rows.stop) for span in spans]
    return LayerStep(
        tokens=None if len(spans) == len(every) else torch.cat(tokens).to(device),
        attention=attention(tuple(span.slot for span in spans)),
        adapters=own,
    )

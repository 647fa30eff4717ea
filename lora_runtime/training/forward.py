"""One forward of several units' rows, each under its own adapter and in its own order of layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from lora_runtime.base.loader import Base
from lora_runtime.base.model.adapted_linear import Binding
from lora_runtime.base.model.layer_order import LayerMap
from lora_runtime.base.model.layer_steps import layer_steps
from lora_runtime.base.model.varlen_attention import RowLengths, VarlenAttention
from lora_runtime.kernels import SlotUse, Span, spans_of_rows

Bindings = Mapping[str, Binding[Sequence[Span]]]
"""Path of a module → what the units train there."""


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

    lengths = [sum(rows.num_tokens for rows in unit.rows) for unit in units]

    def spans(slots: tuple[int, ...], visits: tuple[int, ...]) -> list[Span]:
        return _spans_of([lengths[s] for s in slots], slots, visits)

    every = tuple(range(len(units)))
    with base.context.adapters(_spans_of(lengths, every), bindings):
        if all(unit.layer_map is None for unit in units):
            return base.hidden_states(*tokens, attention(every))
        plain = tuple(range(base.spec.num_layers))
        maps = [unit.layer_map or plain for unit in units]
        steps = layer_steps(maps, lengths, base.device, lambda here: attention(here.rows), spans)
        return base.hidden_states(*tokens, steps)


def logits(base: Base, bindings: Bindings, states: Tensor, counts: Sequence[int]) -> Tensor:
    """Logits (n, vocab) of tokens whose hidden states (n, H) are given, counts[u] of unit u in
    turn.
    """
    with base.context.adapters(None, bindings, _spans_of(counts, range(len(counts)))):
        return base.logits(states)


def _spans_of(
    lengths: Sequence[int], slots: Sequence[int], visits: Sequence[int] | None = None
) -> list[Span]:
    """One span for each unit's tokens, which follow those of the unit before it."""
    return spans_of_rows(lengths, [[SlotUse(slot)] for slot in slots], visits)


def states_of_rows(
    base: Base, bindings: Bindings, rows: Sequence[Tensor], layer_map: LayerMap | None
) -> Tensor:
    """`hidden_states` of whole rows of token ids (n,) of one unit, end to end."""
    lengths = [len(row) for row in rows]
    positions = torch.cat([torch.arange(length) for length in lengths])
    unit = UnitRows([RowLengths(lengths)], layer_map)
    tokens = torch.cat(list(rows)).to(base.device), positions.to(base.device)
    return hidden_states(base, [unit], bindings, *tokens)

"""From the layer maps of a forward's rows to the LayerSteps that run them together.

Serving, training and the parity gate all lay out their layers here. What differs between them, the
attention over the rows of a step and the adapters that act on them, they give as functions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from lora_runtime.base.model.attention import Attention
from lora_runtime.base.model.layer_order import LayerMap, replicas, shortest_order
from lora_runtime.base.model.reordered_model import LayerStep, LayerSteps
from lora_runtime.kernels import to_device


@dataclass(frozen=True, slots=True)
class RowsAtStep:
    """The rows of a forward that run at one step of the layer order.

    rows: their indices, ascending. positions: for each the step's index in its layer map. visits:
    for each how often its map has visited this layer before. tokens (n,) int64, on the host: which
    of the forward's tokens are theirs.
    """

    rows: tuple[int, ...]
    positions: tuple[int, ...]
    visits: tuple[int, ...]
    tokens: Tensor


def layer_steps(
    maps: Sequence[LayerMap],
    lengths: Sequence[int],
    device: torch.device | str,
    attention: Callable[[RowsAtStep], Attention],
    adapters: Callable[[tuple[int, ...], tuple[int, ...]], Any],
) -> LayerSteps:
    """The shortest order of layers that serves rows laid end to end, lengths[i] tokens of maps[i].

    `attention` is asked for every step. `adapters` is asked once for the same rows at the same
    visits: given (rows, visits) as in RowsAtStep, it returns what the bindings take for their
    tokens, laid end to end.
    """
    visits = [replicas(layer_map) for layer_map in maps]
    starts = list(accumulate(lengths, initial=0))
    acting = cache(adapters)

    @cache
    def tokens_of(rows: tuple[int, ...]) -> tuple[Tensor, Tensor | None]:
        """On the host, and as a LayerStep wants them."""
        tokens = torch.cat([torch.arange(starts[row], starts[row + 1]) for row in rows])
        return tokens, None if len(rows) == len(maps) else to_device(tokens, device)

    def step_of(layer: int, places: dict[LayerMap, int]) -> LayerStep:
        rows = tuple(row for row, layer_map in enumerate(maps) if layer_map in places)
        positions = tuple(places[maps[row]] for row in rows)
        seen = tuple(visits[row][at] for row, at in zip(rows, positions, strict=True))
        on_host, tokens = tokens_of(rows)
        here = RowsAtStep(rows, positions, seen, on_host)
        return LayerStep(layer, tokens, attention(here), acting(rows, seen))

    order = shortest_order(frozenset(maps))
    return LayerSteps([step_of(step.layer, dict(step.positions)) for step in order])

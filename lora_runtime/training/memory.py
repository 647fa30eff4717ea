"""Forwards that memory does not take: made smaller and run again, with the same result.

Losses are sums over examples, so what shares a forward changes nothing but its size. Nothing of an
attempt that failed stays: gradients are added when every process has all of its own.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import Parameter

from lora_runtime.training.data import Example, num_tokens
from lora_runtime.training.distributed import World
from lora_runtime.training.units import Unit, UnitStatus

Say = Callable[[str], None]
Gradients = Sequence[tuple[Parameter, Tensor]]
Compute = Callable[[Sequence[Unit], Sequence[Sequence[Example]]], tuple[Sequence[float], Gradients]]
"""Units and the examples of each → a value for each, and gradients."""
NextBatch = Callable[[Unit, int], Sequence[Example]]
"""A unit and a process → what it computes next there, which may be nothing."""


def in_forwards(
    units: Sequence[Unit],
    next_batch: NextBatch,
    compute: Compute,
    world: World,
    say: Say,
) -> Iterator[tuple[Sequence[Unit], Sequence[float]]]:
    """Compute the next batch of every unit, in one forward if that fits, and add the gradients.

    Yields the units of each forward with their values, summed over the processes. A unit of which
    not one example fits fails and is left out.
    """
    left = list(units)
    while left:
        group = [unit for unit in left if not unit.limits.is_alone] or left[:1]
        own = [(unit, next_batch(unit, world.rank)) for unit in group]
        values = _attempt(own, compute, world)
        if values is None:
            batches = [[next_batch(unit, rank) for rank in range(world.size)] for unit in group]
            _make_smaller(group, [max(batch, key=_order) for batch in batches], say)
        else:
            yield group, values
            left = [unit for unit in left if unit not in group]
        left = [unit for unit in left if unit.status is not UnitStatus.FAILED]


def _attempt(
    batches: Sequence[tuple[Unit, Sequence[Example]]], compute: Compute, world: World
) -> list[float] | None:
    """The units' values, or None when some process has no memory for its part."""
    own = [(unit, batch) for unit, batch in batches if batch]
    values: dict[str, float] = {}
    gradients: Gradients = ()
    is_short = False
    try:
        if own:
            found, gradients = compute([unit for unit, _ in own], [batch for _, batch in own])
            values = {unit.name: value for (unit, _), value in zip(own, found, strict=True)}
    except torch.OutOfMemoryError:
        is_short = True
    num_short, *sums = world.total([is_short, *(values.get(u.name, 0.0) for u, _ in batches)])
    if num_short:
        del gradients
        if torch.cuda.is_initialized():
            gc.collect()  # what a backward was at when it failed may refer to itself
            torch.cuda.empty_cache()
        return None
    for parameter, gradient in gradients:
        parameter.grad.add_(gradient)
    return sums


def _make_smaller(units: Sequence[Unit], batches: Sequence[Sequence[Example]], say: Say) -> None:
    """Halve the largest batch of several examples; if there is none, set the largest unit apart."""
    unit, batch = max(zip(units, batches, strict=True), key=lambda pair: _order(pair[1]))
    if len(batch) > 1:
        say(f"{unit.name}: out of memory; from here on forwards of {unit.limits.halve(batch)}")
    elif len(units) > 1:
        unit.limits.is_alone = True
        say(f"{unit.name}: out of memory; from here on it has forwards of its own")
    else:
        unit.fail(
            f"out of memory with one example of {num_tokens(batch[0])} tokens; lower "
            "max_seq_len or set activation_checkpointing"
        )


def _order(batch: Sequence[Example]) -> tuple[bool, int]:
    return len(batch) > 1, sum(map(num_tokens, batch))

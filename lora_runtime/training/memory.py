"""Forwards that memory does not take: made smaller and run again, with the same result.

Losses are sums over examples, so what shares a forward changes nothing but its size. Nothing of an
attempt that failed stays: gradients are added when every process has all of its own.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from itertools import chain

import torch
from torch import Tensor
from torch.nn import Parameter

from lora_runtime.training.data import Item, num_tokens
from lora_runtime.training.distributed import World
from lora_runtime.training.preferences import NOTHING, Signal
from lora_runtime.training.units import Unit, UnitStatus

Say = Callable[[str], None]
Gradients = Sequence[tuple[Parameter, Tensor]]
Compute = Callable[[Sequence[Unit], Sequence[Sequence[Item]]], tuple[Sequence[Signal], Gradients]]
"""Units and the items of each → what each shows, and gradients."""
Batches = Sequence[Sequence[Item]]
"""What a unit computes next on every process, which may be nothing on some."""
NextBatches = Callable[[Unit], Batches]


TOKENS_PER_FORWARD = {"cpu": 2048, "cuda": 8192}
"""What units may have together in one forward, by device: about where products no longer get faster
with more rows, while activations keep growing. A GPU first pays for every layer's dequantisation,
which costs the same for any number of rows.
"""
LEAST_PER_FORWARD = min(TOKENS_PER_FORWARD.values())


def in_forwards(
    units: Sequence[Unit],
    next_batches: NextBatches,
    compute: Compute,
    world: World,
    say: Say,
) -> Iterator[tuple[Sequence[Unit], Sequence[Signal]]]:
    """Compute the next batch of every unit in few forwards, and add the gradients.

    Yields the units of each forward with their signals, summed over the processes. A unit of which
    not one example fits fails and is left out.
    """
    left = list(units)
    while left:
        group = _next_group(left, next_batches)
        members = [unit for unit, _ in group]
        values = _attempt([(unit, batches[world.rank]) for unit, batches in group], compute, world)
        if values is None and len(group) > 1 and _num_tokens(group) > LEAST_PER_FORWARD:
            _share_less(members, _num_tokens(group) // 2, say)
        elif values is None:
            _make_smaller(members, [max(batches, key=_order) for _, batches in group], say)
        else:
            yield members, values
            left = [unit for unit in left if unit not in members]
        left = [unit for unit in left if unit.status is not UnitStatus.FAILED]


def _next_group(units: Sequence[Unit], next_batches: NextBatches) -> list[tuple[Unit, Batches]]:
    """The first units that share a forward within TOKENS_PER_FORWARD on every process, or within
    what memory took.
    """
    group: list[tuple[Unit, Batches]] = []
    most = TOKENS_PER_FORWARD[units[0].device.type]
    for unit in [unit for unit in units if not unit.limits.is_alone] or units[:1]:
        larger = [*group, (unit, next_batches(unit))]
        most = min(most, unit.limits.num_shared_tokens or most)
        if group and _num_tokens(larger) > most:
            break
        group = larger
    return group


def _num_tokens(group: Sequence[tuple[Unit, Batches]]) -> int:
    """Of a forward on the process that has the most."""
    sums = [[sum(map(num_tokens, batch)) for batch in batches] for _, batches in group]
    return max(map(sum, zip(*sums, strict=True)))


def _attempt(
    batches: Sequence[tuple[Unit, Sequence[Item]]], compute: Compute, world: World
) -> list[Signal] | None:
    """The units' signals, or None when some process has no memory for its part."""
    own = [(unit, batch) for unit, batch in batches if batch]
    values: dict[str, Signal] = {}
    gradients: Gradients = ()
    is_short = False
    try:
        if own:
            found, gradients = compute([unit for unit, _ in own], [batch for _, batch in own])
            values = {unit.name: value for (unit, _), value in zip(own, found, strict=True)}
    except torch.OutOfMemoryError:
        is_short = True
    own_sums = chain.from_iterable(values.get(unit.name, NOTHING) for unit, _ in batches)
    num_short, *sums = world.total([is_short, *own_sums])
    if num_short:
        del gradients
        if torch.cuda.is_initialized():
            gc.collect()  # what a backward was at when it failed may refer to itself
            torch.cuda.empty_cache()
        return None
    if gradients:
        torch._foreach_add_([p.grad for p, _ in gradients], [gradient for _, gradient in gradients])
    return [Signal(*three) for three in zip(*[iter(sums)] * len(NOTHING), strict=True)]


def _share_less(units: Sequence[Unit], most: int, say: Say) -> None:
    """Let them have fewer tokens together, before any of them gets smaller forwards."""
    for unit in units:
        unit.limits.num_shared_tokens = most
    say(f"out of memory; from here on {len(units)} units share forwards of up to {most} tokens")


def _make_smaller(units: Sequence[Unit], batches: Sequence[Sequence[Item]], say: Say) -> None:
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


def _order(batch: Sequence[Item]) -> tuple[bool, int]:
    return len(batch) > 1, sum(map(num_tokens, batch))

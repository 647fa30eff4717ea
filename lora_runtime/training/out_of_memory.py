"""Divide units among forwards; after an out-of-memory error retry with smaller batches.

The result stays the same: losses are sums over examples, so what shares a forward changes nothing
but its size. Here only sizes change: what a forward computed is handed on, and what a failed one
computed is dropped on every process.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

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
"""(units, the items of each) → (the signal of each, the gradients of their parameters)."""
Batches = Sequence[Sequence[Item]]
"""Per process, the items of a unit's next forward; may be empty for some processes."""
NextBatches = Callable[[Unit], Batches]


TOKENS_PER_FORWARD = {"cpu": 2048, "cuda": 8192}
"""Most tokens of all units together in one forward, by device: about where products stop getting
faster with more rows, while activations keep growing. A GPU first pays for every layer's
dequantisation, which costs the same for any number of rows.
"""
LEAST_PER_FORWARD = min(TOKENS_PER_FORWARD.values())
"""Forwards of more tokens than this are divided among the units before any unit's own are."""


class Forward(NamedTuple):
    """One forward that every process had the memory for."""

    units: Sequence[Unit]
    signals: Sequence[Signal]
    """Of each unit, summed over the processes."""
    gradients: Gradients
    """This process's own."""


def in_forwards(
    units: Sequence[Unit],
    next_batches: NextBatches,
    compute: Compute,
    world: World,
    say: Say,
) -> Iterator[Forward]:
    """Compute the next batch of every unit in as few forwards as memory allows; yield each.

    A unit of which not even one example fits fails and is left out. `say` is told of every change.
    """
    left = list(units)
    while left:
        group = _next_group(left, next_batches)
        members = [unit for unit, _ in group]
        result = _attempt([(unit, batches[world.rank]) for unit, batches in group], compute, world)
        if result is not None:
            yield Forward(members, *result)
            left = [unit for unit in left if unit not in members]
        elif len(group) > 1 and _num_tokens(group) > LEAST_PER_FORWARD:
            _share_less(members, _num_tokens(group) // 2, say)
        else:
            _make_smaller(members, [_largest_share(batches) for _, batches in group], say)
        del result  # or its gradients would stay alive during the next forward
        left = [unit for unit in left if unit.status is not UnitStatus.FAILED]


def _next_group(units: Sequence[Unit], next_batches: NextBatches) -> list[tuple[Unit, Batches]]:
    """The first units whose batches share a forward: within TOKENS_PER_FORWARD on every process,
    and within what memory was found to take.
    """
    group: list[tuple[Unit, Batches]] = []
    most = TOKENS_PER_FORWARD[units[0].device.type]
    # Units that need a forward of their own come last, one at a time.
    for unit in [unit for unit in units if not unit.limits.is_alone] or units[:1]:
        larger = [*group, (unit, next_batches(unit))]
        most = min(most, unit.limits.num_shared_tokens or most)
        if group and _num_tokens(larger) > most:
            break
        group = larger
    return group


def _num_tokens(group: Sequence[tuple[Unit, Batches]]) -> int:
    """Tokens of a forward on the process that has the most."""
    sums = [[sum(map(num_tokens, batch)) for batch in batches] for _, batches in group]
    return max(map(sum, zip(*sums, strict=True)))


def _attempt(
    batches: Sequence[tuple[Unit, Sequence[Item]]], compute: Compute, world: World
) -> tuple[list[Signal], Gradients] | None:
    """Signals summed over the processes and own gradients; None if any process ran out of memory.

    All processes call it together, those that have no items of their own as well.
    """
    own = [(unit, batch) for unit, batch in batches if batch]
    by_name: dict[str, Signal] = {}
    gradients: Gradients = ()
    is_short = False
    try:
        if own:
            found, gradients = compute([unit for unit, _ in own], [batch for _, batch in own])
            by_name = {unit.name: signal for (unit, _), signal in zip(own, found, strict=True)}
    except torch.OutOfMemoryError:
        is_short = True
    signals = [by_name.get(unit.name, NOTHING) for unit, _ in batches]
    # One reduction for the flag and the signals: each is a round trip between the processes.
    num_short, *sums = world.total([is_short, *(value for signal in signals for value in signal)])
    if num_short:
        del gradients
        if torch.cuda.is_initialized():
            gc.collect()  # what a backward was at when it failed may refer to itself
            torch.cuda.empty_cache()
        return None
    size = len(NOTHING)
    return [Signal(*sums[i : i + size]) for i in range(0, len(sums), size)], gradients


def _share_less(units: Sequence[Unit], most: int, say: Say) -> None:
    """Let the units have fewer tokens together, before any of them gets smaller forwards."""
    for unit in units:
        unit.limits.num_shared_tokens = most
    say(f"out of memory; from here on {len(units)} units share forwards of up to {most} tokens")


def _make_smaller(units: Sequence[Unit], batches: Sequence[Sequence[Item]], say: Say) -> None:
    """Halve the largest batch of several examples; if there is none, set the largest unit apart."""
    unit, batch = max(zip(units, batches, strict=True), key=lambda pair: _size(pair[1]))
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


def _largest_share(batches: Batches) -> Sequence[Item]:
    """The largest of the processes' batches of one unit."""
    return max(batches, key=_size)


def _size(batch: Sequence[Item]) -> tuple[bool, int]:
    """Batches that can be divided count as larger than those of one item."""
    return len(batch) > 1, sum(map(num_tokens, batch))

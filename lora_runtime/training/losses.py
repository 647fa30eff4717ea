"""Losses: cross-entropy of target tokens, or DPO of pairs, from one forward of all units' rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lora_runtime.adapters.parity import Logits
from lora_runtime.base.loader import Base
from lora_runtime.base.model.adapted_linear import Routed
from lora_runtime.base.model.layer_order import LayerMap
from lora_runtime.training.binding import bind
from lora_runtime.training.data import Example, Item, PackedBatch
from lora_runtime.training.forward import (
    Bindings,
    UnitRows,
    hidden_states,
    logits,
    states_of_rows,
)
from lora_runtime.training.preferences import pair_sums
from lora_runtime.training.routing_loss import balance_loss
from lora_runtime.training.units import Unit

CHUNK_LOGITS = 1 << 25
"""Most logits that are alive at once. Where there are more, they are computed in chunks, each of
them a second time for the gradient.
"""


def window_losses(base: Base, units: Sequence[Unit], batches: Sequence[Sequence[Item]]) -> Tensor:
    """Each unit's share of its window's means (N, 3), as `loss_sums` has the sums.

    Share = sum over the micro-batch / target tokens, or pairs, of the whole window, so that
    micro-batches of any lengths add up to the mean over the window.
    """
    sums = loss_sums(base, units, batches)
    return torch.stack([own / unit.window_weight for own, unit in zip(sums, units, strict=True)])


def loss_sums(base: Base, units: Sequence[Unit], batches: Sequence[Sequence[Item]]) -> Tensor:
    """The sums of a `Signal` over each unit's items (N, 3), from one forward of all rows.

    Losses are those of target tokens, or of pairs; only they are differentiable.
    """
    examples = [[example for item in items for example in item.examples] for items in batches]
    _add_references(base, units, examples)
    with base.context.collecting() as routed:
        losses = token_losses(base, units, examples)
    parts = torch.split(losses, [_num_targets(some) for some in examples])
    sums = torch.stack([_sums(*each) for each in zip(units, examples, parts, strict=True)])
    return sums + F.pad(_routing_losses(units, batches, routed, losses)[:, None], (0, 2))


def _routing_losses(
    units: Sequence[Unit],
    batches: Sequence[Sequence[Item]],
    routed: Sequence[Routed],
    like: Tensor,
) -> Tensor:
    """Each unit's auxiliary loss (N,) times the weight of its items, as sums have it."""
    found = []
    for slot, (unit, items) in enumerate(zip(units, batches, strict=True)):
        weight = unit.config.router_aux_loss * sum(item.weight for item in items)
        found.append(weight * balance_loss(routed, slot) if weight else like.new_zeros(()))
    return torch.stack(found)


def _sums(unit: Unit, examples: Sequence[Example], losses: Tensor) -> Tensor:
    if not unit.dataset.is_preference:
        return F.pad(losses.sum()[None], (0, 2))
    counts = [len(example.predictors) for example in examples]
    policy = -torch.stack([part.sum() for part in torch.split(losses, counts)])
    reference = [unit.references[unit.layer_map, example] for example in examples]
    return pair_sums(policy, policy.new_tensor(reference), policy.new_tensor(counts), unit.config)


@torch.no_grad()
def _add_references(
    base: Base, units: Sequence[Unit], batches: Sequence[Sequence[Example]]
) -> None:
    """Fill in log π₀ of those answers of preferences whose reference is not known yet."""
    missing: dict[LayerMap | None, dict[Example, None]] = {}
    for unit, examples in zip(units, batches, strict=True):
        for example in examples if unit.dataset.is_preference else ():
            if (unit.layer_map, example) not in unit.references:
                missing.setdefault(unit.layer_map, {})[example] = None
    if not missing:
        return
    # Units of one layer map share references: one forward without adapters, a slot per layer map.
    keys = [(layer_map, example) for layer_map, own in missing.items() for example in own]
    losses = _token_losses(base, {}, list(missing), [list(own) for own in missing.values()])
    parts = torch.split(losses, [len(example.predictors) for _, example in keys])
    found = (-torch.stack([part.sum() for part in parts])).tolist()
    for unit in units:
        unit.references.update(zip(keys, found, strict=True))


def token_losses(base: Base, units: Sequence[Unit], batches: Sequence[Sequence[Example]]) -> Tensor:
    """−log p of every target token under its unit's adapter, (n,) in float32 or better."""
    return _token_losses(base, bind(units, base), [unit.layer_map for unit in units], batches)


def _token_losses(
    base: Base,
    bindings: Bindings,
    layer_maps: Sequence[LayerMap | None],
    batches: Sequence[Sequence[Example]],
) -> Tensor:
    """−log p of all targets; batch n is read under slot n and in its own order of layers."""
    batch = PackedBatch.of(batches, base.device)
    rows = list(map(UnitRows, batch.rows, layer_maps))
    states = hidden_states(base, rows, bindings, batch.token_ids, batch.position_ids)
    counts = list(map(_num_targets, batches))
    return _chunked(base, bindings, states[batch.logits_at], batch.labels, counts)


def _num_targets(examples: Sequence[Example]) -> int:
    return sum(len(example.predictors) for example in examples)


def _chunked(
    base: Base, bindings: Bindings, states: Tensor, labels: Tensor, counts: Sequence[int]
) -> Tensor:
    """`_losses`, some labels at a time: the logits of all would take too much memory. Each chunk's
    logits are computed again for the gradient.
    """
    size = max(1, CHUNK_LOGITS // base.spec.vocab_size)
    if len(labels) <= size:
        return _losses(base, bindings, states, labels, counts)
    # A chunk may begin and end inside a unit's tokens: count how many of each unit it has.
    slots = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    parts = (torch.split(tensor, size) for tensor in (states, labels, slots))
    losses = [
        checkpoint(
            _losses, base, bindings, some, wanted, own.bincount(minlength=len(counts)).tolist(),
            use_reentrant=False, preserve_rng_state=False,
        )
        for some, wanted, own in zip(*parts, strict=True)
    ]  # fmt: skip
    return torch.cat(losses)


def _losses(
    base: Base, bindings: Bindings, states: Tensor, labels: Tensor, counts: Sequence[int]
) -> Tensor:
    found = logits(base, bindings, states, counts)
    found = found.to(torch.promote_types(found.dtype, torch.float32))
    return F.cross_entropy(found, labels, reduction="none")


def unit_logits(base: Base, unit: Unit) -> Logits:
    """The logits of a unit as training computes them: what the parity gate compares with. A row at
    a time, so that they fit where training did.
    """

    @torch.no_grad()
    def measured(
        rows: Sequence[Sequence[int]], logits_at: Sequence[int], with_adapter: bool
    ) -> Tensor:
        bindings = bind([unit], base) if with_adapter else {}
        layer_map = unit.layer_map if with_adapter else None
        states = torch.cat(
            [states_of_rows(base, bindings, [torch.tensor(row)], layer_map) for row in rows]
        )
        return logits(base, bindings, states[list(logits_at)], [len(logits_at)])

    return measured

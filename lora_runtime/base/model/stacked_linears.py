"""Linear layers that are given the same x, run as one: q, k and v, or gate and up.

A decode step is many short ops. One product over the layers' joined weights and one application of
their adapters take the place of two or three of each.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

from torch import Tensor, cat, nn

from lora_runtime.base.model.adapted_linear import AdaptedLinear, PooledBinding
from lora_runtime.base.model.quant_linear import FrozenLinear
from lora_runtime.kernels import (
    PooledAdapters,
    apply_gated_adapters,
    apply_stacked_adapters,
    can_fuse,
)

SHARING = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Names of modules of one parent that get the same x, in the order in which they are called."""


class StackedLinears:
    """`members` as one: the first that is called computes for all, the others take their slice.

    Members are recognised by getting the very same tensor; it is held until the last has asked.
    """

    def __init__(self, members: Sequence[AdaptedLinear], joined: FrozenLinear) -> None:
        self.members, self.joined = tuple(members), joined
        self.context = members[0].context
        self.widths = tuple(member.out_features for member in members)
        self._x: Tensor | None = None
        self._outputs: tuple[Tensor, ...] = ()

    def takes(self, x: Tensor) -> bool:
        """True where `can_fuse`, and all members have adapters in one pool or none."""
        return x is self._x or (
            can_fuse(x) and (self._extents() is not None or not self._is_adapted())
        )

    def output(self, member: AdaptedLinear, x: Tensor) -> Tensor:
        """What `member` gives for x: (..., in) → (..., out), a slice of all members' outputs."""
        if x is not self._x:
            self._x, self._outputs = x, self._run(x).split(self.widths, -1)
        y = self._outputs[self.members.index(member)]
        if member is self.members[-1]:
            self._x, self._outputs = None, ()
        return y

    def gated(self, x: Tensor, kind: str) -> Tensor | None:
        """act(gate) · up of a gate and an up projection (..., width) in one launch: the product's
        or, with adapters of both, theirs. None where only some have adapters, or where somebody
        listens to a member: ask each.
        """
        if not can_fuse(x) or any(member.is_observed for member in self.members):
            return None
        if not self._is_adapted():
            return self.joined.gated_product(x, kind)
        if (adapters := self._adapters()) is None:
            return None
        rows = x.reshape(-1, x.shape[-1])
        product, hidden = self.joined.product_and_shrink(rows, adapters)
        y = apply_gated_adapters(
            product, rows, self.joined.bias, *adapters, kind, hidden, may_overwrite=True
        )
        return y.view(*x.shape[:-1], -1)

    def _run(self, x: Tensor) -> Tensor:
        if (adapters := self._adapters()) is None:
            return self.joined(x)
        rows, bias = x.reshape(-1, x.shape[-1]), self.joined.bias
        product, hidden = self.joined.product_and_shrink(rows, adapters)
        y = apply_stacked_adapters(
            product, rows, bias, *adapters, self.widths, hidden, may_overwrite=True
        )
        return y.view(*x.shape[:-1], -1)

    def _adapters(self) -> PooledAdapters | None:
        """The adapters of all members, if they can go together."""
        if (extents := self._extents()) is None:
            return None
        return PooledAdapters(self._bindings()[0].memory, extents, self.context.meta)

    def _is_adapted(self) -> bool:
        bound = {} if self.context.meta is None else self.context.bindings
        return any(member.path in bound for member in self.members)

    def _bindings(self) -> list[PooledBinding]:
        found = (self.context.bindings.get(member.path) for member in self.members)
        return [binding for binding in found if isinstance(binding, PooledBinding)]

    def _extents(self) -> Tensor | None:
        """(P, S, R, 8): the extent tables of all members, if their adapters can go together."""
        bindings = self._bindings() if self._is_adapted() else []
        if len(bindings) < len(self.members):
            return None
        first, end = bindings[0].index, bindings[0].index + len(bindings)
        is_one_run = [binding.index for binding in bindings] == list(range(first, end))
        return bindings[0].tables[first:end] if is_one_run else None


def stack_linears(model: nn.Module) -> None:
    """Let the members of every set of SHARING run as one, where their weights can be joined."""
    for module in model.modules():
        for names in SHARING:
            found = [getattr(module, name, None) for name in names]
            members = [member for member in found if isinstance(member, AdaptedLinear)]
            if len(members) == len(names):
                joined = join_layers([member.linear for member in members])
                stack = None if joined is None else StackedLinears(members, joined)
                for member in members:
                    member.stack = stack


def join_layers(layers: Sequence[FrozenLinear]) -> FrozenLinear | None:
    """A layer whose outputs are those of `layers` one after another, or None if their formats
    cannot be joined. The bits stay where every layer finds them: as views of the joined weight.
    """
    first = layers[0]
    kinds = {(type(one), one.joined_parts, one.in_features, one.bias is None) for one in layers}
    if len(kinds) > 1 or not first.joined_parts:
        return None
    joined = copy.copy(first)
    joined.out_features = sum(layer.out_features for layer in layers)
    for name in (*first.joined_parts, *(() if first.bias is None else ("bias",))):
        parts = [getattr(layer, name).detach() for layer in layers]
        whole = cat(parts)
        for layer, view in zip(layers, whole.split([len(part) for part in parts]), strict=True):
            _replace(layer, name, view)
        _replace(joined, name, whole)
    return joined


def _replace(layer: FrozenLinear, name: str, value: Tensor) -> None:
    is_parameter = name in layer._parameters
    setattr(layer, name, nn.Parameter(value, requires_grad=False) if is_parameter else value)

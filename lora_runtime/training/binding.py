"""The units' weights laid out for the base's layers: unit n is slot n."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_runtime.adapters.serving_form import ModuleForm
from lora_runtime.adapters.variants.mutated_base import Factors
from lora_runtime.base.loader import Base
from lora_runtime.base.model.adapted_linear import AdaptedEmbedding, ExpertProduct
from lora_runtime.base.model.quant_linear import FrozenLinear
from lora_runtime.base.model.routing import Routing
from lora_runtime.kernels import Span
from lora_runtime.training.adapted_product import (
    AdaptedRows,
    adapted_product,
    factor_dtype,
    rounded_factors,
)
from lora_runtime.training.starts import master_dtype
from lora_runtime.training.units import Unit

Place = tuple[int, int]
"""(slot, replica): a unit, and which visit to the module by its layer map."""


@dataclass(frozen=True, slots=True)
class TrainedBinding:
    """What the units train at one module of the base; a Binding[Sequence[Span]].

    forms: (slot, replica) → the differentiable form; factors: its a and b as they are multiplied
    with x, where they are rounded for it.
    """

    forms: Mapping[Place, ModuleForm]
    factors: Mapping[Place, Factors] = field(default_factory=dict)

    def linear(self, x: Tensor, layer: FrozenLinear, where: Sequence[Span]) -> Tensor:
        """See `Binding`."""
        adapted = []
        for span in where:
            place = span.slot, span.replica
            form = self.forms.get(place)
            if form is not None and form.a is not None and form.b is not None:
                factors = self.factors.get(place)
                adapted.append(AdaptedRows(span.rows, form.a, form.b, form.gain, factors))
        return adapted_product(x, layer, adapted)

    def experts(
        self, x: Tensor, layer: ExpertProduct, routing: Routing, where: Sequence[Span]
    ) -> Tensor:
        """See `Binding`. One product pair for each unit and each expert that its tokens chose."""
        y = layer.product(x, routing)
        for span in where:
            form = self.forms.get((span.slot, span.replica))
            if form is None or form.a is None or form.b is None:
                continue
            a = form.a.unflatten(0, (form.num_experts, -1))
            b = form.b.unflatten(1, (form.num_experts, -1))
            for expert, pairs in routing.pairs_in(span.rows):
                shrunk = x.index_select(0, pairs).to(a.dtype) @ a[expert].T
                y = y.index_add(0, pairs, (shrunk @ b[:, expert].T).to(y.dtype))
        return y

    def head(self, x: Tensor, layer: FrozenLinear, where: Sequence[Span]) -> Tensor:
        """See `Binding`. Rows of a unit that trains the whole weight are multiplied by it alone."""
        pieces = []
        spans = [span for span in where if span.num_tokens]
        # Neighbouring units that share the base's weight also share one product with it.
        for slot, group in groupby(spans, self._slot_of_whole_patch):
            own = list(group)
            start = own[0].first_token
            some = x[start : own[-1].rows.stop]
            if slot is None:
                own = [replace(span, first_token=span.first_token - start) for span in own]
                pieces.append(self._patched(self.linear(some, layer, own), some, layer, own))
            else:
                weight, bias = self._whole_weight(slot)
                y = F.linear(some, weight.to(x.dtype))
                pieces.append(y if bias is None else y + bias.to(y.dtype))
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def _whole_weight(self, slot: int) -> tuple[Tensor, Tensor | None]:
        form = self.forms[slot, 0]
        assert form.patch is not None
        return form.patch.values, form.bias

    def _slot_of_whole_patch(self, span: Span) -> int | None:
        form = self.forms.get((span.slot, span.replica))
        is_whole = form is not None and form.patch is not None and form.patch.ids is None
        return span.slot if is_whole else None

    def _patched(self, y: Tensor, x: Tensor, layer: FrozenLinear, where: Sequence[Span]) -> Tensor:
        """y += x (V − W)ᵀ at the trained tokens, in place: nothing at the start, when V = W."""
        for span in where:
            form = self.forms.get((span.slot, span.replica))
            if form is None or form.patch is None or form.patch.ids is None:
                continue
            rows, values, ids = span.rows, form.patch.values, form.patch.ids
            # V rounded to the compute dtype, as it will be served; W is of that dtype.
            served, own = values.to(x.dtype), layer.weight_values()[ids]
            change = served.to(values.dtype) - own.to(values.dtype)
            y[rows].index_add_(1, ids, (x[rows].to(values.dtype) @ change.T).to(y.dtype))
        return y

    def embedding(
        self, embedded: Tensor, ids: Tensor, layer: AdaptedEmbedding, where: Sequence[Span]
    ) -> Tensor:
        """See `Binding`."""
        pieces = []
        for span in where:
            form, y = self.forms.get((span.slot, span.replica)), embedded[span.rows]
            pieces.append(y if form is None else _embedded(y, ids[span.rows], layer.scale, form))
        return torch.cat(pieces)


def _embedded(y: Tensor, ids: Tensor, scale: float, form: ModuleForm) -> Tensor:
    """One unit's embedded tokens (n, hidden), given the base's y and token ids (n,)."""
    if form.patch is None:
        assert form.a is not None and form.b is not None
        delta = scale * (F.embedding(ids, form.a.T) @ form.b.T)
        total = y.to(delta.dtype) + delta
        return (total if form.gain is None else form.gain * total).to(y.dtype)
    values = form.patch.values
    if form.patch.ids is None:
        return F.embedding(ids, values).to(y.dtype) * scale
    tokens, places = (ids[:, None] == form.patch.ids).nonzero(as_tuple=True)
    return y.index_copy(0, tokens, values[places].to(y.dtype) * scale)


def bind(units: Sequence[Unit], base: Base) -> dict[str, TrainedBinding]:
    """Module path in the base → what the units train there; modules that none adapts are absent."""
    found: dict[str, dict[Place, ModuleForm]] = {}
    for slot, unit in enumerate(units):
        for module in unit.modules.values():
            form = module.form(base.weights)
            found.setdefault(module.path, {})[slot, module.replica] = form
    factors = _rounded(found, base)
    return {path: TrainedBinding(forms, factors.get(path, {})) for path, forms in found.items()}


def _rounded(
    forms: Mapping[str, Mapping[Place, ModuleForm]], base: Base
) -> dict[str, dict[Place, Factors]]:
    """Module path → the rounded a and b of every form; empty where they are multiplied unrounded.

    The embedding, which looks its rows up, has none.
    """
    masters = master_dtype(base)
    dtype = factor_dtype(base.device, base.dtype, masters)
    if dtype == masters:
        return {}
    exact = {
        (path, place): Factors(form.a, form.b)
        for path, own in forms.items()
        if path != base.spec.embedding
        for place, form in own.items()
        if form.a is not None and form.b is not None
    }
    found: dict[str, dict[Place, Factors]] = {}
    for (path, place), factors in zip(
        exact, rounded_factors(list(exact.values()), dtype), strict=True
    ):
        found.setdefault(path, {})[place] = factors
    return found

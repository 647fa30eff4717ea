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
from lora_runtime.base.model.adapted_linear import AdaptedEmbedding
from lora_runtime.base.model.quant_linear import FrozenLinear
from lora_runtime.kernels import Span
from lora_runtime.training.adapted_product import (
    Part,
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
    """What the units train at one module of the base. `meta` is a list of Spans.

    forms: (slot, replica) → the differentiable form; factors: its a and b as they are multiplied
    with x, where that is not as they are.
    """

    forms: Mapping[Place, ModuleForm]
    factors: Mapping[Place, Factors] = field(default_factory=dict)

    def linear(self, x: Tensor, layer: FrozenLinear, meta: Sequence[Span]) -> Tensor:
        """See `Binding`."""
        parts = [
            Part(span.rows, form, self.factors.get(place))
            for span in meta
            if (form := self.forms.get(place := (span.slot, span.replica))) and form.a is not None
        ]
        return adapted_product(x, layer, parts)

    def head(self, x: Tensor, layer: FrozenLinear, meta: Sequence[Span]) -> Tensor:
        """See `Binding`. Rows of a unit that trains the whole weight are multiplied by it alone."""
        pieces = []
        spans = [span for span in meta if span.num_tokens]
        for slot, group in groupby(spans, self._slot_of_whole_patch):
            own = list(group)
            start = own[0].first_token
            some = x[start : own[-1].rows.stop]
            if slot is None:
                own = [replace(span, first_token=span.first_token - start) for span in own]
                pieces.append(self._patched(self.linear(some, layer, own), some, layer, own))
            else:
                form = self.forms[slot, 0]
                y = F.linear(some, form.patch.values.to(x.dtype))
                pieces.append(y if form.bias is None else y + form.bias.to(y.dtype))
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def _slot_of_whole_patch(self, span: Span) -> int | None:
        form = self.forms.get((span.slot, span.replica))
        is_whole = form is not None and form.patch is not None and form.patch.ids is None
        return span.slot if is_whole else None

    def _patched(self, y: Tensor, x: Tensor, layer: FrozenLinear, meta: Sequence[Span]) -> Tensor:
        """y += x (V − W)ᵀ at the trained tokens, in place: nothing at the start, when V = W."""
        for span in meta:
            form = self.forms.get((span.slot, span.replica))
            if form is None or form.patch is None:
                continue
            rows, values, ids = span.rows, form.patch.values, form.patch.ids
            change = values.to(x.dtype).to(values.dtype) - layer.weight[ids].to(values.dtype)
            y[rows].index_add_(1, ids, (x[rows].to(values.dtype) @ change.T).to(y.dtype))
        return y

    def embedding(
        self, embedded: Tensor, ids: Tensor, layer: AdaptedEmbedding, meta: Sequence[Span]
    ) -> Tensor:
        """See `Binding`."""
        pieces = []
        for span in meta:
            form, y = self.forms.get((span.slot, span.replica)), embedded[span.rows]
            pieces.append(y if form is None else _embedded(y, ids[span.rows], layer.scale, form))
        return torch.cat(pieces)


def _embedded(y: Tensor, ids: Tensor, scale: float, form: ModuleForm) -> Tensor:
    """One unit's embedded tokens (n, hidden), given the base's y and token ids (n,)."""
    if form.patch is None:
        delta = scale * (F.embedding(ids, form.a.T) @ form.b.T)
        total = y.to(delta.dtype) + delta
        return (total if form.gain is None else form.gain * total).to(y.dtype)
    values = form.patch.values
    if form.patch.ids is None:
        return F.embedding(ids, values).to(y.dtype) * scale
    tokens, places = (ids[:, None] == form.patch.ids).nonzero(as_tuple=True)
    return y.index_copy(0, tokens, values[places].to(y.dtype) * scale)


def bind(units: Sequence[Unit], base: Base) -> dict[str, TrainedBinding]:
    """The modules of several units by layer of the base; one that no unit adapts is left out."""
    found: dict[str, dict[Place, ModuleForm]] = {}
    for slot, unit in enumerate(units):
        for module in unit.modules.values():
            form = module.form(base.weights)
            found.setdefault(module.path, {})[slot, module.replica] = form
    factors = _factors(found, base)
    return {path: TrainedBinding(forms, factors.get(path, {})) for path, forms in found.items()}


def _factors(
    forms: Mapping[str, Mapping[Place, ModuleForm]], base: Base
) -> dict[str, dict[Place, Factors]]:
    """By module, of those that multiply x by a; none where factors are multiplied as they are."""
    masters = master_dtype(base)
    dtype = factor_dtype(base.device, base.dtype, masters)
    if dtype == masters:
        return {}
    places = [
        (path, place, form)
        for path, own in forms.items()
        if path != base.spec.embedding
        for place, form in own.items()
        if form.a is not None
    ]
    found: dict[str, dict[Place, Factors]] = {}
    rounded = rounded_factors([form for _, _, form in places], dtype)
    for (path, place, _), factors in zip(places, rounded, strict=True):
        found.setdefault(path, {})[place] = factors
    return found

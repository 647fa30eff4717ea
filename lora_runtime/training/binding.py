"""The units' weights laid out for the base's layers: unit n is slot n."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from lora_runtime.adapters.serving_form import ModuleForm
from lora_runtime.base.adapted_linear import AdaptedEmbedding
from lora_runtime.base.loader import Base
from lora_runtime.base.quant_linear import FrozenLinear
from lora_runtime.kernels import Span
from lora_runtime.training.adapted_product import Part, adapted_product
from lora_runtime.training.units import Unit


@dataclass(frozen=True, slots=True)
class TrainedBinding:
    """What the units train at one module of the base. `meta` is a list of Spans.

    forms: (slot, replica) → the differentiable form.
    """

    forms: Mapping[tuple[int, int], ModuleForm]

    def linear(self, x: Tensor, layer: FrozenLinear, meta: Sequence[Span]) -> Tensor:
        """See `Binding`."""
        parts = [
            Part(slice(span.first_token, span.first_token + span.num_tokens), form)
            for span in meta
            if (form := self.forms.get((span.slot, span.replica)))
        ]
        return adapted_product(x, layer, parts)

    head = linear

    def embedding(
        self, embedded: Tensor, ids: Tensor, layer: AdaptedEmbedding, meta: Sequence[Span]
    ) -> Tensor:
        """See `Binding`; no unit trains the embedding."""
        return embedded


def bind(units: Sequence[Unit], base: Base) -> dict[str, TrainedBinding]:
    """The modules of several units by layer of the base; one that no unit adapts is left out."""
    found: dict[str, dict[tuple[int, int], ModuleForm]] = {}
    for slot, unit in enumerate(units):
        for module in unit.modules.values():
            form = module.form(base.weights)
            found.setdefault(module.path, {})[slot, module.replica] = form
    return {path: TrainedBinding(forms) for path, forms in found.items()}

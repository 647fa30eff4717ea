"""What a unit trains at one module, in its serving form: every variant is data for one op.

    ΔW = s·(B A − B₀A₀),  g = m / ‖W + ΔW‖ or none,  y = g∘(W x + ΔW x)

With first factors A₀, B₀ the parameters are the differences dA = A − A₀ and dB = B − B₀, so that
ΔW = s·(B·dA + dB·A₀): exactly nothing at the start, and no difference of large products later.
Source: DoRA arXiv:2402.09353 (the norm is a constant in backward, §4.3); PiSSA arXiv:2404.02948.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import Parameter

from lora_runtime.adapters.serving_form import ModuleForm, RowPatch
from lora_runtime.adapters.variants.dora import row_norms
from lora_runtime.adapters.variants.mutated_base import Factors
from lora_runtime.base.weights import BaseWeights


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainedModule:
    """One module's parameters: a (r, in) and b (out, r), or their differences from `start`;
    magnitude (out,) of DoRA.
    """

    path: str
    replica: int
    """Which visit to the base's module by the unit's layer map."""
    scaling: float
    a: Parameter
    b: Parameter
    magnitude: Parameter | None = None
    start: Factors | None = None
    """A₀ and B₀, fixed."""
    num_experts: int = 1
    """a and b are those of so many experts, one after another, each of the unit's rank."""
    holder: str = ""
    """The module by which files name the tensors, where that is not the module's own name."""
    is_transposed: bool = False
    """The output layer tied to the embedding, whose a and b these are: A = bᵀ, B = aᵀ."""

    @property
    def parameters(self) -> dict[str, Parameter]:
        """Trained tensors; those that are shared belong to the embedding's module."""
        shared = {} if self.is_transposed else {"a": self.a, "b": self.b}
        named = {**shared, "magnitude": self.magnitude}
        return {name: parameter for name, parameter in named.items() if parameter is not None}

    @property
    def constants(self) -> dict[str, Tensor]:
        """Fixed tensors (A₀, B₀) that must be checkpointed."""
        return {} if self.start is None else {"a_start": self.start.a, "b_start": self.start.b}

    def unscaled(self) -> Factors:
        """A' and B' with ΔW = s·B'A'."""
        if self.is_transposed:
            return Factors(self.b.T, self.a.T)
        if self.start is None:
            return Factors(self.a, self.b)
        a, b = self.start
        return Factors(torch.cat([self.a, a]), torch.cat([b + self.b, self.b], dim=1))

    def form(self, weights: BaseWeights) -> ModuleForm:
        """On the parameters' device and in their dtype, differentiable: as `adapted_product` takes
        it, the serving form but for b, which is without the gain.
        """
        a, b = self.unscaled()
        b = self.scaling * b
        if self.magnitude is None:
            return ModuleForm(a=a, b=b, num_experts=self.num_experts)
        return ModuleForm(a=a, b=b, gain=self.magnitude / norms(weights, self.path, Factors(a, b)))


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainedRows:
    """Rows of the embedding or the output layer with values of their own.

    rows (n, hidden): of the tokens ids (n,) int64, in their order, or of all; bias (vocab,) of an
    output layer that has one and is trained as a whole.
    """

    path: str
    rows: Parameter
    ids: Tensor | None = None
    bias: Parameter | None = None
    is_shared: bool = False
    """True when the rows are another module's parameter, to which this one is tied."""
    replica: int = 0

    @property
    def parameters(self) -> dict[str, Parameter]:
        """The tensors that this module itself trains."""
        named = {"rows": None if self.is_shared else self.rows, "bias": self.bias}
        return {name: parameter for name, parameter in named.items() if parameter is not None}

    @property
    def constants(self) -> dict[str, Tensor]:
        """None: training starts at the base's own rows."""
        return {}

    def form(self, weights: BaseWeights) -> ModuleForm:
        """As `TrainedModule.form`; the rows are rounded to the compute dtype where they act."""
        return ModuleForm(bias=self.bias, patch=RowPatch(self.rows, self.ids))


Trained = TrainedModule | TrainedRows


@torch.no_grad()
def norms(weights: BaseWeights, path: str, delta: Factors) -> Tensor:
    """‖W + ΔW‖ of every output row, (out,), in the dtype and on the device of ΔW = b a."""
    squared = weights.squared_norms(path).to(delta.a.device)
    return row_norms(squared, weights.product_of_rows(path, delta.a), delta).to(delta.a.dtype)

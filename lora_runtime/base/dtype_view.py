"""A loaded base in another compute dtype, over the same weights: to see what rounding does.

The view has modules of its own, so the base is not changed and may go on running. It never holds a
second model: a quantised layer is dequantised at each forward, what the checkpoint has in 16 bits
is cast where it is used.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_runtime.base.loader import Base
from lora_runtime.base.model.adapted_linear import AdaptedEmbedding, AdaptedLinear, StepContext
from lora_runtime.base.model.head_model import head_model
from lora_runtime.base.model.quant_linear import FrozenLinear
from lora_runtime.base.model.reordered_model import reordering, shallow_copy
from lora_runtime.base.weights import BaseWeights


def in_dtype(base: Base, dtype: torch.dtype) -> Base:
    """`base` as if it had been loaded in `dtype`; `base` itself where it was.

    W := fp32(code × absmax), rounded once to `dtype`, which float32 does not; norms, biases,
    embedding and output layer are cast from what the base holds. A step of it takes several times
    that of the base, without gradients only.
    """
    if dtype == base.dtype:
        return base
    context = StepContext()
    model = _view(base.model, dtype, context, {})
    spec = replace(base.spec, dtype=str(dtype).removeprefix("torch."))
    return replace(
        base,
        model=model,
        spec=spec,
        context=context,
        weights=BaseWeights(model, spec, base.folder, dtype),
        reordered=reordering(model, context),
        head=head_model(model),
        dtype=dtype,
    )


class ViewedLinear(FrozenLinear):
    """A layer of the base whose weight is made in `dtype` some rows at a time, at each product.

    Products are summed in float32 or better and rounded once, as kernels do that multiply in
    bfloat16; a CPU that does not would take ten times as long.
    """

    def __init__(self, layer: FrozenLinear, dtype: torch.dtype) -> None:
        super().__init__(keep_copies=False)
        self.out_features, self.in_features = layer.out_features, layer.in_features
        self.dtype = dtype
        self.layer = copy.copy(layer)
        self.layer.dtype = dtype  # type: ignore[assignment]
        bias = layer.bias
        self.register_buffer("bias", None if bias is None else bias.to(dtype))

    @property
    def weight(self) -> Tensor:
        """Of an unquantised layer, as the base holds it."""
        weight: Tensor = self.layer.weight  # type: ignore[assignment]
        return weight

    def product(self, x: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        rows = [x.to(wide) @ block.to(wide).T for _, block in self.row_blocks()]
        return torch.cat(rows, dim=-1).to(x.dtype)

    def weight_values(self) -> Tensor:
        return torch.cat([block for _, block in self.row_blocks()])

    def row_values(self, rows: slice) -> Tensor:
        return self.layer.row_values(rows).to(self.dtype)


class CastEmbedding(nn.Module):
    """An embedding of which only the rows that are looked up are cast. ids (...) → (..., hidden).

    `scale` is what transformers' module multiplies its weight by, else 1: rounded to the dtype from
    the exact number, as the module's own buffer was made in the base's dtype.
    """

    def __init__(self, embedding: nn.Embedding, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight, self.dtype = embedding.weight, dtype
        exact = getattr(embedding, "scalar_embed_scale", 1.0)
        self.scale = float(torch.tensor(exact, dtype=torch.float64).to(dtype))

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.weight).to(self.dtype) * self.scale


def _view(module: Any, dtype: torch.dtype, context: StepContext, seen: dict[int, Any]) -> Any:
    """A copy of `module` and all it holds that shares the weights. `seen`: what is copied already,
    by the original's id, so that what two modules share stays shared.
    """
    if id(module) in seen:
        return seen[id(module)]
    if isinstance(module, FrozenLinear):
        view: Any = ViewedLinear(module, dtype)
    elif isinstance(module, nn.Embedding):
        view = CastEmbedding(module, dtype)
    else:
        view = shallow_copy(module)
        view._parameters = {name: _cast(own, dtype) for name, own in module._parameters.items()}
        for name, child in module.named_children():
            view._modules[name] = _view(child, dtype, context, seen)
        if isinstance(getattr(module, "context", None), StepContext):
            view.context = context
        if isinstance(module, AdaptedLinear):
            view.stack = None
        if isinstance(module, AdaptedEmbedding):
            view.scale = view.embedding.scale
    seen[id(module)] = view
    return view


def _cast(parameter: nn.Parameter | None, dtype: torch.dtype) -> nn.Parameter | None:
    if parameter is None:
        return None
    return nn.Parameter(parameter.detach().to(dtype), requires_grad=False)

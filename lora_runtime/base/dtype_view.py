"""A loaded base in another compute dtype, over the same weights: to see what rounding does.

The view has modules of its own, so the base is not changed and may go on running. It never holds a
second model: a quantised layer is dequantised at each forward, what the checkpoint has in 16 bits
is cast where it is used.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_runtime.base.adapted_linear import AdaptedEmbedding, AdaptedLinear, StepContext
from lora_runtime.base.head_model import head_model
from lora_runtime.base.loader import MAX_PLANNED_MODELS, Base
from lora_runtime.base.planned_model import planned_model, shallow_copy
from lora_runtime.base.quant_linear import DenseLinear, FrozenLinear
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
        planned=lru_cache(MAX_PLANNED_MODELS)(lambda plan: planned_model(model, plan, context)),
        head=head_model(model),
        dtype=dtype,
    )


class CastLinear(FrozenLinear):
    """An unquantised layer whose weight (out, in) is cast some rows at a time."""

    def __init__(self, layer: DenseLinear, dtype: torch.dtype) -> None:
        super().__init__(keep_copies=False)
        self.out_features, self.in_features = layer.out_features, layer.in_features
        self.dtype = dtype
        self.weight = layer.weight
        self.register_buffer("bias", layer.bias)
        _cast(self._buffers, dtype)

    def product(self, x: Tensor) -> Tensor:
        return torch.cat([x @ block.T for _, block in self.row_blocks()], dim=-1)

    def weight_values(self) -> Tensor:
        return self.weight.detach().to(self.dtype)

    def row_values(self, rows: slice) -> Tensor:
        return self.weight[rows].to(self.dtype)


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
    if isinstance(module, DenseLinear):
        view: Any = CastLinear(module, dtype)
    elif isinstance(module, nn.Embedding):
        view = CastEmbedding(module, dtype)
    elif isinstance(module, FrozenLinear):
        view = _quantised_view(module, dtype)
    else:
        view = shallow_copy(module)
        view._parameters = dict(module._parameters)
        _cast(view._parameters, dtype)
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


def _quantised_view(layer: FrozenLinear, dtype: torch.dtype) -> Any:
    """The same codes, with nothing kept."""
    view: Any = copy.copy(layer)
    view._buffers = dict(layer._buffers)
    _cast(view._buffers, dtype, only="bias")
    view.dtype = dtype
    view.keep_copies, view._dense, view._panels = False, None, None
    return view


def _cast(tensors: dict[str, Any], dtype: torch.dtype, only: str | None = None) -> None:
    """Cast what is there and floating, in place; `only`: the one of this name."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.is_floating_point() and only in (None, name):
            cast = tensor.detach().to(dtype)
            is_parameter = isinstance(tensor, nn.Parameter)
            tensors[name] = nn.Parameter(cast, requires_grad=False) if is_parameter else cast

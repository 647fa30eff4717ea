"""A loaded base in another dtype, over the same weights: to see what rounding does.

The view has modules of its own, so the base is not changed and may go on running. It never holds a
second model: a quantised layer is dequantised at each forward, what the checkpoint has in 16 bits
is cast where it is used.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_runtime.base.device import dtype_name
from lora_runtime.base.loader import Base
from lora_runtime.base.model.adapted_linear import AdaptedEmbedding, AdaptedLinear, StepContext
from lora_runtime.base.model.head_model import head_model
from lora_runtime.base.model.quant_linear import DenseLinear, FrozenLinear
from lora_runtime.base.model.reordered_model import reordering, shallow_copy
from lora_runtime.base.weights import BaseWeights
from lora_runtime.core import BaseSpec


def in_dtype(base: Base, dtype: torch.dtype) -> Base:
    """`base` as if it had been loaded in `dtype`; `base` itself where it was.

    W := fp32(code × absmax), rounded once to `dtype`, which float32 does not; norms, biases,
    embedding and output layer are cast from what the base holds. A step of it takes several times
    that of the base, without gradients only.
    """
    if dtype == base.dtype:
        return base
    spec = replace(base.spec, dtype=dtype_name(dtype))
    return _viewed(base, spec, _Cast(dtype, dtype))


def as_bfloat16_holds(base: Base) -> Base:
    """`base`, which computes in float32, with the values that it would hold had it been loaded in
    bfloat16; it still computes in float32. What the quantiser made is the same in both.
    """
    # Modules that transformers holds in float32 also where the rest is bfloat16, by its own names;
    # our wrappers add ".linear".
    names = getattr(base.model, "_keep_in_fp32_modules_strict", None) or ()
    tensors = base.model.state_dict(keep_vars=True)
    kept = {
        id(tensor)
        for path, tensor in tensors.items()
        if any(f".{name}." in f".{path.replace('.linear.', '.')}." for name in names)
    }
    saved = {id(tensor) for tensor in tensors.values() if tensor.is_floating_point()}
    spec = replace(base.spec, exceeds_bfloat16=False)
    cast = _Cast(base.dtype, torch.bfloat16, frozenset(kept), frozenset(saved - kept))
    return _viewed(base, spec, cast)


@dataclass(frozen=True, slots=True)
class _Cast:
    """How the tensors of a view come from the base's, which are told by their ids."""

    dtype: torch.dtype
    """Of the view's computation."""
    precision: torch.dtype
    """To which values are rounded."""
    kept: frozenset[int] = frozenset()
    """What is not rounded."""
    rounded: frozenset[int] = frozenset()
    """Of buffers, which ones are cast: those that a checkpoint has. Others, made of the config, are
    shared as they are. Parameters are always cast."""

    def of(self, tensor: Tensor) -> Callable[[Tensor], Tensor]:
        """What casts `tensor`, or rows of it."""
        if id(tensor) in self.kept:
            return lambda values: values.to(self.dtype)
        return lambda values: values.to(self.precision).to(self.dtype)

    def cast(self, tensor: Tensor) -> Tensor:
        return self.of(tensor)(tensor.detach())


def _viewed(base: Base, spec: BaseSpec, cast: _Cast) -> Base:
    context = StepContext()
    model = _view(base.model, cast, context, {})
    return replace(
        base,
        model=model,
        spec=spec,
        context=context,
        weights=BaseWeights(model, spec, base.folder, cast.dtype),
        reordered=reordering(model, context),
        head=head_model(model),
        dtype=cast.dtype,
    )


class ViewedLinear(FrozenLinear):
    """A layer of the base whose weight is cast some rows at a time, at each product.

    Products are summed in float32 or better and rounded once, as kernels do that multiply in
    bfloat16; a CPU that does not would take ten times as long.
    """

    def __init__(self, layer: FrozenLinear, cast: _Cast) -> None:
        super().__init__(keep_copies=False)
        self.out_features, self.in_features = layer.out_features, layer.in_features
        self.layer = copy.copy(layer)
        self.layer.dtype = cast.dtype  # type: ignore[assignment]
        # A quantised layer makes its values in a dtype, rounded once.
        self.cast = cast.of(layer.weight) if isinstance(layer, DenseLinear) else lambda rows: rows
        bias = layer.bias
        self.register_buffer("bias", None if bias is None else cast.cast(bias))

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
        return self.cast(self.layer.row_values(rows))


class CastEmbedding(nn.Module):
    """An embedding of which only the rows that are looked up are cast. ids (...) → (..., hidden).

    `scale` is what transformers' module multiplies its weight by, else 1: rounded to the dtype from
    the exact number, as the module's own buffer was made in the base's dtype.
    """

    def __init__(
        self,
        embedding: nn.Embedding,
        dtype: torch.dtype,
        cast: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.weight, self.cast = embedding.weight, cast or (lambda rows: rows.to(dtype))
        exact = getattr(embedding, "scalar_embed_scale", 1.0)
        self.scale = float(torch.tensor(exact, dtype=torch.float64).to(dtype))

    def forward(self, ids: Tensor) -> Tensor:
        return self.cast(F.embedding(ids, self.weight)) * self.scale


def _view(module: Any, cast: _Cast, context: StepContext, seen: dict[int, Any]) -> Any:
    """A copy of `module` and all it holds that shares the weights. `seen`: what is copied already,
    by the original's id, so that what two modules share stays shared.
    """
    if id(module) in seen:
        return seen[id(module)]
    if isinstance(module, FrozenLinear):
        view: Any = ViewedLinear(module, cast)
    elif isinstance(module, nn.Embedding):
        view = CastEmbedding(module, cast.dtype, cast.of(module.weight))
    else:
        view = shallow_copy(module)
        view._parameters = {n: _parameter(own, cast) for n, own in module._parameters.items()}
        view._buffers = {
            name: own if own is None or id(own) not in cast.rounded else cast.cast(own)
            for name, own in module._buffers.items()
        }
        for name, child in module.named_children():
            view._modules[name] = _view(child, cast, context, seen)
        if isinstance(getattr(module, "context", None), StepContext):
            view.context = context
        if isinstance(module, AdaptedLinear):
            view.stack = None
        if isinstance(module, AdaptedEmbedding):
            view.scale = view.embedding.scale
    seen[id(module)] = view
    return view


def _parameter(parameter: nn.Parameter | None, cast: _Cast) -> nn.Parameter | None:
    if parameter is None:
        return None
    return nn.Parameter(cast.cast(parameter), requires_grad=False)

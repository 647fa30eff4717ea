"""The op of training: one linear layer under several adapters, with gradients of its own.

Same values as `lora_runtime.kernels.apply_adapters` within rounding. Its adapters are whole
matrices on runs of consecutive rows, so that forward and backward are matrix products only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lora_runtime.adapters.serving_form import ModuleForm
from lora_runtime.adapters.variants.mutated_base import Factors
from lora_runtime.base.model.quant_linear import FrozenLinear


@dataclass(frozen=True, slots=True)
class Part:
    """Consecutive rows and what acts on them: a (r, in), b (out, r), gain (out,) or none.

    factors: a and b as they are multiplied, rounded to `factor_dtype`; None: as they are.
    """

    rows: slice
    form: ModuleForm
    factors: Factors | None = None


def factor_dtype(device: torch.device, compute: torch.dtype, masters: torch.dtype) -> torch.dtype:
    """The dtype in which a and b, kept in `masters`, are multiplied on a base of dtype `compute`.

    On a GPU bfloat16 for a bfloat16 base: its tensor cores sum such products in float32 and many
    times faster than float32 ones, and neither x nor y needs a float32 copy. Elsewhere `masters`.
    """
    is_faster = device.type == "cuda" and compute == torch.bfloat16
    return compute if is_faster else masters


@torch.no_grad()
def rounded_factors(forms: Sequence[ModuleForm], dtype: torch.dtype) -> list[Factors]:
    """a and b of every form in `dtype`, all in few launches: once a forward, not once a product."""
    exact = [part for form in forms for part in (form.a, form.b)]
    rounded = [torch.empty_like(part, dtype=dtype) for part in exact]
    if exact:
        torch._foreach_copy_(rounded, exact)
    return list(map(Factors, rounded[::2], rounded[1::2]))


def adapted_product(x: Tensor, layer: FrozenLinear, parts: Sequence[Part]) -> Tensor:
    """y = W x + bias, and in the rows of each part y = g ∘ (W x + B A x) + bias.

    With a gain, b holds B without it. Shapes: x (T, in) in the compute dtype; returns (T, out). The
    parts' products are in the dtype of their factors. Differentiable in x and in the forms'
    tensors, whose gradients are in these tensors' own dtype, never rounded to the factors'; W is
    asked for again in backward, so no dense copy is kept alive.
    """
    forms = [(part.form.a, part.form.b, part.form.gain) for part in parts]
    tensors = [tensor for form in forms for tensor in form]
    factors = [part.factors or Factors(part.form.a, part.form.b) for part in parts]
    product = layer.tracked_product if torch.is_grad_enabled() else layer.product
    slices = [part.rows for part in parts]
    y = _AdaptedProduct.apply(x, product, layer, slices, factors, *tensors)
    return y if layer.bias is None else y + layer.bias


class _AdaptedProduct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        product: Callable[[Tensor], Tensor],
        layer: FrozenLinear,
        slices: Sequence[slice],
        factors: Sequence[Factors],
        *tensors: Tensor | None,
    ) -> Tensor:
        y = product(x)
        kept: list[Tensor | None] = [x]
        for rows, (a, b), gain in zip(slices, factors, tensors[2::3], strict=True):
            shrunk = x[rows].to(a.dtype) @ a.T
            _add_product(y[rows], shrunk, b.T)
            sums = None if gain is None else y[rows].clone()
            if gain is not None:
                y[rows] *= gain
            kept += [a, b, gain, shrunk, sums]
        ctx.save_for_backward(*kept)
        ctx.layer, ctx.slices, ctx.masters = layer, slices, [a.dtype for a in tensors[::3]]
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, *kept = ctx.saved_tensors
        parts = list(zip(ctx.slices, *(kept[i::5] for i in range(5)), strict=True))
        if any(gain is not None for _, _, _, gain, _, _ in parts):
            of_y, grad = grad, grad.clone()
            for rows, _, _, gain, _, _ in parts:
                if gain is not None:
                    grad[rows] *= gain
        of_x = grad @ ctx.layer.kept_values() if ctx.needs_input_grad[0] else None
        found: list[Tensor | None] = []
        for (rows, a, b, gain, shrunk, sums), masters in zip(parts, ctx.masters, strict=True):
            of_sums = grad[rows].to(a.dtype)
            of_shrunk = of_sums @ b
            if of_x is not None:
                _add_product(of_x[rows], of_shrunk, a)
            of_gain = None if gain is None else (of_y[rows] * sums).sum(0, dtype=gain.dtype)
            found += [
                _product(of_shrunk.T, x[rows].to(a.dtype), masters),
                _product(of_sums.T, shrunk, masters),
                of_gain,
            ]
        return of_x, None, None, None, None, *found


def _product(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """left right, not rounded on its way to `dtype`."""
    if left.dtype == dtype:
        return left @ right
    if left.is_cuda:  # torch 2.11 to 2.13 have it there alone
        return torch.mm(left, right, out_dtype=dtype)
    return left.to(dtype) @ right.to(dtype)


def _add_product(y: Tensor, left: Tensor, right: Tensor) -> None:
    """y += left right, in place; the sum is in the dtype of the factors."""
    if y.dtype == left.dtype:
        y.addmm_(left, right)
    else:
        y.copy_(torch.addmm(y.to(left.dtype), left, right))

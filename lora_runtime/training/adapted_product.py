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

from lora_runtime.adapters.variants.mutated_base import Factors
from lora_runtime.base.device import resolve_dtype
from lora_runtime.base.model.quant_linear import FrozenLinear
from lora_runtime.kernels import can_train_adapter, train_adapter, trained_adapter_gradients


@dataclass(frozen=True, slots=True)
class AdaptedRows:
    """Consecutive rows of x and what acts on them: a (r, in), b (out, r), gain (out,) or None."""

    rows: slice
    a: Tensor
    b: Tensor
    gain: Tensor | None = None
    factors: Factors | None = None
    """a and b as they are multiplied, rounded to `factor_dtype`; None: as they are."""


def factor_dtype(device: torch.device, compute: torch.dtype, masters: torch.dtype) -> torch.dtype:
    """The dtype in which a and b, kept in `masters`, are multiplied on a base of dtype `compute`.

    bfloat16 for a bfloat16 base, on a GPU and on CPUs that multiply it: such products are summed in
    float32, many times faster than float32 ones, and neither x nor y needs a float32 copy.
    Elsewhere `masters`.
    """
    is_native = device.type == "cuda" or resolve_dtype("auto", device) == torch.bfloat16
    return compute if compute == torch.bfloat16 and is_native else masters


@torch.no_grad()
def rounded_factors(factors: Sequence[Factors], dtype: torch.dtype) -> list[Factors]:
    """All a and b in `dtype`, in few launches: once a forward, not once a product."""
    exact = [part for pair in factors for part in pair]
    rounded = [torch.empty_like(part, dtype=dtype) for part in exact]
    if exact:
        torch._foreach_copy_(rounded, exact)
    return [Factors(a, b) for a, b in zip(rounded[::2], rounded[1::2], strict=True)]


def adapted_product(x: Tensor, layer: FrozenLinear, adapted: Sequence[AdaptedRows]) -> Tensor:
    """y = W x + bias, and in adapted rows y = g ∘ (W x + B A x) + bias.

    With a gain, b holds B without it. Shapes: x (T, in) in the compute dtype; returns (T, out). The
    adapters' products are in the dtype of their factors. Differentiable in x, a, b and the gains.
    Gradients have the dtype of these tensors and are never rounded to the factors'. W is asked for
    again in backward, so no dense copy is kept alive.
    """
    tensors = [tensor for own in adapted for tensor in (own.a, own.b, own.gain)]
    factors = [own.factors or Factors(own.a, own.b) for own in adapted]
    product = layer.tracked_product if torch.is_grad_enabled() else layer.product
    slices = [own.rows for own in adapted]
    y: Tensor = _AdaptedProduct.apply(x, product, layer, slices, factors, *tensors)  # type: ignore[no-untyped-call]
    return y if layer.bias is None else y + layer.bias


class _AdaptedProduct(torch.autograd.Function):
    """Written by hand, for autograd would keep W and a copy of x for every adapter alive.

    z = W x + B A x and y = g ∘ z have these gradients, given G = ∂L/∂y, per adapter on its rows:
    ∂g = Σ_rows G ∘ z,  G' = g ∘ G,  ∂B = G'ᵀ (A x),  ∂A = (G' B)ᵀ x,  ∂x = G' W + (G' B) A.
    """

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
        masters = [a.dtype for a in tensors[::3] if a is not None]
        x = x.contiguous()
        y = product(x)
        saved: list[Tensor | None] = [x]
        # tensors are (a, b, gain) of each adapter in turn: every third from 2 on is a gain.
        for rows, (a, b), gain in zip(slices, factors, tensors[2::3], strict=True):
            shrunk = _add_adapter(y[rows], x[rows], Factors(a, b))
            before_gain = None if gain is None else y[rows].clone()
            if gain is not None:
                y[rows] *= gain
            saved += [a, b, gain, shrunk, before_gain]
        ctx.save_for_backward(*saved)
        ctx.layer, ctx.slices, ctx.masters = layer, slices, masters
        return y

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x, *saved = ctx.saved_tensors
        # Five tensors were saved of each adapter: the i-th of all adapters are saved[i::5].
        adapters = list(zip(ctx.slices, *(saved[i::5] for i in range(5)), strict=True))
        grad = grad_y.contiguous()  # of z, which is y before the gains
        if any(gain is not None for _, _, _, gain, _, _ in adapters):
            grad = grad.clone()
            for rows, _, _, gain, _, _ in adapters:
                if gain is not None:
                    grad[rows] *= gain
        grad_x = grad @ ctx.layer.kept_values() if ctx.needs_input_grad[0] else None
        found: list[Tensor | None] = []
        for (rows, a, b, gain, shrunk, z), dtype in zip(adapters, ctx.masters, strict=True):
            of_x = None if grad_x is None else grad_x[rows]
            found += _gradients(grad[rows], x[rows], shrunk, Factors(a, b), of_x, dtype)
            found.append(None if gain is None else (grad_y[rows] * z).sum(0, dtype=gain.dtype))
        # One gradient per argument of forward: none for product, layer, slices and factors.
        return grad_x, None, None, None, None, *found


def _add_adapter(y: Tensor, x: Tensor, factors: Factors) -> Tensor:
    """y += B A x in place; returns A x as `_gradients` takes it."""
    a, b = factors
    if can_train_adapter(y, x, a):
        return train_adapter(y, x, a, b)
    shrunk = x.to(a.dtype) @ a.T
    _add_product(y, shrunk, b.T)
    return shrunk


def _gradients(
    grad: Tensor,
    x: Tensor,
    shrunk: Tensor,
    factors: Factors,
    grad_x: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """∂A and ∂B in `dtype`, given G' of an adapter's rows; ∂x is added to grad_x, if that is
    wanted.
    """
    a, b = factors
    if can_train_adapter(grad, x, a):
        return trained_adapter_gradients(grad, x, shrunk, a, b, grad_x)
    grad = grad.to(a.dtype)
    grad_shrunk = grad @ b
    if grad_x is not None:
        _add_product(grad_x, grad_shrunk, a)
    of_a = _product(grad_shrunk.T, x.to(a.dtype), dtype)
    return of_a, _product(grad.T, shrunk, dtype)


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

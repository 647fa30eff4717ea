"""Norms, rotation, attention and activation of `cpu.py` with gradients, one pass forward and one
back.

Only activations have gradients, the base's weights have none. Kept for backward are an op's inputs;
what it computes between them and its result is computed again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lora_runtime.kernels import cpu
from lora_runtime.kernels.cpu_library import beside_torch
from lora_runtime.kernels.types import HeadNorm, wants_gradient


def can_run(*activations: Tensor, frozen: tuple[Tensor, ...] = ()) -> bool:
    """True where `cpu` takes activations and frozen weights of one dtype, and a gradient is wanted
    of the former alone.
    """
    return (
        wants_gradient(*activations)
        and not wants_gradient(*frozen)
        and cpu.takes(*activations, *frozen)
    )


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, plus_one: bool) -> Tensor:
    """See `lora_runtime.kernels.rms_norm`."""
    y: Tensor = _Norm.apply(x, weight, eps, plus_one)  # type: ignore[no-untyped-call]
    return y


class _Norm(torch.autograd.Function):
    @staticmethod
    @beside_torch()
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, plus_one: bool) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.eps, ctx.plus_one = eps, plus_one
        return cpu.rms_norm(x, weight, eps, plus_one=plus_one)

    @staticmethod
    @once_differentiable
    @beside_torch()
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        x, weight = ctx.saved_tensors
        found = cpu.rms_norm_gradient(grad, x, weight, ctx.eps, plus_one=ctx.plus_one)
        return found, None, None, None


def add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    *,
    plus_one: bool,
    branch_weight: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """See `lora_runtime.kernels.add_rms_norm`."""
    found: tuple[Tensor, Tensor] = _AddNorm.apply(  # type: ignore[no-untyped-call]
        x, residual, weight, branch_weight, eps, plus_one
    )
    return found


class _AddNorm(torch.autograd.Function):
    @staticmethod
    @beside_torch()
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor,
        weight: Tensor,
        branch_weight: Tensor | None,
        eps: float,
        plus_one: bool,
    ) -> tuple[Tensor, Tensor]:
        total, y = cpu.add_rms_norm(
            x, residual, weight, eps, plus_one=plus_one, branch_weight=branch_weight
        )
        branch = None if branch_weight is None else x
        ctx.save_for_backward(total, weight, branch, branch_weight)
        ctx.eps, ctx.plus_one = eps, plus_one
        return total, y

    @staticmethod
    @once_differentiable
    @beside_torch()
    def backward(ctx: Any, grad_total: Tensor, grad: Tensor) -> tuple[Tensor | None, ...]:
        total, weight, branch, branch_weight = ctx.saved_tensors
        options: Any = {"eps": ctx.eps, "plus_one": ctx.plus_one}
        found = cpu.rms_norm_gradient(grad, total, weight, other=grad_total, **options)
        of_x = found
        if branch is not None:
            of_x = cpu.rms_norm_gradient(found, branch, branch_weight, **options)
        return of_x, found, None, None, None, None


def rotate(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, norm: HeadNorm | None
) -> tuple[Tensor, Tensor]:
    """See `lora_runtime.kernels.rotate`."""
    found: tuple[Tensor, Tensor] = _Rotation.apply(q, k, cos, sin, norm)  # type: ignore[no-untyped-call]
    return found


class _Rotation(torch.autograd.Function):
    @staticmethod
    @beside_torch()
    def forward(
        ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, norm: HeadNorm | None
    ) -> tuple[Tensor, Tensor]:
        ctx.norm = norm
        # Without a norm of heads the gradient asks for their shapes alone.
        ctx.save_for_backward(cos, sin, *(() if norm is None else (q, k)))
        return cpu.rotate(q, k, cos, sin, norm)

    @staticmethod
    @once_differentiable
    @beside_torch()
    def backward(ctx: Any, grad_q: Tensor, grad_k: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin, *heads = ctx.saved_tensors
        q, k = heads or (grad_q, grad_k)
        return *cpu.rotate_gradient(grad_q, grad_k, q, k, cos, sin, ctx.norm), None, None, None


def attend_rows(q: Tensor, k: Tensor, v: Tensor, segments: Tensor, scale: float) -> Tensor:
    """See `lora_runtime.kernels.attend_rows`."""
    out: Tensor = _RowAttention.apply(q, k, v, segments, scale)  # type: ignore[no-untyped-call]
    return out


class _RowAttention(torch.autograd.Function):
    @staticmethod
    @beside_torch()
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, segments: Tensor, scale: float
    ) -> Tensor:
        ctx.save_for_backward(q, k, v, segments)
        ctx.scale = scale
        return cpu.attend_rows(q, k, v, segments, scale)

    @staticmethod
    @once_differentiable
    @beside_torch()
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, segments = ctx.saved_tensors
        found = cpu.attend_rows_gradient(grad, q, k, v, segments, ctx.scale)
        return *found, None, None


def gated_activation(gate: Tensor, up: Tensor, kind: str) -> Tensor:
    """See `lora_runtime.kernels.gated_activation`."""
    y: Tensor = _Gated.apply(gate, up, kind)  # type: ignore[no-untyped-call]
    return y


class _Gated(torch.autograd.Function):
    @staticmethod
    @beside_torch()
    def forward(ctx: Any, gate: Tensor, up: Tensor, kind: str) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.kind = kind
        return cpu.gated_activation(gate, up, kind)

    @staticmethod
    @once_differentiable
    @beside_torch()
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        gate, up = ctx.saved_tensors
        return *cpu.gated_activation_gradient(grad, gate, up, ctx.kind), None

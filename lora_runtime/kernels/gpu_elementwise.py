"""Norm, rotation and gated activation in Triton: one launch each, in the place of two to ten.

Inputs may be slices of a larger product: rows and heads lie anywhere, what is within them together.
Unmeasured: tested through Triton's interpreter only, never run or timed on a GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

NORM_BLOCK = 1024
"""Values that one program norms, where a row is shorter; unmeasured."""
HEADS_BLOCK = 4
ACTIVATION_BLOCK = 1024


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, plus_one: bool) -> Tensor:
    """See `lora_runtime.kernels.rms_norm`."""
    return _norm(x, None, weight, eps, plus_one=plus_one)[1]


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """See `lora_runtime.kernels.add_rms_norm`."""
    return _norm(x, residual.reshape(-1, x.shape[-1]), weight, eps, plus_one=False)


def _norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, *, plus_one: bool
) -> tuple[Tensor, Tensor]:
    """The sum, which is x itself without a residual (rows, width), and its norm."""
    y, width = torch.empty(x.shape, dtype=x.dtype, device=x.device), x.shape[-1]
    total = x if residual is None else torch.empty_like(y)
    rows = x if x.ndim > 2 and x.shape[:-3].numel() == 1 else x.reshape(1, -1, width)
    num_rows, block = x.numel() // width, triton.next_power_of_2(width)
    block_rows = max(1, NORM_BLOCK // block)
    _rms_norm_kernel[(triton.cdiv(num_rows, block_rows),)](
        y, total, rows, y if residual is None else residual, weight, eps, num_rows,
        rows.shape[-2], width, rows.stride(-3), rows.stride(-2),
        0 if residual is None else residual.stride(0),
        PLUS_ONE=plus_one, HAS_RESIDUAL=residual is not None, BLOCK_ROWS=block_rows, BLOCK=block,
        num_warps=min(8, max(1, block_rows * block // 512)),
    )  # fmt: skip
    return total, y


def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """See `lora_runtime.kernels.rotate`."""
    out_q, out_k = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k))
    num_tokens, num_heads, head_dim = q.shape
    blocks = [triton.cdiv(heads, HEADS_BLOCK) for heads in (num_heads, k.shape[1])]
    _rotate_kernel[num_tokens, sum(blocks)](
        out_q, out_k, q, k, cos, sin, blocks[0], num_heads, k.shape[1], head_dim, cos.shape[1],
        *q.stride()[:2], *k.stride()[:2], cos.stride(0), sin.stride(0),
        BLOCK_H=HEADS_BLOCK, BLOCK_D=triton.next_power_of_2(head_dim),
    )  # fmt: skip
    return out_q, out_k


def gated_activation(gate: Tensor, up: Tensor, kind: str) -> Tensor:
    """See `lora_runtime.kernels.gated_activation`."""
    assert gate.shape[:-2].numel() == 1, "rows of one step"
    y = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    width = gate.shape[-1]
    _gated_activation_kernel[y.numel() // width, triton.cdiv(width, ACTIVATION_BLOCK)](
        y, gate, up, width, gate.stride(-2), up.stride(-2),
        IS_SILU=kind == "silu", BLOCK=ACTIVATION_BLOCK,
    )  # fmt: skip
    return y


@triton.jit
def _rms_norm_kernel(
    y_ptr, total_ptr, x_ptr, residual_ptr, weight_ptr, eps, num_rows, inner, width, stride_outer,
    stride_inner, stride_residual, PLUS_ONE: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Some rows: one of a hidden state, several of a head's size. A row is summed the same way
    whatever the number of rows.
    """
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
    i = tl.arange(0, BLOCK)[None, :]
    is_in = (row < num_rows) & (i < width)
    place = (row // inner) * stride_outer + (row % inner) * stride_inner + i
    x = tl.load(x_ptr + place, mask=is_in, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + i, mask=i < width, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        added = tl.load(residual_ptr + row * stride_residual + i, mask=is_in, other=0.0)
        total = (x + added.to(tl.float32)).to(y_ptr.dtype.element_ty)
        tl.store(total_ptr + row * width + i, total, mask=is_in)
        x = total.to(tl.float32)
    x = x * tl.rsqrt(tl.sum(x * x, 1)[:, None] / width + eps)
    if PLUS_ONE:
        y = x * (1.0 + weight)
    else:
        y = x.to(y_ptr.dtype.element_ty).to(tl.float32) * weight
    tl.store(y_ptr + row * width + i, y.to(y_ptr.dtype.element_ty), mask=is_in)


@triton.jit
def _rotate_heads(
    out_ptr, x_ptr, cos_ptr, sin_ptr, first_head, num_heads, head_dim, rotated,
    stride_x_head, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Some heads of one token."""
    h, d = (first_head + tl.arange(0, BLOCK_H)).to(tl.int64), tl.arange(0, BLOCK_D)
    is_cell = (h < num_heads)[:, None] & (d < head_dim)[None, :]
    is_rotated, half = d < rotated, rotated // 2
    partner = tl.where(d < half, d + half, d - half)
    cos = tl.load(cos_ptr + d, mask=is_rotated, other=1.0).to(tl.float32)
    sin = tl.load(sin_ptr + d, mask=is_rotated, other=0.0).to(tl.float32)
    row = x_ptr + h[:, None] * stride_x_head
    x = tl.load(row + d[None, :], mask=is_cell, other=0.0).to(tl.float32)
    other = tl.load(row + partner[None, :], mask=is_cell & is_rotated[None, :], other=0.0)
    other = tl.where((d < half)[None, :], -other.to(tl.float32), other.to(tl.float32))
    y = tl.where(is_rotated[None, :], x * cos[None, :] + other * sin[None, :], x)
    place = h[:, None] * head_dim + d[None, :]
    tl.store(out_ptr + place, y.to(out_ptr.dtype.element_ty), mask=is_cell)


@triton.jit
def _rotate_kernel(
    out_q_ptr, out_k_ptr, q_ptr, k_ptr, cos_ptr, sin_ptr, q_blocks, num_heads, num_key_heads,
    head_dim, rotated, stride_q_token, stride_q_head, stride_k_token, stride_k_head, stride_cos,
    stride_sin, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Blocks of query heads, then blocks of key heads, of one token."""
    token, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    cos_ptr += token * stride_cos
    sin_ptr += token * stride_sin
    if block < q_blocks:
        _rotate_heads(
            out_q_ptr + token * num_heads * head_dim, q_ptr + token * stride_q_token,
            cos_ptr, sin_ptr, block * BLOCK_H, num_heads, head_dim, rotated, stride_q_head,
            BLOCK_H, BLOCK_D,
        )  # fmt: skip
    else:
        _rotate_heads(
            out_k_ptr + token * num_key_heads * head_dim, k_ptr + token * stride_k_token,
            cos_ptr, sin_ptr, (block - q_blocks) * BLOCK_H, num_key_heads, head_dim, rotated,
            stride_k_head, BLOCK_H, BLOCK_D,
        )  # fmt: skip


@triton.jit
def gated_value(gate, up, IS_SILU: tl.constexpr):
    """act(gate) · up in float32."""
    if IS_SILU:
        slope = gate
    else:
        slope = 1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)  # 2 √(2/π)
    return gate / (1.0 + tl.exp(-slope)) * up


@triton.jit
def _gated_activation_kernel(
    y_ptr, gate_ptr, up_ptr, width, stride_gate, stride_up,
    IS_SILU: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Part of one row."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_in = i < width
    gate = tl.load(gate_ptr + row * stride_gate + i, mask=is_in, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * stride_up + i, mask=is_in, other=0.0).to(tl.float32)
    y = gated_value(gate, up, IS_SILU)
    tl.store(y_ptr + row * width + i, y.to(y_ptr.dtype.element_ty), mask=is_in)

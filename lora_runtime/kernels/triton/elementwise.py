"""Norm, rotation (with the write of keys and values) and gated activation in Triton: one launch
each, in the place of two to ten.

Inputs may be slices of a larger product: rows and heads lie anywhere, what is within them together.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_runtime.kernels.types import HeadNorm

NORM_BLOCK = 1024
"""Values that one program norms, where a row is shorter."""
HEADS_BLOCK = 4
ACTIVATION_BLOCK = 1024


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, plus_one: bool) -> Tensor:
    """See `lora_runtime.kernels.rms_norm`."""
    return _norm(x, None, weight, eps, plus_one, None)[1]


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
    return _norm(x, residual, weight, eps, plus_one, branch_weight)


def _norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    eps: float,
    plus_one: bool,
    branch_weight: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The sum, which is x itself without a residual (rows, width), and its norm."""
    y, width = torch.empty(x.shape, dtype=x.dtype, device=x.device), x.shape[-1]
    total = x if residual is None else torch.empty_like(y)
    added = y if residual is None else _packed(residual).reshape(-1, width)
    is_heads = x.ndim > 3 and x.shape[:-3].numel() == 1
    rows = _packed(x) if is_heads else _packed(x).reshape(-1, 1, width)
    num_rows, block = x.numel() // width, triton.next_power_of_2(width)
    block_rows = max(1, NORM_BLOCK // block)
    _rms_norm_kernel[(triton.cdiv(num_rows, block_rows),)](
        y, total, rows, added, weight, weight if branch_weight is None else branch_weight, eps,
        num_rows, rows.shape[-2], width, rows.stride(-3), rows.stride(-2),
        0 if residual is None else added.stride(0),
        PLUS_ONE=plus_one, HAS_RESIDUAL=residual is not None,
        HAS_BRANCH_NORM=branch_weight is not None, BLOCK_ROWS=block_rows, BLOCK=block,
        num_warps=min(8, max(1, block_rows * block // 512)),
    )  # fmt: skip
    return total, y


def rotate(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, norm: HeadNorm | None
) -> tuple[Tensor, Tensor]:
    """See `lora_runtime.kernels.rotate`."""
    out_k = torch.empty(k.shape, dtype=k.dtype, device=k.device)
    return _rotate(q, k, None, cos, sin, out_k, out_k, None, norm), out_k


def rotate_and_write(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor,
    cache_slots: Tensor,
    norm: HeadNorm | None,
) -> Tensor:
    """See `lora_runtime.kernels.rotate_and_write`."""
    return _rotate(q, k, v, cos, sin, keys, values, cache_slots, norm)


def _rotate(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor,
    cache_slots: Tensor | None,
    norm: HeadNorm | None,
) -> Tensor:
    """Rotated queries; keys of token t go to keys[t], or with v to the token's slot of the cache.

    keys and values: a token's heads together, as are all tensors of a cache.
    """
    out_q = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    num_tokens, num_heads, head_dim = q.shape
    q, k, cos, sin = (_packed(x) for x in (q, k, cos, sin))
    v = k if v is None else _packed(v)
    blocks = [triton.cdiv(heads, HEADS_BLOCK) for heads in (num_heads, k.shape[1])]
    weights = (q, q) if norm is None else (norm.q_weight, norm.k_weight)
    _rotate_kernel[num_tokens, sum(blocks)](
        out_q, keys, values, q, k, v, cos, sin, q if cache_slots is None else cache_slots,
        *weights, 0.0 if norm is None else norm.eps, blocks[0], num_heads, k.shape[1], head_dim,
        cos.shape[1], *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], cos.stride(0),
        sin.stride(0), WRITES=cache_slots is not None, HAS_NORM=norm is not None,
        PLUS_ONE=norm is not None and norm.plus_one,
        BLOCK_H=HEADS_BLOCK, BLOCK_D=triton.next_power_of_2(head_dim),
    )  # fmt: skip
    return out_q


def _packed(x: Tensor) -> Tensor:
    """x, copied if the values of a row do not lie together."""
    return x if x.stride(-1) == 1 else x.contiguous()


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


@triton.jit(do_not_specialize=["num_rows"])
def _rms_norm_kernel(
    y_ptr, total_ptr, x_ptr, residual_ptr, weight_ptr, branch_weight_ptr, eps, num_rows, inner,
    width, stride_outer, stride_inner, stride_residual, PLUS_ONE: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr, HAS_BRANCH_NORM: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Some rows: one of a hidden state, several of a head's size. A row is summed the same way
    whatever the number of rows.
    """
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
    i = tl.arange(0, BLOCK)[None, :]
    is_in = (row < num_rows) & (i < width)
    place = (row // inner) * stride_outer + (row % inner) * stride_inner + i
    x = tl.load(x_ptr + place, mask=is_in, other=0.0).to(tl.float32)
    dtype = y_ptr.dtype.element_ty
    weight = tl.load(weight_ptr + i, mask=i < width, other=0.0)
    if HAS_BRANCH_NORM:
        branch_weight = tl.load(branch_weight_ptr + i, mask=i < width, other=0.0)
        x = _weighted(x * _scale(x, width, eps), branch_weight, dtype, PLUS_ONE).to(tl.float32)
    if HAS_RESIDUAL:
        added = tl.load(residual_ptr + row * stride_residual + i, mask=is_in, other=0.0)
        total = (x + added.to(tl.float32)).to(dtype)
        tl.store(total_ptr + row * width + i, total, mask=is_in)
        x = total.to(tl.float32)
    y = _weighted(x * _scale(x, width, eps), weight, dtype, PLUS_ONE)
    tl.store(y_ptr + row * width + i, y, mask=is_in)


@triton.jit
def _scale(x, width, eps):
    """1 / √(mean x² + eps) of each row of x (rows, BLOCK) float32, 0 behind its width."""
    return tl.rsqrt(tl.sum(x * x, 1)[:, None] / width + eps)


@triton.jit
def _weighted(x, weight, dtype: tl.constexpr, PLUS_ONE: tl.constexpr):
    """The weights of a norm on x float32, rounded as the norm says."""
    if PLUS_ONE:
        return (x * (1.0 + weight.to(tl.float32))).to(dtype)
    return (x.to(dtype).to(tl.float32) * weight.to(tl.float32)).to(dtype)


@triton.jit
def _rotate_heads(
    out_ptr, x_ptr, weight_ptr, cos_ptr, sin_ptr, eps, h, num_heads, head_dim, rotated,
    stride_x_head, HAS_NORM: tl.constexpr, PLUS_ONE: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The heads h (BLOCK_H,) of one token."""
    d = tl.arange(0, BLOCK_D)
    is_cell = (h < num_heads)[:, None] & (d < head_dim)[None, :]
    is_rotated, half = d < rotated, rotated // 2
    partner = tl.where(d < half, d + half, d - half)
    is_turned = is_cell & is_rotated[None, :]
    row = x_ptr + h[:, None] * stride_x_head
    x = tl.load(row + d[None, :], mask=is_cell, other=0.0).to(tl.float32)
    other = tl.load(row + partner[None, :], mask=is_turned, other=0.0).to(tl.float32)
    if HAS_NORM:
        scale = _scale(x, head_dim, eps)
        dtype = x_ptr.dtype.element_ty
        weight = tl.load(weight_ptr + d, mask=d < head_dim, other=0.0)[None, :]
        other_weight = tl.load(weight_ptr + partner, mask=is_rotated, other=0.0)[None, :]
        x = _weighted(x * scale, weight, dtype, PLUS_ONE).to(tl.float32)
        other = _weighted(other * scale, other_weight, dtype, PLUS_ONE).to(tl.float32)
    cos = tl.load(cos_ptr + d, mask=is_rotated, other=1.0).to(tl.float32)
    sin = tl.load(sin_ptr + d, mask=is_rotated, other=0.0).to(tl.float32)
    other = tl.where((d < half)[None, :], -other, other)
    y = tl.where(is_rotated[None, :], x * cos[None, :] + other * sin[None, :], x)
    place = h[:, None] * head_dim + d[None, :]
    tl.store(out_ptr + place, y.to(out_ptr.dtype.element_ty), mask=is_cell)


@triton.jit(do_not_specialize_on_alignment=["slots_ptr"])
def _rotate_kernel(
    out_q_ptr, keys_ptr, values_ptr, q_ptr, k_ptr, v_ptr, cos_ptr, sin_ptr, slots_ptr,
    q_weight_ptr, k_weight_ptr, eps, q_blocks, num_heads, num_key_heads, head_dim, rotated,
    stride_q_token, stride_q_head, stride_k_token, stride_k_head, stride_v_token, stride_v_head,
    stride_cos, stride_sin, WRITES: tl.constexpr, HAS_NORM: tl.constexpr, PLUS_ONE: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Blocks of query heads, then blocks of key and value heads, of one token."""
    token, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    cos_ptr += token * stride_cos
    sin_ptr += token * stride_sin
    if block < q_blocks:
        h = (block * BLOCK_H + tl.arange(0, BLOCK_H)).to(tl.int64)
        _rotate_heads(
            out_q_ptr + token * num_heads * head_dim, q_ptr + token * stride_q_token, q_weight_ptr,
            cos_ptr, sin_ptr, eps, h, num_heads, head_dim, rotated, stride_q_head, HAS_NORM,
            PLUS_ONE, BLOCK_D,
        )  # fmt: skip
    else:
        slot = token
        if WRITES:
            slot = tl.load(slots_ptr + token)
            if slot < 0:
                return
        h = ((block - q_blocks) * BLOCK_H + tl.arange(0, BLOCK_H)).to(tl.int64)
        if WRITES:
            d = tl.arange(0, BLOCK_D)
            is_cell = (h < num_key_heads)[:, None] & (d < head_dim)[None, :]
            v_place = token * stride_v_token + h[:, None] * stride_v_head + d[None, :]
            place = (slot * num_key_heads + h[:, None]) * head_dim + d[None, :]
            tl.store(values_ptr + place, tl.load(v_ptr + v_place, mask=is_cell), mask=is_cell)
        _rotate_heads(
            keys_ptr + slot * num_key_heads * head_dim, k_ptr + token * stride_k_token,
            k_weight_ptr, cos_ptr, sin_ptr, eps, h, num_key_heads, head_dim, rotated,
            stride_k_head, HAS_NORM, PLUS_ONE, BLOCK_D,
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

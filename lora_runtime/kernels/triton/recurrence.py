"""One token of recurrent layers in Triton: states are read and written once, where they are kept.

A program has some columns of one head's state, all of its keys, so that sums over keys stay within
it; of a convolution, some channels of one row. A row's sums are the same in any batch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

STATE_BLOCK = 4096
"""Numbers of a state that one program holds: 32 in each of 128 threads."""
MAX_BLOCK_VALUES = 32
"""Columns of a state that one program has: 128 bytes of each row are read together."""
CHANNELS_BLOCK = 256


def recurrent_step(
    states: Tensor,
    slots: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keep: Tensor,
    beta: Tensor | None,
    copies: Tensor | None,
) -> Tensor:
    """See `lora_runtime.kernels.recurrent_step`."""
    num_rows, num_heads, num_values = v.shape
    num_keys = q.shape[2]
    q, k, v, keep = (_packed(part) for part in (q, k, v, keep))
    beta = keep if beta is None else _packed(beta)
    out = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    block_keys = triton.next_power_of_2(num_keys)
    fitting = max(1, STATE_BLOCK // block_keys)
    block_values = min(triton.next_power_of_2(num_values), MAX_BLOCK_VALUES, fitting)
    _recurrent_step_kernel[num_rows, num_heads, triton.cdiv(num_values, block_values)](
        out, states, slots, _or_none(copies, slots), q, k, v, keep, beta,
        num_heads, num_heads // q.shape[1], num_keys, num_values,
        q.stride(0), k.stride(0), v.stride(0), keep.stride(0), beta.stride(0),
        HAS_BETA=beta is not keep, BLOCK_K=block_keys, BLOCK_V=block_values,
        num_warps=min(8, max(1, block_keys * block_values // 1024)),
    )  # fmt: skip
    return out


def conv_step(
    histories: Tensor,
    slots: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    is_silu: bool,
    copies: Tensor | None,
) -> Tensor:
    """See `lora_runtime.kernels.conv_step`."""
    x = _packed(x)
    num_rows, num_channels = x.shape
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _conv_step_kernel[num_rows, triton.cdiv(num_channels, CHANNELS_BLOCK)](
        y, histories, slots, _or_none(copies, slots), x, weight, weight if bias is None else bias,
        num_channels, x.stride(0), *weight.stride(),
        TAPS=weight.shape[1], HAS_BIAS=bias is not None, IS_SILU=is_silu, BLOCK=CHANNELS_BLOCK,
    )  # fmt: skip
    return y


def _packed(x: Tensor) -> Tensor:
    """x (N, …), copied if the values of a row do not lie together."""
    return x if x[0].is_contiguous() else x.contiguous()


def _or_none(copies: Tensor | None, slots: Tensor) -> Tensor:
    """A table that names no further slot where there is none: the same kernel serves both."""
    return torch.full_like(slots, -1) if copies is None else copies


@triton.jit(
    do_not_specialize=["stride_q", "stride_k", "stride_v", "stride_keep", "stride_beta"],
    do_not_specialize_on_alignment=[
        "slots_ptr", "copies_ptr", "q_ptr", "k_ptr", "v_ptr", "keep_ptr", "beta_ptr",
    ],
)  # fmt: skip
def _recurrent_step_kernel(
    out_ptr, states_ptr, slots_ptr, copies_ptr, q_ptr, k_ptr, v_ptr, keep_ptr, beta_ptr,
    num_heads, heads_per_key, num_keys, num_values, stride_q, stride_k, stride_v, stride_keep,
    stride_beta, HAS_BETA: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Columns of the state of one row's head. What is given of a row may be a slice of a larger
    tensor, whose address and stride change with the number of rows: neither is specialised on.
    """
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    i = tl.arange(0, BLOCK_K)
    j = tl.program_id(2) * BLOCK_V + tl.arange(0, BLOCK_V)
    is_key, is_value = i < num_keys, j < num_values
    out_ptr += (row * num_heads + head) * num_values + j
    slot = tl.load(slots_ptr + row)
    if slot < 0:
        tl.store(out_ptr, tl.zeros((BLOCK_V,), out_ptr.dtype.element_ty), mask=is_value)
        return
    is_cell = is_key[:, None] & is_value[None, :]
    place = i.to(tl.int64)[:, None] * num_values + j[None, :]
    size = tl.cast(num_keys, tl.int64) * num_values
    own = states_ptr + (slot * num_heads + head) * size + place
    key = (head // heads_per_key) * num_keys + i
    k = tl.load(k_ptr + row * stride_k + key, mask=is_key, other=0.0)
    q = tl.load(q_ptr + row * stride_q + key, mask=is_key, other=0.0)
    given = tl.load(v_ptr + row * stride_v + head * num_values + j, mask=is_value, other=0.0)
    state = tl.load(own, mask=is_cell, other=0.0) * tl.load(keep_ptr + row * stride_keep + head)
    if HAS_BETA:
        held = tl.sum(state * k[:, None], 0)
        given = tl.load(beta_ptr + row * stride_beta + head) * (given - held)
    state += k[:, None] * given[None, :]
    tl.store(own, state, mask=is_cell)
    further = tl.load(copies_ptr + row)
    if further >= 0:
        copy = states_ptr + (further * num_heads + head) * size + place
        tl.store(copy, state, mask=is_cell)
    tl.store(out_ptr, tl.sum(state * q[:, None], 0), mask=is_value)


@triton.jit(
    do_not_specialize=["stride_x"],
    do_not_specialize_on_alignment=["slots_ptr", "copies_ptr", "x_ptr"],
)
def _conv_step_kernel(
    y_ptr, histories_ptr, slots_ptr, copies_ptr, x_ptr, weight_ptr, bias_ptr, num_channels,
    stride_x, stride_weight, stride_tap, TAPS: tl.constexpr, HAS_BIAS: tl.constexpr,
    IS_SILU: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Channels of one row; its history moves up by one token."""
    row = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_in = c < num_channels
    y_ptr += row * num_channels + c
    dtype = y_ptr.dtype.element_ty
    slot, further = tl.load(slots_ptr + row), tl.load(copies_ptr + row)
    if slot < 0:
        tl.store(y_ptr, tl.zeros((BLOCK,), dtype), mask=is_in)
        return
    own = histories_ptr + slot * (TAPS - 1) * num_channels + c
    copy = histories_ptr + further * (TAPS - 1) * num_channels + c
    weight_ptr += c * stride_weight
    y = tl.zeros((BLOCK,), tl.float32)
    for tap in tl.static_range(TAPS):
        if tap < TAPS - 1:
            x = tl.load(own + tap * num_channels, mask=is_in, other=0.0)
        else:
            x = tl.load(x_ptr + row * stride_x + c, mask=is_in, other=0.0).to(tl.float32)
        y += x * tl.load(weight_ptr + tap * stride_tap, mask=is_in, other=0.0).to(tl.float32)
        if tap > 0:
            tl.store(own + (tap - 1) * num_channels, x, mask=is_in)
            tl.store(copy + (tap - 1) * num_channels, x, mask=is_in & (further >= 0))
    if HAS_BIAS:
        y += tl.load(bias_ptr + c, mask=is_in, other=0.0).to(tl.float32)
    if IS_SILU:
        y = y / (1.0 + tl.exp(-y))
    tl.store(y_ptr, y.to(dtype), mask=is_in)

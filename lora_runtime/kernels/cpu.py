"""The compiled CPU backend: a small C++ library behind ctypes, built with the package.

It is optional: without a compiler the install goes through and `reference` serves. Autograd does
not follow what it makes; `cpu_tracked.py` has the ops that training asks gradients of.
"""

from __future__ import annotations

import ctypes
import importlib.util
import math
import struct
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from ctypes import c_float, c_int, c_long, c_void_p
from functools import cache, cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lora_runtime.kernels.reference import copy_states
from lora_runtime.kernels.types import (
    AdapterMemory,
    AttentionMeta,
    HeadNorm,
    NestedScales,
    StepMeta,
    wants_gradient,
)

ABI = 11
LEVELS = ("baseline", "avx2", "avx512", "avx512_bf16", "amx")
FIRST_LEVEL_WITH_BFLOAT16 = 3
"""From it on the processor multiplies bfloat16, and `*_product` below take it."""
UNIT_INPUTS = 64
"""The products of bfloat16 take inputs in multiples of it."""
FOUR_BIT_BLOCK = 64
"""Weights that share one absmax."""
TRAINED_WIDTHS = 32
"""Adapters in training have inputs and outputs in multiples of it."""
MAX_HEAD_DIM = 512
"""Values of a head that `paged_attention` has room for: MAX_CHUNKS vectors in vectors.h."""
ALIGNMENT = 64
"""Bytes; where tensors of a tape begin."""
SUFFIXES = {torch.float32: "f32", torch.bfloat16: "bf16"}
TYPES = {"p": c_void_p, "i": c_int, "l": c_long, "f": c_float}
SIGNATURES = {
    "product_f32": "ppp iii i",
    "four_bit_product": "pp pppppp iii i",
    "int8_product": "pp pp iii i",
    "dense_product": "pp p iii i",
    "grouped_four_bit_product": "pp pppppp p iii i",
    "grouped_int8_product": "pp pp p iii i",
    "grouped_dense_product": "pp p p iii i",
    "apply_adapters": "pppp ppp ii pi ppppp i iii i",
    "apply_half_adapters": "pppp ppp ii pi ppppp i iii i",
    "attention": "pppp ppp p iiiiiii ff i",
    "row_attention": "pppp p iiii f i",
    "row_attention_gradient": "ppp pppp p iiii f i",
    "rms_norm": "pppppp iii f i",
    "rotate": "ppp ppp pp pp p lll iiiiii f i",
    "gated_activation": "ppp ll iii i",
    "rms_norm_gradient": "ppppp iii f i",
    "rotate_gradient": "pp pppp pp pp llll iiiiii f i",
    "gated_activation_gradient": "pp ppp ll iii i",
    "most_likely": "pp ii i",
    "sort_pairs": "p pppp iii i",
    "quantize_four_bit": "pp ppp l i",
    "find_segments": "pppp ppp ppppp pp iii i",
    "find_extents": "pp ppp iiii i",
    "sum_pairs": "pp pp iii i",
    "recurrent_step": "ppp ppppp iiii i",
    "train_adapter": "pp ppp iiii i",
    "adapter_gradients": "ppp pp ppp iiii i",
}
"""Arguments of the library's functions: p a pointer, i int, l long, f float; the last one is the
number of threads, see `_num_threads`.
"""
POINTER, FLOAT = "p", "f"


@cache
def library() -> ctypes.CDLL | None:
    """The compiled library, or None if it was not built or is of another version."""
    spec = importlib.util.find_spec("lora_runtime.kernels._cpu")
    if spec is None or spec.origin is None:
        return None
    found = ctypes.CDLL(spec.origin)
    return found if found.loramux_abi() == ABI else None


def name() -> str | None:
    """`cpu-avx2` and the like; None without the library."""
    found = library()
    return None if found is None else f"cpu-{LEVELS[found.loramux_level()]}"


def can_run(*activations: Tensor, weights: tuple[Tensor, ...] = ()) -> bool:
    """True when the library is there and takes these tensors.

    It takes CPU tensors without gradients: activations of one dtype, float32 or bfloat16, and
    adapter weights in float32, or what `adapter_dtype` says.
    """
    dtype = activations[0].dtype
    if wants_gradient(*activations, *weights) or not takes(*activations):
        return False
    dtypes = (torch.float32, adapter_dtype(dtype))
    return all(weight.dtype in dtypes and weight.is_cpu for weight in weights)


def takes(*activations: Tensor) -> bool:
    """True when the library is there for CPU tensors of this dtype, the same for all."""
    dtype = activations[0].dtype
    if dtype not in SUFFIXES or library() is None:
        return False
    return all(tensor.dtype == dtype and tensor.is_cpu for tensor in activations)


def adapter_dtype(compute: torch.dtype) -> torch.dtype:
    """See `lora_runtime.kernels.adapter_dtype`, on a CPU."""
    return torch.float16 if compute == torch.bfloat16 and multiplies_bfloat16() else torch.float32


def can_multiply(x: Tensor) -> bool:
    """True when the products of bfloat16 take x (..., in)."""
    return (
        x.dtype == torch.bfloat16
        and x.shape[-1] % UNIT_INPUTS == 0
        and can_run(x)
        and multiplies_bfloat16()
    )


def multiplies_bfloat16() -> bool:
    """True when the processor multiplies bfloat16, and the library was built for that."""
    found = library()
    return found is not None and found.loramux_level() >= FIRST_LEVEL_WITH_BFLOAT16


def four_bit_product(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    code: Tensor,
    out_features: int,
    nested: NestedScales | None = None,
) -> Tensor:
    """See `lora_runtime.kernels.four_bit_product`."""
    return _product("four_bit_product", x, out_features, packed, *_scales(absmax, code, nested))


def _scales(absmax: Tensor, code: Tensor, nested: NestedScales | None) -> tuple[Tensor | None, ...]:
    if nested is None:
        return absmax, code, None, None, None
    return nested.absmax, code, absmax, nested.code, nested.offset


def four_bit_gated_product(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    code: Tensor,
    out_features: int,
    kind: str,
    nested: NestedScales | None = None,
) -> Tensor:
    """See `lora_runtime.kernels.four_bit_gated_product`."""
    gate, up = four_bit_product(x, packed, absmax, code, out_features, nested).chunk(2, dim=-1)
    return gated_activation(gate, up, kind)


def int8_product(x: Tensor, codes: Tensor, absmax: Tensor) -> Tensor:
    """See `lora_runtime.kernels.int8_product`."""
    return _product("int8_product", x, len(codes), codes, absmax)


def dense_product(x: Tensor, weight: Tensor) -> Tensor:
    """See `lora_runtime.kernels.dense_product`."""
    return _product("dense_product", x, len(weight), weight)


def grouped_four_bit_product(
    x: Tensor,
    starts: Tensor,
    packed: Tensor,
    absmax: Tensor,
    code: Tensor,
    out_features: int,
    nested: NestedScales | None = None,
) -> Tensor:
    """See `lora_runtime.kernels.grouped_four_bit_product`."""
    weight = (packed, *_scales(absmax, code, nested))
    return _grouped_product("grouped_four_bit_product", x, starts, out_features, *weight)


def grouped_int8_product(x: Tensor, starts: Tensor, codes: Tensor, absmax: Tensor) -> Tensor:
    """See `lora_runtime.kernels.grouped_int8_product`."""
    out_features = len(codes) // (len(starts) - 1)
    return _grouped_product("grouped_int8_product", x, starts, out_features, codes, absmax)


def grouped_dense_product(x: Tensor, starts: Tensor, weight: Tensor) -> Tensor:
    """See `lora_runtime.kernels.grouped_dense_product`."""
    out_features = len(weight) // (len(starts) - 1)
    return _grouped_product("grouped_dense_product", x, starts, out_features, weight)


def _grouped_product(
    op: str, x: Tensor, starts: Tensor, out_features: int, *weight: Tensor | None
) -> Tensor:
    x, width = x.contiguous(), x.shape[-1]
    y = empty((len(x), out_features), x.dtype)
    _run(op, None, *_pointers(y, x, *weight, starts), len(starts) - 1, width, out_features)
    return y


def _product(op: str, x: Tensor, out_features: int, *weight: Tensor | None) -> Tensor:
    x, width = x.contiguous(), x.shape[-1]
    y = empty((*x.shape[:-1], out_features), x.dtype)
    _run(op, None, *_pointers(y, x, *weight), x.numel() // width, width, out_features)
    return y


def apply_stacked_adapters(
    base: Tensor,
    x: Tensor,
    bias: Tensor | None,
    memory: AdapterMemory,
    extents: Tensor,
    meta: StepMeta,
    widths: tuple[int, ...],
    *,
    may_overwrite: bool = False,
) -> Tensor:
    """See `lora_runtime.kernels.apply_stacked_adapters`."""
    base, x, extents = base.contiguous(), x.contiguous(), extents.contiguous()
    y = base if may_overwrite else empty(base.shape, base.dtype)
    columns = (ctypes.c_int64 * len(widths))(*widths)
    is_half = memory.weights.dtype == torch.float16
    _run(
        "apply_half_adapters" if is_half else "apply_adapters",
        None if is_half else base.dtype,
        *_pointers(y, base, x, bias, memory.weights, memory.vectors, extents),
        *extents.shape[1:3],
        columns,
        len(widths),
        *_pointers(meta.tokens, meta.slots, meta.replicas, meta.weights, meta.segment_starts),
        len(meta.segment_starts) - 1,
        len(base),
        x.shape[1],
        base.shape[1],
    )
    return y


def paged_attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    meta: AttentionMeta,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None = None,
) -> Tensor:
    """See `lora_runtime.kernels.paged_attention`."""
    q, sinks = q.contiguous(), None if sinks is None else sinks.float()
    out = empty(q.shape, q.dtype)
    _run(
        "attention",
        q.dtype,
        *_pointers(out, q, keys, values, meta.rows, meta.positions, meta.block_tables, sinks),
        *q.shape[:2],
        *keys.shape[1:],
        meta.block_size,
        meta.block_tables.shape[1],
        window or 0,
        scale,
        softcap or 0.0,
    )
    return out


def attend_rows(q: Tensor, k: Tensor, v: Tensor, segments: Tensor, scale: float) -> Tensor:
    """See `lora_runtime.kernels.attend_rows`."""
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    out = empty(q.shape, q.dtype)
    sizes = len(segments), q.shape[1], *k.shape[1:]
    _run("row_attention", q.dtype, *_pointers(out, q, k, v, segments), *sizes, scale)
    return out


def attend_rows_gradient(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, segments: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Those of q, k and v, given that of `attend_rows` of them."""
    parts = [part.contiguous() for part in (grad, q, k, v)]
    dq, dk, dv = (empty(part.shape, part.dtype) for part in (q, k, v))
    sizes = len(segments), q.shape[1], *k.shape[1:]
    tensors = _pointers(dq, dk, dv, *parts, segments)
    _run("row_attention_gradient", q.dtype, *tensors, *sizes, scale)
    return dq, dk, dv


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, plus_one: bool) -> Tensor:
    """See `lora_runtime.kernels.rms_norm`."""
    x = x.contiguous()
    y = empty(x.shape, x.dtype)
    _norm(y, None, x, None, weight, None, eps, plus_one=plus_one)
    return y


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
    x, residual = x.contiguous(), residual.contiguous()
    y, total = empty(x.shape, x.dtype), empty(x.shape, x.dtype)
    _norm(y, total, x, residual, weight, branch_weight, eps, plus_one=plus_one)
    return total, y


def _norm(
    y: Tensor,
    total: Tensor | None,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    branch_weight: Tensor | None,
    eps: float,
    *,
    plus_one: bool,
) -> None:
    width = x.shape[-1]
    _run(
        "rms_norm",
        x.dtype,
        *_pointers(y, total, x, residual, weight, branch_weight),
        x.numel() // width,
        width,
        plus_one,
        eps,
    )


def rotate(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, norm: HeadNorm | None
) -> tuple[Tensor, Tensor]:
    """See `lora_runtime.kernels.rotate`."""
    q_out, k_out = (empty(part.shape, part.dtype) for part in (q, k))
    _rotate(q_out, k_out, None, q, k, None, cos, sin, None, norm)
    return q_out, k_out


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
    q_out = empty(q.shape, q.dtype)
    _rotate(q_out, keys, values, q, k, v, cos, sin, cache_slots, norm)
    return q_out


def _rotate(
    q_out: Tensor,
    k_out: Tensor,
    v_out: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    slots: Tensor | None,
    norm: HeadNorm | None,
) -> None:
    """Heads of q, k and v may lie between others; a token's own are side by side."""
    q, k = _side_by_side(q), _side_by_side(k)
    v = None if v is None else _side_by_side(v)
    cos, sin = cos.contiguous(), sin.contiguous()
    weights = (None, None) if norm is None else (norm.q_weight, norm.k_weight)
    num_tokens, num_heads, head_dim = q.shape
    _run(
        "rotate",
        q.dtype,
        *_pointers(q_out, k_out, v_out, q, k, v, cos, sin, *weights, slots),
        q.stride(0),
        k.stride(0),
        0 if v is None else v.stride(0),
        num_tokens,
        num_heads,
        k.shape[1],
        head_dim,
        cos.shape[1],
        norm is not None and norm.plus_one,
        0.0 if norm is None else norm.eps,
    )


def _side_by_side(heads: Tensor) -> Tensor:
    """(T, H, D) with every token's H · D values in one run."""
    is_one_run = heads.stride(2) == 1 and heads.stride(1) == heads.shape[2]
    return heads if is_one_run else heads.contiguous()


def rotate_gradient(
    grad_q: Tensor,
    grad_k: Tensor,
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    norm: HeadNorm | None,
) -> tuple[Tensor, Tensor]:
    """Those of q (T, H, D) and k (T, G, D), given those of what `rotate` makes of them. Without a
    norm q and k are not read.
    """
    grads = [_side_by_side(part) for part in (grad_q, grad_k)]
    heads = [_side_by_side(part) for part in (q, k)]
    cos, sin = cos.contiguous(), sin.contiguous()
    weights = (None, None) if norm is None else (norm.q_weight, norm.k_weight)
    found = [empty(part.shape, part.dtype) for part in (q, k)]
    num_tokens, num_heads, head_dim = q.shape
    _run(
        "rotate_gradient",
        q.dtype,
        *_pointers(*found, *grads, *heads, cos, sin, *weights),
        *(part.stride(0) for part in (*grads, *heads)),
        num_tokens,
        num_heads,
        k.shape[1],
        head_dim,
        cos.shape[1],
        norm is not None and norm.plus_one,
        0.0 if norm is None else norm.eps,
    )
    return found[0], found[1]


def rms_norm_gradient(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    eps: float,
    *,
    plus_one: bool,
    other: Tensor | None = None,
) -> Tensor:
    """That of x, given that of `rms_norm` of x and, added to it, what x has from elsewhere."""
    grad, x = grad.contiguous(), x.contiguous()
    other = None if other is None else other.contiguous()
    found, width = empty(x.shape, x.dtype), x.shape[-1]
    _run(
        "rms_norm_gradient",
        x.dtype,
        *_pointers(found, grad, other, x, weight),
        x.numel() // width,
        width,
        plus_one,
        eps,
    )
    return found


def gated_activation(gate: Tensor, up: Tensor, kind: str) -> Tensor:
    """See `lora_runtime.kernels.gated_activation`."""
    rows, width = _rows_of(gate, up), gate.shape[-1]
    y = empty(gate.shape, gate.dtype)
    _run(
        "gated_activation",
        gate.dtype,
        *_pointers(y, *rows),
        *(part.stride(0) for part in rows),
        len(rows[0]),
        width,
        kind == "gelu_tanh",
    )
    return y


def gated_activation_gradient(
    grad: Tensor, gate: Tensor, up: Tensor, kind: str
) -> tuple[Tensor, Tensor]:
    """Those of gate and up, given that of `gated_activation` of them."""
    rows, width = _rows_of(gate, up), gate.shape[-1]
    grad = grad.contiguous()
    dgate, dup = (empty(part.shape, part.dtype) for part in (gate, up))
    _run(
        "gated_activation_gradient",
        gate.dtype,
        *_pointers(dgate, dup, grad, *rows),
        *(part.stride(0) for part in rows),
        len(rows[0]),
        width,
        kind == "gelu_tanh",
    )
    return dgate, dup


def _rows_of(*parts: Tensor) -> list[Tensor]:
    """(..., width) each as (rows, width), a row's values side by side."""
    rows = [part.reshape(-1, part.shape[-1]) for part in parts]
    return [part if part.stride(1) == 1 else part.contiguous() for part in rows]


def can_train_adapter(y: Tensor, x: Tensor, a: Tensor) -> bool:
    """See `lora_runtime.kernels.can_train_adapter`, on a CPU."""
    are_whole = x.shape[-1] % TRAINED_WIDTHS == 0 and y.shape[-1] % TRAINED_WIDTHS == 0
    return are_whole and x.dtype == torch.bfloat16 and takes(x, y, a) and multiplies_bfloat16()


def train_adapter(y: Tensor, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """See `lora_runtime.kernels.train_adapter`."""
    rank, (num_tokens, width) = len(a), x.shape
    hidden = empty((-(-rank // 16) * 16, -(-num_tokens // 32) * 32), x.dtype)
    sizes = num_tokens, width, y.shape[1], rank
    a, b = a.contiguous(), b.contiguous()  # named, so that they live until the call is over
    tensors = _pointers(y, hidden, x, a, b)
    _run("train_adapter", None, *tensors, *sizes)
    return hidden


def trained_adapter_gradients(
    grad: Tensor, x: Tensor, hidden: Tensor, a: Tensor, b: Tensor, grad_x: Tensor | None
) -> tuple[Tensor, Tensor]:
    """See `lora_runtime.kernels.trained_adapter_gradients`."""
    of_a, of_b = (empty(part.shape, torch.float32) for part in (a, b))
    a, b = a.contiguous(), b.contiguous()
    tensors = _pointers(grad_x, of_a, of_b, grad, hidden, x, a, b)
    _run("adapter_gradients", None, *tensors, *x.shape, grad.shape[1], len(a))
    return of_a, of_b


def most_likely(logits: Tensor) -> Tensor:
    """See `lora_runtime.kernels.most_likely`."""
    logits = logits.contiguous()
    found = empty((len(logits), 2), torch.int64)
    _run("most_likely", logits.dtype, *_pointers(found, logits), *logits.shape)
    return found


def can_sort(*integers: Tensor) -> bool:
    """True when the library is there for integers that are on the CPU; they have no gradient."""
    return library() is not None and all(tensor.is_cpu for tensor in integers)


def can_quantize(weight: Tensor) -> bool:
    """See `lora_runtime.kernels.can_quantize`."""
    return weight.is_cpu and library() is not None


def quantize_four_bit(weight: Tensor, code: Tensor) -> tuple[Tensor, Tensor]:
    """See `lora_runtime.kernels.quantize_four_bit`."""
    weight, order = weight.to(torch.bfloat16).contiguous(), torch.argsort(code)
    bounds = (code[order[:-1]] + code[order[1:]]) / 2
    order = order.to(torch.uint8)
    packed = empty((-(-weight.numel() // 2),), torch.uint8)
    absmax = empty((-(-weight.numel() // FOUR_BIT_BLOCK),), torch.float32)
    pointers = _pointers(packed, absmax, weight, bounds, order)
    _run("quantize_four_bit", None, *pointers, weight.numel())
    return packed, absmax


def sort_pairs(chosen: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `lora_runtime.kernels.sort_pairs`."""
    chosen, num_pairs = chosen.contiguous(), chosen.numel()
    tokens, experts = (empty((num_pairs,), torch.int64) for _ in range(2))
    places, starts = empty(chosen.shape, torch.int64), empty((num_experts + 1,), torch.int32)
    outputs = _pointers(chosen, tokens, experts, places, starts)
    _run("sort_pairs", None, *outputs, num_pairs, chosen.shape[1], num_experts)
    return tokens, experts, places, starts


def find_segments(
    meta: StepMeta, places: Tensor, experts: Tensor, num_experts: int
) -> tuple[Tensor, ...]:
    """The pairs (E · K,), segments and weights of entries, and starts, slots, replicas and experts
    of segments; see `ExpertPairs`. There are as many segments as could be: how many have entries
    is not read here, so that a tape fits the steps to come, and the last ones are empty.
    """
    per_token, num_adapters = places.shape[1], len(meta.segment_starts) - 1
    size = len(meta.tokens) * per_token
    most = min(size, num_adapters * num_experts)
    pairs, segments = (empty((size,), torch.int32) for _ in range(2))
    weights, starts = empty((size,), torch.float32), empty((most + 1,), torch.int32)
    slots, replicas, own = (empty((most,), torch.int64) for _ in range(3))
    outputs = (pairs, segments, weights, starts, slots, replicas, own)
    entries = (meta.tokens, meta.slots, meta.replicas, meta.weights, meta.segment_starts[-1:])
    sizes = (most, per_token, num_experts)
    _run("find_segments", None, *_pointers(*outputs, *entries, places, experts), *sizes)
    return outputs


def find_extents(
    table: Tensor,
    slots: Tensor,
    replicas: Tensor,
    experts: Tensor,
    in_features: int,
    out_features: int,
) -> Tensor:
    """See `ExpertPairs.extents`."""
    table, count = table.contiguous(), len(slots)
    found = empty((count, 1, table.shape[-1]), torch.int64)
    tensors = _pointers(found, table, slots, replicas, experts)
    _run("find_extents", None, *tensors, table.shape[1], count, in_features, out_features)
    return found


def sum_pairs(y: Tensor, places: Tensor, weights: Tensor) -> Tensor:
    """See `lora_runtime.kernels.sum_pairs`."""
    y, places, weights = y.contiguous(), places.contiguous(), weights.float().contiguous()
    found = empty((len(places), y.shape[1]), y.dtype)
    _run("sum_pairs", y.dtype, *_pointers(found, y, places, weights), *places.shape, y.shape[1])
    return found


def recurrent_step(
    states: Tensor,
    slots: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keep: Tensor,
    beta: Tensor | None,
    copies: Tensor | None = None,
) -> Tensor:
    """See `lora_runtime.kernels.recurrent_step`."""
    share = v.shape[1] // q.shape[1]
    q, k = (part.repeat_interleave(share, dim=1) for part in (q, k))
    v, keep = v.contiguous(), keep.contiguous()
    beta = None if beta is None else beta.contiguous()
    out = empty(v.shape, v.dtype)
    given = _pointers(out, states, slots, q, k, v, keep, beta)
    _run("recurrent_step", None, *given, *q.shape, v.shape[2])
    if copies is not None:
        copy_states(states, slots, copies)
    return out


def pack_panels(weight: Tensor) -> Tensor:
    """See `lora_runtime.kernels.pack_panels`."""
    found = library()
    assert found is not None, "`can_use_panels` says whether there is a library"
    width = found.loramux_panel_width()
    out_features, in_features = weight.shape
    num_panels = -(-out_features // width)
    padded = weight.new_zeros(num_panels * width, in_features)
    padded[:out_features] = weight
    return padded.view(num_panels, width, in_features).transpose(1, 2).contiguous()


def panel_product(x: Tensor, panels: Tensor, out_features: int) -> Tensor:
    """See `lora_runtime.kernels.panel_product`."""
    return _product("product_f32", x, out_features, panels)


Step = tuple[Callable[..., object], tuple[Any, ...]]
"""What to call, and with what."""


class Tape:
    """The library's calls of one run, to be made again in the same order on the same memory.

    What an op gives lies meanwhile in memory of the tape's own, which is used again as soon as
    nobody holds the tensor any more, as the run's other tensors would be.
    """

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self.kept: list[object] = []
        """What must not be freed while the tape may be played."""
        self._free: dict[int, list[np.ndarray[Any, Any]]] = {}
        self._addresses: set[int] = set()

    def play(self) -> None:
        """Run all again. Calls of the library that follow one another are one call of Python's:
        each would let other threads have the interpreter, and wait for them to give it back. What
        torch does in between is little: it would wait longer for its threads than it computes.
        """
        num_threads = set_torch_threads(1)
        try:
            for function, arguments in self._joined:
                function(*arguments)
        finally:
            set_torch_threads(num_threads)

    @cached_property
    def _joined(self) -> list[Step]:
        """The steps once all are noted."""
        joined: list[Step] = []
        calls: list[tuple[_Function, tuple[Any, ...]]] = []
        for function, arguments in self.steps:
            if isinstance(function, _Function):
                calls.append((function, arguments))
                continue
            joined += [*_as_one(calls), (function, arguments)]
            calls = []
        joined += _as_one(calls)
        return joined

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """As `torch.empty`, of the tape's memory."""
        size = -(-math.prod(shape) * dtype.itemsize // ALIGNMENT) * ALIGNMENT
        free = self._free.setdefault(size, [])
        memory = free.pop() if free else _aligned(size)
        self._addresses.add(memory.ctypes.data)
        lent = memory.view()
        weakref.finalize(lent, free.append, memory)  # once the last tensor over it has gone
        values = torch.from_numpy(lent).view(dtype)
        return values[: math.prod(shape)].view(*shape)

    def keep(self, tensor: Tensor) -> None:
        """Hold a tensor of others' memory that a call reads or writes."""
        if tensor.untyped_storage().data_ptr() not in self._addresses:
            self.kept.append(tensor)


class Unrecordable(Exception):
    """This forward cannot be played again: it computes in Python what its tensors hold, or makes
    more than a tape should keep.
    """


class _Recording(threading.local):
    tape: Tape | None = None


_recording = _Recording()


@contextmanager
def recorded_on(tape: Tape) -> Iterator[None]:
    """Note this thread's calls of the library on `tape`; they run as well."""
    _recording.tape = tape
    try:
        yield
    finally:
        _recording.tape = None


@contextmanager
def unrecorded() -> Iterator[None]:
    """What is made within stays: a tape that is recorded holds it, and not how it is made."""
    tape, _recording.tape = _recording.tape, None
    try:
        yield
    finally:
        _recording.tape = tape


def is_recording() -> bool:
    """True within `recorded_on`, on its thread, outside of `unrecorded`."""
    return _recording.tape is not None


def refuse_recording() -> None:
    """Raise Unrecordable while a tape is recorded: what follows must not be on it."""
    if is_recording():
        raise Unrecordable


def empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """An uninitialised CPU tensor for an op's result."""
    tape = _recording.tape
    return torch.empty(shape, dtype=dtype) if tape is None else tape.empty(shape, dtype)


def _aligned(size: int) -> np.ndarray[Any, Any]:
    """Memory that begins at a multiple of ALIGNMENT."""
    raw = np.empty(size + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + size]


def _pointers(*tensors: Tensor | None) -> list[int | None]:
    if (tape := _recording.tape) is not None:
        for tensor in tensors:
            if tensor is not None:
                tape.keep(tensor)
    return [None if tensor is None else tensor.data_ptr() for tensor in tensors]


class _Threads(threading.local):
    are_torchs = False


_threads = _Threads()


@contextmanager
def beside_torch() -> Iterator[None]:
    """Within it this thread's calls of the library run on torch's threads: for few calls between
    many ops of torch, whose threads keep the cores for milliseconds after each.
    """
    before, _threads.are_torchs = _threads.are_torchs, True
    try:
        yield
    finally:
        _threads.are_torchs = before


def set_torch_threads(number: int) -> int:
    """Let torch compute in `number` threads what this thread asks of it, and return how many they
    were; 0, and nothing is done, where there is no library, torch has no OpenMP, or `number` is
    less than 1.

    `torch.set_num_threads` also sets the number of every thread that has not asked for its own yet.
    """
    found = library()
    return 0 if found is None else int(found.loramux_set_torch_threads(number))


def _num_threads() -> int:
    """As the library takes it: a negative number is one of torch's threads."""
    return -torch.get_num_threads() if _threads.are_torchs else torch.get_num_threads()


def _run(op: str, dtype: torch.dtype | None, *arguments: Any) -> None:
    function, arguments = _function(op, dtype), (*arguments, _num_threads())
    if (tape := _recording.tape) is not None:
        tape.steps.append((function, arguments))
    function(*arguments)


class _Function:
    """One of the library's functions, for Python to call and for a tape to play."""

    def __init__(self, op: str, dtype: torch.dtype | None) -> None:
        found, name = library(), op if dtype is None else f"{op}_{SUFFIXES[dtype]}"
        self._kinds = SIGNATURES[op].replace(" ", "")
        self._call = getattr(found, f"loramux_{name}")
        self._call.restype = None
        self._call.argtypes = [TYPES[kind] for kind in self._kinds]
        self._played = ctypes.cast(getattr(found, f"loramux_played_{name}"), c_void_p).value

    def __call__(self, *arguments: Any) -> None:
        self._call(*arguments)

    def words(self, arguments: Sequence[Any]) -> list[int]:
        """A call as `loramux_play` reads it: what to call, how many arguments, and these."""
        assert self._played is not None
        packed = map(_word, self._kinds, arguments)
        return [self._played, len(self._kinds), *packed]


_function = cache(_Function)


def _word(kind: str, value: Any) -> int:
    """An argument in 8 bytes; a float as the bits of a double."""
    if kind == POINTER:
        return ctypes.addressof(value) if isinstance(value, ctypes.Array) else value or 0
    if kind == FLOAT:
        return int.from_bytes(struct.pack("=d", value), sys.byteorder, signed=True)
    return int(value)


def _as_one(calls: Sequence[tuple[_Function, tuple[Any, ...]]]) -> list[Step]:
    """Calls of the library as one step, which also holds what they point at; none as none."""
    words = [word for function, arguments in calls for word in function.words(arguments)]
    return [(_play, (np.array(words, np.int64), calls))] if calls else []


def _play(program: np.ndarray[Any, Any], calls: Sequence[object]) -> None:
    found = library()
    assert found is not None
    found.loramux_play(c_void_p(program.ctypes.data), c_long(len(calls)))

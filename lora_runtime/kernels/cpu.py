"""The ops of the compiled CPU backend, a small C++ library that is built with the package.

Autograd does not follow what they make; `cpu_tracked.py` has those that training asks gradients of.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from lora_runtime.kernels import huge_pages
from lora_runtime.kernels.cpu_library import SUFFIXES, library
from lora_runtime.kernels.reference import copy_states
from lora_runtime.kernels.tape import empty, pointers, run
from lora_runtime.kernels.types import (
    AdapterMemory,
    AttentionMeta,
    HeadNorm,
    NestedScales,
    StepMeta,
    wants_gradient,
)

FIRST_LEVEL_WITH_CODES, FIRST_LEVEL_WITH_BFLOAT16 = 1, 3
"""From it on products read codes, of float32 activations and of bfloat16 ones."""
UNIT_INPUTS = 64
"""Products take inputs in multiples of it, those of panels any number."""
PANEL = 32
"""Outputs of a panel: PANEL in panels.h."""
EXAMINED_ROWS = 1024
"""Rows whose values are compared with bfloat16 at once: few enough for a processor's cache."""
FOUR_BIT_BLOCK = 64
"""Weights that share one absmax."""
TRAINED_WIDTHS = 32
"""Adapters in training have inputs and outputs in multiples of it."""


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


def can_multiply_codes(x: Tensor) -> bool:
    """True when products with codes, grouped ones too, take x (..., in)."""
    first = FIRST_LEVEL_WITH_CODES if x.dtype == torch.float32 else FIRST_LEVEL_WITH_BFLOAT16
    return x.shape[-1] % UNIT_INPUTS == 0 and can_run(x) and _level() >= first


def can_multiply_dense(x: Tensor) -> bool:
    """True when `dense_product` and `grouped_dense_product` take x (..., in)."""
    return x.dtype == torch.bfloat16 and can_multiply_codes(x)


def multiplies_bfloat16() -> bool:
    """True when the processor multiplies bfloat16, and the library was built for that."""
    return _level() >= FIRST_LEVEL_WITH_BFLOAT16


def _level() -> int:
    """Where the processor is in `LEVELS`; -1 without the library."""
    found = library()
    return -1 if found is None else int(found.loramux_level())


def four_bit_product(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    code: Tensor,
    out_features: int,
    nested: NestedScales | None = None,
) -> Tensor:
    """See `lora_runtime.kernels.four_bit_product`."""
    weight = (packed, *_scales(absmax, code, nested))
    return _product("four_bit_product", x.dtype, x, out_features, *weight)


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
    return _product("int8_product", x.dtype, x, len(codes), codes, absmax)


def dense_product(x: Tensor, weight: Tensor) -> Tensor:
    """See `lora_runtime.kernels.dense_product`."""
    return _product("dense_product", None, x, len(weight), weight)


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
    return _grouped_product("grouped_four_bit_product", x.dtype, x, starts, out_features, *weight)


def grouped_int8_product(x: Tensor, starts: Tensor, codes: Tensor, absmax: Tensor) -> Tensor:
    """See `lora_runtime.kernels.grouped_int8_product`."""
    out_features = len(codes) // (len(starts) - 1)
    return _grouped_product("grouped_int8_product", x.dtype, x, starts, out_features, codes, absmax)


def grouped_dense_product(x: Tensor, starts: Tensor, weight: Tensor) -> Tensor:
    """See `lora_runtime.kernels.grouped_dense_product`."""
    out_features = len(weight) // (len(starts) - 1)
    return _grouped_product("grouped_dense_product", None, x, starts, out_features, weight)


def _grouped_product(
    op: str,
    dtype: torch.dtype | None,
    x: Tensor,
    starts: Tensor,
    out_features: int,
    *weight: Tensor | None,
) -> Tensor:
    x, width = x.contiguous(), x.shape[-1]
    y = empty((len(x), out_features), x.dtype)
    run(op, dtype, *pointers(y, x, *weight, starts), len(starts) - 1, width, out_features)
    return y


def _product(
    op: str, dtype: torch.dtype | None, x: Tensor, out_features: int, *weight: Tensor | None
) -> Tensor:
    x, width = x.contiguous(), x.shape[-1]
    y = empty((*x.shape[:-1], out_features), x.dtype)
    run(op, dtype, *pointers(y, x, *weight), x.numel() // width, width, out_features)
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
    run(
        "apply_half_adapters" if is_half else "apply_adapters",
        None if is_half else base.dtype,
        *pointers(y, base, x, bias, memory.weights, memory.vectors, extents),
        *extents.shape[1:3],
        columns,
        len(widths),
        *pointers(meta.tokens, meta.slots, meta.replicas, meta.weights, meta.segment_starts),
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
    run(
        "attention",
        q.dtype,
        *pointers(out, q, keys, values, meta.rows, meta.positions, meta.block_tables, sinks),
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
    run("row_attention", q.dtype, *pointers(out, q, k, v, segments), *sizes, scale)
    return out


def attend_rows_gradient(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, segments: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Those of q, k and v, given that of `attend_rows` of them."""
    parts = [part.contiguous() for part in (grad, q, k, v)]
    dq, dk, dv = (empty(part.shape, part.dtype) for part in (q, k, v))
    sizes = len(segments), q.shape[1], *k.shape[1:]
    tensors = pointers(dq, dk, dv, *parts, segments)
    run("row_attention_gradient", q.dtype, *tensors, *sizes, scale)
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
    run(
        "rms_norm",
        x.dtype,
        *pointers(y, total, x, residual, weight, branch_weight),
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
    run(
        "rotate",
        q.dtype,
        *pointers(q_out, k_out, v_out, q, k, v, cos, sin, *weights, slots),
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
    run(
        "rotate_gradient",
        q.dtype,
        *pointers(*found, *grads, *heads, cos, sin, *weights),
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
    run(
        "rms_norm_gradient",
        x.dtype,
        *pointers(found, grad, other, x, weight),
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
    run(
        "gated_activation",
        gate.dtype,
        *pointers(y, *rows),
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
    run(
        "gated_activation_gradient",
        gate.dtype,
        *pointers(dgate, dup, grad, *rows),
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
    tensors = pointers(y, hidden, x, a, b)
    run("train_adapter", None, *tensors, *sizes)
    return hidden


def trained_adapter_gradients(
    grad: Tensor, x: Tensor, hidden: Tensor, a: Tensor, b: Tensor, grad_x: Tensor | None
) -> tuple[Tensor, Tensor]:
    """See `lora_runtime.kernels.trained_adapter_gradients`."""
    of_a, of_b = (empty(part.shape, torch.float32) for part in (a, b))
    a, b = a.contiguous(), b.contiguous()
    tensors = pointers(grad_x, of_a, of_b, grad, hidden, x, a, b)
    run("adapter_gradients", None, *tensors, *x.shape, grad.shape[1], len(a))
    return of_a, of_b


def most_likely(logits: Tensor) -> Tensor:
    """See `lora_runtime.kernels.most_likely`."""
    logits = logits.contiguous()
    found = empty((len(logits), 2), torch.int64)
    run("most_likely", logits.dtype, *pointers(found, logits), *logits.shape)
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
    places = pointers(packed, absmax, weight, bounds, order)
    run("quantize_four_bit", None, *places, weight.numel())
    return packed, absmax


def sort_pairs(chosen: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `lora_runtime.kernels.sort_pairs`."""
    chosen, num_pairs = chosen.contiguous(), chosen.numel()
    tokens, experts = (empty((num_pairs,), torch.int64) for _ in range(2))
    places, starts = empty(chosen.shape, torch.int64), empty((num_experts + 1,), torch.int32)
    outputs = pointers(chosen, tokens, experts, places, starts)
    run("sort_pairs", None, *outputs, num_pairs, chosen.shape[1], num_experts)
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
    run("find_segments", None, *pointers(*outputs, *entries, places, experts), *sizes)
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
    tensors = pointers(found, table, slots, replicas, experts)
    run("find_extents", None, *tensors, table.shape[1], count, in_features, out_features)
    return found


def sum_pairs(y: Tensor, places: Tensor, weights: Tensor) -> Tensor:
    """See `lora_runtime.kernels.sum_pairs`."""
    y, places, weights = y.contiguous(), places.contiguous(), weights.float().contiguous()
    found = empty((len(places), y.shape[1]), y.dtype)
    run("sum_pairs", y.dtype, *pointers(found, y, places, weights), *places.shape, y.shape[1])
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
    given = pointers(out, states, slots, q, k, v, keep, beta)
    run("recurrent_step", None, *given, *q.shape, v.shape[2])
    if copies is not None:
        copy_states(states, slots, copies)
    return out


def pack_panels(weight: Tensor, num_groups: int = 1) -> Tensor:
    """See `lora_runtime.kernels.pack_panels`."""
    is_exact = all(
        torch.equal(part.bfloat16().float(), part) for part in weight.split(EXAMINED_ROWS)
    )
    dtype = torch.bfloat16 if is_exact else torch.float32
    in_features = weight.shape[1]
    groups = weight.unflatten(0, (num_groups, -1))
    height = groups.shape[1]
    num_panels, num_whole = -(-height // PANEL), height // PANEL
    num_values = num_groups * num_panels * in_features * PANEL
    panels = huge_pages.zeros(num_values * dtype.itemsize).view(dtype)
    panels = panels.view(num_groups, num_panels, in_features, PANEL)
    whole, rest = groups.split([num_whole * PANEL, height % PANEL], dim=1)
    panels[:, :num_whole] = whole.unflatten(1, (num_whole, PANEL)).transpose(2, 3)
    panels[:, num_whole:, :, : height % PANEL] = rest.transpose(1, 2)[:, None]
    return panels.flatten(0, 1)


def panel_product(x: Tensor, panels: Tensor, out_features: int) -> Tensor:
    """See `lora_runtime.kernels.panel_product`."""
    if (len(panels), panels.shape[1]) != (-(-out_features // PANEL), x.shape[-1]):
        raise ValueError(f"panels {tuple(panels.shape)} of {x.shape[-1]} × {out_features}")
    return _product("panel_product", panels.dtype, x, out_features, panels)

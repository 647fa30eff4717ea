"""The public ops of the runtime.

`reference.py` defines every op in torch; `cpu.py` is a compiled backend that gives the same values
within rounding and runs whenever it can (CPU tensors, no gradients; `cpu_tracked.py` has some of
its ops with gradients). `gpu.py` is the same for CUDA tensors, in Triton and CUDA.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from lora_runtime.kernels import cpu, cpu_library, cpu_tracked, gpu, huge_pages, reference
from lora_runtime.kernels.expert_pairs import ExpertPairs
from lora_runtime.kernels.tape import refuse_recording, unrecorded
from lora_runtime.kernels.types import (
    NO_EXTENT,
    AdapterMemory,
    AttentionMeta,
    Extent,
    HeadNorm,
    NestedScales,
    PooledAdapters,
    SlotUse,
    Span,
    StepMeta,
    segment_starts,
    spans_of_rows,
    to_device,
    wants_gradient,
)

__all__ = [
    "BACKEND",
    "LIBRARY_MISSING",
    "NO_EXTENT",
    "AdapterMemory",
    "AttentionMeta",
    "ExpertPairs",
    "HeadNorm",
    "NestedScales",
    "PooledAdapters",
    "SlotUse",
    "Extent",
    "Span",
    "StepMeta",
    "adapter_dtype",
    "add_rms_norm",
    "apply_adapters",
    "apply_gated_adapters",
    "apply_stacked_adapters",
    "attend_rows",
    "can_attend_rows",
    "can_dequantize",
    "can_fuse",
    "can_fuse_elementwise",
    "can_multiply_dense",
    "can_multiply_codes",
    "can_multiply_groups",
    "can_quantize",
    "can_run_on_gpu",
    "can_shrink_with_product",
    "can_train_adapter",
    "can_use_panels",
    "conv_step",
    "dense_product",
    "draw_cut",
    "embed_adapters",
    "four_bit_gated_product",
    "four_bit_product",
    "four_bit_product_and_shrink",
    "four_bit_values",
    "gated_activation",
    "grouped_dense_product",
    "grouped_four_bit_product",
    "grouped_int8_product",
    "huge_pages",
    "int8_product",
    "int8_product_and_shrink",
    "invert",
    "most_likely",
    "quantize_four_bit",
    "recurrent_step",
    "pack_panels",
    "paged_attention",
    "panel_product",
    "patch_logits",
    "refuse_recording",
    "rms_norm",
    "rotate",
    "rotate_and_write",
    "segment_starts",
    "sort_pairs",
    "spans_of_rows",
    "sum_pairs",
    "to_device",
    "train_adapter",
    "trained_adapter_gradients",
    "unrecorded",
    "wants_gradient",
    "write_kv",
]

BACKEND = gpu.name() or cpu_library.name() or "torch"
"""The fastest backend of this installation."""
LIBRARY_MISSING = (
    "the compiled library is missing or of another version, and a CPU computes at a quarter of its "
    "speed without it: install again with a C++ compiler, and run from where it was installed"
)
"""What is said of the backend `torch`."""


def _fastest(*activations: Tensor) -> ModuleType:
    """The fastest backend that takes these tensors."""
    if gpu.can_run(*activations):
        return gpu
    return cpu if cpu.can_run(*activations) else _reference()


def _fastest_tracked(*activations: Tensor, frozen: tuple[Tensor, ...] = ()) -> ModuleType:
    """`_fastest`, also among backends with gradients of the activations."""
    if _can_track(*activations, frozen=frozen):
        return cpu_tracked
    return _fastest(*activations, *frozen)


def _can_track(*activations: Tensor, frozen: tuple[Tensor, ...] = ()) -> bool:
    """True where `cpu_tracked` runs; a tensor that is the GPU backend's is not its."""
    is_on_cpu = activations[0].device.type not in gpu.DEVICES
    return is_on_cpu and cpu_tracked.can_run(*activations, frozen=frozen)


def _reference() -> ModuleType:
    """The definition. It reads tables in Python, so what is recorded must not contain it."""
    refuse_recording()
    return reference


def adapter_dtype(device: torch.device, compute: torch.dtype) -> torch.dtype:
    """The dtype in which adapters' weights are kept for a base of dtype `compute`.

    On a GPU the compute dtype. On a CPU float32; float16 under a bfloat16 base if the processor
    multiplies bfloat16: half of the bytes that a step reads, each off by 2⁻¹¹ at most where a
    bfloat16 is by 2⁻⁸.
    """
    return compute if device.type in gpu.DEVICES else cpu.adapter_dtype(compute)


def apply_adapters(
    base: Tensor,
    x: Tensor,
    bias: Tensor | None,
    memory: AdapterMemory,
    extents: Tensor,
    meta: StepMeta,
    hidden: Tensor | None = None,
    *,
    may_overwrite: bool = False,
) -> Tensor:
    """Add every token's adapters to one linear layer's output; rows of all adapters at once.

    y[t] = base[t] + bias + Σ_e w_e · ((g − 1) ∘ base[t] + B'ᵀ(A x[t]) + (b − bias)),
    over the entries e of token t; A, B', g, b are those of the Extent `extents[slot_e, replica_e]`
    in `memory`.

    Shapes: base (T, out) = W x without bias, x (T, in), bias (out,) or None,
    extents (S, R, 8) int64, an Extent each. Returns (T, out) in base's dtype; nothing is changed in
    place. With `may_overwrite` base is the caller's to lose: on a CPU the result lies in its
    memory, which saves a third of what is read and written of outputs. Products accumulate in
    float32. Rows without an entry are exactly base + bias, whatever values other rows or
    unused memory hold. `hidden`: A x, where the launch of the product made it
    (`four_bit_product_and_shrink`). Raises IndexError where `meta` names a slot or replica that
    `extents` does not have.
    Source: Punica's SGMV (arXiv:2310.18547), with true ranks and DoRA gains (arXiv:2402.09353).
    """
    widths = (base.shape[1],)
    adapters = memory, extents[None], meta
    return apply_stacked_adapters(
        base, x, bias, *adapters, widths, hidden, may_overwrite=may_overwrite
    )


def apply_stacked_adapters(
    base: Tensor,
    x: Tensor,
    bias: Tensor | None,
    memory: AdapterMemory,
    extents: Tensor,
    meta: StepMeta,
    widths: tuple[int, ...],
    hidden: Tensor | None = None,
    *,
    may_overwrite: bool = False,
) -> Tensor:
    """`apply_adapters` of up to three modules that share x, their outputs side by side in `base`.

    Shapes: base (T, Σ widths), bias (Σ widths,) or None, extents (P, S, R, 8), a table for each of
    the P widths; other names as in `apply_adapters`. Returns (T, Σ widths).
    """
    meta.check_within(extents)
    if gpu.can_run(base, x, weights=(memory.weights,)):
        return gpu.apply_stacked_adapters(base, x, bias, memory, extents, meta, widths, hidden)
    if cpu.can_run(base, x, weights=(memory.weights,)):
        adapters = memory, extents, meta
        return cpu.apply_stacked_adapters(
            base, x, bias, *adapters, widths, may_overwrite=may_overwrite
        )
    biases = [None] * len(widths) if bias is None else bias.split(widths)
    parts = zip(base.split(widths, 1), biases, extents, strict=True)
    plain = _reference().apply_adapters
    return torch.cat([plain(y, x, b, memory, own, meta) for y, b, own in parts], 1)


def apply_gated_adapters(
    base: Tensor,
    x: Tensor,
    bias: Tensor | None,
    memory: AdapterMemory,
    extents: Tensor,
    meta: StepMeta,
    kind: str,
    hidden: Tensor | None = None,
    *,
    may_overwrite: bool = False,
) -> Tensor:
    """`gated_activation` of the two halves of `apply_stacked_adapters`: act(gate) · up.

    gate and up share x and are rounded to base's dtype before, as if they had been written.
    Shapes: base (T, 2 · width) and bias (2 · width,) or None, gate's half first;
    extents (2, S, R, 8); `kind` as in `gated_activation`, `hidden` and `may_overwrite` as in
    `apply_adapters`. Returns (T, width).
    """
    meta.check_within(extents)
    if gpu.can_run(base, x, weights=(memory.weights,)):
        return gpu.apply_gated_adapters(base, x, bias, memory, extents, meta, kind, hidden)
    width = base.shape[1] // 2
    adapters = memory, extents, meta
    y = apply_stacked_adapters(
        base, x, bias, *adapters, (width, width), may_overwrite=may_overwrite
    )
    gate, up = y.chunk(2, dim=1)
    return gated_activation(gate, up, kind)


def embed_adapters(
    base: Tensor,
    token_ids: Tensor,
    scale: float,
    memory: AdapterMemory,
    extents: Tensor,
    meta: StepMeta,
    vocab_size: int,
) -> Tensor:
    """Add every token's adapters to its embedding.

    y[t] = base[t] + Σ_e w_e · ((g − 1) ∘ base[t] + scale · B'ᵀ A[:, id] +
    (scale · rows[id] − base[t], if e replaces row id)), id = token_ids[t]. `scale` is what the
    model multiplies embeddings by (Gemma).
    Shapes: base (T, hidden), token_ids (T,), A (rank, vocab), B' (rank, hidden); other names as in
    `apply_adapters`. Returns (T, hidden) in base's dtype.
    """
    meta.check_within(extents)
    backend = gpu if gpu.can_run(base, weights=(memory.weights,)) else _reference()
    return backend.embed_adapters(base, token_ids, scale, memory, extents, meta, vocab_size)


def patch_logits(
    y: Tensor, base: Tensor, x: Tensor, memory: AdapterMemory, extents: Tensor, meta: StepMeta
) -> Tensor:
    """Replace rows of the output layer's weight: y[t, i] += Σ_e w_e · (rows_i · x[t] − base[t, i]).

    Shapes: y and base (T, vocab) with base = W x, x (T, hidden); names as in `apply_adapters`.
    Returns (T, vocab) in y's dtype; y itself may be overwritten.
    """
    meta.check_within(extents)
    backend = gpu if gpu.can_run(y, base, x, weights=(memory.weights,)) else _reference()
    return backend.patch_logits(y, base, x, memory, extents, meta)


def write_kv(keys: Tensor, values: Tensor, k: Tensor, v: Tensor, cache_slots: Tensor) -> None:
    """Store this step's keys and values, in place: keys[cache_slots[t]] = k[t], values likewise.

    A token whose slot is negative is not stored. Shapes: keys, values (cache slots, G, D) of one
    layer, k, v (T, G, D), cache_slots (T,) int64.
    """
    backend = gpu if gpu.can_run(k, v, keys, values) else _reference()
    backend.write_kv(keys, values, k, v, cache_slots)


def paged_attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    meta: AttentionMeta,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Causal grouped-query attention of every token over its own row's cached positions.

    out[t, h] = Σ_j softmax_j(c(scale · q[t, h] · K_j)) V_j over the positions j ≤ positions[t] of
    row rows[t], the last `window` of them if given; c(s) = softcap · tanh(s / softcap) or s.
    Shapes: q (T, H, D), keys and values (cache slots, G, D) of one layer, H a multiple of G;
    tokens of a row are consecutive. sinks (H,): of every head a score more in the softmax, which
    has no value (gpt-oss). Returns (T, H, D) in q's dtype; softmax and sums in float32.
    Cache slots that the row does not own may hold anything, NaN included. A token at a negative
    position sees nothing: 0.
    Source: PagedAttention, arXiv:2309.06180.
    """
    backend = _fastest(q, keys, values)
    if backend is gpu:
        if sinks is None:
            return gpu.paged_attention(q, keys, values, meta, scale, window, softcap)
        backend = _reference()
    return backend.paged_attention(q, keys, values, meta, scale, window, softcap, sinks)


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, plus_one: bool) -> Tensor:
    """n = x / √(mean x² + eps) of each row; y = weight · n, n rounded to x's dtype before.

    With `plus_one` y = (1 + weight) · n, rounded once (Gemma). Shapes: x (..., width), weight
    (width,); float32 inside. Source: RMSNorm, arXiv:1910.07467.
    """
    backend = _fastest_tracked(x, frozen=(weight,))
    return backend.rms_norm(x, weight, eps, plus_one=plus_one)


def add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    *,
    plus_one: bool = False,
    branch_weight: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """s = residual + x, rounded, and `rms_norm` of s: a residual connection and the norm behind it.

    With `branch_weight` x is first replaced by its own `rms_norm` under that weight, rounded
    (Gemma's norms behind attention and MLP). Shapes: x and residual (..., width), the weights
    (width,). Returns (s, y).
    """
    weights = (weight,) if branch_weight is None else (weight, branch_weight)
    backend = _fastest_tracked(x, residual, frozen=weights)
    return backend.add_rms_norm(
        x, residual, weight, eps, plus_one=plus_one, branch_weight=branch_weight
    )


def rotate(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, norm: HeadNorm | None = None
) -> tuple[Tensor, Tensor]:
    """y = x cos + turned(x) sin, turned(x) = [−second half, first half], of queries and keys.

    With `norm` x is first replaced by the `rms_norm` of its heads, rounded. Shapes: q (T, H, D),
    k (T, G, D), cos and sin (T, R); of a head's D values the first R are rotated. Rounded once.
    Source: RoFormer, arXiv:2104.09864.
    """
    backend = _fastest_tracked(q, k, frozen=(cos, sin, *_weights(norm)))
    return backend.rotate(q, k, cos, sin, norm)


def rotate_and_write(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor,
    cache_slots: Tensor,
    norm: HeadNorm | None = None,
) -> Tensor:
    """`rotate`, and `write_kv` of the rotated keys and of v: what a layer does before it attends.

    Shapes as there. Returns the rotated queries (T, H, D).
    """
    tensors = (q, k, v, cos, sin, keys, values, *_weights(norm))
    backend = _fastest(*tensors)
    return backend.rotate_and_write(q, k, v, cos, sin, keys, values, cache_slots, norm)


def _weights(norm: HeadNorm | None) -> tuple[Tensor, ...]:
    return () if norm is None else (norm.q_weight, norm.k_weight)


def gated_activation(gate: Tensor, up: Tensor, kind: str) -> Tensor:
    """act(gate) · up, both (..., width); `kind`: silu or gelu_tanh. Rounded once.

    Source: GLU variants, arXiv:2002.05202.
    """
    backend = _fastest_tracked(gate, up)
    return backend.gated_activation(gate, up, kind)


def recurrent_step(
    states: Tensor,
    slots: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keep: Tensor,
    beta: Tensor | None = None,
    copies: Tensor | None = None,
) -> Tensor:
    """One token of N rows of a linear recurrence with decay; their states change in place.

    Of every head, with state S (K, V): S ← keep · S; v ← β · (v − Sᵀk) if β is given;
    S ← S + k vᵀ; out = Sᵀq. Shapes: states (slots, H, K, V) of float32 or better, contiguous; slots
    (N,) int64, each once; q, k (N, G, K), H a multiple of G, v (N, H, V), keep and β (N, H) of the
    states' dtype → (N, H, V). A row whose slot is negative is none: it changes nothing and gives 0.
    copies (N,) int64: a further slot that the new state is written to, negative for none; it is no
    row's own. No gradient. Source: gated delta networks, arXiv:2412.06464.
    """
    backend = cpu if v.dtype == torch.float32 and cpu.can_run(states, v) else reference
    if v.dtype == torch.float32 and gpu.can_run(v, states, q, k, keep):
        backend = gpu
    return backend.recurrent_step(states, slots, q, k, v, keep, beta, copies)


def conv_step(
    histories: Tensor,
    slots: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    is_silu: bool,
    copies: Tensor | None = None,
) -> Tensor:
    """One token of N rows of a causal convolution of each channel; their histories change in place.

    y = Σ_i w_i h_i + w_{K−1} x + b over a row's last K − 1 inputs h, then silu if `is_silu`;
    rounded once to x's dtype. x becomes the last of h. Shapes: histories (slots, K − 1, C) of
    float32 or better, contiguous; x (N, C), weight (C, K), bias (C,) or None → (N, C). `slots` and
    `copies` as in `recurrent_step`. No gradient.
    """
    weights = (histories, weight) if bias is None else (histories, weight, bias)
    backend = gpu if gpu.can_run(x, weights=weights) else reference
    return backend.conv_step(histories, slots, x, weight, bias, is_silu, copies)


def most_likely(logits: Tensor) -> Tensor:
    """(n, 2) int64 of logits (n, vocab): every row's most likely token, the first of equal ones,
    and 1 if the row is finite throughout. Depends on shapes alone, so a captured step can hold it.
    """
    backend = cpu if cpu.can_run(logits) else reference
    return backend.most_likely(logits)


def draw_cut(scaled: Tensor, number: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """Draw a token a row by inversion, the most likely first, from the likeliest of them.

    p = softmax(scaled) in descending order, equal ones by token id; of these are kept the first
    top_k, those before which Σ p < top_p, and those with p ≥ min_p · max p. Drawn is the first
    at which the cumulative sum of what is kept passes `number` of its total. Shapes: scaled
    (n, vocab) float32, 0 at the largest, number (n, 1) float64 in [0, 1), top_k, top_p, min_p
    (n, 1) float32. Returns (n, 1) int64. The Triton backend adds up in another order, and in
    whole parts of 2⁻⁴⁰ of the largest p where more than a thousand tokens are kept.
    Source: Holtzman et al., arXiv:1904.09751.
    """
    backend = gpu if gpu.can_run(scaled) else reference
    return backend.draw_cut(scaled, number, top_k, top_p, min_p)


def invert(kept: Tensor, number: Tensor) -> Tensor:
    """Where the cumulative sum of `kept` (n, vocab) first passes number (n, 1) of the whole: (n, 1)
    int64.
    """
    return reference.invert(kept, number)


def can_attend_rows(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """True when `attend_rows` takes these: float32 or bfloat16 on a CPU, with a gradient."""
    return _can_track(q, k, v)


def attend_rows(q: Tensor, k: Tensor, v: Tensor, segments: Tensor, scale: float) -> Tensor:
    """Causal attention over whole rows, without a cache: q (T, H, D), k and v (T, G, D), query head
    h reads key head h · G / H. Returns (T, H, D). Differentiable; inside all is float32.

    segments (N, 4) int32 on the host: (a, p, b, n) says that each of the n tokens from b on sees
    the p tokens from a on, those of the n before it and itself. Scores are q · k times `scale`. The
    n tokens of all segments are all T tokens; with p > 0, a is another segment's b, and p at most
    its n.
    """
    return cpu_tracked.attend_rows(q, k, v, segments, scale)


def can_train_adapter(y: Tensor, x: Tensor, a: Tensor) -> bool:
    """True when `train_adapter` takes y (T, out), x (T, in) and a (r, in): bfloat16 on a CPU that
    multiplies it, in and out multiples of 32.
    """
    return x.device.type not in gpu.DEVICES and cpu.can_train_adapter(y, x, a)


def train_adapter(y: Tensor, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """y += (x Aᵀ) Bᵀ in place: y (T, out), x (T, in), a (r, in), b (out, r), all bfloat16; sums in
    float32, x Aᵀ is rounded.

    Returns x Aᵀ as `trained_adapter_gradients` takes it.
    """
    return cpu.train_adapter(y, x, a, b)


def trained_adapter_gradients(
    grad: Tensor, x: Tensor, hidden: Tensor, a: Tensor, b: Tensor, grad_x: Tensor | None
) -> tuple[Tensor, Tensor]:
    """∂A = (G B)ᵀ x and ∂B = Gᵀ (x Aᵀ) in float32, not rounded, given G = ∂L/∂y: grad (T, out).

    `hidden` is what `train_adapter` returned. grad_x (T, in), None where it is not wanted: (G B) A
    is added to it in place.
    """
    return cpu.trained_adapter_gradients(grad, x, hidden, a, b, grad_x)


def can_use_panels(x: Tensor) -> bool:
    """True when `panel_product` takes x: compiled backend, float32 on the CPU, no gradient."""
    return x.dtype == torch.float32 and cpu.can_run(x)


def pack_panels(weight: Tensor, num_groups: int = 1) -> Tensor:
    """Lay W (out, in) out as zero-padded panels (⌈out / 32⌉, in, 32) in huge pages: in bfloat16
    where that holds every one of its values, else in float32. Of G equal groups of rows each begins
    with a panel: (G · ⌈out / G / 32⌉, in, 32).
    """
    return cpu.pack_panels(weight, num_groups)


def panel_product(x: Tensor, panels: Tensor, out_features: int) -> Tensor:
    """W x with W in panels: x (..., in) → (..., out), float32.

    Every output is one sum over the inputs in order, so a row's result is bit-equal whatever
    the number of rows. Source: the packed inner kernel of GotoBLAS (Goto & van de Geijn, 2008).
    """
    return cpu.panel_product(x, panels, out_features)


def can_run_on_gpu(x: Tensor) -> bool:
    """True when ops on x run in Triton: CUDA, float32 or bfloat16, no gradient."""
    return gpu.can_run(x)


def can_fuse(x: Tensor) -> bool:
    """True when a compiled backend runs norms, rotation, activation and stacked adapters of x as
    one pass each: float32 or bfloat16, no gradient.
    """
    return gpu.can_run(x) or cpu.can_run(x)


def can_fuse_elementwise(x: Tensor) -> bool:
    """`can_fuse` for norms, rotation and activation alone: on a CPU with a gradient too."""
    return can_fuse(x) or _can_track(x)


def can_multiply_codes(x: Tensor, *, is_four_bit: bool = False) -> bool:
    """True when `int8_product`, or with `is_four_bit` `four_bit_product`, takes x without a
    gradient: on CUDA few rows, on a CPU float32 from AVX2 on, and bfloat16 if the processor
    multiplies it.
    """
    if gpu.can_run(x):
        return gpu.can_multiply_codes(x, is_four_bit=is_four_bit)
    return cpu.can_multiply_codes(x)


def can_multiply_dense(x: Tensor) -> bool:
    """True when `dense_product` takes x: bfloat16 on a CPU that multiplies it, no gradient."""
    return cpu.can_multiply_dense(x)


def dense_product(x: Tensor, weight: Tensor) -> Tensor:
    """W x: x (..., in) → (..., out), weight (out, in), both bfloat16; sums in float32.

    A row's result is bit-equal whatever the number of rows.
    """
    return cpu.dense_product(x, weight)


def four_bit_product(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    code: Tensor,
    out_features: int,
    nested: NestedScales | None = None,
) -> Tensor:
    """W x from W's 4-bit codes: x (..., in) → (..., out) in x's dtype.

    W = fp32(code[c] × absmax) rounded once to x's dtype; sums in float32. A row's result is
    bit-equal whatever the number of rows. Shapes: packed (out · in / 2,) uint8, two codes a byte,
    high nibble first, at an address that is a multiple of 4; absmax (out · in / 64,) float32, or
    uint8 with `nested`; code (16,) float32; in a multiple of 64. Source: QLoRA, arXiv:2305.14314.
    """
    backend = _fastest(x)
    return backend.four_bit_product(x, packed, absmax, code, out_features, nested)


def four_bit_gated_product(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    code: Tensor,
    out_features: int,
    kind: str,
    nested: NestedScales | None = None,
) -> Tensor:
    """act(gate) · up of two layers that share x: x (..., in) → (..., out / 2), on a GPU one launch.

    The first half of W's rows gives gate, the second up. Bit-equal to `gated_activation` of the
    halves of `four_bit_product`, whose names and shapes these are.
    """
    backend = _fastest(x)
    return backend.four_bit_gated_product(x, packed, absmax, code, out_features, kind, nested)


def int8_product(x: Tensor, codes: Tensor, absmax: Tensor) -> Tensor:
    """W x from W's 8-bit codes: x (..., in) → (..., out) in x's dtype.

    W = fp32(code × (absmax / 127)) rounded once to x's dtype; sums in float32. Shapes: codes
    (out, in) int8, absmax (out,) float32. Source: LLM.int8, arXiv:2208.07339 §2.
    """
    return _fastest(x).int8_product(x, codes, absmax)


def grouped_four_bit_product(
    x: Tensor,
    starts: Tensor,
    packed: Tensor,
    absmax: Tensor,
    code: Tensor,
    out_features: int,
    nested: NestedScales | None = None,
) -> Tensor:
    """W_g x of the rows of every group g, from 4-bit codes: x (P, in) → (P, out) in x's dtype.

    Rows starts[g] to starts[g + 1] of x belong to group g; starts (G + 1,) int32 ascends from 0 to
    P. W_g is the rows g · out to (g + 1) · out of a weight (G · out, in) that is held as in
    `four_bit_product`, and so are its values and sums: a row's result is bit-equal whatever rows
    and groups stand beside it. Groups without rows are not read.
    """
    backend = _fastest(x)
    return backend.grouped_four_bit_product(x, starts, packed, absmax, code, out_features, nested)


def grouped_int8_product(x: Tensor, starts: Tensor, codes: Tensor, absmax: Tensor) -> Tensor:
    """As `grouped_four_bit_product`, from the 8-bit codes of `int8_product`: (G · out, in)."""
    return _fastest(x).grouped_int8_product(x, starts, codes, absmax)


def grouped_dense_product(x: Tensor, starts: Tensor, weight: Tensor) -> Tensor:
    """As `grouped_four_bit_product`, of a weight (G · out, in) in bfloat16."""
    return cpu.grouped_dense_product(x, starts, weight)


def sort_pairs(chosen: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The pairs of T tokens and the K experts that each chose, in the order of expert, then token.

    chosen (T, K) int64. Returns tokens and experts (T · K,) int64 of the pairs, places (T, K)
    int64 of each token's pairs among them, and starts (num_experts + 1,) int32: where each
    expert's begin.
    """
    backend = cpu if cpu.can_sort(chosen) else _reference()
    return backend.sort_pairs(chosen, num_experts)


def sum_pairs(y: Tensor, places: Tensor, weights: Tensor) -> Tensor:
    """Σ_k weights[t, k] · y[places[t, k]]: y (P, H), places and weights (T, K) → (T, H).

    Summed in float32 or better, in the order of k, and rounded once to y's dtype.
    """
    is_compiled = cpu.can_run(y) and not wants_gradient(weights) and weights.is_cpu
    backend = cpu if is_compiled else _reference()
    return backend.sum_pairs(y, places, weights)


def can_quantize(weight: Tensor) -> bool:
    """True when `quantize_four_bit` takes the weight: on a CPU, if the library was built."""
    return cpu.can_quantize(weight)


def quantize_four_bit(weight: Tensor, code: Tensor) -> tuple[Tensor, Tensor]:
    """A weight's 4-bit codes and absmax, bit-equal to what bitsandbytes 0.50.2 makes of it rounded
    to bfloat16 (`quantize_4bit` with blocks of 64), some twenty times as fast.

    With m = max |w| over a block of 64, v = clamp(w / m, -1, 1) is given the nearest of the 16
    values `code`, of two equally near ones the lower. Returns packed (⌈n / 2⌉) uint8, two codes a
    byte, the first in the upper half, and absmax (⌈n / 64⌉) float32.
    Source: QLoRA, arXiv:2305.14314, appendix E.
    """
    return cpu.quantize_four_bit(weight, code)


def can_multiply_groups(x: Tensor, *, is_dense: bool = False) -> bool:
    """True when the grouped products take x without a gradient: on CUDA those of codes, on a CPU
    as far as those of one group do (`is_dense`: of a dense weight).
    """
    if is_dense:
        return cpu.can_multiply_dense(x)
    return gpu.can_run(x) or cpu.can_multiply_codes(x)


def can_shrink_with_product(x: Tensor, adapters: PooledAdapters) -> bool:
    """True when `four_bit_product_and_shrink` and its 8-bit kin take x (T, in) and its adapters,
    as far as `can_multiply_codes` does.
    """
    return gpu.can_shrink_with_product(x, adapters)


def four_bit_product_and_shrink(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    code: Tensor,
    out_features: int,
    adapters: PooledAdapters,
    nested: NestedScales | None = None,
) -> tuple[Tensor, Tensor]:
    """`four_bit_product` of x (T, in), and A x of every adapter that acts on it, in one launch.

    The second is what `apply_adapters` and its kin take as `hidden`; its layout is the backend's.
    """
    adapters.meta.check_within(adapters.extents)
    return gpu.four_bit_product_and_shrink(x, packed, absmax, code, out_features, adapters, nested)


def int8_product_and_shrink(
    x: Tensor, codes: Tensor, absmax: Tensor, adapters: PooledAdapters
) -> tuple[Tensor, Tensor]:
    """`int8_product` of x (T, in), and A x as in `four_bit_product_and_shrink`."""
    adapters.meta.check_within(adapters.extents)
    return gpu.int8_product_and_shrink(x, codes, absmax, adapters)


def can_dequantize(packed: Tensor) -> bool:
    """True when `four_bit_values` takes packed codes of this device."""
    return packed.device.type in gpu.DEVICES and gpu.has_triton()


def four_bit_values(
    packed: Tensor,
    absmax: Tensor,
    code: Tensor,
    shape: tuple[int, int],
    dtype: torch.dtype,
    nested: NestedScales | None = None,
) -> Tensor:
    """W = fp32(code[c] × absmax) of `shape`, rounded once to dtype; names as in
    `four_bit_product`, any shape.
    """
    return gpu.four_bit_values(packed, absmax, code, shape, dtype, nested)

"""The Triton backend's door: which tensors it takes, and Triton imported only when it is used.

Unmeasured: no GPU was at hand when it was written. It is tested on a CPU through Triton's
interpreter; tile sizes, splits and the crossover below are estimates.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from lora_runtime.kernels.types import AdapterMemory, AttentionMeta, StepMeta, wants_gradient

DEVICES = {"cuda"}
"""Device types that are handed to Triton. Tests add "cpu", under TRITON_INTERPRET=1."""
DTYPES = (torch.bfloat16, torch.float32)
MAX_PRODUCT_ROWS = 64
"""Rows up to which a quantised product reads the codes instead of a dequantised W; unmeasured."""


@cache
def has_triton() -> bool:
    """True when Triton can be imported."""
    try:
        import triton  # noqa: F401
    except ImportError:
        return False
    return True


def name() -> str | None:
    """`triton`, where there is a CUDA device for it."""
    return "triton" if torch.cuda.is_available() and has_triton() else None


def can_run(*activations: Tensor, weights: tuple[Tensor, ...] = ()) -> bool:
    """True when Triton takes these tensors.

    It takes tensors of one device without gradients: activations of one dtype, float32 or
    bfloat16, and adapter weights in that dtype or in float32.
    """
    tensors, first = (*activations, *weights), activations[0]
    return (
        first.device.type in DEVICES
        and first.dtype in DTYPES
        and all(t.device == first.device for t in tensors)
        and all(t.dtype == first.dtype for t in activations)
        and all(w.dtype in (first.dtype, torch.float32) for w in weights)
        and not wants_gradient(*tensors)
        and has_triton()
    )


def can_multiply_codes(x: Tensor) -> bool:
    """True when a product with x (..., in) may read quantised weights directly."""
    return x.numel() <= MAX_PRODUCT_ROWS * x.shape[-1] and can_run(x)


def apply_adapters(
    base: Tensor,
    x: Tensor,
    bias: Tensor | None,
    memory: AdapterMemory,
    runs: Tensor,
    meta: StepMeta,
) -> Tensor:
    """See `lora_runtime.kernels.apply_adapters`."""
    return apply_stacked_adapters(base, x, bias, memory, runs[None], meta, (base.shape[1],))


def apply_stacked_adapters(
    base: Tensor,
    x: Tensor,
    bias: Tensor | None,
    memory: AdapterMemory,
    runs: Tensor,
    meta: StepMeta,
    widths: tuple[int, ...],
) -> Tensor:
    """See `lora_runtime.kernels.apply_stacked_adapters`."""
    from lora_runtime.kernels import gpu_adapters

    with torch.cuda.device_of(x):
        return gpu_adapters.apply_adapters(base, x, bias, memory, runs, meta, widths)


def four_bit_product(
    x: Tensor, packed: Tensor, absmax: Tensor, code: Tensor, out_features: int
) -> Tensor:
    """See `lora_runtime.kernels.four_bit_product`."""
    from lora_runtime.kernels import gpu_quantised

    with torch.cuda.device_of(x):
        return gpu_quantised.four_bit_product(x, packed, absmax, code, out_features)


def four_bit_values(
    packed: Tensor, absmax: Tensor, code: Tensor, shape: tuple[int, int], dtype: torch.dtype
) -> Tensor:
    """See `lora_runtime.kernels.four_bit_values`."""
    from lora_runtime.kernels import gpu_quantised

    with torch.cuda.device_of(packed):
        return gpu_quantised.four_bit_values(packed, absmax, code, shape, dtype)


def int8_product(x: Tensor, codes: Tensor, absmax: Tensor) -> Tensor:
    """See `lora_runtime.kernels.int8_product`."""
    from lora_runtime.kernels import gpu_quantised

    with torch.cuda.device_of(x):
        return gpu_quantised.int8_product(x, codes, absmax)


def write_kv(keys: Tensor, values: Tensor, k: Tensor, v: Tensor, slot_mapping: Tensor) -> None:
    """See `lora_runtime.kernels.write_kv`."""
    from lora_runtime.kernels import gpu_attention

    with torch.cuda.device_of(k):
        gpu_attention.write_kv(keys, values, k, v, slot_mapping)


def paged_attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    meta: AttentionMeta,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """See `lora_runtime.kernels.paged_attention`."""
    from lora_runtime.kernels import gpu_attention

    with torch.cuda.device_of(q):
        return gpu_attention.paged_attention(q, keys, values, meta, scale, window, softcap)


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, plus_one: bool) -> Tensor:
    """See `lora_runtime.kernels.rms_norm`."""
    from lora_runtime.kernels import gpu_elementwise

    with torch.cuda.device_of(x):
        return gpu_elementwise.rms_norm(x, weight, eps, plus_one=plus_one)


def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """See `lora_runtime.kernels.rotate`."""
    from lora_runtime.kernels import gpu_elementwise

    with torch.cuda.device_of(q):
        return gpu_elementwise.rotate(q, k, cos, sin)


def gated_activation(gate: Tensor, up: Tensor, kind: str) -> Tensor:
    """See `lora_runtime.kernels.gated_activation`."""
    from lora_runtime.kernels import gpu_elementwise

    with torch.cuda.device_of(gate):
        return gpu_elementwise.gated_activation(gate, up, kind)

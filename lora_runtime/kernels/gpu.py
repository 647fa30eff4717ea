"""The GPU backend: which tensors its ops take. Triton is imported when the first op is called.

The kernels are written in Triton, but for the 4-bit product of bfloat16, which is written in CUDA
and used where that can be compiled. They are tested on a CPU through Triton's interpreter too.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from lora_runtime.kernels.cuda import product as cuda_product
from lora_runtime.kernels.types import PooledAdapters, wants_gradient

DEVICES = {"cuda"}
"""Device types that are handed to Triton. Tests add "cpu", under TRITON_INTERPRET=1."""
DTYPES = (torch.bfloat16, torch.float32)
MAX_PRODUCT_ROWS = 64
"""Rows up to which a quantised product in Triton reads the codes instead of a dequantised W: on an
H100 both take as long at 64 rows, and with more rows reading the codes is far slower.
"""
MAX_SMALL_STEP = 256
"""Entries up to which a step's adapters go in small tiles: the largest decode step has as many.
"""


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


def can_multiply_codes(x: Tensor, *, is_four_bit: bool = False) -> bool:
    """True when a product with x (..., in) may read quantised weights directly."""
    if not can_run(x):
        return False
    is_cuda = is_four_bit and cuda_product.can_run(x)
    return x.numel() <= (cuda_product.MAX_ROWS if is_cuda else MAX_PRODUCT_ROWS) * x.shape[-1]


def can_shrink_with_product(x: Tensor, adapters: PooledAdapters) -> bool:
    """True when a product that reads codes and the A x of its adapters may be one op."""
    memory, meta = adapters.memory, adapters.meta
    return (
        len(meta.tokens) <= MAX_SMALL_STEP
        and bool(memory.max_rank)
        and can_run(x, weights=(memory.weights,))
    )


def _op(module: str, name: str) -> Callable[..., Any]:
    """An op of a Triton module, which is imported at the first call; documented and typed in
    `lora_runtime.kernels`. Its first argument says on which device it runs.
    """

    def op(*args: Any, **kwargs: Any) -> Any:
        with torch.cuda.device_of(args[0]):
            return getattr(import_module(f"lora_runtime.kernels.{module}"), name)(*args, **kwargs)

    return op


apply_stacked_adapters = _op("triton.adapters", "apply_adapters")
embed_adapters = _op("triton.vocabulary", "embed_adapters")
patch_logits = _op("triton.vocabulary", "patch_logits")
four_bit_product = _op("triton.quantised", "four_bit_product")
four_bit_gated_product = _op("triton.quantised", "four_bit_gated_product")
four_bit_values = _op("triton.quantised", "four_bit_values")
int8_product = _op("triton.quantised", "int8_product")
four_bit_product_and_shrink = _op("triton.quantised", "four_bit_product_and_shrink")
int8_product_and_shrink = _op("triton.quantised", "int8_product_and_shrink")
grouped_four_bit_product = _op("triton.quantised", "grouped_four_bit_product")
grouped_int8_product = _op("triton.quantised", "grouped_int8_product")
write_kv = _op("triton.attention", "write_kv")
paged_attention = _op("triton.attention", "paged_attention")
rms_norm = _op("triton.elementwise", "rms_norm")
add_rms_norm = _op("triton.elementwise", "add_rms_norm")
rotate = _op("triton.elementwise", "rotate")
rotate_and_write = _op("triton.elementwise", "rotate_and_write")
apply_gated_adapters = _op("triton.adapters", "apply_gated_adapters")
gated_activation = _op("triton.elementwise", "gated_activation")
draw_cut = _op("triton.sampling", "draw_cut")
recurrent_step = _op("triton.recurrence", "recurrent_step")
conv_step = _op("triton.recurrence", "conv_step")

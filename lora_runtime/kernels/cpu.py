"""The compiled CPU backend: a small C++ library behind ctypes, built with the package.

It is optional: without a compiler the install goes through and `reference` serves. Gradients are
never asked of it.
"""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from lora_runtime.kernels.types import AdapterMemory, AttentionMeta, StepMeta, wants_gradient

ABI = 3
LEVELS = ("baseline", "avx2", "avx512")
SUFFIXES = {torch.float32: "f32", torch.bfloat16: "bf16"}


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
    adapter weights in float32.
    """
    tensors, dtype = (*activations, *weights), activations[0].dtype
    return (
        library() is not None
        and dtype in SUFFIXES
        and all(t.device.type == "cpu" for t in tensors)
        and all(t.dtype == dtype for t in activations)
        and all(w.dtype == torch.float32 for w in weights)
        and not wants_gradient(*tensors)
    )


def apply_adapters(
    base: Tensor,
    x: Tensor,
    bias: Tensor | None,
    memory: AdapterMemory,
    extents: Tensor,
    meta: StepMeta,
) -> Tensor:
    """See `lora_runtime.kernels.apply_adapters`."""
    base, x, extents = base.contiguous(), x.contiguous(), extents.contiguous()
    y = torch.empty_like(base)
    _function("apply_adapters", base.dtype)(
        *_pointers(y, base, x, bias, memory.weights, memory.vectors, extents),
        extents.shape[1],
        *_pointers(meta.tokens, meta.slots, meta.replicas, meta.weights, meta.segment_starts),
        len(meta.segment_starts) - 1,
        *base.shape[:1],
        x.shape[1],
        base.shape[1],
        torch.get_num_threads(),
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
) -> Tensor:
    """See `lora_runtime.kernels.paged_attention`."""
    q = q.contiguous()
    out = torch.empty_like(q)
    _function("attention", q.dtype)(
        *_pointers(out, q, keys, values, meta.rows, meta.positions, meta.block_tables),
        *q.shape[:2],
        *keys.shape[1:],
        meta.block_size,
        meta.block_tables.shape[1],
        window or 0,
        ctypes.c_float(scale),
        ctypes.c_float(softcap or 0.0),
        torch.get_num_threads(),
    )
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
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    y = rows.new_empty(len(rows), out_features)
    _function("product", x.dtype)(
        *_pointers(y, rows, panels), *rows.shape, out_features, torch.get_num_threads()
    )
    return y.view(*x.shape[:-1], out_features)


def _pointers(*tensors: Tensor | None) -> list[ctypes.c_void_p]:
    return [ctypes.c_void_p(None if tensor is None else tensor.data_ptr()) for tensor in tensors]


@cache
def _function(op: str, dtype: torch.dtype) -> Callable[..., None]:
    function = getattr(library(), f"loramux_{op}_{SUFFIXES[dtype]}")
    function.restype = None
    call: Callable[..., None] = function
    return call

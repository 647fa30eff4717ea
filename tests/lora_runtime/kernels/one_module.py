"""The adapters of one module, by a backend's own op."""

from __future__ import annotations

from lora_runtime.kernels import reference


def of_one_module(backend, base, x, bias, memory, extents, meta):
    """`kernels.apply_adapters` by `backend`: fast ones take several modules, and here only one."""
    if backend is reference:
        return reference.apply_adapters(base, x, bias, memory, extents, meta)
    widths = (base.shape[1],)
    return backend.apply_stacked_adapters(base, x, bias, memory, extents[None], meta, widths)

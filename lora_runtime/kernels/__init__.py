"""The public ops of the runtime. The backend is chosen once, when the module is imported.

`reference.py` defines every op; a faster backend gives the same values within rounding. A test
names another backend with `use_backend`.
"""

from __future__ import annotations

from torch import Tensor

from lora_runtime.kernels import reference
from lora_runtime.kernels.types import NO_RUN, AttentionMeta, RankPool, Span, StepMeta

__all__ = ["NO_RUN", "AttentionMeta", "RankPool", "Span", "StepMeta", "apply_adapters"]


def apply_adapters(
    base: Tensor, x: Tensor, bias: Tensor | None, pool: RankPool, runs: Tensor, meta: StepMeta
) -> Tensor:
    """Add every token's adapters to one linear layer's output; rows of all adapters at once.

    y[t] = base[t] + bias + Σ_e w_e · ((g − 1) ∘ base[t] + B'ᵀ(A x[t]) + (b − bias)),
    over the entries e of token t; A, B', g, b are the run `runs[slot_e, replica_e]` in `pool`.

    Shapes: base (T, out) = W x without bias, x (T, in), bias (out,) or None,
    runs (S, R, 4) int32 with (start, rank, gain row or −1, bias row or −1). Returns (T, out) in
    base's dtype; nothing is changed in place. Products accumulate in float32. Rows without an
    entry are exactly base + bias, whatever values other rows or free pool rows hold.
    Source: Punica's SGMV (arXiv:2310.18547), with true ranks and DoRA gains (arXiv:2402.09353).
    """
    return reference.apply_adapters(base, x, bias, pool, runs, meta)

"""The one linear layer that adapters act on, in serving and in training.

What acts on it comes from a StepContext that all layers of one base share: the caller sets it for
the length of one forward.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import Tensor, nn

from lora_runtime.base.quant_linear import FrozenLinear
from lora_runtime.kernels import RankPool, StepMeta, apply_adapters


@dataclass(frozen=True, slots=True)
class Binding:
    """Where one module finds its adapters: the pool of its shape and its run table.

    runs (S, R, 4) int32: (slot, replica) → start, rank, gain row, bias row.
    """

    pool: RankPool
    runs: Tensor


@dataclass(slots=True)
class StepContext:
    """The adapters of the forward that is running; no adapters outside of `effect`."""

    meta: StepMeta | None = None
    bindings: Mapping[str, Binding] = field(default_factory=dict)

    @contextmanager
    def effect(self, meta: StepMeta | None, bindings: Mapping[str, Binding]) -> Iterator[None]:
        """Apply `bindings` to the tokens in `meta` during one forward; a path without a binding
        is the base's.
        """
        self.meta, self.bindings = meta, bindings
        try:
            yield
        finally:
            self.meta, self.bindings = None, {}


class AdaptedLinear(nn.Module):
    """y = W x + bias, plus every row's own adapters. x (..., in) → (..., out)."""

    def __init__(self, path: str, linear: FrozenLinear, context: StepContext) -> None:
        super().__init__()
        self.path = path
        self.linear = linear
        self.context = context
        self.in_features, self.out_features = linear.in_features, linear.out_features

    def forward(self, x: Tensor) -> Tensor:
        context, linear = self.context, self.linear
        binding = None if context.meta is None else context.bindings.get(self.path)
        if binding is None:
            return linear(x)
        rows = x.reshape(-1, self.in_features)
        y = apply_adapters(
            linear.product(rows), rows, linear.bias, binding.pool, binding.runs, context.meta
        )
        return y.view(*x.shape[:-1], self.out_features)

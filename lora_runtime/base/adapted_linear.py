"""The layers that adapters act on, in serving and in training: linears, embedding, output layer.

What acts on them comes from a StepContext that all layers of one base share: the caller sets it
for the length of one forward.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import Tensor, nn

from lora_runtime.base.quant_linear import FrozenLinear
from lora_runtime.kernels import (
    AdapterMemory,
    StepMeta,
    apply_adapters,
    embed_adapters,
    patch_logits,
)


@dataclass(frozen=True, slots=True)
class Binding:
    """Where one module finds its adapters: their memory and the module's run table.

    runs (S, R, 8) int64: (slot, replica) → Run.
    """

    memory: AdapterMemory
    runs: Tensor


@dataclass(slots=True)
class StepContext:
    """The adapters of the forward that is running; no adapters outside of `effect`."""

    meta: StepMeta | None = None
    head_meta: StepMeta | None = None
    bindings: Mapping[str, Binding] = field(default_factory=dict)

    @contextmanager
    def effect(
        self,
        meta: StepMeta | None,
        bindings: Mapping[str, Binding],
        head_meta: StepMeta | None = None,
    ) -> Iterator[None]:
        """Apply `bindings` during one forward: by `meta` to its tokens, by `head_meta` to the
        tokens whose logits are wanted. A path without a binding is the base's.
        """
        self.meta, self.bindings, self.head_meta = meta, bindings, head_meta
        try:
            yield
        finally:
            self.meta, self.bindings, self.head_meta = None, {}, None

    @contextmanager
    def at(self, meta: StepMeta | None) -> Iterator[None]:
        """Within `effect`: run some layers for other tokens than the whole step's."""
        outer, self.meta = self.meta, meta
        try:
            yield
        finally:
            self.meta = outer


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
            linear.product(rows), rows, linear.bias, binding.memory, binding.runs, context.meta
        )
        return y.view(*x.shape[:-1], self.out_features)


class AdaptedHead(AdaptedLinear):
    """The output layer: also replaces rows of its weight. x (..., hidden) → logits (..., vocab)."""

    def forward(self, x: Tensor) -> Tensor:
        context, linear = self.context, self.linear
        binding = None if context.head_meta is None else context.bindings.get(self.path)
        if binding is None:
            return linear(x)
        rows = x.reshape(-1, self.in_features)
        product = linear.product(rows)
        adapters = (binding.memory, binding.runs, context.head_meta)
        y = apply_adapters(product, rows, linear.bias, *adapters)
        return patch_logits(y, product, rows, *adapters).view(*x.shape[:-1], self.out_features)


class AdaptedEmbedding(nn.Module):
    """The input embedding plus every row's own adapters. ids (...) → (..., hidden).

    `scale` is what the wrapped module multiplies its weight by (Gemma), else 1.
    """

    def __init__(self, path: str, embedding: nn.Embedding, context: StepContext) -> None:
        super().__init__()
        self.path = path
        self.embedding = embedding
        self.context = context
        scale = getattr(embedding, "embed_scale", 1.0)
        self.scale = float(scale.to(embedding.weight.dtype)) if isinstance(scale, Tensor) else scale

    @property
    def weight(self) -> Tensor:
        return self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        context = self.context
        binding = None if context.meta is None else context.bindings.get(self.path)
        embedded = self.embedding(ids)
        if binding is None:
            return embedded
        y = embed_adapters(
            embedded.view(-1, embedded.shape[-1]), ids.flatten(), self.scale,
            binding.memory, binding.runs, context.meta, self.embedding.num_embeddings,
        )  # fmt: skip
        return y.view_as(embedded)

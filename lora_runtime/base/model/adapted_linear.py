"""The layers that adapters act on, in serving and in training: linears, embedding, output layer.

What acts on them comes from a StepContext that all layers of one base share: the caller sets it
for the length of one forward.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, TypeVar

from torch import Tensor, nn

from lora_runtime.base.model.quant_linear import FrozenLinear
from lora_runtime.base.model.routing import Routing
from lora_runtime.kernels import (
    AdapterMemory,
    PooledAdapters,
    StepMeta,
    apply_adapters,
    embed_adapters,
    gated_activation,
    patch_logits,
)

Where = TypeVar("Where", contravariant=True)
"""How a kind of binding is told which adapters act on which tokens: StepMeta in serving, Spans in
training."""


class ExpertProduct(Protocol):
    """One product of a mixture of experts; see `AdaptedExperts`."""

    in_features: int
    out_features: int

    def product(self, x: Tensor, routing: Routing) -> Tensor:
        """W_e x_p of every pair, x (P, in) → (P, out)."""
        ...


class Binding(Protocol[Where]):
    """What adapters do at one module. `where` says which of them act on which of the tokens."""

    def linear(self, x: Tensor, layer: FrozenLinear, where: Where) -> Tensor:
        """x (T, in) → (T, out)."""
        ...

    def head(self, x: Tensor, layer: FrozenLinear, where: Where) -> Tensor:
        """x (T, hidden) → (T, vocab): as `linear`, and rows of W can be replaced."""
        ...

    def experts(self, x: Tensor, layer: ExpertProduct, routing: Routing, where: Where) -> Tensor:
        """x (P, in), of the routing's pairs → (P, out), without the base's biases."""
        ...

    def embedding(
        self, embedded: Tensor, ids: Tensor, layer: AdaptedEmbedding, where: Where
    ) -> Tensor:
        """embedded (T, hidden), the base's, of ids (T,) → (T, hidden)."""
        ...


@dataclass(frozen=True, slots=True)
class PooledBinding:
    """Where one module finds its adapters in serving: their memory and the module's extent table.

    tables (modules, S, R, 8) int64: of every module (slot, replica) → Extent; this one's is at
    `index`. `where` is a StepMeta.
    """

    memory: AdapterMemory
    tables: Tensor
    index: int

    @property
    def extents(self) -> Tensor:
        """(S, R, 8) int64: this module's."""
        return self.tables[self.index]

    def linear(self, x: Tensor, layer: FrozenLinear, where: StepMeta) -> Tensor:
        adapters = self.memory, self.extents, where
        pooled = PooledAdapters(self.memory, self.extents[None], where)
        product, hidden = layer.product_and_shrink(x, pooled)
        return apply_adapters(product, x, layer.bias, *adapters, hidden, may_overwrite=True)

    def experts(self, x: Tensor, layer: ExpertProduct, routing: Routing, where: StepMeta) -> Tensor:
        pairs, product = routing.pairs(where), layer.product(x, routing)
        extents = pairs.extents(self.extents, layer.in_features, layer.out_features)
        adapters = self.memory, extents, pairs.meta
        return apply_adapters(product, x, None, *adapters, may_overwrite=True)

    def head(self, x: Tensor, layer: FrozenLinear, where: StepMeta) -> Tensor:
        product, adapters = layer.product(x), (self.memory, self.extents, where)
        y = apply_adapters(product, x, layer.bias, *adapters)
        return patch_logits(y, product, x, *adapters)

    def embedding(
        self, embedded: Tensor, ids: Tensor, layer: AdaptedEmbedding, where: StepMeta
    ) -> Tensor:
        return embed_adapters(
            embedded, ids, layer.scale, self.memory, self.extents, where, layer.num_embeddings
        )


class Routed(NamedTuple):
    """What one router gave: logits (T, E) and chosen (T, K) of T tokens, and the `where` of the
    adapters on them.
    """

    where: Any
    logits: Tensor
    chosen: Tensor


@dataclass(slots=True)
class StepContext:
    """The adapters of the forward that is running; no adapters outside of `adapters`."""

    meta: Any = None
    head_meta: Any = None
    bindings: Mapping[str, Binding[Any]] = field(default_factory=dict)
    num_calls: int = 0
    """Linear layers called so far: what moves during a long forward, for who watches over it."""
    routed: list[Routed] | None = None
    """Filled by routers, while somebody collects it."""

    @contextmanager
    def adapters(
        self,
        meta: Any,
        bindings: Mapping[str, Binding[Any]],
        head_meta: Any = None,
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
    def collecting(self) -> Iterator[list[Routed]]:
        """What routers give while inside."""
        found: list[Routed] = []
        self.routed = found
        try:
            yield found
        finally:
            self.routed = None

    @contextmanager
    def set_aside(self) -> Iterator[None]:
        """Within a forward: let another one run, and go on as before."""
        kept = self.meta, self.bindings, self.head_meta, self.routed
        self.meta, self.bindings, self.head_meta, self.routed = None, {}, None, None
        try:
            yield
        finally:
            self.meta, self.bindings, self.head_meta, self.routed = kept

    @contextmanager
    def at(self, meta: Any) -> Iterator[None]:
        """Within `adapters`: run some layers for other tokens than the whole step's."""
        outer, self.meta = self.meta, meta
        try:
            yield
        finally:
            self.meta = outer


class Stack(Protocol):
    """Linear layers that can run as one: the layer `joined`, whose outputs are all of theirs."""

    joined: FrozenLinear

    def takes(self, x: Tensor) -> bool:
        """True when `output` can be asked for x."""
        ...

    def output(self, member: AdaptedLinear, x: Tensor) -> Tensor:
        """The output of one of the layers."""
        ...

    def gated(self, x: Tensor, kind: str) -> Tensor | None:
        """act(first) · second of two layers in one launch, or None where a step cannot end so."""
        ...


class AdaptedLinear(nn.Module):
    """y = W x + bias, plus every row's own adapters. x (..., in) → (..., out).

    `stack`: layers that get the same x, if they can run as one; see stacked_linears.py.
    """

    def __init__(self, path: str, linear: FrozenLinear, context: StepContext) -> None:
        super().__init__()
        self.path = path
        self.linear = linear
        self.context = context
        self.stack: Stack | None = None
        self.in_features, self.out_features = linear.in_features, linear.out_features

    @property
    def is_observed(self) -> bool:
        """True while somebody listens to calls of this module: it must be called then."""
        return bool(self._forward_pre_hooks or self._forward_hooks)

    def gated(self, x: Tensor, kind: str) -> Tensor:
        """act(gate) · up of this layer's outputs' two halves, see `gated_activation`."""
        self.context.num_calls += 1
        is_adapted = self.context.meta is not None and self.path in self.context.bindings
        if not is_adapted and not self.is_observed:
            return self.linear.gated_product(x, kind)
        gate, up = self(x).chunk(2, dim=-1)
        return gated_activation(gate, up, kind)

    def forward(self, x: Tensor) -> Tensor:
        self.context.num_calls += 1
        if self.stack is not None and self.stack.takes(x):
            return self.stack.output(self, x)
        context, linear = self.context, self.linear
        binding = None if context.meta is None else context.bindings.get(self.path)
        if binding is None:
            return linear(x)
        y = binding.linear(x.reshape(-1, self.in_features), linear, context.meta)
        return y.view(*x.shape[:-1], self.out_features)


class AdaptedHead(AdaptedLinear):
    """The output layer: also replaces rows of its weight. x (..., hidden) → logits (..., vocab)."""

    def forward(self, x: Tensor) -> Tensor:
        context, linear = self.context, self.linear
        binding = None if context.head_meta is None else context.bindings.get(self.path)
        if binding is None:
            return linear(x)
        y = binding.head(x.reshape(-1, self.in_features), linear, context.head_meta)
        return y.view(*x.shape[:-1], self.out_features)


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
        self.num_embeddings = embedding.num_embeddings
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
        flat = embedded.view(-1, embedded.shape[-1])
        return binding.embedding(flat, ids.flatten(), self, context.meta).view_as(embedded)

"""The attention function that transformers calls for every layer of a base.

The forward is given an Attention object as the keyword `attention`, which alone knows where keys
and values are kept. Serving reads and writes the paged cache; training has whole rows and no cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, NamedTuple, Protocol

import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface

from lora_runtime.base.model.handing_on import HANDED
from lora_runtime.base.model.recurrence import Recurrence
from lora_runtime.kernels import (
    AttentionMeta,
    HeadNorm,
    huge_pages,
    paged_attention,
    rotate_and_write,
    write_kv,
)

NAME = "loramux"


class Attention(Protocol):
    """Causal attention of one layer over all rows of the step."""

    @property
    def recurrence(self) -> Recurrence:
        """Where the same rows keep the states of recurrent layers."""
        ...

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        layer: int,
        scale: float,
        window: int | None,
        softcap: float | None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """q (T, H, D), k and v (T, G, D) → (T, H, D); H is a multiple of G.

        A token sees the positions of its own row up to its own, the last `window` of them if
        given; scores s become softcap · tanh(s / softcap) if softcap is given. sinks (H,): of each
        head a score more that has no value.
        """
        ...


def loramux_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    attention: Attention | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """transformers' attention interface: query, key (1, H, T, D), value (1, H, T, E) →
    (1, T, H, E).

    Where keys and values differ in size, as in latent attention, the smaller are padded with zeros,
    which changes no score and no sum. Without `scaling`, scores are divided by √D.
    """
    attention = attention or getattr(module, HANDED, None)
    if attention is None:
        raise TypeError("the base was called without attention=; use Base.forward")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    size, width = max(query.shape[-1], value.shape[-1]), value.shape[-1]
    q, k, v = (_widened(x[0].transpose(0, 1), size) for x in (query, key, value))
    out = attention.attend(
        q,
        k,
        v,
        layer=module.layer_idx,
        scale=scale,
        window=sliding_window,
        softcap=softcap,
        sinks=s_aux,
    )
    return out[None, ..., :width], None


def _widened(heads: Tensor, size: int) -> Tensor:
    """(T, H, D) → (T, H, size), with zeros behind."""
    missing = size - heads.shape[-1]
    return F.pad(heads, (0, missing)) if missing else heads


# No mask function is registered under this name: transformers would build a (T, T) mask.
AttentionInterface.register(NAME, loramux_attention)


class KVShape(NamedTuple):
    """Of the keys, and of the values, that one layer keeps of a token."""

    num_heads: int
    head_dim: int

    @property
    def size(self) -> int:
        return self.num_heads * self.head_dim


@dataclass(frozen=True, slots=True)
class KVLayout:
    """What the layers of a model keep of every token.

    shapes: of the K layers that keep keys and values, in order. kept_by: for every layer of the
    model, which of the K it reads; a layer that reads what an earlier one has kept writes nothing.
    None for a layer that does not attend.
    """

    shapes: tuple[KVShape, ...]
    kept_by: tuple[int | None, ...]

    @classmethod
    def uniform(cls, num_layers: int, num_heads: int, head_dim: int) -> KVLayout:
        """Of layers that are alike."""
        return cls((KVShape(num_heads, head_dim),) * num_layers, tuple(range(num_layers)))

    @property
    def is_uniform(self) -> bool:
        """True when every layer keeps its own keys and values, all of one shape."""
        return len(set(self.shapes)) == 1 and self.kept_by == tuple(range(len(self.shapes)))

    @property
    def values_per_token(self) -> int:
        """Numbers that all layers keep of one token: keys, and values."""
        return 2 * sum(shape.size for shape in self.shapes)

    def is_kept(self, layer: int) -> bool:
        """False for a layer that reads what an earlier layer keeps."""
        kept = self.kept_by[layer]
        return kept is not None and self.kept_by.index(kept) == layer


class KVCache:
    """Paged keys and values of all layers, each layer's (num_cache_slots, G, D).

    They lie one layer behind the other in two flat tensors, `keys` and `values`.
    """

    def __init__(self, keys: Tensor, values: Tensor, layout: KVLayout) -> None:
        self.keys, self.values, self.layout = keys, values, layout
        tokens = 2 * keys.numel() // layout.values_per_token
        self.num_cache_slots = tokens
        """Number of cache slots of each layer; a slot holds one token's keys and values."""
        ends = list(accumulate((tokens * shape.size for shape in layout.shapes), initial=0))
        kept = [
            (keys[start:end].view(tokens, *shape), values[start:end].view(tokens, *shape))
            for (start, end), shape in zip(pairwise(ends), layout.shapes, strict=True)
        ]
        self._layers = [None if index is None else kept[index] for index in layout.kept_by]
        self._is_kept = [layout.is_kept(layer) for layer in range(len(layout.kept_by))]

    @classmethod
    def allocate(cls, layout: KVLayout, num_cache_slots: int, like: Tensor) -> KVCache:
        num_bytes = num_cache_slots * layout.values_per_token // 2 * like.dtype.itemsize
        keys, values = (huge_pages.zeros(num_bytes, like.device) for _ in range(2))
        return cls(keys.view(like.dtype), values.view(like.dtype), layout)

    def of_layer(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values (num_cache_slots, G, D) that one of the model's layers reads."""
        found = self._layers[layer]
        if found is None:
            raise LookupError(f"layer {layer} does not attend: it has no keys and values")
        return found

    def is_kept(self, layer: int) -> bool:
        """True for a layer that writes what it reads."""
        return self._is_kept[layer]

    def as_one_layer(self) -> KVCache:
        """The same memory as one layer of L · num_slots slots; layer l begins at l · num_slots.
        Only of a uniform layout.
        """
        one = KVLayout.uniform(1, *self.layout.shapes[0])
        return KVCache(self.keys, self.values, one)


class PagedAttention:
    """Attention over the paged cache; writes this step's keys and values first.

    `layer`: the cache's layer to use, whichever layer of the model asks. `recurrence`: of a base
    with recurrent layers, where the step's rows keep their states.
    """

    def __init__(
        self,
        cache: KVCache,
        meta: AttentionMeta,
        layer: int | None = None,
        recurrence: Recurrence | None = None,
    ) -> None:
        self.cache, self.meta, self.layer = cache, meta, layer
        self._recurrence = recurrence

    @property
    def recurrence(self) -> Recurrence:
        if self._recurrence is None:
            raise TypeError("a recurrent layer was run without a pool of states")
        return self._recurrence

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        layer: int,
        scale: float,
        window: int | None,
        softcap: float | None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        place = self._place(layer)
        keys, values = self.cache.of_layer(place)
        if self.cache.is_kept(place):
            write_kv(keys, values, k, v, self.meta.cache_slots)
        return paged_attention(q, keys, values, self.meta, scale, window, softcap, sinks)

    def rotate_and_attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cos: Tensor,
        sin: Tensor,
        norm: HeadNorm | None,
        *,
        layer: int,
        scale: float,
        window: int | None,
        softcap: float | None,
    ) -> Tensor:
        """`attend` of queries and keys that are still to be normed and rotated: cos, sin (T, R)."""
        keys, values = self.cache.of_layer(self._place(layer))
        slots = self.meta.cache_slots
        q = rotate_and_write(q, k, v, cos, sin, keys, values, slots, norm)
        return paged_attention(q, keys, values, self.meta, scale, window, softcap)

    def _place(self, layer: int) -> int:
        """Which of the cache's layers one of the model's uses."""
        return layer if self.layer is None else self.layer

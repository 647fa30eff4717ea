"""The attention function that transformers calls for every layer of a base.

The forward is given an Attention object as the keyword `attention`, which alone knows where keys
and values are kept. Serving reads and writes the paged cache; training has whole rows and no cache.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor
from transformers import AttentionInterface

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
    scaling: float,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    attention: Attention | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """transformers' attention interface: query (1, H, T, D) → (1, T, H, D)."""
    if attention is None:
        raise TypeError("the base was called without attention=; use Base.forward")
    out = attention.attend(
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        layer=module.layer_idx,
        scale=scaling,
        window=sliding_window,
        softcap=softcap,
        sinks=s_aux,
    )
    return out[None], None


# No mask function is registered under this name: transformers would build a (T, T) mask.
AttentionInterface.register(NAME, loramux_attention)


class KVCache:
    """Paged keys and values of all layers: two (L, num_blocks · block_size, G, D) tensors.

    `layers`: the model's layers that they are of, ascending, where not every layer attends.
    """

    def __init__(self, keys: Tensor, values: Tensor, layers: Sequence[int] | None = None) -> None:
        self.keys, self.values = keys, values
        self._places = None if layers is None else {layer: n for n, layer in enumerate(layers)}

    @classmethod
    def allocate(
        cls,
        layers: Sequence[int],
        num_cache_slots: int,
        num_kv_heads: int,
        head_dim: int,
        like: Tensor,
    ) -> KVCache:
        shape = (len(layers), num_cache_slots, num_kv_heads, head_dim)
        num_bytes = math.prod(shape) * like.dtype.itemsize
        memory = [huge_pages.zeros(num_bytes, like.device) for _ in range(2)]
        keys, values = (part.view(like.dtype).view(shape) for part in memory)
        return cls(keys, values, layers)

    def of_layer(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values (num_blocks · block_size, G, D) of one of the model's layers."""
        place = layer if self._places is None else self._places[layer]
        return self.keys[place], self.values[place]

    @property
    def num_cache_slots(self) -> int:
        """Number of cache slots of each layer; a slot holds one token's keys and values."""
        return self.keys.shape[1]

    def as_one_layer(self) -> KVCache:
        """The same memory as one layer of L · num_slots slots; layer l begins at l · num_slots."""
        return KVCache(self.keys.flatten(0, 1)[None], self.values.flatten(0, 1)[None])


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
        keys, values = self._memory(layer)
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
        keys, values = self._memory(layer)
        slots = self.meta.cache_slots
        q = rotate_and_write(q, k, v, cos, sin, keys, values, slots, norm)
        return paged_attention(q, keys, values, self.meta, scale, window, softcap)

    def _memory(self, layer: int) -> tuple[Tensor, Tensor]:
        return self.cache.of_layer(layer if self.layer is None else self.layer)

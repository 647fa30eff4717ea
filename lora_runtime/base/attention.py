"""The attention function that transformers calls for every layer of a base.

The forward gets an Attention object as the keyword `batch`; it alone knows where keys and values
live. Serving reads and writes the paged cache; training has whole sequences and no cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AttentionInterface

from lora_runtime.kernels import AttentionMeta, paged_attention, write_kv

NAME = "loramux"


class Attention(Protocol):
    """Causal attention of one layer over all rows of the step."""

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
    ) -> Tensor:
        """q (T, H, D), k and v (T, G, D) → (T, H, D); H is a multiple of G.

        A token sees the positions of its own row up to its own, the last `window` of them if
        given; scores s become softcap · tanh(s / softcap) if softcap is given.
        """
        ...


def loramux_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    batch: Attention | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """transformers' attention interface: query (1, H, T, D) → (1, T, H, D)."""
    if batch is None:
        raise TypeError("the base was called without batch=; use Base.forward")
    out = batch.attend(
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        layer=module.layer_idx,
        scale=scaling,
        window=sliding_window,
        softcap=softcap,
    )
    return out[None], None


# No mask function is registered under this name: transformers would build a (T, T) mask.
AttentionInterface.register(NAME, loramux_attention)


class KVCache:
    """Paged keys and values of all layers: two (L, num_blocks · block_size, G, D) tensors."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.keys, self.values = keys, values

    @classmethod
    def allocate(
        cls, num_layers: int, num_slots: int, num_kv_heads: int, head_dim: int, like: Tensor
    ) -> KVCache:
        shape = (num_layers, num_slots, num_kv_heads, head_dim)
        return cls(like.new_zeros(shape), like.new_zeros(shape))

    @property
    def num_slots(self) -> int:
        """Token slots of each layer."""
        return self.keys.shape[1]

    def as_one_layer(self) -> KVCache:
        """The same memory as one layer of L · num_slots slots; layer l begins at l · num_slots."""
        return KVCache(self.keys.flatten(0, 1)[None], self.values.flatten(0, 1)[None])


class PagedAttention:
    """Attention over the paged cache; writes this step's keys and values first.

    `layer`: the cache's layer to use, whichever layer of the model asks.
    """

    def __init__(self, cache: KVCache, meta: AttentionMeta, layer: int | None = None) -> None:
        self.cache, self.meta, self.layer = cache, meta, layer

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
    ) -> Tensor:
        layer = layer if self.layer is None else self.layer
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        write_kv(keys, values, k, v, self.meta.slot_mapping)
        return paged_attention(q, keys, values, self.meta, scale, window, softcap)


class VarlenAttention:
    """Attention over whole sequences laid end to end, without a cache; differentiable."""

    def __init__(self, lengths: Sequence[int]) -> None:
        self.lengths = list(lengths)

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
    ) -> Tensor:
        q, k, v = (self._padded(part) for part in (q, k, v))
        longest = q.shape[2]
        if softcap is None and (window is None or window >= longest):
            out = F.scaled_dot_product_attention(
                q, k, v, is_causal=True, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
            )
        else:
            out = _masked_attention(q, k, v, scale, window, softcap)
        rows = zip(out.transpose(1, 2), self.lengths, strict=True)
        return torch.cat([row[:length] for row, length in rows])

    def _padded(self, packed: Tensor) -> Tensor:
        """(T, H, D) → (N, H, longest, D); causal rows never see the zeros after their end."""
        return pad_sequence(packed.split(self.lengths), batch_first=True).transpose(1, 2)


def _masked_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None, softcap: float | None
) -> Tensor:
    repeats = q.shape[1] // k.shape[1]
    k, v = (part.repeat_interleave(repeats, dim=1) for part in (k, v))
    scores = q @ k.transpose(2, 3) * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    position = torch.arange(q.shape[2], device=q.device)
    distance = position[:, None] - position
    is_hidden = (distance < 0) if window is None else (distance < 0) | (distance >= window)
    scores = scores.masked_fill(is_hidden, float("-inf"))
    return torch.softmax(scores, dim=-1, dtype=torch.float32).to(v.dtype) @ v

"""One forward of a model in which every layer shows how it attends, and what it keeps of a row.

Used by `self_check.py`, which judges a model by it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from lora_runtime.base.model.attention import (
    KVCache,
    KVLayout,
    KVShape,
    PagedAttention,
    loramux_attention,
)
from lora_runtime.base.model.parts import decoder_layers
from lora_runtime.base.model.recurrence import Piece, Recurrence
from lora_runtime.base.model.recurrent_layers import allocate_states
from lora_runtime.base.model.varlen_attention import RowLengths, VarlenAttention
from lora_runtime.errors import BaseRefused
from lora_runtime.kernels import AttentionMeta

BLOCK_SIZE = 16
"""Of the cache that a followed row has."""
OBSERVED = "loramux-observed"
"""The name under which attention is registered for that forward."""
INERT_OPTIONS = {
    "attention_mask", "cache_position", "is_causal", "logits_to_keep", "max_length_k",
    "max_length_q", "output_attentions", "output_hidden_states", "output_router_logits",
    "position_embeddings", "position_ids", "return_dict", "use_cache",
}  # fmt: skip
"""What layers hand to the attention function that changes no number of a causal forward."""

_running: ContextVar[ObservedAttention] = ContextVar("running")
"""Of the forward that is observed, for attention modules that are not given it."""


@contextmanager
def observing(attention: ObservedAttention) -> Iterator[None]:
    """While inside, modules that are not given an `Attention` attend through this one."""
    running = _running.set(attention)
    try:
        yield
    finally:
        _running.reset(running)


class ObservedAttention:
    """`Attention` over one whole row, of `num_tokens`, that notes what every layer keeps of it."""

    def __init__(self, model: PreTrainedModel, num_tokens: int) -> None:
        self.model_type = model.config.model_type
        self.layers = decoder_layers(model)
        self.max_model_len = int(model.config.get_text_config().max_position_embeddings)
        self._device = model.device
        self._attention = VarlenAttention([RowLengths([num_tokens])], model.device)
        self.states = allocate_states(model, 1)
        """Of recurrent layers, behind the row in slot 0; None where there are none."""
        stores = () if self.states is None else (0,)
        piece = Piece(0, num_tokens, stores=stores)
        self.recurrence = Recurrence([piece], model.device, self.states)
        self.not_handed: set[nn.Module] = set()
        """Modules that attend and were not given what the forward was given."""
        self._kept: dict[int, tuple[Tensor, Tensor]] = {}
        """Layer → its keys and values (T, G, D); those of layers that share are the same object."""

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
        """See `Attention`."""
        if layer in self._kept:
            raise self.refused(layer, "attends more than once")
        sharing = (kept for kept in self._kept.values() if _same_memory(kept[0], k))
        self._kept[layer] = next(sharing, (k, v))
        return self._attention.attend(
            q, k, v, layer=layer, scale=scale, window=window, softcap=softcap, sinks=sinks
        )

    def layout(self) -> KVLayout:
        """What all layers keep. Raises BaseRefused for one that has not attended, but for those of
        a model with recurrent layers: what such a layer does beside, the two rows show.
        """
        indices = range(len(self.layers))
        for layer in indices:
            if layer not in self._kept and self.states is None:
                raise self.refused(layer, "does not attend through transformers' interface")
        if not self._kept:
            raise BaseRefused(f"{self.model_type} cannot be served: none of its layers attends")
        if (last := max(self._kept)) not in indices:
            raise self.refused(last, "is none of the decoder's layers")
        distinct = list({id(kept): kept for _, kept in sorted(self._kept.items())}.values())
        place = {id(kept): index for index, kept in enumerate(distinct)}
        shapes = tuple(KVShape(*keys.shape[1:]) for keys, _ in distinct)
        kept = (self._kept.get(layer) for layer in indices)
        return KVLayout(shapes, tuple(None if own is None else place[id(own)] for own in kept))

    def followed_by(self, positions: list[Tensor]) -> PagedAttention:
        """Attention of two rows at `positions`, each (n,): a new one, and the rest of this one."""
        new, rest = map(len, positions)
        loads = None if self.states is None else 0
        pieces = [Piece(0, new), Piece(new, rest, loads=loads)]
        recurrence = Recurrence(pieces, self._device, self.states)
        return PagedAttention(self._cache(), _meta(positions, self._device), recurrence=recurrence)

    def _cache(self) -> KVCache:
        """A cache of four blocks whose blocks 1 and 2 hold the row."""
        layout, (like, _) = self.layout(), next(iter(self._kept.values()))
        cache = KVCache.allocate(layout, 4 * BLOCK_SIZE, like)
        for layer, kept in self._kept.items():
            for memory, values in zip(cache.of_layer(layer), kept, strict=True):
                memory[BLOCK_SIZE : BLOCK_SIZE + len(values)] = values
        return cache

    def refused(self, layer: int, reason: str) -> BaseRefused:
        """The error for a layer that does what `reason` says."""
        kind = type(self.layers[layer]).__name__ if layer < len(self.layers) else "a layer"
        return BaseRefused(
            f"{self.model_type} cannot be served: layer {layer} ({kind}) {reason}; each decoder "
            "layer has to attend once, causally, through the attention interface of transformers"
        )


def _same_memory(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.device.type != "meta" and a.data_ptr() == b.data_ptr()


def observed_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    attention: ObservedAttention | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """`loramux_attention` that refuses what it would not heed: other options, other masks."""
    if attention is None:
        attention = _running.get()
        attention.not_handed.add(module)
    layer = getattr(module, "layer_idx", None)
    if not isinstance(layer, int):
        raise BaseRefused(
            f"{attention.model_type} cannot be served: its attention ({type(module).__name__}) has "
            "no layer_idx, so nobody knows whose keys and values it is given"
        )
    unknown = [k for k, v in options.items() if k not in INERT_OPTIONS and not _is_nothing(v)]
    if unknown:
        raise attention.refused(layer, f"gives its attention {', '.join(unknown)}")
    if options.get("is_causal") is False or getattr(module, "is_causal", True) is False:
        raise attention.refused(layer, "attends to later tokens")
    if attention_mask is not None:
        _check_mask(attention_mask, layer, sliding_window, attention)
    return loramux_attention(
        module, query, key, value, None, scaling, 0.0, sliding_window, softcap, s_aux, attention
    )


def _is_nothing(value: object) -> bool:
    return value is None or value is False or isinstance(value, int | float) and value == 0


Visible = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def observed_mask(
    batch_size: int, q_length: int, kv_length: int, mask_function: Visible, **options: Any
) -> Tensor:
    """Stands for a mask of transformers."""
    shape = batch_size, 1, q_length, kv_length
    mask = torch.zeros(shape, dtype=torch.bool, device=options.get("device"))
    return RuleMask.of(mask, mask_function)


class RuleMask(Tensor):
    """A mask with the rule by which it would have been made; slices of all of it keep the rule."""

    visible: Visible | None = None

    @classmethod
    def of(cls, mask: Tensor, visible: Visible | None) -> RuleMask:
        made: RuleMask = mask.as_subclass(cls)
        made.visible = visible
        return made

    def __getitem__(self, index: Any) -> Tensor:
        part = super().__getitem__(index)
        return RuleMask.of(part, self.visible) if part.shape == self.shape else part


def _check_mask(mask: Tensor, layer: int, window: int | None, attention: ObservedAttention) -> None:
    """Raise BaseRefused unless transformers' rule is: own and earlier tokens, the last `window`.

    Asked at any place up to the longest row, as a window or a chunk may be longer than a short row.
    """
    if getattr(mask, "visible", None) is None:
        raise attention.refused(layer, "makes an attention mask of its own")
    query, key = _places(attention.max_model_len, window)
    zero = torch.zeros((), dtype=torch.int64)
    rule: Any = mask
    seen = rule.visible(zero, zero, query, key)
    ours = key <= query if window is None else (key <= query) & (query - key < window)
    wrong = seen != ours
    if wrong.any():
        at, other = int(query[wrong][0]), int(key[wrong][0])
        kind = "all earlier tokens" if window is None else f"the last {window} tokens"
        does = "does not see" if bool(ours[wrong][0]) else "sees"
        raise attention.refused(
            layer, f"does not attend to {kind}: position {at} {does} position {other}"
        )


def _places(max_model_len: int, window: int | None) -> tuple[Tensor, Tensor]:
    """Pairs of positions (n,) below `max_model_len`: random ones, and those at distances where
    windows and chunks end.
    """
    generator = torch.Generator().manual_seed(0)
    query = torch.randint(max_model_len, (512,), generator=generator)
    first, last = torch.arange(min(64, max_model_len)), query.new_tensor([max_model_len - 1])
    query = torch.cat([query, first, last])
    powers = 2 ** torch.arange(max_model_len.bit_length())
    edges = powers if window is None else torch.cat([powers, powers.new_tensor([window])])
    distances = torch.cat([edges - 1, edges, edges + 1, -edges]).unique()
    random = torch.randint(max_model_len, (len(query), 64), generator=generator)
    key = torch.cat([query[:, None] - distances, random], dim=1)
    query = query[:, None].expand_as(key)
    is_place = (key >= 0) & (key < max_model_len)
    return query[is_place], key[is_place]


def _meta(positions: list[Tensor], device: torch.device) -> AttentionMeta:
    """The rows at these positions: the first in block 0, the second in blocks 1 and 2."""
    places = torch.cat([positions[0], BLOCK_SIZE + positions[1]])
    rows = torch.cat([torch.full((len(own),), row) for row, own in enumerate(positions)])
    return AttentionMeta(
        rows=rows.int().to(device),
        positions=torch.cat(positions).int().to(device),
        cache_slots=places.to(device),
        block_tables=torch.tensor([[0, 0], [1, 2]], dtype=torch.int32, device=device),
        block_size=BLOCK_SIZE,
    )


AttentionInterface.register(OBSERVED, observed_attention)
AttentionMaskInterface.register(OBSERVED, observed_mask)

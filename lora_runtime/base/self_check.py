"""Whether a model can be served, found by running it: before it is quantised, in every part that a
family may do in its own way.

Nothing here knows families by name. A model is served if its layers attend through transformers'
attention interface, each once, as our attention can; and if two rows in one batch, one of them in
two pieces over a cache, get the logits that the untouched model gives each alone. What carries
something else from token to token, a recurrent state, a convolution, positions of its own, cannot.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

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
from lora_runtime.base.model.handing_on import hand_on_attention
from lora_runtime.base.model.head_model import head_model
from lora_runtime.base.model.parts import decoder_layers, decoder_of, set_attention
from lora_runtime.base.model.varlen_attention import RowLengths, VarlenAttention
from lora_runtime.errors import BaseRefused
from lora_runtime.kernels import AttentionMeta

SELF_CHECK_LENGTHS = (5, 23)
FIRST_PIECE = 15
"""Tokens of the second row that run before the others."""
SELF_CHECK_TOLERANCE = {torch.float64: 1e-6, torch.float32: 2e-4, torch.bfloat16: 0.15}
"""The largest logit difference that is accepted, relative to the largest logit."""
BLOCK_SIZE = 16
"""Of the cache that the check uses."""
OBSERVED = "loramux-observed"
"""The name under which attention is registered for the first piece."""
INERT_OPTIONS = {
    "attention_mask", "cache_position", "is_causal", "logits_to_keep", "max_length_k",
    "max_length_q", "output_attentions", "output_hidden_states", "output_router_logits",
    "position_embeddings", "position_ids", "return_dict", "use_cache",
}  # fmt: skip
"""What layers hand to the attention function that changes no number of a causal forward."""


class Findings(NamedTuple):
    """What the check has seen of a model."""

    layout: KVLayout
    can_reorder: bool
    """True when its layers could run in another order: they are alike, and given nothing of each
    token that is not known to us."""


@contextmanager
def refusing_errors(model: PreTrainedModel, doing: str) -> Iterator[None]:
    """Turn whatever transformers' code raises inside into BaseRefused, memory errors apart."""
    try:
        yield
    except (BaseRefused, torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:
        raise BaseRefused(
            f"{model.config.model_type} cannot be served: {doing} failed with "
            f"{type(error).__name__}: {str(error)[:300]}"
        ) from error


def _check_rows(model: PreTrainedModel) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    vocab_size = model.config.get_text_config().vocab_size
    rows = [torch.randint(vocab_size, (n,), generator=generator) for n in SELF_CHECK_LENGTHS]
    return [row.to(model.device) for row in rows]


@torch.no_grad()
def original_logits(model: PreTrainedModel) -> list[Tensor]:
    """Last logits (vocab,) of each row, run alone through transformers' own modules."""
    with refusing_errors(model, "transformers' own forward of a few tokens"):
        return [model(row[None], use_cache=False).logits[0, -1] for row in _check_rows(model)]


@torch.no_grad()
def observe(model: PreTrainedModel) -> tuple[Findings, ObservedAttention]:
    """Run the first piece of the longer row, and look at how every layer attends and is called.

    The attention holds what the cache then has. Raises BaseRefused for what our attention cannot
    do.
    """
    attention = ObservedAttention(model)
    row = _check_rows(model)[1][:FIRST_PIECE]
    set_attention(model, OBSERVED)
    running = _running.set(attention)
    try:
        with _layer_calls(model) as calls, refusing_errors(model, "a forward with our attention"):
            _hidden_states(model, row, torch.arange(len(row), device=row.device), attention)
    finally:
        _running.reset(running)
    hand_on_attention(attention.layers, attention.not_handed)
    layout = attention.layout()
    can_reorder = layout.is_uniform and all(map(_is_plain_call, calls))
    return Findings(layout, can_reorder), attention


@torch.no_grad()
def self_check(model: PreTrainedModel, original: list[Tensor], observed: ObservedAttention) -> None:
    """Run the short row beside the rest of the long one, through all replaced modules.

    Raises BaseRefused if the logits of either differ from `original`, where each ran alone.
    """
    short, long = _check_rows(model)
    rest = long[FIRST_PIECE:]
    positions = [torch.arange(len(short)), torch.arange(FIRST_PIECE, len(long))]
    with refusing_errors(model, "a batch of two rows over a cache"):
        states = _hidden_states(
            model,
            torch.cat([short, rest]),
            torch.cat(positions).to(model.device),
            PagedAttention(observed.cache(), _meta(positions, model.device)),
        )
        ends = [len(short) - 1, len(short) + len(rest) - 1]
        found = head_model(model)(inputs_embeds=states[None, ends], use_cache=False).logits[0]
    compare(model, list(found), original)


def compare(model: PreTrainedModel, found: list[Tensor], original: list[Tensor]) -> None:
    """Raise BaseRefused if the logits (vocab,) of a row are not the original's."""
    scale = max(float(logits.abs().max()) for logits in original)
    for row, (logits, expected) in enumerate(zip(found, original, strict=True)):
        error = float((logits - expected).abs().max()) / scale
        if not error <= SELF_CHECK_TOLERANCE[model.dtype]:
            raise BaseRefused(
                f"{model.config.model_type} does not give its own logits with our attention and "
                f"linear layers (relative error {error:.2g} on a row of {SELF_CHECK_LENGTHS[row]} "
                "tokens): it tells tokens' places, or brings values from one to another, by other "
                "means than position_ids and causal attention; this architecture is not served"
            )


_running: ContextVar[ObservedAttention] = ContextVar("running")
"""Of the forward that is observed, for attention modules that are not given it."""


class ObservedAttention:
    """`Attention` over one whole row that notes what every layer keeps of it."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model_type = model.config.model_type
        self.layers = decoder_layers(model)
        self.max_model_len = int(model.config.get_text_config().max_position_embeddings)
        self._attention = VarlenAttention([RowLengths([FIRST_PIECE])], model.device)
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
    ) -> Tensor:
        """See `Attention`."""
        if layer in self._kept:
            raise self.refused(layer, "attends more than once")
        sharing = (kept for kept in self._kept.values() if _same_memory(kept[0], k))
        self._kept[layer] = next(sharing, (k, v))
        return self._attention.attend(
            q, k, v, layer=layer, scale=scale, window=window, softcap=softcap
        )

    def layout(self) -> KVLayout:
        """What all layers keep. Raises BaseRefused for one that has not attended."""
        indices = range(len(self.layers))
        for layer in indices:
            if layer not in self._kept:
                raise self.refused(layer, "does not attend through transformers' interface")
        if len(self._kept) > len(indices):
            raise self.refused(max(self._kept), "is none of the decoder's layers")
        distinct = list({id(kept): kept for _, kept in sorted(self._kept.items())}.values())
        place = {id(kept): index for index, kept in enumerate(distinct)}
        shapes = tuple(KVShape(*keys.shape[1:]) for keys, _ in distinct)
        return KVLayout(shapes, tuple(place[id(self._kept[layer])] for layer in indices))

    def cache(self) -> KVCache:
        """A cache of four blocks whose blocks 1 and 2 hold the row."""
        layout, like = self.layout(), self._kept[0][0]
        cache = KVCache.allocate(layout, 4 * BLOCK_SIZE, like)
        for layer, kept in self._kept.items():
            for memory, values in zip(cache.layer(layer), kept, strict=True):
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
        module, query, key, value, None, scaling, 0.0, sliding_window, softcap, attention
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


AttentionInterface.register(OBSERVED, observed_attention)
AttentionMaskInterface.register(OBSERVED, observed_mask)


def _hidden_states(
    model: PreTrainedModel, ids: Tensor, positions: Tensor, attention: Any
) -> Tensor:
    """As `Base.hidden_states`: (T, H)."""
    decoder: Any = decoder_of(model)
    out = decoder(
        input_ids=ids[None], position_ids=positions[None], use_cache=False, attention=attention
    )
    states: Tensor = out.last_hidden_state[0]
    return states


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


@contextmanager
def _layer_calls(model: PreTrainedModel) -> Iterator[list[tuple[tuple[Any, ...], dict[str, Any]]]]:
    """Collects the arguments with which the decoder calls its layers."""
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append((args, kwargs))

    hooks = [
        layer.register_forward_pre_hook(note, with_kwargs=True) for layer in decoder_layers(model)
    ]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


KNOWN_TENSORS = {
    "attention_mask", "cache_position", "hidden_states", "position_embeddings", "position_ids",
}  # fmt: skip
"""What a decoder may give its layers of each token in a model whose layers run in any order."""


def _is_plain_call(call: tuple[tuple[Any, ...], dict[str, Any]]) -> bool:
    """True for what a `ReorderedLayer` can hand on for some of the tokens."""
    args, kwargs = call
    rotary = kwargs.get("position_embeddings")
    others = [value for name, value in kwargs.items() if name not in KNOWN_TENSORS]
    return (
        len(args) + ("hidden_states" in kwargs) == 1
        and isinstance(rotary, tuple)
        and isinstance(kwargs.get("position_ids"), Tensor)
        and not any(isinstance(value, Tensor | dict | list | tuple) for value in others)
    )

"""Whether a model can be served, found by running it: before it is quantised, in every part that a
family may do in its own way.

Nothing here knows families by name. A model is served if its layers attend through transformers'
attention interface, each once, as our attention can, or are recurrent layers that we have replaced;
and if two rows in one batch, one of them in two pieces over a cache, get the logits that the
untouched model gives each alone. What carries something else from token to token, a recurrent state
that is not known, a convolution, positions of its own, cannot.

A mixture's router turns a difference of rounding into another expert where two are nearly as good.
So its logits are compared as the model's are, and behind it both go the way of the original.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lora_runtime.base.model.attention import KVLayout
from lora_runtime.base.model.handing_on import hand_on_attention
from lora_runtime.base.model.head_model import head_model
from lora_runtime.base.model.parts import decoder_layers, decoder_of, set_attention
from lora_runtime.base.model.routers import routers
from lora_runtime.base.observed_attention import OBSERVED, ObservedAttention, observing
from lora_runtime.base.refusing import refusing, shown
from lora_runtime.errors import BaseRefused

SELF_CHECK_LENGTHS = (5, 23)
FIRST_PIECE = 22
"""Tokens of the second row that run before the others. One is left: whatever a layer brings to it
from those before, but by what we keep of them, is missing in its logits."""
SELF_CHECK_TOLERANCE = {torch.float64: 1e-6, torch.float32: 2e-4, torch.bfloat16: 0.15}
"""The largest logit difference that is accepted, relative to the largest logit."""


class Findings(NamedTuple):
    """What the check has seen of a model."""

    layout: KVLayout
    can_reorder: bool
    """True when its layers could run in another order: they are alike, carry no state, and are
    given nothing of each token that is not known to us."""


class Original(NamedTuple):
    """What transformers' own modules gave.

    logits: the last ones (vocab,) of each row, run alone. routed: path of a router → logits,
    weights and experts of the tokens of all rows.
    """

    logits: list[Tensor]
    routed: dict[str, tuple[Tensor, ...]]


def refusing_errors(model: PreTrainedModel, doing: str) -> AbstractContextManager[None]:
    """See `refusing`: of what transformers' code raises."""

    def describe(error: Exception) -> str:
        why = f"{doing} failed with {shown(error)}"
        if isinstance(error, AttributeError) and "Linear' object has no attribute" in str(error):
            why = "a module reads the weight of a linear layer, past the layer and its adapters"
        return f"{model.config.model_type} cannot be served: {why}"

    return refusing(describe)


def _check_rows(model: PreTrainedModel) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    vocab_size = model.config.get_text_config().vocab_size
    rows = [torch.randint(vocab_size, (n,), generator=generator) for n in SELF_CHECK_LENGTHS]
    return [row.to(model.device) for row in rows]


@torch.no_grad()
def original_logits(model: PreTrainedModel) -> Original:
    """Run each row alone."""
    logits: list[Tensor] = []
    modules = routers(model)
    routed: dict[str, list[tuple[Tensor, ...]]] = {path: [] for path in modules}
    hooks = {module: routed[path].append for path, module in modules.items()}
    doing = "transformers' own forward of a few tokens"
    with _without_advice(), _hooked(hooks), refusing_errors(model, doing):
        for row in _check_rows(model):
            logits.append(model(row[None], use_cache=False).logits[0, -1])
        of_rows = {path: tuple(zip(*own, strict=True)) for path, own in routed.items()}
        return Original(logits, {path: tuple(map(torch.cat, own)) for path, own in of_rows.items()})


@contextmanager
def _without_advice() -> Iterator[None]:
    """transformers advises to install faster kernels for recurrent layers, which are never run
    again.
    """
    advice = logging.getLogger("transformers.integrations.hub_kernels")
    advice.addFilter(_says_nothing)
    try:
        yield
    finally:
        advice.removeFilter(_says_nothing)


def _says_nothing(_: logging.LogRecord) -> bool:
    return False


@contextmanager
def _hooked(hooks: Mapping[nn.Module, Callable[[Any], Any]]) -> Iterator[None]:
    """Let each module's hook see, and replace, what it returns."""
    handles = [
        module.register_forward_hook(lambda _m, _x, found, hook=hook: hook(found))
        for module, hook in hooks.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def observe(model: PreTrainedModel, original: Original) -> tuple[Findings, ObservedAttention]:
    """Run the first piece of the longer row, and look at how every layer attends and is called.

    The attention holds what the cache then has. Raises BaseRefused for what our attention cannot
    do.
    """
    attention = ObservedAttention(model, FIRST_PIECE)
    short, long = _check_rows(model)
    positions = torch.arange(FIRST_PIECE, device=model.device)
    set_attention(model, OBSERVED)
    with (
        observing(attention),
        _layer_calls(model) as calls,
        _routed_as(model, original, len(short) + positions),
        refusing_errors(model, "a forward with our attention"),
    ):
        _hidden_states(model, long[:FIRST_PIECE], positions, attention)
    hand_on_attention(attention.layers, attention.not_handed)
    layout = attention.layout()
    is_alike = layout.is_uniform and attention.states is None
    return Findings(layout, is_alike and all(map(_is_plain_call, calls))), attention


@torch.no_grad()
def self_check(model: PreTrainedModel, original: Original, observed: ObservedAttention) -> None:
    """Run the short row beside the end of the long one, through all replaced modules.

    Raises BaseRefused if the logits of either differ from `original`, where each ran alone.
    """
    short, long = _check_rows(model)
    ids = torch.cat([short, long[FIRST_PIECE:]])
    positions = [torch.arange(len(short)), torch.arange(FIRST_PIECE, len(long))]
    tokens = torch.cat([positions[0], len(short) + positions[1]])
    with (
        refusing_errors(model, "a batch of two rows over a cache"),
        _routed_as(model, original, tokens),
    ):
        attention = observed.followed_by(positions)
        states = _hidden_states(model, ids, torch.cat(positions).to(model.device), attention)
        ends = [len(short) - 1, len(ids) - 1]
        found = head_model(model)(inputs_embeds=states[None, ends], use_cache=False).logits[0]
    compare(model, list(found), original.logits)


@contextmanager
def _routed_as(model: PreTrainedModel, original: Original, tokens: Tensor) -> Iterator[None]:
    """Let routers give what the original's gave of `tokens` (n,), which are numbered over all rows.

    Raises BaseRefused if their own logits differ.
    """

    def hook(theirs: tuple[Tensor, ...]) -> Callable[[Any], Any]:
        scale = float(theirs[0].abs().max())
        chosen = tuple(part[tokens.to(part.device)] for part in theirs)

        def route(ours: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            _check_close(model, ours[0], chosen[0], scale, "a router")
            return chosen

        return route

    decoder = decoder_of(model)
    hooks = {decoder.get_submodule(path): hook(own) for path, own in original.routed.items()}
    with _hooked(hooks):
        yield


def compare(model: PreTrainedModel, found: list[Tensor], original: list[Tensor]) -> None:
    """Raise BaseRefused if the logits (vocab,) of a row are not the original's."""
    scale = max(float(logits.abs().max()) for logits in original)
    for row, (logits, expected) in enumerate(zip(found, original, strict=True)):
        where = f"a row of {SELF_CHECK_LENGTHS[row]} tokens"
        _check_close(model, logits, expected, scale, where)


def _check_close(
    model: PreTrainedModel, ours: Tensor, theirs: Tensor, scale: float, where: str
) -> None:
    error = float((ours - theirs).abs().max())
    if not math.isfinite(error):
        raise BaseRefused(
            f"{model.config.model_type} gives numbers that are not finite on {where}: the weights "
            "of this checkpoint hold some, or overflow its dtype; download it again, or choose "
            "another dtype"
        )
    if not error <= SELF_CHECK_TOLERANCE[model.dtype] * scale:
        raise BaseRefused(
            f"{model.config.model_type} does not give its own logits with our attention and linear "
            f"layers (error {error:.2g} of {scale:.2g} on {where}): it tells tokens' places, or "
            "brings values from one to another, by other means than position_ids and causal "
            "attention; this architecture is not served"
        )


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

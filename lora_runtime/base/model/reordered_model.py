"""A base that runs its layers in another order, some of them several times, some for some rows.

The caller chooses the order: `reordered_model` lays out the layers once, and LayerSteps say for one
forward which tokens run at which of them. layer_order.py finds the shortest order for several maps.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from lora_runtime.base.model.adapted_linear import StepContext
from lora_runtime.base.model.attention import Attention
from lora_runtime.base.model.parts import decoder_of

MAX_REORDERED_MODELS = 64
"""Orders of layers for which a base keeps a model."""


@dataclass(frozen=True, slots=True)
class LayerStep:
    """One run of base layer `layer`, and what it acts on.

    tokens (n,) int64, ascending: which of the forward's T tokens run here, None for all.
    attention: over these tokens, in this order. adapters: the `where` of these tokens' bindings,
    None for no adapters.
    """

    layer: int
    tokens: Tensor | None
    attention: Attention
    adapters: Any


@dataclass(frozen=True, slots=True)
class LayerSteps:
    """The `attention=` of a reordered model's forward: a LayerStep for each of its layers."""

    steps: Sequence[LayerStep]

    @property
    def layers(self) -> tuple[int, ...]:
        """The base layers that run, in order."""
        return tuple(step.layer for step in self.steps)


class WrappedLayer(nn.Module):
    """Stands for `layer` in a decoder.

    Decoders read attributes of their layers, for example `attention_type`: those that this module
    does not have itself are the layer's.
    """

    def __init__(self, layer: nn.Module, context: StepContext) -> None:
        super().__init__()
        self.layer, self.context = layer, context

    def __getattr__(self, name: str) -> Any:
        own = self.__dict__["_modules"]
        return own[name] if name in own else getattr(own["layer"], name)


class ReorderedLayer(WrappedLayer):
    """Runs `layer` for the tokens of step `index`; the others keep their hidden state unchanged."""

    def __init__(self, layer: nn.Module, index: int, context: StepContext) -> None:
        super().__init__(layer, context)
        self.index = index

    def forward(
        self,
        hidden_states: Tensor,
        *,
        position_embeddings: tuple[Tensor, Tensor],
        position_ids: Tensor,
        attention: LayerSteps,
        **kwargs: Any,
    ) -> Tensor:
        """hidden_states (1, T, H), position_embeddings (cos, sin) (1, T, D), position_ids (1, T)
        → (1, T, H).
        """
        step = attention.steps[self.index]
        cos, sin = position_embeddings
        with self.context.at(step.adapters):
            out: Tensor = self.layer(
                _select(hidden_states, step.tokens),
                position_embeddings=(_select(cos, step.tokens), _select(sin, step.tokens)),
                position_ids=_select(position_ids, step.tokens),
                attention=step.attention,
                **kwargs,
            )
        return out if step.tokens is None else hidden_states.index_copy(1, step.tokens, out)


def _select(x: Tensor, tokens: Tensor | None) -> Tensor:
    """The tokens of x (1, T, …). Select, never multiply: NaN of one row must not reach another."""
    return x if tokens is None else x.index_select(1, tokens)


def reordering(
    model: PreTrainedModel, context: StepContext
) -> Callable[[tuple[int, ...]], PreTrainedModel]:
    """`reordered_model` as a function of layers; the MAX_REORDERED_MODELS last used are kept."""
    return lru_cache(MAX_REORDERED_MODELS)(lambda layers: reordered_model(model, layers, context))


def reordered_model(
    model: PreTrainedModel, layers: tuple[int, ...], context: StepContext
) -> PreTrainedModel:
    """A copy of `model` whose decoder has the base layers `layers`, in this order.

    The copy shares the parameters; neither the model nor its config is changed. The copy's forward
    wants LayerSteps as `attention=`. `context` is that of the model's adapted layers.
    """
    decoder: Any = decoder_of(model)
    configs: dict[int, Any] = {}
    reordered_decoder = shallow_copy(decoder)
    reordered_decoder.config = _reordered_config(decoder.config, layers, configs)
    reordered_decoder.layers = nn.ModuleList(
        ReorderedLayer(decoder.layers[layer], index, context) for index, layer in enumerate(layers)
    )
    reordered: PreTrainedModel = with_submodule(model, decoder, reordered_decoder, configs)
    return reordered


def _reordered_config(
    config: PreTrainedConfig, layers: tuple[int, ...], configs: dict[int, Any]
) -> PreTrainedConfig:
    """A copy of the decoder's config that says it has these layers."""
    reordered = copy.deepcopy(config, configs)
    reordered.num_hidden_layers = len(layers)
    if layer_types := getattr(config, "layer_types", None):
        reordered.layer_types = [layer_types[layer] for layer in layers]
    return reordered


def shallow_copy(module: Any) -> Any:
    """A copy with the same parameters, buffers and submodules, whose submodules can be replaced."""
    copied = copy.copy(module)
    copied.__dict__["_modules"] = dict(module._modules)
    return copied


def with_submodule(parent: Any, old: nn.Module, new: nn.Module, configs: dict[int, Any]) -> Any:
    """A shallow copy of `parent` that holds `new` where it holds `old`, at any depth.

    `configs` is deepcopy's memo, so that a config which several modules share stays shared.
    """
    if parent is old:
        return new
    copied = shallow_copy(parent)
    copied.config = copy.deepcopy(parent.config, configs)
    for name, child in parent.named_children():
        if any(module is old for module in child.modules()):
            setattr(copied, name, with_submodule(child, old, new, configs))
    return copied

"""Which layers of a model are recurrent, what state they carry, and whether we know all of them."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from lora_runtime.base.model.fused_modules import recurrent_kind
from lora_runtime.base.model.recurrence import StateShapes
from lora_runtime.base.model.recurrent_mixers import ACTIVATIONS, RecurrentMixer
from lora_runtime.base.streamed_load import decoder_layers
from lora_runtime.errors import BaseRefused

ATTENDING = frozenset(
    ("full_attention", "sliding_attention", "chunked_attention", "attention", "mlp", "moe")
)
"""Types of layers, as configs name them, that carry no state but keys and values."""


def check_recurrence(model: PreTrainedModel) -> None:
    """Raise BaseRefused for a model, not changed yet, with a recurrent layer of a kind that is not
    known: rows laid end to end would run into each other in it.
    """
    known = _mixers(model)
    for path, module in known.items():
        activation = getattr(module, "activation", "silu")
        if activation not in ACTIVATIONS:
            raise BaseRefused(
                f"{path} of {model.config.model_type} ends its convolution in {activation!r}; only "
                f"{', '.join(sorted(ACTIVATIONS))} are served"
            )
    with_known = {int(path.partition(".")[0]) for path in known}
    config: Any = model.config.get_text_config()
    types = getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None) or []
    unknown = [
        (index, kind)
        for index, kind in enumerate(types)
        if kind not in ATTENDING and index not in with_known
    ]
    if unknown:
        index, kind = unknown[0]
        raise BaseRefused(
            f"layer {index} of {model.config.model_type} is of type {kind!r}, which is not served: "
            "its tokens may depend on each other in ways that are not known"
        )
    if getattr(model, "_is_stateful", False) and not known and not types:
        raise BaseRefused(
            f"{model.config.model_type} keeps a recurrent state in layers of a kind that is not "
            "served; served are gated delta nets, Mamba-2 and the short convolutions of LFM2"
        )


def convolutions(model: PreTrainedModel) -> set[nn.Module]:
    """The convolutions of its recurrent layers: no adapter acts on them."""
    found = set()
    for module in _mixers(model).values():
        kind = recurrent_kind(module)
        assert kind is not None
        found.add(module.get_submodule(kind.convolution))
    return found


def state_shapes(model: PreTrainedModel) -> dict[int, StateShapes]:
    """Layer → the shapes of a row's states there; the model's modules are replaced."""
    mixers = (m for m in decoder_layers(model).modules() if isinstance(m, RecurrentMixer))
    return {mixer.layer_idx: mixer.state_shapes for mixer in mixers}


def state_bytes(model: PreTrainedModel) -> int:
    """Bytes of all states of one row."""
    itemsize = torch.promote_types(model.dtype, torch.float32).itemsize
    shapes = (shape for own in state_shapes(model).values() for shape in own)
    return itemsize * sum(math.prod(shape) for shape in shapes)


def attention_layers(model: PreTrainedModel) -> tuple[int, ...]:
    """The layers that keep keys and values: all, but in a model with recurrent ones."""
    layers = decoder_layers(model)
    if not state_shapes(model):
        return tuple(range(len(layers)))
    return tuple(index for index, layer in enumerate(layers) if _attends(layer))


def _attends(layer: nn.Module) -> bool:
    """By the name of a class, as every family has its own."""
    return any(type(module).__name__.endswith("Attention") for module in layer.modules())


def _mixers(model: PreTrainedModel) -> dict[str, nn.Module]:
    """The recurrent layers of a known kind, by their path from the list of decoder layers."""
    modules = decoder_layers(model).named_modules()
    return {path: module for path, module in modules if recurrent_kind(module) is not None}

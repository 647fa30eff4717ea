"""Where the parts of transformers' model are: decoder, layers, linears, experts, what is no text.

Paths of parts are from the decoder on.
"""

from __future__ import annotations

from itertools import chain
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from lora_runtime.errors import BaseRefused

EXPERT_WEIGHTS = ("gate_up_proj", "down_proj")
"""Parameters that hold the experts of a layer, one after another: (E, out, in) or (E, in, out)."""


def path_of(model: nn.Module, wanted: nn.Module) -> str:
    """The path of one of a model's modules."""
    return next(path for path, module in model.named_modules() if module is wanted)


def decoder_of(model: PreTrainedModel) -> nn.Module:
    """The module that makes hidden states of tokens. Raises BaseRefused for a model without one.

    transformers' own answer, which is a guess by names, or else what holds the input embedding.
    """
    embedding = model.get_input_embeddings()
    holders = (m for m in model.modules() if any(child is embedding for child in m.children()))
    # Every forward asks: all modules are looked through only where transformers' answer is none.
    for module in chain([model.get_decoder()], holders):
        if isinstance(getattr(module, "layers", None), nn.ModuleList):
            found: nn.Module = module
            return found
    raise BaseRefused(
        f"{model.config.model_type} has no decoder with a list `layers`; only decoders of causal "
        "language models that transformers writes so are served"
    )


def set_attention(model: PreTrainedModel, name: str) -> None:
    """Let the decoder attend by the function that transformers knows under `name`."""
    decoder: Any = decoder_of(model)
    (decoder if isinstance(decoder, PreTrainedModel) else model).set_attn_implementation(name)


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The list of decoder layers. Raises BaseRefused for a model that has none."""
    layers: Any = decoder_of(model).layers
    found: nn.ModuleList = layers
    return found


def inner_linears(model: PreTrainedModel) -> dict[str, nn.Linear]:
    """Every nn.Linear of the decoder. The output layer is none of them."""
    head = model.get_output_embeddings()
    return {
        path: module
        for path, module in decoder_of(model).named_modules()
        if type(module) is nn.Linear and module is not head
    }


def expert_modules(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Every module of the decoder that holds experts as parameters."""
    return {
        path: module
        for path, module in decoder_of(model).named_modules()
        if any(weight.ndim == 3 for weight in expert_weights(module))
    }


def expert_weights(module: nn.Module) -> list[nn.Parameter]:
    """Those parameters of `module` itself."""
    found = (module._parameters.get(name) for name in EXPERT_WEIGHTS)
    return [weight for weight in found if weight is not None]


def towers(model: PreTrainedModel) -> dict[str, nn.Module]:
    """What a model of text and images or sounds has besides its text: path → module, the outermost.
    Empty for a model of text.
    """
    if model.config.get_text_config() is model.config:
        return {}
    needed = {decoder_of(model), model.get_output_embeddings()}
    found: dict[str, nn.Module] = {}
    waiting: list[tuple[str, nn.Module]] = [("", model)]
    while waiting:
        prefix, parent = waiting.pop()
        for name, child in parent.named_children():
            if child in needed:
                continue
            if needed.isdisjoint(child.modules()):
                found[f"{prefix}{name}"] = child
            else:
                waiting.append((f"{prefix}{name}.", child))
    return found


def drop_towers(model: PreTrainedModel) -> tuple[str, ...]:
    """Take them out of `model`, in place, and return their paths."""
    paths = tuple(towers(model))
    for path in paths:
        parent, _, name = path.rpartition(".")
        delattr(model.get_submodule(parent), name)
    return paths

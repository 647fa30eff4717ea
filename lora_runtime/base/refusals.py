"""What is refused of a model before it is run: what no run of it would show."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel

from lora_runtime.base.model.experts import check_experts
from lora_runtime.base.model.parts import decoder_layers, decoder_of, expert_modules
from lora_runtime.base.model.recurrent_layers import convolutions
from lora_runtime.base.model.routers import routers
from lora_runtime.errors import BaseRefused


def refuse_unsupported(model: PreTrainedModel) -> None:
    """Raise BaseRefused for weights that adapters could not act on, for a decoder that is not one
    of text alone, and for one that does not say how long a row it takes.
    """
    kind, config = model.config.model_type, model.config.get_text_config()
    if model.config.is_encoder_decoder:
        raise BaseRefused(f"{kind} has an encoder; only decoders are served")
    _refuse_weights(model, kind)
    for path, module in decoder_of(model).named_modules():
        if path and isinstance(module, PreTrainedModel):
            raise BaseRefused(
                f"the decoder of {kind} holds another model, {path} ({type(module).__name__}); "
                "text alone cannot be told from it"
            )
    longest = getattr(config, "max_position_embeddings", None)
    if not isinstance(longest, int) or longest < 1:
        raise BaseRefused(f"{kind} does not say max_position_embeddings, the longest row it takes")
    _refuse_ends(model, kind, (config.vocab_size, config.hidden_size))


def _refuse_weights(model: PreTrainedModel, kind: str) -> None:
    """Raise BaseRefused for weights in layers of forms that we do not know."""
    check_experts(model)
    known = {*expert_modules(model).values(), *routers(model).values(), *convolutions(model)}
    for path, module in decoder_layers(model).named_modules():
        if type(module) is nn.Linear or module in known:
            continue
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.ndim > 1:
                raise BaseRefused(
                    f"{kind} keeps weights in {path}.{name} ({type(module).__name__}), which "
                    "adapters cannot act on: it is no linear layer, nor a router, experts or a "
                    "recurrent layer's convolution in a form that is known"
                )


def _refuse_ends(model: PreTrainedModel, kind: str, shape: tuple[int, int]) -> None:
    """Raise BaseRefused unless embedding and output layer are plain, their weights of `shape`."""
    ends: dict[str, tuple[Any, Any]] = {
        "embedding": (model.get_input_embeddings(), nn.Embedding),
        "output layer": (model.get_output_embeddings(), nn.Linear),
    }
    for name, (module, plain) in ends.items():
        if not isinstance(module, plain):
            raise BaseRefused(
                f"the {name} of {kind} is {type(module).__name__}, not {plain.__name__}; adapters "
                "could not act on it"
            )
        if tuple(module.weight.shape) != shape:
            raise BaseRefused(
                f"the {name} of {kind} is {tuple(module.weight.shape)}, not (vocab_size, "
                f"hidden_size) = {shape}; projections between them are not served"
            )

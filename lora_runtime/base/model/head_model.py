"""The part of a model behind its decoder, so that logits can be made of some tokens at a time."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from lora_runtime.base.model.parts import decoder_of
from lora_runtime.base.model.reordered_model import with_submodule


class StatesAlone(BaseModelOutputWithPast):
    """What a decoder gives: last hidden states, and None for all else that families add to it."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("_"):
            raise AttributeError(name)


class GivenStates(nn.Module):
    """Stands where the decoder stood: its output is what it is given as `inputs_embeds`."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config

    def forward(self, *_: Any, inputs_embeds: Tensor, **__: Any) -> StatesAlone:
        """inputs_embeds (1, n, H) → the same as the last hidden state."""
        return StatesAlone(last_hidden_state=inputs_embeds)


def head_model(model: PreTrainedModel) -> PreTrainedModel:
    """`model` from its last hidden states on: output layer, and what the family does to logits.

    Its forward wants them, (1, n, H), as `inputs_embeds=`. Parameters are shared with `model`. All
    that `model` wraps around its decoder goes with it, such as what joins images to text.
    """
    is_text = model.config.get_text_config() is model.config
    body: Any = decoder_of(model) if is_text else model.base_model
    states = GivenStates(copy.deepcopy(body.config))
    for name, value in vars(body).items():
        if isinstance(value, int | float):  # Falcon-H1 takes the logits' factor from its decoder
            setattr(states, name, value)
    head: PreTrainedModel = with_submodule(model, body, states, {})
    return head

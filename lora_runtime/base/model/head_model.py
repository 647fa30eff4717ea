"""The part of a model behind its decoder, so that logits can be made of some tokens at a time."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import MoeModelOutputWithPast

from lora_runtime.base.model.reordered_model import with_submodule


class GivenStates(nn.Module):
    """Stands where the decoder stood: its output is what it is given as `inputs_embeds`."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config

    def forward(self, inputs_embeds: Tensor, **_: Any) -> MoeModelOutputWithPast:
        """inputs_embeds (1, n, H) → the same as the last hidden state, in an output that has all
        that a family reads of its decoder's.
        """
        return MoeModelOutputWithPast(last_hidden_state=inputs_embeds)


def head_model(model: PreTrainedModel) -> PreTrainedModel:
    """`model` from its last hidden states on: output layer, and what the family does to logits.

    Its forward wants them, (1, n, H), as `inputs_embeds=`. Parameters are shared with `model`.
    """
    decoder: Any = model.get_decoder()
    states = GivenStates(copy.deepcopy(decoder.config))
    for name, value in vars(decoder).items():
        if isinstance(value, int | float):  # Falcon-H1 takes the logits' factor from its decoder
            setattr(states, name, value)
    head: PreTrainedModel = with_submodule(model, decoder, states, {})
    return head

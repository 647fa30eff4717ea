"""A base as its config describes it: what can be told before its weights are read.

transformers builds the model without memory for its weights, which takes a second at most, so that
a setting that cannot be, or a family that is refused for its parts, is told before gigabytes are
read and quantised. Whether the model gives its own logits here is seen by running it, in `loader`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from lora_runtime.base.model.recurrent_layers import replace_recurrent_layers, state_bytes
from lora_runtime.base.refusals import refuse_unsupported
from lora_runtime.base.self_check import refusing_errors
from lora_runtime.base.streamed_load import empty_model, read_config


@dataclass(frozen=True, slots=True)
class Outline:
    """What a config says of a base."""

    model_type: str
    state_bytes: int
    """As `BaseSpec.state_bytes`."""


def outline(folder: Path, dtype: torch.dtype) -> Outline:
    """Build the model of a checkpoint's config, without weights, to be served in `dtype`.

    Raises BaseRefused for what is refused of it before it is run.
    """
    model = empty_model(read_config(folder), dtype)
    with refusing_errors(model, "looking at its parts"):
        refuse_unsupported(model)
        replace_recurrent_layers(model)
        return Outline(model.config.model_type, state_bytes(model))

"""The recurrent layers of a model: which there are, their replacement, and the states of a row.

A layer's class becomes a subclass, as in `fused_modules.py`, but always: only ours know where rows
keep their states, and leave the originals' attributes, names and parameters as they are.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from lora_runtime.base.model.parts import decoder_of
from lora_runtime.base.model.recurrence import StatePool, StateShapes
from lora_runtime.base.model.recurrent_mixers import (
    ACTIVATIONS,
    GatedDeltaNet,
    JoinedGatedDeltaNet,
    Mamba2,
    RecurrentMixer,
    ScaledMamba2,
    ShortConvolution,
)
from lora_runtime.base.model.requirement import require_attributes
from lora_runtime.errors import BaseRefused

TABLE: dict[type[RecurrentMixer], tuple[str, ...]] = {
    GatedDeltaNet: ("Qwen3_5GatedDeltaNet", "Qwen3_5MoeGatedDeltaNet"),
    JoinedGatedDeltaNet: ("Qwen3NextGatedDeltaNet",),
    Mamba2: ("BambaMixer", "GraniteMoeHybridMambaLayer", "NemotronHMamba2Mixer"),
    ScaledMamba2: ("FalconH1Mixer",),
    ShortConvolution: ("Lfm2ShortConv", "Lfm2MoeShortConv"),
}
"""Recurrent layers → classes of transformers. A model with others is refused."""
KINDS = {name: kind for kind, names in TABLE.items() for name in names}


def replace_recurrent_layers(model: PreTrainedModel) -> None:
    """Let the layers that TABLE knows keep their states where the forward says, in place.

    Raises BaseRefused for one that ends its convolution in another function than ours do, that
    lacks what ours read, or that carries nothing from token to token.
    """
    kind: Any
    for path, kind in _recurrent_kinds(model).items():
        module: Any = decoder_of(model).get_submodule(path)
        activation = getattr(module, "activation", "silu")
        if activation not in ACTIVATIONS:
            raise BaseRefused(
                f"{path} of {model.config.model_type} ends its convolution in {activation!r}; only "
                f"{', '.join(sorted(ACTIVATIONS))} are served"
            )
        require_attributes(module, kind.relies_on, "a recurrent layer reads")
        original: Any = type(module)
        module.__class__ = _with_states(kind, original)
        if not any(math.prod(shape) for shape in module.state_shapes):
            raise BaseRefused(
                f"{path} of {model.config.model_type} ({original.__name__}) is a convolution over "
                "one token, which carries nothing to the next; such a recurrent layer is not served"
            )


def convolutions(model: PreTrainedModel) -> set[nn.Module]:
    """The convolutions of the layers that will be replaced: no adapter acts on them."""
    kinds, decoder = _recurrent_kinds(model), decoder_of(model)
    return {decoder.get_submodule(f"{path}.{kind.convolution}") for path, kind in kinds.items()}


def allocate_states(model: PreTrainedModel, num_slots: int) -> StatePool | None:
    """Room for the states of `num_slots` rows or snapshots, in float32 or better, on the model's
    device; None for a model without recurrent layers. The layers are replaced.
    """
    shapes = _state_shapes(model)
    like = torch.empty(0, dtype=_state_dtype(model), device=model.device)
    return StatePool.allocate(shapes, num_slots, like) if shapes else None


def state_bytes(model: PreTrainedModel) -> int:
    """Bytes of all states of one row; 0 without recurrent layers. The layers are replaced."""
    shapes = (shape for own in _state_shapes(model).values() for shape in own)
    return _state_dtype(model).itemsize * sum(math.prod(shape) for shape in shapes)


def _recurrent_kinds(model: PreTrainedModel) -> dict[str, type[RecurrentMixer]]:
    """Path from the decoder on → what the layer there is to become."""
    modules = decoder_of(model).named_modules()
    names = {path: type(module).__name__ for path, module in modules}
    return {path: KINDS[name] for path, name in names.items() if name in KINDS}


def _state_shapes(model: PreTrainedModel) -> dict[int, StateShapes]:
    """Layer → the shapes of a row's states there."""
    mixers = (m for m in decoder_of(model).modules() if isinstance(m, RecurrentMixer))
    return {mixer.layer_idx: mixer.state_shapes for mixer in mixers}


def _state_dtype(model: PreTrainedModel) -> torch.dtype:
    return torch.promote_types(model.dtype, torch.float32)


@cache
def _with_states(kind: type[Any], original: type[Any]) -> type[Any]:
    return type(f"Stateful{original.__name__}", (kind, original), {})

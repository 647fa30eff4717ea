"""Activation checkpointing: a base whose layers keep only their input and are computed again for
the gradient.

Source: Chen et al., arXiv:1604.06174. torch's checkpoint is used, not transformers' switch, whose
name and behaviour differ between versions and which works in training mode only.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lora_runtime.base.loader import Base
from lora_runtime.base.model.adapted_linear import StepContext
from lora_runtime.base.model.parts import decoder_of
from lora_runtime.base.model.reordered_model import (
    WrappedLayer,
    reordering,
    shallow_copy,
    with_submodule,
)


class RecomputedLayer(WrappedLayer):
    """Runs `layer`, and again in backward under the adapters of its forward."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Whatever `layer` takes and returns."""
        if not torch.is_grad_enabled():
            return self.layer(*args, **kwargs)
        return checkpoint(
            self.layer,
            *args,
            use_reentrant=False,
            preserve_rng_state=False,
            context_fn=partial(_contexts, self.context),
            **kwargs,
        )


def recomputed(base: Base) -> Base:
    """`base` with less memory and more time for a gradient, which is the same to the last bit.

    Weights and context are shared; the given base is not changed.
    """
    model = base.model
    decoder: Any = decoder_of(model)
    lighter = shallow_copy(decoder)
    lighter.layers = nn.ModuleList(RecomputedLayer(layer, base.context) for layer in decoder.layers)
    configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}
    lighter_model = with_submodule(model, decoder, lighter, configs)
    reordered = reordering(lighter_model, base.context)
    return replace(base, model=lighter_model, reordered=reordered)


def _contexts(
    context: StepContext,
) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """For the forward nothing; for the one in backward what acts now, as it will have ended."""
    again = context.adapters(context.meta, context.bindings, context.head_meta)
    return nullcontext(), again

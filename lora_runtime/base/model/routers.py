"""Routers of mixtures: what they do with their logits is the family's own, the product is ours.

So adapters act on routers, and nothing of a family's rule is written here. Routers are not
quantised: a small difference of their logits sends a token to other experts.
"""

from __future__ import annotations

from functools import cache
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lora_runtime.base.model.adapted_linear import AdaptedLinear, Routed, StepContext
from lora_runtime.base.model.parts import decoder_of, expert_modules, path_of
from lora_runtime.base.model.quant_linear import DenseLinear
from lora_runtime.base.model.reordered_model import shallow_copy
from lora_runtime.errors import BaseRefused

UNQUANTISED = ("shared_expert_gate",)
"""Last names of linear layers that choose as routers do, and stay as exact as they."""


class AdaptedRouter(AdaptedLinear):
    """The router of a mixture: an unquantised linear layer, and what its family makes of its
    logits.

    transformers' router multiplies and chooses in one forward. Here a copy of it chooses, whose
    weight is the identity, from the logits of a linear layer as any other: so adapters act on it,
    and the family's rule stays transformers' own. The product with the identity is exact, and in
    float32 or better, so that the weights of the chosen experts are not rounded.
    `is_wide`: the family multiplies in float32 whatever the compute dtype is.
    """

    def __init__(self, path: str, router: Any, context: StepContext) -> None:
        weight, bias = router.weight.data, getattr(router, "bias", None)
        self_dtype = torch.float32 if _multiplies_in_float32(router) else weight.dtype
        super().__init__(path, DenseLinear(weight.to(self_dtype), bias), context)
        self.is_wide = self_dtype != weight.dtype
        self.choose = _chooser(router, torch.promote_types(self_dtype, torch.float32))

    def forward(self, hidden_states: Tensor, *bias: Tensor) -> Any:
        """hidden_states (..., H) → what the family's router gives: of T tokens logits (T, E),
        weights (T, K) and experts (T, K). bias (E,): what some families keep outside of it.
        """
        x = hidden_states.reshape(-1, self.in_features)
        logits = super().forward(x.float() if self.is_wide else x)
        found = self.choose(logits.to(self.choose.weight.dtype), *bias)
        _collect(self.context, logits, found[2])
        return found


class RouterLinear(AdaptedLinear):
    """The linear layer inside of a router that is written around one."""

    logits: Tensor | None = None
    """Of the forward that runs, while somebody collects what routers give."""

    def forward(self, x: Tensor) -> Tensor:
        logits = super().forward(x)
        self.logits = None if self.context.routed is None else logits
        return logits


class _AroundLinear(nn.Module):
    """A router of transformers whose logits are those of a RouterLinear inside of it."""

    linear_name: str

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        found = super().forward(*args, **kwargs)
        linear: Any = getattr(self, self.linear_name)
        _collect(linear.context, linear.logits, found[2])
        return found


def _collect(context: StepContext, logits: Tensor, chosen: Tensor) -> None:
    if context.routed is not None:
        context.routed.append(Routed(context.meta, logits, chosen))


def replace_routers(
    model: PreTrainedModel, context: StepContext
) -> dict[str, AdaptedRouter | RouterLinear]:
    """Let adapters act on every router; linear layers are replaced already. Returns path → what
    they act on: an AdaptedRouter in the place of a router with a weight of its own, else the
    linear layer inside of it.
    """
    decoder = decoder_of(model)
    prefix = path_of(model, decoder)
    found: dict[str, AdaptedRouter | RouterLinear] = {}
    for path, router in routers(model).items():
        parent, _, name = path.rpartition(".")
        adapted: AdaptedRouter | RouterLinear
        if "weight" in router._parameters:
            adapted = AdaptedRouter(f"{prefix}.{path}", router, context)
            setattr(decoder.get_submodule(parent), name, adapted)
        else:
            adapted = _adapted_inside(router)
        found[adapted.path] = adapted
    return found


def routers(model: PreTrainedModel) -> dict[str, nn.Module]:
    """The module that routes to each mixture: the one beside its experts with a row for each of
    them, in a weight of its own or in its only linear layer. Raises BaseRefused where there is no
    such module.
    """
    decoder = decoder_of(model)
    found: dict[str, nn.Module] = {}
    experts: Any
    for path, experts in expert_modules(model).items():
        parent = path.rpartition(".")[0]
        block: Any = decoder.get_submodule(parent)
        own = {
            name: module
            for name, module in block.named_children()
            if module is not experts and _num_routed(module) == experts.num_experts
        }
        if len(own) != 1:
            raise BaseRefused(
                f"{model.config.model_type} is not served: {path} are experts without a router in "
                "a form that is known"
            )
        found |= {f"{parent}.{name}": module for name, module in own.items()}
    return found


def _num_routed(module: nn.Module) -> int | None:
    """How many experts a module chooses from, if it is a router."""
    weight = module._parameters.get("weight")
    if weight is not None:
        is_router = weight.ndim == 2 and type(module) is not nn.Linear
        return len(weight) if is_router else None
    linears = [m for m in module.children() if isinstance(m, nn.Linear | AdaptedLinear)]
    return linears[0].out_features if len(linears) == 1 else None


def _adapted_inside(router: Any) -> RouterLinear:
    """The router's linear layer; both change their class."""
    ((name, linear),) = (
        (name, child) for name, child in router.named_children() if isinstance(child, AdaptedLinear)
    )
    adapted: Any = linear
    adapted.__class__ = RouterLinear
    original: Any = type(router)
    router.__class__ = _around(original)
    router.linear_name = name
    found: RouterLinear = adapted
    return found


@cache
def _around(original: type[Any]) -> type[Any]:
    return type(f"Adapted{original.__name__}", (_AroundLinear, original), {})


def _chooser(router: Any, dtype: torch.dtype) -> Any:
    """A copy of a router that takes logits for hidden states and multiplies them by 1."""
    chooser = shallow_copy(router)
    chooser._buffers, own = dict(router._buffers), dict(router._parameters)
    chooser._non_persistent_buffers_set = set(router._non_persistent_buffers_set)
    chooser._parameters = {}
    num_experts, device = len(router.weight), router.weight.device
    # Buffers, as those keep their dtype in a view of the base in another.
    constants = {"weight": torch.eye(num_experts, dtype=dtype, device=device)}
    if own.get("bias") is not None:
        constants["bias"] = torch.zeros(num_experts, dtype=dtype, device=device)
    for name, values in constants.items():
        chooser.register_buffer(name, values, persistent=False)
    for name in own.keys() - constants.keys():  # what is added to scores, a parameter in some
        if own[name] is not None:
            chooser.register_buffer(name, own[name].data)
    if hasattr(chooser, "hidden_dim"):
        chooser.hidden_dim = num_experts
    return chooser


@torch.no_grad()
def _multiplies_in_float32(router: Any) -> bool:
    """True when a router of another dtype gives logits that are not rounded to it."""
    weight = router.weight
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(8, weight.shape[1], generator=generator).to(weight)
    biases = [weight.new_zeros(len(weight))] * (len(signature(router.forward).parameters) - 1)
    logits: Tensor = router(x, *biases)[0]
    return not torch.equal(logits, logits.to(weight.dtype).to(logits.dtype))

"""Mixtures of experts: the experts that tokens choose, multiplied as groups of rows of one weight.

transformers holds a layer's experts as two parameters, gate and up (E, 2 · inner, hidden) and down
(E, hidden, inner), in some families transposed. Here each is one frozen layer whose rows are those
of all experts, E · out, which holds every expert's matrix in the bits that it would have alone. The
pairs of token and chosen expert are sorted by expert, once for both products, and each product is
one over all of them.

Routing is transformers' own and knows nothing of a batch: every token gets all the experts that it
chose, there is no capacity, and its sum is over its own choices in their order. So rows do not
touch each other.
Source: Switch Transformers, arXiv:2101.03961 (routing); MegaBlocks, arXiv:2211.15841 (no capacity).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lora_runtime.base.model.adapted_linear import AdaptedLinear, Routed, StepContext
from lora_runtime.base.model.fused_modules import ACTIVATIONS
from lora_runtime.base.model.parts import (
    EXPERT_WEIGHTS,
    decoder_of,
    expert_modules,
    path_of,
)
from lora_runtime.base.model.quant_linear import DenseLinear, FrozenLinear
from lora_runtime.base.model.reordered_model import shallow_copy
from lora_runtime.base.model.requirement import require_attributes
from lora_runtime.base.model.routing import Routing
from lora_runtime.base.model.stacked_linears import join_layers
from lora_runtime.core import ExpertsLayout
from lora_runtime.errors import BaseRefused
from lora_runtime.kernels import can_fuse, gated_activation

RELIES_ON = (
    "num_experts", "has_gate", "is_transposed", "is_concatenated", "has_post_expert_norm",
    "_apply_gate", "_is_expert_parallel",
)  # fmt: skip
UNQUANTISED = ("shared_expert_gate",)
"""Last names of linear layers that choose as routers do, and stay as exact as they."""


class AdaptedExperts(nn.Module):
    """One product of a mixture: y_p = W_e x_p + b_e, plus the adapters of the pair's row.

    `linear` holds all experts' rows, and their biases (E · out,). in_features and out_features are
    those of one expert.
    """

    def __init__(
        self, path: str, linear: FrozenLinear, layout: ExpertsLayout, context: StepContext
    ) -> None:
        super().__init__()
        self.path, self.linear, self.context = path, linear, context
        self.layout = layout
        self.in_features = linear.in_features
        self.out_features = linear.out_features // layout.count

    def forward(self, x: Tensor, routing: Routing) -> Tensor:
        """x (P, in), of the routing's pairs in their order → (P, out)."""
        context, bias = self.context, self.linear.bias
        context.num_calls += 1
        binding = None if context.meta is None else context.bindings.get(self.path)
        if binding is None:
            y = self.product(x, routing)
        else:
            y = binding.experts(x, self, routing, context.meta)
        if bias is None:
            return y
        return y + bias.view(self.layout.count, -1).index_select(0, routing.experts)

    def product(self, x: Tensor, routing: Routing) -> Tensor:
        """W_e x_p, without biases."""
        return self.linear.grouped_product(x, routing.starts)


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

    def forward(self, hidden_states: Tensor) -> Any:
        """hidden_states (..., H) → what the family's router gives: of T tokens logits (T, E),
        weights (T, K) and experts (T, K).
        """
        x = hidden_states.reshape(-1, self.in_features)
        logits = super().forward(x.float() if self.is_wide else x)
        found = self.choose(logits.to(self.choose.weight.dtype))
        if self.context.routed is not None:
            self.context.routed.append(Routed(self.context.meta, logits, found[2]))
        return found


class _GroupedExperts(nn.Module):
    """In the place of the forward of transformers' experts."""

    num_experts: int
    gate_up_proj: AdaptedExperts
    down_proj: AdaptedExperts
    config: Any
    _apply_gate: Callable[[Tensor], Tensor]
    is_plain_gate: bool
    """act(gate) · up, as transformers has it unless a family says otherwise."""

    def forward(self, hidden_states: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """hidden_states (T, H), chosen and weights (T, K) → (T, H)."""
        routing = Routing.of(chosen, self.num_experts)
        x = hidden_states.index_select(0, routing.tokens)
        y = self.down_proj(self._gated(self.gate_up_proj(x, routing)), routing)
        return routing.summed(y, weights)

    def _gated(self, gate_up: Tensor) -> Tensor:
        kind = ACTIVATIONS.get(getattr(self.config, "hidden_act", ""))
        if kind is None or not can_fuse(gate_up) or not self.is_plain_gate:
            return self._apply_gate(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        return gated_activation(gate, up, kind)


class UnfrozenExperts(FrozenLinear):
    """Experts' weights where the checkpoint has them, until they are frozen: each visits the device
    alone, in the compute dtype, when it is multiplied.

    weight (E, out, in), or (E, in, out) if `is_transposed`; bias (E · out,) or None.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        device: torch.device,
        dtype: torch.dtype,
        *,
        is_transposed: bool,
    ) -> None:
        super().__init__(keep_copies=False)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.is_transposed, self.target = is_transposed, (device, dtype)
        num_experts, rows, columns = weight.shape
        self._out, self.in_features = (columns, rows) if is_transposed else (rows, columns)
        self.out_features = num_experts * self._out
        self.register_buffer("bias", None if bias is None else bias.flatten())

    def matrices(self) -> Iterator[Tensor]:
        """Each expert's W (out, in) in turn, on the device in the compute dtype."""
        for expert in range(len(self.weight)):
            yield self._matrix(expert)

    def row_values(self, rows: slice) -> Tensor:
        """All rows of one expert."""
        return self._matrix(rows.start // self._out)

    def _matrix(self, expert: int) -> Tensor:
        matrix = self.weight[expert].to(*self.target)
        return matrix.T.contiguous() if self.is_transposed else matrix


def replace_experts(
    model: PreTrainedModel, context: StepContext, device: torch.device, dtype: torch.dtype
) -> dict[str, AdaptedExperts]:
    """Let the model's mixtures run as groups, still unquantised. Returns path → each product.

    The routers become AdaptedRouters. Raises BaseRefused for experts of another form.
    """
    found: dict[str, AdaptedExperts] = {}
    prefix = path_of(model, decoder_of(model))
    for path, experts in expert_modules(model).items():
        _check(model, path, experts)
        for name in EXPERT_WEIGHTS:
            product = _opened(f"{prefix}.{path}.{name}", experts, name, context, device, dtype)
            found[product.path] = product
        original: Any = type(experts)
        experts.__class__ = _grouped(original)
    return found


def replace_routers(model: PreTrainedModel, context: StepContext) -> dict[str, AdaptedRouter]:
    """Put an AdaptedRouter in the place of every router. Returns path → the router there."""
    decoder, found = decoder_of(model), {}
    prefix = path_of(model, decoder)
    for path, router in routers(model).items():
        parent, _, name = path.rpartition(".")
        adapted = AdaptedRouter(f"{prefix}.{path}", router, context)
        setattr(decoder.get_submodule(parent), name, adapted)
        found[adapted.path] = adapted
    return found


def routers(model: PreTrainedModel) -> dict[str, nn.Module]:
    """The module that routes to each mixture."""
    decoder = decoder_of(model)
    found: dict[str, nn.Module] = {}
    experts: Any
    for path, experts in expert_modules(model).items():
        parent = path.rpartition(".")[0]
        block: Any = decoder.get_submodule(parent)
        own = {
            name: module
            for name, module in block.named_children()
            if type(module) is not nn.Linear and _is_router(module, experts.num_experts)
        }
        if len(own) != 1:
            raise _refused(model, f"{path} has {len(own)} routers beside it, and needs one")
        found |= {f"{parent}.{name}": module for name, module in own.items()}
    return found


def freeze_experts(experts: AdaptedExperts, freeze: Callable[..., FrozenLinear]) -> None:
    """Freeze one expert's matrix after another, and forget them. Raises BaseRefused where their
    format cannot hold them one after another.
    """
    unfrozen: Any = experts.linear
    device, dtype = unfrozen.target
    joined = join_layers([freeze(matrix, None) for matrix in unfrozen.matrices()])
    if joined is None:
        raise BaseRefused(
            f"the experts of {experts.path} are matrices of {experts.out_features} × "
            f"{experts.in_features}, which this quantisation does not hold in whole blocks: "
            "choose 'int8' or 'none', or 'nf4' where it is 'nf4-double'"
        )
    joined.bias = None if unfrozen.bias is None else unfrozen.bias.to(device, dtype)
    experts.linear = joined


def _is_router(module: nn.Module, num_experts: int) -> bool:
    weight = module._parameters.get("weight")
    return weight is not None and weight.ndim == 2 and len(weight) == num_experts


def _check(model: PreTrainedModel, path: str, experts: Any) -> None:
    require_attributes(experts, RELIES_ON, "experts that run as groups need")
    names = {name for name, _ in experts.named_parameters(recurse=False)}
    biases = {f"{name}_bias" for name in EXPERT_WEIGHTS}
    if not experts.has_gate or experts.has_post_expert_norm or experts._is_expert_parallel:
        raise _refused(model, f"{path} has experts without a gate, with a norm, or not all of them")
    if unknown := names - biases - {*EXPERT_WEIGHTS}:
        raise _refused(model, f"{path} has {min(unknown)}, which experts have in no known family")


def _refused(model: PreTrainedModel, what: str) -> BaseRefused:
    return BaseRefused(f"{model.config.model_type} is not served: {what}")


def _opened(
    path: str,
    experts: Any,
    name: str,
    context: StepContext,
    device: torch.device,
    dtype: torch.dtype,
) -> AdaptedExperts:
    """The product in the place of the parameter `name`, over the same memory."""
    weight, bias = experts._parameters.pop(name), experts._parameters.pop(f"{name}_bias", None)
    unfrozen = UnfrozenExperts(
        weight.data,
        None if bias is None else bias.data,
        device,
        dtype,
        is_transposed=experts.is_transposed,
    )
    is_interleaved = name == EXPERT_WEIGHTS[0] and not experts.is_concatenated
    layout = ExpertsLayout(experts.num_experts, experts.is_transposed, is_interleaved)
    product = AdaptedExperts(path, unfrozen, layout, context)
    setattr(experts, name, product)
    return product


@cache
def _grouped(original: type[Any]) -> type[Any]:
    is_plain = original._apply_gate.__name__ == "_default_apply_gate"
    attributes = {"is_plain_gate": is_plain}
    return type(f"Grouped{original.__name__}", (_GroupedExperts, original), attributes)


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
    if hasattr(chooser, "hidden_dim"):
        chooser.hidden_dim = num_experts
    return chooser


@torch.no_grad()
def _multiplies_in_float32(router: Any) -> bool:
    """True when a router of another dtype gives logits that are not rounded to it."""
    weight = router.weight
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(8, weight.shape[1], generator=generator).to(weight)
    logits: Tensor = router(x)[0]
    return not torch.equal(logits, logits.to(weight.dtype).to(logits.dtype))

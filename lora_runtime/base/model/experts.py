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

from lora_runtime.base.model.adapted_linear import StepContext
from lora_runtime.base.model.finite import require_finite
from lora_runtime.base.model.fused_modules import ACTIVATIONS
from lora_runtime.base.model.parts import (
    EXPERT_WEIGHTS,
    decoder_of,
    expert_modules,
    path_of,
)
from lora_runtime.base.model.quant_linear import (
    BLOCK_SIZE,
    NESTED_BLOCK_SIZE,
    FrozenLinear,
)
from lora_runtime.base.model.routing import Routing
from lora_runtime.base.model.stacked_linears import join_layers
from lora_runtime.core import ExpertsLayout
from lora_runtime.errors import BaseRefused
from lora_runtime.kernels import can_fuse, gated_activation

RELIES_ON = (
    "num_experts", "has_gate", "is_transposed", "is_concatenated", "has_post_expert_norm",
    "_apply_gate", "_is_expert_parallel",
)  # fmt: skip


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

    `check_experts` has seen that their forms are known.
    """
    found: dict[str, AdaptedExperts] = {}
    prefix = path_of(model, decoder_of(model))
    for path, experts in expert_modules(model).items():
        for name in EXPERT_WEIGHTS:
            product = _opened(f"{prefix}.{path}.{name}", experts, name, context, device, dtype)
            found[product.path] = product
        original: Any = type(experts)
        experts.__class__ = _grouped(original)
    return found


def is_mixture(module: nn.Module) -> bool:
    """True for the block of a layer that holds experts which run as groups."""
    return any(isinstance(child, _GroupedExperts) for child in module.children())


def check_experts(model: PreTrainedModel) -> None:
    """Raise BaseRefused for experts in another form than those we know."""
    kind = model.config.model_type
    experts: Any
    for path, experts in expert_modules(model).items():
        where = f"{kind} is not served: {path} ({type(experts).__name__}) are experts"
        if not all(hasattr(experts, name) for name in RELIES_ON):
            raise BaseRefused(f"{where} that it multiplies in a way of its own")
        if not experts.has_gate:
            raise BaseRefused(f"{where} without a gate")
        if experts.has_post_expert_norm or experts._is_expert_parallel:
            raise BaseRefused(f"{where} with a norm behind each, or not all of them")
        names = {name for name, _ in experts.named_parameters(recurse=False)}
        biases = {f"{name}_bias" for name in EXPERT_WEIGHTS}
        if unknown := names - biases - {*EXPERT_WEIGHTS}:
            raise BaseRefused(f"{where} with {min(unknown)}, which those of no known family have")


def require_whole_blocks(experts: AdaptedExperts, quantization: str) -> None:
    """Raise BaseRefused where a format cannot hold experts one after another, as some of its blocks
    would hold weights of two inputs' rows, or its scales' blocks those of two experts.
    """
    num_inputs, num_outputs = experts.in_features, experts.out_features
    has_blocks = quantization in ("nf4", "nf4-double", "fp4")
    is_nested = quantization == "nf4-double"
    is_ragged = is_nested and num_inputs * num_outputs % (BLOCK_SIZE * NESTED_BLOCK_SIZE) != 0
    if has_blocks and (num_inputs % BLOCK_SIZE or is_ragged):
        fitting = "'int8' or 'none'" + ("" if num_inputs % BLOCK_SIZE else ", or 'nf4'")
        raise BaseRefused(
            f"the experts of {experts.path} have {num_inputs} inputs and {num_outputs} outputs: in "
            f"4 bits an expert's inputs must be a multiple of {BLOCK_SIZE}, with double "
            f"quantisation inputs × outputs also one of {BLOCK_SIZE * NESTED_BLOCK_SIZE}. Choose "
            f"quantization {fitting}",
            field="quantization",
        )


def freeze_experts(experts: AdaptedExperts, freeze: Callable[..., FrozenLinear]) -> None:
    """Freeze one expert's matrix after another, and forget them, in a format that holds them by
    `require_whole_blocks`. Raises BaseRefused for numbers that are not finite.
    """
    unfrozen: Any = experts.linear
    device, dtype = unfrozen.target
    joined = join_layers(
        [
            freeze(require_finite(f"expert {expert} of {experts.path}", matrix), None)
            for expert, matrix in enumerate(unfrozen.matrices())
        ]
    )
    assert joined is not None, f"{experts.path} in blocks of two experts"
    if unfrozen.bias is not None:
        name = f"{experts.path}_bias"
        joined.bias = require_finite(name, unfrozen.bias.to(device, dtype))
    experts.linear = joined


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

"""Modules of transformers that run as one GPU launch where there were two to ten.

A module keeps its attributes, names and parameters; only its class becomes a subclass, whose
forward is the original wherever a fused kernel cannot run: on a CPU, or with gradients.
"""

from __future__ import annotations

from functools import cache
from types import FunctionType
from typing import Any

from torch import Tensor, nn

from lora_runtime.base.adapted_linear import AdaptedLinear
from lora_runtime.kernels import add_rms_norm, can_run_on_gpu, gated_activation, rms_norm, rotate

ACTIVATIONS = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
"""transformers' names of activations → ours."""


class _Norm(nn.Module):
    plus_one = False

    def forward(self, x: Tensor) -> Tensor:
        if not can_run_on_gpu(x):
            return super().forward(x)
        eps = self.eps if self.plus_one else self.variance_epsilon
        return rms_norm(x, self.weight, eps, plus_one=self.plus_one)


class _NormPlusOne(_Norm):
    plus_one = True


class _GatedMLP(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if not can_run_on_gpu(x):
            return super().forward(x)
        kind, stack = ACTIVATIONS[_activation(self)], getattr(self.gate_proj, "stack", None)
        gated = None if stack is None else stack.gated(x, kind)
        if gated is None:
            gated = gated_activation(self.gate_proj(x), self.up_proj(x), kind)
        return self.down_proj(gated)


class _JoinedGateMLP(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if not can_run_on_gpu(x):
            return super().forward(x)
        kind = ACTIVATIONS[_activation(self)]
        if isinstance(self.gate_up_proj, AdaptedLinear):
            return self.down_proj(self.gate_up_proj.gated(x, kind))
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(gated_activation(gate, up, kind))


class _Attention(nn.Module):
    """Its forward is the original's, in which one name means something else."""


class _Layer(nn.Module):
    """Attention, then MLP, each behind a norm; the first sum and the second norm are one launch."""

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        if not can_run_on_gpu(hidden_states):
            return super().forward(hidden_states, **kwargs)
        attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
        norm = self.post_attention_layernorm
        sums = add_rms_norm(attended, hidden_states, norm.weight, norm.variance_epsilon)
        return sums[0] + self.mlp(sums[1])


TABLE: dict[type, tuple[str, ...]] = {
    _Norm: ("LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm", "Phi3RMSNorm"),
    _NormPlusOne: ("Gemma2RMSNorm", "Gemma3RMSNorm"),
    _GatedMLP: ("LlamaMLP", "MistralMLP", "Qwen2MLP", "Qwen3MLP", "Gemma2MLP", "Gemma3MLP"),
    _JoinedGateMLP: ("Phi3MLP",),
    _Attention: ("LlamaAttention", "MistralAttention", "Qwen2Attention", "Qwen3Attention",
                 "Gemma2Attention", "Gemma3Attention", "Phi3Attention"),
    _Layer: ("LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer",
             "Phi3DecoderLayer"),
}  # fmt: skip
"""How modules are fused → classes of transformers. A class that is not here stays as it is."""
KINDS = {name: kind for kind, names in TABLE.items() for name in names}


def fuse_modules(model: nn.Module) -> None:
    """Fuse every module of `model` that TABLE knows, in place; the model is in eval mode."""
    for module in model.modules():
        kind = KINDS.get(type(module).__name__)
        is_mlp = kind in (_GatedMLP, _JoinedGateMLP)
        if kind is not None and not (is_mlp and _activation(module) not in ACTIVATIONS):
            module.__class__ = _fused(kind, type(module))


@cache
def _fused(kind: type, original: type) -> type:
    members: dict[str, Any] = {}
    if kind is _Attention:
        members["forward"] = _rotating_forward(original)
    return type(f"Fused{original.__name__}", (kind, original), members)


def _rotating_forward(original: Any) -> FunctionType:
    """The forward of an attention class, with our `rotate` for its apply_rotary_pos_emb."""
    forward = original.forward
    plain = forward.__globals__["apply_rotary_pos_emb"]

    def apply_rotary_pos_emb(
        q: Tensor, k: Tensor, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor]:
        """q (1, H, T, D), k (1, G, T, D), cos and sin (1, T, R)."""
        if not can_run_on_gpu(q) or len(q) > 1:
            return plain(q, k, cos, sin)
        q, k = rotate(q[0].transpose(0, 1), k[0].transpose(0, 1), cos[0], sin[0])
        return q.transpose(0, 1)[None], k.transpose(0, 1)[None]

    names = {**forward.__globals__, "apply_rotary_pos_emb": apply_rotary_pos_emb}
    fused = FunctionType(
        forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__
    )
    fused.__kwdefaults__ = forward.__kwdefaults__
    return fused


def _activation(module: Any) -> str:
    config = module.config
    return str(getattr(config, "hidden_activation", None) or config.hidden_act)

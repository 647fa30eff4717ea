"""Modules of transformers that run as one GPU launch where there were two to ten.

A module keeps its attributes, names and parameters; only its class becomes a subclass, whose
forward is the original wherever a fused kernel cannot run: on a CPU, or with gradients.
"""

from __future__ import annotations

from functools import cache
from types import FunctionType
from typing import Any

from torch import Tensor, nn

from lora_runtime.kernels import can_run_on_gpu, gated_activation, rms_norm, rotate

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
        kind = ACTIVATIONS[_activation(self)]
        return self.down_proj(gated_activation(self.gate_proj(x), self.up_proj(x), kind))


class _JoinedGateMLP(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if not can_run_on_gpu(x):
            return super().forward(x)
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(gated_activation(gate, up, ACTIVATIONS[_activation(self)]))


class _Attention(nn.Module):
    """Its forward is the original's, in which one name means something else."""


TABLE: dict[str, type] = {
    "LlamaRMSNorm": _Norm,
    "MistralRMSNorm": _Norm,
    "Qwen2RMSNorm": _Norm,
    "Qwen3RMSNorm": _Norm,
    "Phi3RMSNorm": _Norm,
    "Gemma2RMSNorm": _NormPlusOne,
    "Gemma3RMSNorm": _NormPlusOne,
    "LlamaMLP": _GatedMLP,
    "MistralMLP": _GatedMLP,
    "Qwen2MLP": _GatedMLP,
    "Qwen3MLP": _GatedMLP,
    "Gemma2MLP": _GatedMLP,
    "Gemma3MLP": _GatedMLP,
    "Phi3MLP": _JoinedGateMLP,
    "LlamaAttention": _Attention,
    "MistralAttention": _Attention,
    "Qwen2Attention": _Attention,
    "Qwen3Attention": _Attention,
    "Gemma2Attention": _Attention,
    "Gemma3Attention": _Attention,
    "Phi3Attention": _Attention,
}
"""Class of transformers → how it is fused. A class that is not here stays as it is."""


def fuse_modules(model: nn.Module) -> None:
    """Fuse every module of `model` that TABLE knows, in place."""
    for module in model.modules():
        kind = TABLE.get(type(module).__name__)
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

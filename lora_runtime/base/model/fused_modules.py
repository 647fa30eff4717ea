"""Modules of transformers that run as one op where there were two to ten: a launch on a GPU, on a
CPU a call of the compiled library.

A module keeps its attributes, names and parameters; only its class becomes a subclass, whose
forward is the original wherever the ops are not compiled (`can_fuse_elementwise`), and on a GPU
where a gradient is wanted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

from torch import Tensor, nn

from lora_runtime.base.model.adapted_linear import AdaptedLinear
from lora_runtime.base.model.attention import Attention, PagedAttention
from lora_runtime.base.model.requirement import require_attributes
from lora_runtime.kernels import (
    HeadNorm,
    add_rms_norm,
    can_fuse_elementwise,
    gated_activation,
    rms_norm,
    rotate,
    wants_gradient,
)

ACTIVATIONS = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
"""transformers' names of activations → ours."""


class _Norm(nn.Module):
    weight: Tensor
    plus_one, epsilon = False, "variance_epsilon"
    relies_on = ("weight", "variance_epsilon")

    def forward(self, x: Tensor) -> Tensor:
        norm, normed = vars(x).pop("handed_on", (None, None))
        if norm is self:
            return normed
        if not can_fuse_elementwise(x):
            return super().forward(x)
        return rms_norm(x, self.weight, getattr(self, self.epsilon), plus_one=self.plus_one)


class _NormPlusOne(_Norm):
    plus_one, epsilon = True, "eps"
    relies_on = ("weight", "eps")


def _add_norm(
    x: Tensor, residual: Tensor, norm: Any, branch_norm: Any = None
) -> tuple[Tensor, Tensor]:
    """The sum of residual and x, or of what `branch_norm` makes of x, and the `norm` of the sum."""
    return add_rms_norm(
        x,
        residual,
        norm.weight,
        getattr(norm, norm.epsilon),
        plus_one=norm.plus_one,
        branch_weight=None if branch_norm is None else branch_norm.weight,
    )


class _GatedMLP(nn.Module):
    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module
    relies_on: tuple[str, ...] = ("config", "gate_proj", "up_proj", "down_proj")

    def forward(self, x: Tensor) -> Tensor:
        if not can_fuse_elementwise(x):
            return super().forward(x)
        kind, stack = ACTIVATIONS[_activation(self)], getattr(self.gate_proj, "stack", None)
        gated = None if stack is None else stack.gated(x, kind)
        if gated is None:
            gated = gated_activation(self.gate_proj(x), self.up_proj(x), kind)
        return self.down_proj(gated)


class _JoinedGateMLP(nn.Module):
    gate_up_proj: nn.Module
    down_proj: nn.Module
    relies_on: tuple[str, ...] = ("config", "gate_up_proj", "down_proj")

    def forward(self, x: Tensor) -> Tensor:
        if not can_fuse_elementwise(x):
            return super().forward(x)
        kind = ACTIVATIONS[_activation(self)]
        if isinstance(self.gate_up_proj, AdaptedLinear):
            return self.down_proj(self.gate_up_proj.gated(x, kind))
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(gated_activation(gate, up, kind))


class _Attention(nn.Module):
    """Norms of heads, rotation and the write of keys and values are one launch."""

    config: Any
    head_dim: int
    layer_idx: int
    scaling: float
    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module
    o_proj: nn.Module
    relies_on: tuple[str, ...] = ("config", "head_dim", "layer_idx", "scaling", "o_proj")

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention: Attention | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """hidden_states (1, T, H), position_embeddings (cos, sin) (1, T, R) → (1, T, H)."""
        if attention is None or len(hidden_states) > 1 or not self._can_fuse(hidden_states):
            given = {"position_embeddings": position_embeddings, "attention": attention}
            return super().forward(hidden_states, **given, **kwargs)
        q, k, v = self._heads(hidden_states)
        (cos,), (sin,) = position_embeddings
        options: Any = {
            "layer": self.layer_idx,
            "scale": self.scaling,
            "window": self._window(),
            "softcap": self._softcap(),
        }
        if isinstance(attention, PagedAttention):
            out = attention.rotate_and_attend(q, k, v, cos, sin, self._norm(), **options)
        else:
            q, k = rotate(q, k, cos, sin, self._norm())
            out = attention.attend(q, k, v, **options)
        return self.o_proj(out.flatten(1)[None]), None

    def _heads(self, x: Tensor) -> tuple[Tensor, ...]:
        """Queries (T, H, D), keys and values (T, G, D) of x (1, T, width)."""
        parts = (self.q_proj(x), self.k_proj(x), self.v_proj(x))
        return tuple(part[0].unflatten(1, (-1, self.head_dim)) for part in parts)

    def _can_fuse(self, x: Tensor) -> bool:
        """False too where somebody has put another norm of heads into the module."""
        return can_fuse_elementwise(x) and isinstance(getattr(self, "q_norm", None), _Norm | None)

    def _norm(self) -> HeadNorm | None:
        q: Any = getattr(self, "q_norm", None)
        k: Any = getattr(self, "k_norm", None)
        if q is None:
            return None
        return HeadNorm(q.weight, k.weight, getattr(q, q.epsilon), q.plus_one)

    def _window(self) -> int | None:
        return getattr(self, "sliding_window", None)

    def _softcap(self) -> float | None:
        return None


class _AttentionOfConfigsWindow(_Attention):
    def _window(self) -> int | None:
        return getattr(self.config, "sliding_window", None)


class _JoinedAttention(_AttentionOfConfigsWindow):
    num_key_value_heads: int
    qkv_proj: nn.Module
    relies_on = (*_Attention.relies_on, "qkv_proj", "num_key_value_heads")

    def _heads(self, x: Tensor) -> tuple[Tensor, ...]:
        groups = self.num_key_value_heads
        heads = self.qkv_proj(x)[0].unflatten(1, (-1, self.head_dim))
        return heads.split((self.config.num_attention_heads, groups, groups), 1)


class _CappedAttention(_Attention):
    attn_logit_softcapping: float | None
    relies_on = (*_Attention.relies_on, "attn_logit_softcapping")

    def _softcap(self) -> float | None:
        return self.attn_logit_softcapping


class _Layer(nn.Module):
    """Attention, then MLP, each behind a norm. Each sum and the norm behind it are one launch.

    Behind the last sum comes the norm of another module, the next layer's or the decoder's: it
    finds what was made for it on the tensor that it is given, and only on that one. Whoever else
    is given the tensor finds the plain sum. Not where a gradient is wanted: a layer that is
    computed again for it (`recompute.py`) would not find it.
    """

    input_layernorm: nn.Module
    self_attn: nn.Module
    post_attention_layernorm: nn.Module
    mlp: nn.Module
    relies_on: tuple[str, ...] = (
        "input_layernorm", "self_attn", "post_attention_layernorm", "mlp"
    )  # fmt: skip
    norm_behind: tuple[Any, ...] = ()
    """The norm behind the last sum, if it is one of ours; in a tuple it is no submodule."""
    norms_between: tuple[str, ...] = ("post_attention_layernorm",)
    """Norms that are part of a sum's launch."""

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        if not self._can_fuse(hidden_states):
            return super().forward(hidden_states, **kwargs)
        attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
        total, normed = _add_norm(attended, hidden_states, self.post_attention_layernorm)
        return self._sum(self.mlp(normed), total)

    def _can_fuse(self, x: Tensor) -> bool:
        """False too where somebody has put other norms into the layer."""
        norms = (getattr(self, name) for name in self.norms_between)
        return can_fuse_elementwise(x) and all(isinstance(norm, _Norm) for norm in norms)

    def _sum(self, x: Tensor, residual: Tensor, branch_norm: Any = None) -> Tensor:
        """residual + x, or what `branch_norm` makes of x, with what `norm_behind` makes of it."""
        if not self.norm_behind or not can_fuse_elementwise(x) or wants_gradient(x):
            return residual + (x if branch_norm is None else branch_norm(x))
        (norm,) = self.norm_behind
        total, normed = _add_norm(x, residual, norm, branch_norm)
        vars(total)["handed_on"] = (norm, normed)
        return total


class _LayerOfFourNorms(_Layer):
    """What attention and MLP give is normed too, before it is added (Gemma)."""

    pre_feedforward_layernorm: nn.Module
    post_feedforward_layernorm: nn.Module
    relies_on = (*_Layer.relies_on, "pre_feedforward_layernorm", "post_feedforward_layernorm")
    norms_between = (
        "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"
    )  # fmt: skip

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        if not self._can_fuse(hidden_states):
            return super(_Layer, self).forward(hidden_states, **kwargs)
        attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
        total, normed = _add_norm(
            attended, hidden_states, self.pre_feedforward_layernorm, self.post_attention_layernorm
        )
        return self._sum(self.mlp(normed), total, self.post_feedforward_layernorm)


TABLE: dict[type[Any], tuple[str, ...]] = {
    _Norm: ("LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm", "Phi3RMSNorm",
            "Qwen3MoeRMSNorm", "Qwen2MoeRMSNorm", "MixtralRMSNorm", "OlmoeRMSNorm",
            "GraniteMoeRMSNorm", "Glm4MoeRMSNorm", "Lfm2RMSNorm", "BambaRMSNorm",
            "FalconH1RMSNorm", "GraniteMoeHybridRMSNorm"),
    _NormPlusOne: ("Gemma2RMSNorm", "Gemma3RMSNorm", "Qwen3_5RMSNorm", "Qwen3NextRMSNorm"),
    _GatedMLP: ("LlamaMLP", "MistralMLP", "Qwen2MLP", "Qwen3MLP", "Gemma2MLP", "Gemma3MLP",
                "Qwen3MoeMLP", "Qwen2MoeMLP", "Glm4MoeMLP", "Qwen3_5MLP", "Qwen3NextMLP",
                "BambaMLP"),
    _JoinedGateMLP: ("Phi3MLP",),
    _Attention: ("LlamaAttention", "Qwen2Attention", "Qwen3Attention", "Gemma3Attention",
                 "Qwen3MoeAttention", "Qwen2MoeAttention"),
    _AttentionOfConfigsWindow: ("MistralAttention", "MixtralAttention"),
    _JoinedAttention: ("Phi3Attention",),
    _CappedAttention: ("Gemma2Attention",),
    _Layer: ("LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer",
             "Phi3DecoderLayer", "Qwen3MoeDecoderLayer", "Qwen2MoeDecoderLayer",
             "MixtralDecoderLayer"),
    _LayerOfFourNorms: ("Gemma2DecoderLayer", "Gemma3DecoderLayer"),
}  # fmt: skip
"""How modules are fused → classes of transformers. A class that is not here stays as it is."""
KINDS = {name: kind for kind, names in TABLE.items() for name in names}


def fuse_modules(model: nn.Module) -> None:
    """Fuse every module of `model` that TABLE knows, in place; the model is in eval mode.

    Raises BaseRefused where this version of transformers lacks what the fused forward reads.
    """
    for module in model.modules():
        original: Any = type(module)
        kind: Any = KINDS.get(original.__name__)
        is_mlp = kind in (_GatedMLP, _JoinedGateMLP)
        if kind is not None and not (is_mlp and _activation(module) not in ACTIVATIONS):
            require_attributes(module, kind.relies_on, "its fused forward reads")
            module.__class__ = _fused(kind, original)
    for module in model.modules():
        _join_layers(getattr(module, "layers", None), getattr(module, "norm", None))


def are_fused(layers: Iterable[Any], is_mixture: Callable[[nn.Module], bool]) -> bool:
    """True when every one of these decoder layers is of TABLE's, with all of its parts; in the
    place of a fused MLP there may be a mixture, of which `is_mixture` tells.
    """
    return all(
        isinstance(layer, _Layer)
        and isinstance(layer.self_attn, _Attention)
        and (isinstance(layer.mlp, _GatedMLP | _JoinedGateMLP) or is_mixture(layer.mlp))
        for layer in layers
    )


def _join_layers(layers: Any, last_norm: Any) -> None:
    """Tell every layer of a decoder which norm comes behind it."""
    layer: Any
    if isinstance(layers, nn.ModuleList) and all(isinstance(layer, _Layer) for layer in layers):
        norms = [*(layer.input_layernorm for layer in layers), last_norm][1:]
        for layer, norm in zip(layers, norms, strict=True):
            layer.norm_behind = (norm,) if isinstance(norm, _Norm) else ()


@cache
def _fused(kind: type[Any], original: type[Any]) -> type[Any]:
    return type(f"Fused{original.__name__}", (kind, original), {})


def _activation(module: Any) -> str:
    config = module.config
    return str(getattr(config, "hidden_activation", None) or config.hidden_act)

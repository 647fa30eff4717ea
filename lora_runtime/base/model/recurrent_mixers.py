"""transformers' recurrent layers, with the state of each row kept where the forward says.

A module keeps its attributes, names, parameters and linear layers; only its class becomes a
subclass, whose forward takes its rows laid end to end (1, T, H). Projections and gates are the
module's own and act on tokens; what goes from token to token is `advance`, which the forward's
Recurrence calls for all rows. States are float32 or better, and so is the arithmetic on them.
Which class of transformers is of which kind is in the table of `recurrent_layers.py`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_runtime.base.model.linear_recurrence import advance, causal_conv
from lora_runtime.base.model.recurrence import Padding, Recurrence, States, StateShapes


class RecurrentMixer(nn.Module):
    """A layer that carries states over a row's tokens: a `Rule`."""

    layer_idx: int
    out_proj: nn.Module
    relies_on: tuple[str, ...] = ("layer_idx", "out_proj")
    convolution = "conv1d"
    """The submodule whose weights are the convolution's: it is no layer that adapters act on."""

    @property
    def state_shapes(self) -> StateShapes:
        """The shapes of one row's states: of the convolution's (K − 1, C), and its others."""
        raise NotImplementedError

    def advance(
        self, states: States, inputs: tuple[Tensor, ...], padding: Padding
    ) -> tuple[Tensor, States]:
        """See `Rule`."""
        raise NotImplementedError

    def _conv(
        self, x: Tensor, history: Any, padding: Padding, activation: str | None = None
    ) -> tuple[Tensor, Any]:
        """The layer's convolution of x (N, L, C) in `history`'s dtype, rounded once to x's."""
        conv: Any = getattr(self, self.convolution)
        lengths = None if padding.is_token is None else padding.lengths
        return causal_conv(
            x, history, conv.weight[:, 0], conv.bias, lengths, is_silu=activation in ACTIVATIONS
        )

    def _conv_shape(self) -> tuple[int, int]:
        conv: Any = getattr(self, self.convolution)
        return conv.kernel_size[0] - 1, conv.in_channels


ACTIVATIONS = {"silu", "swish"}
"""transformers' names of silu, which follows a convolution. A layer with another is not served."""


def recurrence_of(attention: Any) -> Recurrence:
    """Where the forward's rows keep their states."""
    if attention is None:
        raise TypeError("the base was called without attention=; use Base.forward")
    recurrence: Recurrence = attention.recurrence
    return recurrence


class GatedDeltaNet(RecurrentMixer):
    """Source: gated delta networks, arXiv:2412.06464 (Qwen3.5, Qwen3-Next)."""

    activation: str
    num_k_heads: int
    num_v_heads: int
    head_k_dim: int
    head_v_dim: int
    key_dim: int
    value_dim: int
    A_log: Tensor
    dt_bias: Tensor
    norm: nn.Module
    conv1d: nn.Conv1d
    relies_on = (
        *RecurrentMixer.relies_on, "activation", "num_k_heads", "num_v_heads", "head_k_dim",
        "head_v_dim", "key_dim", "value_dim", "A_log", "dt_bias", "norm", "conv1d",
    )  # fmt: skip

    @property
    def state_shapes(self) -> StateShapes:
        return self._conv_shape(), (self.num_v_heads, self.head_k_dim, self.head_v_dim)

    def forward(self, hidden_states: Tensor, attention: Any = None, **_: object) -> Tensor:
        """hidden_states (1, T, H) → (1, T, H)."""
        recurrence = recurrence_of(attention)
        mixed, z, b, a = self._projected(hidden_states)
        decay = -self.A_log.float().exp() * F.softplus(a.float() + self.dt_bias.float())
        out = recurrence.run(self, (mixed, decay, b.sigmoid()))
        normed = self.norm(out.flatten(0, 1), z.reshape(-1, self.head_v_dim))
        return self.out_proj(normed.view(1, len(mixed), self.value_dim))

    def _projected(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q, k and v side by side (T, C), z (T, value_dim), b and a (T, v heads) of x (1, T, H)."""
        layers: Any = (self.in_proj_qkv, self.in_proj_z, self.in_proj_b, self.in_proj_a)
        mixed, z, b, a = (layer(x)[0] for layer in layers)
        return mixed, z, b, a

    def advance(
        self, states: States, inputs: tuple[Tensor, ...], padding: Padding
    ) -> tuple[Tensor, States]:
        """inputs: q, k, v (N, L, C) before the convolution; decay and β (N, L, v heads)."""
        history, state = states
        mixed, decay, beta = inputs
        mixed, history = self._conv(mixed, history, padding, self.activation)
        dtype, wide = mixed.dtype, state.dtype
        q, k, v = mixed.to(wide).split([self.key_dim, self.key_dim, self.value_dim], dim=-1)
        q, k = (_normed(x.unflatten(2, (self.num_k_heads, -1))) for x in (q, k))
        v = v.unflatten(2, (self.num_v_heads, -1))
        decay, beta = (_without_padding(x.to(wide), padding) for x in (decay, beta))
        out, state = advance(q * self.head_k_dim**-0.5, k, v, decay, beta, state)
        return out.to(dtype), (history, state)


class JoinedGatedDeltaNet(GatedDeltaNet):
    """The projections of each key head's q, k, v and z are one layer, those of b and a another."""

    def _projected(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        joined: Any = self
        parts = joined.fix_query_key_value_ordering(joined.in_proj_qkvz(x), joined.in_proj_ba(x))
        q, k, v, z, b, a = (part[0] for part in parts)
        return torch.cat([part.flatten(1) for part in (q, k, v)], dim=1), z.flatten(1), b, a


class Mamba2(RecurrentMixer):
    """Source: Mamba-2, arXiv:2405.21060 (Bamba, Granite 4, Nemotron-H)."""

    activation: str
    num_heads: int
    head_dim: int
    n_groups: int
    ssm_state_size: int
    intermediate_size: int
    conv_dim: int
    time_step_limit: tuple[float, float]
    A_log: Tensor
    D: Tensor
    dt_bias: Tensor
    norm: nn.Module
    in_proj: nn.Module
    conv1d: nn.Conv1d
    relies_on = (
        *RecurrentMixer.relies_on, "activation", "num_heads", "head_dim", "n_groups",
        "ssm_state_size", "intermediate_size", "conv_dim", "time_step_limit", "A_log", "D",
        "dt_bias", "norm", "in_proj", "conv1d",
    )  # fmt: skip

    @property
    def state_shapes(self) -> StateShapes:
        return self._conv_shape(), (self.num_heads, self.ssm_state_size, self.head_dim)

    def forward(self, hidden_states: Tensor, attention: Any = None, **_: object) -> Tensor:
        """hidden_states (1, T, H) → (1, T, H)."""
        recurrence = recurrence_of(attention)
        projected = self._projected(hidden_states)
        gate, mixed, steps = projected.split(
            [self.intermediate_size, self.conv_dim, self.num_heads], dim=-1
        )
        out = recurrence.run(self, (mixed[0], steps[0]))
        return self.out_proj(self._gated(out[None], gate).to(hidden_states.dtype))

    def _projected(self, x: Tensor) -> Tensor:
        return self.in_proj(x)

    def _gated(self, out: Tensor, gate: Tensor) -> Tensor:
        """out, gate (1, T, intermediate) → what the output projection is given."""
        return self.norm(out, gate)

    def advance(
        self, states: States, inputs: tuple[Tensor, ...], padding: Padding
    ) -> tuple[Tensor, States]:
        """inputs: x, B, C (N, L, conv_dim) before the convolution; Δ (N, L, heads) before its bias.

        Δ is clamped for every token. transformers clamps it in prompts only, so that a token's
        state would depend on how it came in; all published models leave it unclamped.
        """
        history, state = states
        mixed, steps = inputs
        mixed, history = self._conv(mixed, history, padding, self.activation)
        wide = state.dtype
        width = self.n_groups * self.ssm_state_size
        x, b, c = mixed.to(wide).split([self.intermediate_size, width, width], dim=-1)
        x = x.unflatten(2, (self.num_heads, -1))
        b, c = (part.unflatten(2, (self.n_groups, -1)) for part in (b, c))
        steps = F.softplus(steps.to(wide) + self.dt_bias.to(wide)).clamp(*self.time_step_limit)
        steps = _without_padding(steps, padding)
        decay = steps * -self.A_log.to(wide).exp()
        out, state = advance(c, b, steps[..., None] * x, decay, None, state)
        out = out + self.D.to(wide)[:, None] * x
        return out.flatten(2), (history, state)


class ScaledMamba2(Mamba2):
    """Falcon-H1's: its inputs are scaled, and the norm before the output projection is optional."""

    ssm_in_multiplier: float
    mamba_rms_norm: bool
    mup_vector: Tensor
    relies_on = (*Mamba2.relies_on, "ssm_in_multiplier", "mamba_rms_norm", "mup_vector")

    def _projected(self, x: Tensor) -> Tensor:
        return self.in_proj(x * self.ssm_in_multiplier) * self.mup_vector

    def _gated(self, out: Tensor, gate: Tensor) -> Tensor:
        return self.norm(out, gate) if self.mamba_rms_norm else out * F.silu(gate.to(out.dtype))


class ShortConvolution(RecurrentMixer):
    """LFM2's: a gated convolution over a few tokens, whose inputs are all the state there is."""

    in_proj: nn.Module
    conv: nn.Conv1d
    relies_on = (*RecurrentMixer.relies_on, "in_proj", "conv")
    convolution = "conv"

    @property
    def state_shapes(self) -> StateShapes:
        return (self._conv_shape(),)

    def forward(self, hidden_states: Tensor, attention: Any = None, **_: object) -> Tensor:
        """hidden_states (1, T, H) → (1, T, H)."""
        recurrence = recurrence_of(attention)
        b, c, x = self.in_proj(hidden_states)[0].chunk(3, dim=-1)
        return self.out_proj((c * recurrence.run(self, (b * x,)))[None])

    def advance(
        self, states: States, inputs: tuple[Tensor, ...], padding: Padding
    ) -> tuple[Tensor, States]:
        """inputs: (N, L, H)."""
        out, history = self._conv(inputs[0], states[0], padding)
        return out, (history,)


def _normed(x: Tensor) -> Tensor:
    """Of unit length along the last dimension; transformers' epsilon."""
    return x * torch.rsqrt((x * x).sum(-1, keepdim=True) + 1e-6)


def _without_padding(x: Tensor, padding: Padding) -> Tensor:
    """x (N, L, H) with 0 in the place of padding."""
    if padding.is_token is None:
        return x
    return torch.where(padding.is_token[..., None], x, 0)

"""Linear recurrences with decay over padded rows: in chunks, and held states in one step.

Of every head, with state S (K, V) before a token that brings q, k (K,), v (V,) and decay g ≤ 0:

    S ← exp(g) · S
    v ← β · (v − Sᵀk)                 the delta rule, where β is given
    S ← S + k vᵀ
    out = Sᵀq

Mamba-2 is this with q = C, k = B, v = Δ · x and g = Δ · A; a gated delta net has β too.
Sources: Mamba-2, arXiv:2405.21060; gated delta networks, arXiv:2412.06464, whose chunked form with
one triangular system a chunk is used here, as in transformers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_runtime.kernels import conv_step, recurrent_step

CHUNK = 64
"""Tokens of a chunk: within it products of matrices, from one to the next the state."""


@dataclass(frozen=True, slots=True)
class HeldState:
    """The states of N rows where they are kept: slots (N,) int64 of memory (slots, …), negative for
    no row. copies (N,) int64: a further slot for each new state, negative for none; None: for all.
    """

    memory: Tensor
    slots: Tensor
    copies: Tensor | None = None

    @property
    def dtype(self) -> torch.dtype:
        return self.memory.dtype


def advance(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor | None,
    state: Tensor | HeldState,
) -> tuple[Tensor, Tensor | HeldState]:
    """q, k (N, L, G, K), v (N, L, H, V), g and beta (N, L, H), state (N, H, K, V), all of one
    floating dtype, float32 or better → outputs (N, L, H, V) and the state behind the last token.
    H is a multiple of G: as many heads in a row share q and k.

    A token with v = g = 0, and β = 0 where there is one, leaves the state as it is. Differentiable.
    The states of single tokens, L = 1, may be HeldState: they change where they are kept.
    """
    if isinstance(state, HeldState):
        q, k, v, keep = (part[:, 0] for part in (q, k, v, g.exp()))
        beta = None if beta is None else beta[:, 0]
        out = recurrent_step(state.memory, state.slots, q, k, v, keep, beta, state.copies)
        return out[:, None], state
    repeats = v.shape[2] // q.shape[2]
    q, k = (part.repeat_interleave(repeats, dim=2) for part in (q, k))
    return _chunks(q, k, v, g, beta, state)


def _chunks(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor | None, state: Tensor
) -> tuple[Tensor, Tensor]:
    num_tokens = q.shape[1]
    size = min(CHUNK, num_tokens)
    q, k, v, g = (_in_chunks(x, size) for x in (q, k, v, g))
    until = g.cumsum(-1)  # (N, H, chunks, size): the decay from the chunk's begin on, its logarithm
    later = torch.ones(size, size, dtype=torch.bool, device=q.device).triu(1)
    between = (until[..., :, None] - until[..., None, :]).masked_fill(later, -torch.inf).exp()
    scores = q @ k.transpose(-1, -2) * between
    erased = None
    if beta is not None:
        beta = _in_chunks(beta, size)[..., None]
        # Every token takes back what those before it in the chunk have written under its key.
        system = (beta * k) @ k.transpose(-1, -2) * between
        given = torch.cat([beta * v, beta * k * until.exp()[..., None]], dim=-1)
        solved = torch.linalg.solve_triangular(system, given, upper=False, unitriangular=True)
        v, erased = solved.split([v.shape[-1], k.shape[-1]], dim=-1)
    q = q * until.exp()[..., None]
    k = k * (until[..., -1:] - until).exp()[..., None]
    whole = until[..., -1].exp()[..., None, None]
    outs = []
    for chunk in range(q.shape[2]):
        own = v[:, :, chunk]
        if erased is not None:
            own = own - erased[:, :, chunk] @ state
        outs.append(q[:, :, chunk] @ state + scores[:, :, chunk] @ own)
        state = state * whole[:, :, chunk] + k[:, :, chunk].transpose(-1, -2) @ own
    out = torch.stack(outs, dim=2).flatten(2, 3)[:, :, :num_tokens]
    return out.transpose(1, 2), state


def _in_chunks(x: Tensor, size: int) -> Tensor:
    """(N, L, H, …) → (N, H, chunks, size, …), the last chunk filled up with zeros."""
    x = x.transpose(1, 2)
    missing = -x.shape[2] % size
    if missing:
        x = F.pad(x, (*(0, 0) * (x.ndim - 3), 0, missing))
    return x.unflatten(2, (-1, size))


def causal_conv(
    x: Tensor,
    history: Tensor | HeldState,
    weight: Tensor,
    bias: Tensor | None,
    lengths: Tensor | None,
    *,
    is_silu: bool = False,
) -> tuple[Tensor, Tensor | HeldState]:
    """A convolution of each channel over the tokens up to its own: y_t = Σ_k w_k x_{t+k+1−K} + b,
    then silu if `is_silu`, rounded once to x's dtype from that of `history`.

    x (N, L, C); history (N, K − 1, C): the inputs before; weight (C, K); lengths (N,): how many of
    a row's L tokens are none of padding, None for all → (N, L, C) and the last K − 1 inputs. Those
    of single tokens, L = 1, may be a HeldState: they change where they are kept.
    """
    if isinstance(history, HeldState):
        memory, slots, copies = history.memory, history.slots, history.copies
        y = conv_step(memory, slots, x[:, 0], weight, bias, is_silu=is_silu, copies=copies)
        return y[:, None], history
    num_tokens, num_before = x.shape[1], history.shape[1]
    inputs = torch.cat([history, x.to(history.dtype)], dim=1)
    weight = weight.to(history.dtype)
    y = inputs[:, :num_tokens] * weight[:, 0]
    for tap in range(1, num_before + 1):
        y = y + inputs[:, tap : tap + num_tokens] * weight[:, tap]
    if bias is not None:
        y = y + bias.to(history.dtype)
    if is_silu:
        y = F.silu(y)
    y = y.to(x.dtype)
    if lengths is None:
        return y, inputs[:, num_tokens:]
    last = lengths[:, None] + torch.arange(num_before, device=x.device)
    return y, inputs.gather(1, last[..., None].expand(-1, -1, x.shape[2]))

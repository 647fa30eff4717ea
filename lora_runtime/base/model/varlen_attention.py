"""Attention over whole rows, without a cache: for training and for checks. Differentiable.

Rows that begin with the same tokens may share them: these are computed once, and every row's own
tokens see them. A row's result and gradient are those it would have alone, but for rounding: one
row that is long for the CPU's op of short rows takes all rows of its batch to the other one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_runtime.base.model.recurrence import Piece, Recurrence
from lora_runtime.kernels import attend_rows, can_attend_rows

PADDED_TO = 32
"""Segments whose lengths round up to the same multiple of it are padded to the longest of them."""

SHORT = 256
"""Keys up to which torch's attention with its gradient on a CPU was measured to be slower than
`attend_rows`, and in bfloat16 than plain products.
"""


@dataclass(frozen=True, slots=True)
class RowLengths:
    """The layout of consecutive rows that begin with the same `prefix` tokens, 0 for none.

    First come the shared tokens, once, then the other tokens of each row: `lengths`, each at
    least 1.
    """

    lengths: Sequence[int]
    prefix: int = 0

    @property
    def num_tokens(self) -> int:
        """Tokens of all rows; those that the rows share count once."""
        return self.prefix + sum(self.lengths)


class VarlenAttention:
    """`Attention` over rows laid end to end: by FlashAttention where it can run, for the gradient
    of short rows on a CPU by one op of the library, else by rows of similar length padded to one.
    """

    def __init__(self, rows: Sequence[RowLengths], device: torch.device | str = "cpu") -> None:
        # Which of the two runs depends on the queries' device, dtype and head size: index tables
        # are built with the first layer's queries, and all layers share them.
        self._segments = list(_segments(rows))
        self._device = device

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        layer: int,
        scale: float,
        window: int | None,
        softcap: float | None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """See `Attention`."""
        if sinks is None and can_use_flash(q, softcap):
            return self._end_to_end.attend(q, k, v, scale, window)
        is_whole = sinks is None and softcap is None and (window is None or window >= self._longest)
        if is_whole and self._longest <= SHORT and can_attend_rows(q, k, v):
            return attend_rows(q, k, v, self._table, scale)
        return self._padded.attend(q, k, v, scale, window, softcap, sinks)

    @cached_property
    def recurrence(self) -> Recurrence:
        """The same rows for recurrent layers: those that share a prefix go on from its state."""
        segments = self._segments
        first = {own.start: index for index, own in enumerate(segments) if not own.prefix}
        pieces = [
            Piece(own.start, own.length, first[own.prefix_start] if own.prefix else None)
            for own in segments
        ]
        return Recurrence(pieces, self._device)

    @cached_property
    def _longest(self) -> int:
        """Most keys of a segment."""
        return max(own.prefix + own.length for own in self._segments)

    @cached_property
    def _table(self) -> Tensor:
        """(N, 4) int32: the segments."""
        return torch.tensor(self._segments, dtype=torch.int32)

    @cached_property
    def _end_to_end(self) -> _EndToEnd:
        return _EndToEnd.of(self._segments, self._device)

    @cached_property
    def _padded(self) -> _Padded:
        return _Padded(self._segments, self._device)


def can_use_flash(q: Tensor, softcap: float | None) -> bool:
    """True when the FlashAttention 2 that torch contains can take queries (T, H, D).

    torch's build has no softcap.
    """
    return (
        q.is_cuda
        and q.dtype in (torch.bfloat16, torch.float16)
        and q.shape[-1] % 8 == 0
        and q.shape[-1] <= 256
        and softcap is None
        and torch.cuda.get_device_capability(q.device) >= (8, 0)
    )


class _Segment(NamedTuple):
    """One row's own `length` tokens from `start` on. They also see the `prefix` tokens that begin
    at `prefix_start`, which other rows share.
    """

    prefix_start: int
    prefix: int
    start: int
    length: int


def _segments(rows: Sequence[RowLengths]) -> Iterator[_Segment]:
    """The shared tokens of rows are a segment of their own, which sees no prefix."""
    end = 0
    for group in rows:
        shared, end = end, end + group.prefix
        if group.prefix:
            yield _Segment(shared, 0, shared, group.prefix)
        for length in group.lengths:
            yield _Segment(shared, group.prefix, end, length)
            end += length


@dataclass(frozen=True, slots=True)
class _EndToEnd:
    """Segments as FlashAttention takes them: without padding.

    query_ends, key_ends (N + 1,) int32: 0, and where the queries and keys of each segment end.
    keys: the token of every key, if segments share some; None if keys are all tokens in order.
    """

    query_ends: Tensor
    key_ends: Tensor
    longest: tuple[int, int]
    """Most queries and most keys of a segment."""
    keys: Tensor | None

    @classmethod
    def of(cls, segments: Sequence[_Segment], device: torch.device | str) -> _EndToEnd:
        """`segments` follow one another and cover all tokens, so queries need no gather."""
        queries = [segment.length for segment in segments]
        counts = [segment.prefix + segment.length for segment in segments]
        query_ends, key_ends = (
            torch.tensor([0, *accumulate(each)], dtype=torch.int32).to(device)
            for each in (queries, counts)
        )
        keys = None
        if queries != counts:
            keys = torch.cat([_indices([own], own.prefix)[0][0] for own in segments]).to(device)
        return cls(query_ends, key_ends, (max(queries), max(counts)), keys)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None) -> Tensor:
        """(T, H, D) of all tokens. A segment's queries are the last of its keys; a query sees
        `window` keys, its own among them.

        Source: torch's `varlen_attn`. Its operator is called because the function takes fewer key
        heads than query heads only from torch 2.12 on.
        """
        if self.keys is not None:
            k, v = k.index_select(0, self.keys), v.index_select(0, self.keys)
        out: Tensor = torch.ops.aten._flash_attention_forward(
            q, k, v, self.query_ends, self.key_ends, *self.longest,
            0.0, window is None, False,  # no dropout, causal without a window, no probabilities
            scale=scale,
            window_size_left=-1 if window is None else window - 1,
            window_size_right=0,
        )[0]  # fmt: skip
        return out


class _Padded:
    """Segments of similar length share a padded call.

    A segment is padded with its own last token, so no token of another row is ever read for it.
    """

    def __init__(self, segments: Sequence[_Segment], device: torch.device | str) -> None:
        self._order = torch.empty(sum(own.length for own in segments), dtype=torch.int64)
        self._groups, end = [], 0
        for members in _alike(segments):
            own, is_own = _indices(members, 0)
            places = end + torch.arange(own.numel()).view_as(own)
            self._order[own[is_own]] = places[is_own]
            end += own.numel()
            keys, _ = _indices(members, members[0].prefix)
            distance = _distance(own.shape[1], keys.shape[1])
            self._groups.append(_Group(*(part.to(device) for part in (own, keys, distance))))
        self._order = self._order.to(device)

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float,
        window: int | None,
        softcap: float | None,
        sinks: Tensor | None,
    ) -> Tensor:
        """(T, H, D) of all tokens."""
        outs = [group.attend(q, k, v, scale, window, softcap, sinks) for group in self._groups]
        return torch.cat(outs).index_select(0, self._order)


def _alike(segments: Sequence[_Segment]) -> list[list[_Segment]]:
    """Segments with equal prefixes and equal lengths, rounded up to PADDED_TO."""
    found: dict[tuple[int, int], list[_Segment]] = {}
    for segment in segments:
        key = segment.prefix, -(-segment.length // PADDED_TO)
        found.setdefault(key, []).append(segment)
    return list(found.values())


def _indices(members: Sequence[_Segment], prefix: int) -> tuple[Tensor, Tensor]:
    """(N, prefix + longest): `prefix` shared tokens, then each segment's own, of which the last is
    repeated as padding; and (N, longest): which of the own ones are no padding.
    """
    starts = torch.tensor([segment.start for segment in members])[:, None]
    lengths = torch.tensor([segment.length for segment in members])[:, None]
    place = torch.arange(int(lengths.max()))
    shared = torch.tensor([segment.prefix_start for segment in members])[:, None]
    own = starts + torch.minimum(place, lengths - 1)
    return torch.cat([shared + torch.arange(prefix), own], dim=1), place < lengths


@dataclass(frozen=True, slots=True)
class _Group:
    """N segments with prefixes of one length, padded. queries (N, Q) and keys (N, K): tokens;
    distance (Q, K): how far each key lies before each query.
    """

    queries: Tensor
    keys: Tensor
    distance: Tensor

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float,
        window: int | None,
        softcap: float | None,
        sinks: Tensor | None,
    ) -> Tensor:
        """(N · Q, H, D) of all queries, padding included."""
        q = _gathered(q, self.queries)
        k, v = _gathered(k, self.keys), _gathered(v, self.keys)
        longest = k.shape[2]
        is_whole = softcap is None and sinks is None and (window is None or window >= longest)
        if is_whole and not _is_slow_backward(q, longest):
            is_square = q.shape[2] == longest
            mask = None if is_square else self.distance >= 0
            out = F.scaled_dot_product_attention(
                q, k, v, mask, is_causal=is_square, scale=scale,
                enable_gqa=q.shape[1] != k.shape[1],
            )  # fmt: skip
        else:
            out = _masked_attention(q, k, v, self.distance, scale, window, softcap, sinks)
        return out.transpose(1, 2).flatten(0, 1)


def _is_slow_backward(q: Tensor, longest: int) -> bool:
    """True where torch's own attention is slower with its gradient than one of plain products: for
    short rows in bfloat16 on a CPU (torch 2.13: 64 tokens 4.5 ms, by products 1.6).
    """
    is_half_on_cpu = q.is_cpu and q.dtype == torch.bfloat16
    return is_half_on_cpu and longest <= SHORT and torch.is_grad_enabled() and q.requires_grad


def _gathered(x: Tensor, tokens: Tensor) -> Tensor:
    """(T, H, D), tokens (N, L) → (N, H, L, D)."""
    return x.index_select(0, tokens.flatten()).unflatten(0, tokens.shape).transpose(1, 2)


def _distance(num_queries: int, num_keys: int) -> Tensor:
    """How far each key lies before each query (Q, K); both end at the same token."""
    place = torch.arange(num_keys)
    return place[num_keys - num_queries :, None] - place


def _masked_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    distance: Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None = None,
) -> Tensor:
    heads, groups = q.shape[:3], k.shape[:2]
    # Heads that share keys are rows of one product, so that neither keys nor values are repeated.
    scores = (q.reshape(*groups, -1, q.shape[3]) @ k.transpose(2, 3)).view(*heads, -1) * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    is_hidden = (distance < 0) if window is None else (distance < 0) | (distance >= window)
    scores = scores.masked_fill(is_hidden, float("-inf"))
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if sinks is None:
        weights = torch.softmax(scores, dim=-1)
    else:
        own = sinks.to(scores.dtype)[:, None, None].expand(*heads, 1)
        weights = torch.softmax(torch.cat([scores, own], dim=-1), dim=-1)[..., :-1]
    weights = weights.to(v.dtype).reshape(*groups, -1, weights.shape[3])
    return (weights @ v).view(*heads, -1)

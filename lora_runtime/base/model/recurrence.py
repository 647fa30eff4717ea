"""Recurrent layers over rows laid end to end: where every row's state comes from and goes to.

A recurrent layer reads a state, goes through a row's tokens in order and leaves a state. What it
does with them is its *rule* (`recurrent_mixers.py`); this file knows rows only. The forward's
tokens are cut into pieces, each of one row: serving begins with the state that a slot of the pool
holds and stores states there, training begins with none and stores none. Pieces of similar length
run together, padded; one row's numbers never enter another's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from lora_runtime.base.model.linear_recurrence import HeldState
from lora_runtime.kernels import huge_pages, to_device

PADDED_TO = 64
"""Pieces whose lengths round up to the same multiple of it share a call: the length of the chunks
in which the rules compute, so that padding costs them nothing."""

States = tuple[Any, ...]
"""What a layer carries from token to token: tensors (N, *shape) in float32 or better; of single
tokens a HeldState each, where these change their rows' own slots."""
StateShapes = tuple[tuple[int, ...], ...]
"""The shapes of one row's States."""


@dataclass(frozen=True, slots=True)
class Piece:
    """`length` tokens of one row, from the forward's token `start` on.

    It begins with the state that piece `after` (its index) ends with, or with the one in slot
    `loads`, or else with zeros: the row begins here. Its last state goes to the slots `stores`.
    """

    start: int
    length: int
    after: int | None = None
    loads: int | None = None
    stores: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Padding:
    """Which tokens of N padded pieces (N, L) count. lengths (N,) int64; is_token (N, L) bool, None
    where all are of one length. A piece is padded with its own last token.
    """

    lengths: Tensor
    is_token: Tensor | None


class Rule(Protocol):
    """What one recurrent layer does with its rows."""

    layer_idx: int

    @property
    def state_shapes(self) -> StateShapes: ...

    def advance(
        self, states: States, inputs: tuple[Tensor, ...], padding: Padding
    ) -> tuple[Tensor, States]:
        """states before N pieces and their inputs (N, L, …) → outputs (N, L, …) and the states
        behind each piece's last token, which padding must not change. Rows stay apart.
        """
        ...


class StatePool:
    """Slots for the states of rows: of every recurrent layer, tensors (num_slots, *shape).

    Memory of a slot that was never written is not touched.
    """

    def __init__(self, layers: Mapping[int, States], num_slots: int) -> None:
        self.layers, self.num_slots = layers, num_slots

    @classmethod
    def allocate(cls, shapes: Mapping[int, StateShapes], num_slots: int, like: Tensor) -> StatePool:
        """Room for states of `like`'s dtype, on its device; `shapes` by layer."""

        def empty(shape: tuple[int, ...]) -> Tensor:
            whole = (num_slots, *shape)
            memory = huge_pages.zeros(math.prod(whole) * like.dtype.itemsize, like.device)
            return memory.view(like.dtype).view(whole)

        layers = {layer: tuple(map(empty, own)) for layer, own in shapes.items()}
        return cls(layers, num_slots)


@dataclass(frozen=True, slots=True)
class _Group:
    """N pieces that run together. tokens (N, L) int64; is_all: they are the forward's, in order.

    Of the int64 pairs, the first says which of the N it is about: `loads` names slots, `follows`
    earlier pieces in the order in which they ran, `stores` slots, where a piece may stand several
    times. In their place single tokens may have `held`: the slot (N,) int64 that each both loads
    from and stores to, and a further one that it stores to, −1 for none; None for all.
    """

    tokens: Tensor
    is_all: bool
    padding: Padding
    loads: tuple[Tensor, Tensor] | None = None
    follows: tuple[Tensor, Tensor] | None = None
    stores: tuple[Tensor, Tensor] | None = None
    held: tuple[Tensor, Tensor | None] | None = None


class Recurrence:
    """Runs recurrent layers over the pieces of one forward, which together are all its tokens."""

    def __init__(
        self, pieces: Sequence[Piece], device: torch.device | str, pool: StatePool | None = None
    ) -> None:
        self._pool = pool
        self._groups: list[_Group] = []
        order = torch.empty(sum(piece.length for piece in pieces), dtype=torch.int64)
        ran: dict[int, int] = {}
        end = 0
        for members in _groups(pieces):
            tokens, is_token = _padded([pieces[index] for index in members])
            places = end + torch.arange(tokens.numel()).view_as(tokens)
            order[tokens[is_token]] = places[is_token]
            end += tokens.numel()
            group = _group(pieces, members, ran, tokens, is_token, device)
            self._groups.append(group)
            if group.held is None:  # else all are their rows' last pieces, which none follows
                ran |= {index: len(ran) + place for place, index in enumerate(members)}
        self._order = to_device(order, device)

    @classmethod
    def of_held(cls, slots: Tensor, copies: Tensor, pool: StatePool) -> Recurrence:
        """One token of each of N rows, in order. slots, copies (N,) int64, of the device, are read
        by every run: as in `HeldState`.
        """
        found = cls((), "cpu", pool)
        tokens = torch.arange(len(slots), device=slots.device)[:, None]
        padding = Padding(lengths=torch.ones_like(slots), is_token=None)
        found._groups.append(_Group(tokens, is_all=True, padding=padding, held=(slots, copies)))
        return found

    def run(self, rule: Rule, inputs: Sequence[Tensor]) -> Tensor:
        """What `rule` gives of every token, (T, …), from its inputs, each (T, …)."""
        outs: list[Tensor] = []
        ended: list[States] = []
        for group in self._groups:
            given = tuple(_gathered(each, group) for each in inputs)
            before = self._before(rule, group, ended, inputs[0])
            out, after = rule.advance(before, given, group.padding)
            self._store(rule, group, after)
            outs.append(out.flatten(0, 1))
            if group.held is None:
                ended.append(after)
        if self._groups[0].is_all:
            return outs[0]
        return (outs[0] if len(outs) == 1 else torch.cat(outs)).index_select(0, self._order)

    def _before(self, rule: Rule, group: _Group, ended: list[States], like: Tensor) -> States:
        """The states before a group's pieces: zeros where a row begins."""
        if group.held is not None:
            return tuple(HeldState(memory, *group.held) for memory in self._memory(rule))
        num_pieces = len(group.tokens)
        dtype = torch.promote_types(like.dtype, torch.float32)
        found: list[Any] = []
        for index, shape in enumerate(rule.state_shapes):
            if group.loads is not None and len(group.loads[0]) == num_pieces:
                found.append(self._memory(rule)[index].index_select(0, group.loads[1]))
                continue
            state = torch.zeros(num_pieces, *shape, dtype=dtype, device=like.device)
            if group.loads is not None:
                places, slots = group.loads
                held = self._memory(rule)[index].index_select(0, slots)
                state = state.index_copy(0, places, held)
            if group.follows is not None:
                places, pieces = group.follows
                earlier = torch.cat([states[index] for states in ended])
                state = state.index_copy(0, places, earlier.index_select(0, pieces))
            found.append(state)
        return tuple(found)

    def _store(self, rule: Rule, group: _Group, after: States) -> None:
        if group.stores is None:
            return
        places, slots = group.stores
        for memory, state in zip(self._memory(rule), after, strict=True):
            memory.index_copy_(0, slots, state.index_select(0, places).to(memory.dtype))

    def _memory(self, rule: Rule) -> States:
        if self._pool is None:
            raise TypeError("pieces that load or store states need a pool of them")
        return self._pool.layers[rule.layer_idx]


def _groups(pieces: Sequence[Piece]) -> list[list[int]]:
    """Indices of pieces that can run together, those that others follow before them."""
    waves: list[int] = []
    found: dict[tuple[int, int], list[int]] = {}
    for index, piece in enumerate(pieces):
        waves.append(0 if piece.after is None else waves[piece.after] + 1)
        # Single tokens run apart, as for them a rule has a shorter form; apart from each other too,
        # so that a row that begins does not take it from all.
        rounded = -(-piece.length // PADDED_TO) if piece.length > 1 else -int(_stays(piece))
        found.setdefault((waves[index], rounded), []).append(index)
    return [found[key] for key in sorted(found)]


def _padded(pieces: Sequence[Piece]) -> tuple[Tensor, Tensor]:
    """(N, L) tokens, each piece's last repeated as padding; (N, L): which of them are none."""
    starts = torch.tensor([piece.start for piece in pieces])[:, None]
    lengths = torch.tensor([piece.length for piece in pieces])[:, None]
    place = torch.arange(int(lengths.max()))
    return starts + torch.minimum(place, lengths - 1), place < lengths


def _group(
    pieces: Sequence[Piece],
    members: Sequence[int],
    ran: Mapping[int, int],
    tokens: Tensor,
    is_token: Tensor,
    device: torch.device | str,
) -> _Group:
    """The pieces `members`; `ran`: the pieces before them → their number in the order of running"""

    def pair(entries: list[tuple[int, int]]) -> tuple[Tensor, Tensor] | None:
        if not entries:
            return None
        first, second = to_device(torch.tensor(entries).T.contiguous(), device)
        return first, second

    own = [pieces[index] for index in members]
    lengths = torch.tensor([piece.length for piece in own])
    padding = Padding(
        to_device(lengths, device), None if bool(is_token.all()) else to_device(is_token, device)
    )
    group = partial(
        _Group,
        tokens=to_device(tokens, device),
        is_all=tokens.flatten().equal(torch.arange(sum(piece.length for piece in pieces))),
        padding=padding,
    )
    if tokens.shape[1] == 1 and all(map(_stays, own)):
        further = [[slot for slot in p.stores if slot != p.loads] for p in own]
        copies = torch.tensor([slots[0] if slots else -1 for slots in further])
        slots = to_device(torch.tensor([piece.loads for piece in own]), device)
        return group(held=(slots, to_device(copies, device) if any(further) else None))
    return group(
        loads=pair([(n, piece.loads) for n, piece in enumerate(own) if piece.loads is not None]),
        follows=pair([(n, ran[p.after]) for n, p in enumerate(own) if p.after is not None]),
        stores=pair([(n, slot) for n, piece in enumerate(own) for slot in piece.stores]),
    )


def _stays(piece: Piece) -> bool:
    """True for a piece whose state stays in a slot, and goes to one more at most."""
    return piece.loads in piece.stores and len(piece.stores) <= 2


def _gathered(x: Tensor, group: _Group) -> Tensor:
    """(T, …) → (N, L, …). Select, never multiply: rows stay apart."""
    tokens = group.tokens
    own = x if group.is_all else x.index_select(0, tokens.flatten())
    return own.unflatten(0, tokens.shape)

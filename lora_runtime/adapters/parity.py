"""The parity gate: an adapter must do here what it did where it was made.

A sidecar beside the adapter holds logits of the base and of the adapter on fixed public token ids.
The gate is on the effect Δz = adapter − base over all recorded numbers:

    error = ‖Δz here − Δz recorded‖ / max(‖Δz recorded‖, floor · ‖z recorded‖)

z are the adapter's numbers. The floor lets an adapter of little or no effect pass in spite of
rounding. Knows a function that gives logits; knows no engine and no file (`parity_file.py`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor

from lora_runtime.errors import ParityFailed

SIDECAR_FILE = "loramux_parity.json"
NUM_ROWS = 2
ROW_LENGTH = 24
NUM_POSITIONS = 4
"""Last positions of each row that are recorded."""
NUM_TOP = 64
MAX_DRAWS = 4096

Logits = Callable[[Sequence[Sequence[int]], bool], Sequence[Tensor]]
"""Rows of token ids, and True for the adapter or False for the base → (len(row), vocab) each."""


class Tolerance(NamedTuple):
    """The largest `error` that passes, and the floor of its denominator."""

    limit: float
    floor: float


TOLERANCES: Mapping[str, Tolerance] = {
    "float64": Tolerance(limit=0.01, floor=1e-3),
    "float32": Tolerance(limit=0.01, floor=1e-3),
    "bfloat16": Tolerance(limit=0.05, floor=0.3),
}
"""Compute dtype → tolerance; between two dtypes the coarser one's holds. In bfloat16 rounding alone
moves Δz by 0.9 % of z (measured: SmolLM2, 30 layers), so 1.5 % of z is always accepted.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Position:
    """What one token position gave: the logits of `token_ids` in order, then the logsumexp of all
    logits.
    """

    row: int
    position: int
    token_ids: tuple[int, ...]
    """The adapter's likeliest tokens, likeliest first."""
    base: tuple[float, ...]
    adapter: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Golden:
    """The sidecar: what base and adapter gave where the adapter was made."""

    base_fingerprint: str
    dtype: str
    """Compute dtype it was recorded in."""
    rows: tuple[tuple[int, ...], ...]
    positions: tuple[Position, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Parity:
    """Outcome of a comparison."""

    error: float
    """Relative error of the effect."""
    effect: float
    """Root mean square of the recorded Δz, in logits."""
    limit: float

    @property
    def passed(self) -> bool:
        return self.error <= self.limit


def public_rows(vocab_size: int, invocation: Sequence[int] = ()) -> tuple[tuple[int, ...], ...]:
    """Return token ids that depend on the vocabulary's size alone, never on data.

    With `invocation` each row holds it once, at the end but for the recorded positions.
    """
    tail = NUM_POSITIONS if invocation else 0
    head = max(ROW_LENGTH - len(invocation) - tail, 0)
    rows = []
    for row in range(NUM_ROWS):
        fresh = (token for token in _draw(vocab_size, row) if token not in invocation)
        drawn = list(islice(fresh, head + tail))
        rows.append((*drawn[:head], *invocation, *drawn[head:]))
    return tuple(rows)


def measure(
    logits: Logits,
    *,
    vocab_size: int,
    fingerprint: str,
    dtype: str,
    invocation: Sequence[int] = (),
) -> Golden:
    """Record what base and adapter give now. `invocation`: an aLoRA's tokens."""
    rows = public_rows(vocab_size, invocation)
    pairs = zip(logits(rows, False), logits(rows, True), strict=True)
    return Golden(
        base_fingerprint=fingerprint,
        dtype=dtype,
        rows=rows,
        positions=tuple(
            _position(row, position, base[position], adapter[position])
            for row, (base, adapter) in enumerate(pairs)
            for position in range(len(rows[row]) - NUM_POSITIONS, len(rows[row]))
        ),
    )


def check(golden: Golden, logits: Logits, tolerance: Tolerance) -> Parity:
    """Compare the adapter's effect here with the recorded one. Non-finite logits never pass."""
    here = [logits(golden.rows, with_adapter) for with_adapter in (False, True)]
    base, adapter = (_recorded(golden, rows) for rows in here)
    expected = _flat(p.adapter for p in golden.positions)
    effect = expected - _flat(p.base for p in golden.positions)
    scale = max(float(effect.norm()), tolerance.floor * float(expected.norm()))
    return Parity(
        error=float((adapter - base - effect).norm()) / max(scale, torch.finfo(torch.float64).tiny),
        effect=float(effect.norm()) / len(effect) ** 0.5,
        limit=tolerance.limit,
    )


def gate(golden: Golden | None, logits: Logits, dtype: str) -> Parity | None:
    """Check an adapter that is about to be served in `dtype`; None without a record.

    Raises: ParityFailed where the error is above the limit.
    """
    if golden is None:
        return None
    parity = check(golden, logits, max(TOLERANCES[golden.dtype], TOLERANCES[dtype]))
    if not parity.passed:
        raise ParityFailed(
            f"the adapter does not do here what {SIDECAR_FILE} recorded: relative error "
            f"{parity.error:.2g} of its effect ({parity.effect:.3g} logits), at most "
            f"{parity.limit:g} is accepted. Its weights were changed after the record, or this "
            f"machine computes wrongly; remove {SIDECAR_FILE} only if you changed them on purpose",
            field=SIDECAR_FILE,
        )
    return parity


def _draw(vocab_size: int, row: int) -> Iterator[int]:
    """Yield ids by SHA-256, so that no library's random generator can change them."""
    for index in range(MAX_DRAWS):
        digest = hashlib.sha256(f"loramux {vocab_size} {row} {index}".encode()).digest()
        yield int.from_bytes(digest[:8], "big") % vocab_size


def _position(row: int, position: int, base: Tensor, adapter: Tensor) -> Position:
    top = adapter.double().topk(min(NUM_TOP, len(adapter))).indices
    return Position(
        row=row,
        position=position,
        token_ids=tuple(top.tolist()),
        base=tuple(_numbers(base, top).tolist()),
        adapter=tuple(_numbers(adapter, top).tolist()),
    )


def _numbers(logits: Tensor, token_ids: Tensor) -> Tensor:
    """Logits (vocab,) → the chosen ones and the logsumexp, (n + 1,) float64 on the host."""
    exact = logits.double()
    return torch.cat([exact[token_ids], exact.logsumexp(0)[None]]).cpu()


def _recorded(golden: Golden, rows: Sequence[Tensor]) -> Tensor:
    """The numbers that `golden` holds, from other logits."""
    found = []
    for place in golden.positions:
        logits = rows[place.row][place.position]
        found.append(_numbers(logits, torch.tensor(place.token_ids, device=logits.device)))
    return torch.cat(found)


def _flat(numbers: Iterator[tuple[float, ...]]) -> Tensor:
    return torch.tensor([number for group in numbers for number in group], dtype=torch.float64)

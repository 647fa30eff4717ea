"""The parity gate: an adapter must do here what it did where it was made.

A parity record beside the adapter holds logits of the base and of the adapter on fixed public rows,
made in float32 whatever the dtype of training. The gate is on the effect Δz = adapter − base over
all recorded numbers, which the server makes in its own dtype with its own kernels:

    error = ‖Δz here − Δz recorded‖ / max(‖Δz recorded‖, FLOOR · ‖z recorded‖)  ≤  limit

z are the adapter's numbers; the floor lets an adapter of no effect pass. In float32 the limit is
LIMIT. In bfloat16 rounding alone may move the logits by more than a few updates of training did, by
how much depends on base, adapter and rows. So the record says how much it was there:

    noise = √(mean (base in bfloat16 − base in float32)² + mean (adapter …)²), in logits
    limit = max(LIMIT, NOISE_FACTOR · noise · √n / the error's denominator),  n recorded numbers

The base's own numbers must agree in the same way, relative to their own length. A checkpoint of
more digits than bfloat16 has is another function when it is loaded in bfloat16. So the record says
in which dtype its base was held, and where a server holds more, its gate rounds as the record did.
The squares are added because another machine may round base and adapter in unrelated ways. For the
same reason an equal error is expected of a server, and NOISE_FACTOR is what it may be off by: on a
CPU a server's error was 0.7 to 1.05 times the noise, over thirteen variants on SmolLM2-135M and
three on Gemma 3 270M. Where the noise is
larger than the effect, the numbers say little; what certainly says that weights were changed is
`tensors_sha256`, which needs no forward.

Knows a function that gives logits; knows no engine and no file (`files/parity_record.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate

import torch
from torch import Tensor

from lora_runtime.adapters.files.file_names import PARITY_FILE
from lora_runtime.errors import ParityFailed

ROW_LENGTH = 64
"""Tokens of a row at most."""
NUM_POSITIONS = 16
"""Last positions of each row that are recorded: few say too little about the noise."""
NUM_TOP = 64

LIMIT = 0.01
FLOOR = 1e-3
NOISE_FACTOR = 2.0
ROUGH_LIMIT = 0.5
ROUGH_FLOOR = 0.3
"""LIMIT and FLOOR for records of version 1 where they or the server are in bfloat16. Such a record
is itself rounded, on random tokens, by an unknown amount: honest adapters were off by up to 0.16
with this floor. What this still refuses are other weights with an effect of their own."""

ROUGH_BASE_LIMIT = 0.1
"""The same for the base's own logits, which by the fingerprint are the recorded ones."""

_UNSAID = (
    "The base's checkpoint has more digits than bfloat16, which dtype float32 keeps, and this "
    "older record does not say whether they were kept where it was made: if the adapter was "
    "trained in bfloat16, serve it with dtype bfloat16 or train it again. If not: "
)

PUBLIC_TEXTS = (
    "The river rises in the hills north of the town, runs past the old mill and under a stone "
    "bridge, and reaches the sea at a small harbour. In spring the water is high and brown. In "
    "summer children play on its banks, and in the evening people walk along the path with their "
    "dogs and talk about the weather.",
    "To make bread, mix flour, water, salt and a little yeast, and let the dough rest for an hour "
    "in a warm place. Fold it twice, shape it into a round loaf and let it rise again until it has "
    "doubled. Bake it in a hot oven for forty minutes. It is done when it sounds hollow.",
)
"""The texts of the rows: see `public_rows`."""

Row = Sequence[int]
Logits = Callable[[Sequence[Row], Sequence[int], bool], Tensor]
"""Rows of token ids, some of the tokens by their index in all rows laid end to end, and True for
the adapter or False for the base → the logits (chosen tokens, vocab) there, in that order."""


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
class ParityRecord:
    """Logits of base and adapter, computed where the adapter was made."""

    base_fingerprint: str
    rows: tuple[tuple[int, ...], ...]
    positions: tuple[Position, ...]
    dtype: str = "float32"
    """The dtype in which the logits were computed: float32, but for records of version 1."""
    noise: float | None = None
    """The error of bfloat16, in logits, as defined above; None in records of version 1."""
    tensors_sha256: str | None = None
    """SHA-256 of the safetensors file that it was written beside; None if it holds for any."""
    base_dtype: str | None = None
    """The dtype in which the base's tensors were held; None in records of versions 1 and 2."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Parity:
    """Outcome of a comparison."""

    error: float
    """Relative error of the effect."""
    base_error: float
    """Relative error of the base's own logits."""
    effect_rms: float
    """Root mean square of the recorded Δz, in logits."""
    limit: float
    base_limit: float

    @property
    def passed(self) -> bool:
        return self.error <= self.limit and self.base_error <= self.base_limit


def public_rows(
    encode: Callable[[str], Sequence[int]], vocab_size: int, max_model_len: int
) -> tuple[tuple[int, ...], ...]:
    """The rows of a record: PUBLIC_TEXTS by the base's own tokenizer, of ROW_LENGTH tokens at most.

    Plain prose because the model is sure of itself there: in bfloat16 its logits are off by 0.09 to
    0.13, on random tokens by 0.15 to 2. The texts are part of this program, so that a record holds
    nothing of anyone's data.
    """
    longest = min(ROW_LENGTH, max_model_len)
    rows = [[token for token in encode(text) if token < vocab_size] for text in PUBLIC_TEXTS]
    return tuple(tuple(row[:longest]) or (0,) for row in rows)


def measure(
    rows: Sequence[Row],
    exact: Logits,
    rounded: Logits,
    *,
    fingerprint: str,
    base_dtype: str | None = None,
) -> ParityRecord:
    """Record what base and adapter give in float32, by `exact`, and how far off bfloat16 is, by
    `rounded`. `fingerprint` is the base's, `base_dtype` that in which its tensors are held.
    """
    record = ParityRecord(
        base_fingerprint=fingerprint,
        base_dtype=base_dtype,
        rows=tuple(map(tuple, rows)),
        positions=tuple(_measured(rows, exact)),
        noise=0.0,
    )
    found = [_numbers_of(record, forward()) for forward in forwards(record, rounded)]
    errors = [one - other for one, other in zip(found, _recorded(record), strict=True)]
    noise = sum(float(error.square().mean()) for error in errors) ** 0.5
    return replace(record, noise=noise)


def forwards(record: ParityRecord, logits: Logits) -> list[Callable[[], Tensor]]:
    """The two forwards of a check, of the base and of the adapter, so that other work can come
    between. What they return, in this order, is what `compare` takes.
    """
    places = [(place.row, place.position) for place in record.positions]
    logits_at = _laid_end_to_end(record.rows, places)
    return [partial(logits, record.rows, logits_at, on) for on in (False, True)]


def compare(record: ParityRecord, logits: Sequence[Tensor], dtype: str) -> Parity:
    """Compare the adapter's effect in `dtype`, by the logits of both `forwards`, with the recorded
    one. Numbers that are not finite never pass.
    """
    base, adapter = _recorded(record)
    base_here, adapter_here = (_numbers_of(record, found) for found in logits)
    effect = adapter - base
    is_coarse = "bfloat16" in (record.dtype, dtype)
    # A record of version 1 does not say how much of it is rounding: it is judged by wide limits.
    is_rough = is_coarse and record.noise is None
    limit, floor = (ROUGH_LIMIT, ROUGH_FLOOR) if is_rough else (LIMIT, FLOOR)
    smallest = torch.finfo(torch.float64).tiny
    # The floor: an adapter that changes next to nothing is compared with the logits themselves.
    scale = max(float(effect.norm()), floor * float(adapter.norm()), smallest)
    base_scale = max(float(base.norm()), smallest)
    base_limit = ROUGH_BASE_LIMIT if is_rough else LIMIT
    if is_coarse and record.noise is not None:
        noise = NOISE_FACTOR * record.noise * len(effect) ** 0.5
        limit, base_limit = max(limit, noise / scale), max(base_limit, noise / base_scale)
    return Parity(
        error=float((adapter_here - base_here - effect).norm()) / scale,
        base_error=float((base_here - base).norm()) / base_scale,
        effect_rms=float(effect.norm()) / len(effect) ** 0.5,
        limit=limit,
        base_limit=base_limit,
    )


def require(
    parity: Parity,
    record: ParityRecord,
    tensors_sha256: str | None = None,
    *,
    exceeds_bfloat16: bool = False,
) -> None:
    """Raises: ParityFailed where the error is above the limit, or the adapter's safetensors file,
    if its SHA-256 is given, is not the recorded one. `exceeds_bfloat16` as in `BaseSpec`.
    """
    if not parity.passed:
        unsaid = _UNSAID if exceeds_bfloat16 and record.base_dtype is None else ""
        raise ParityFailed(
            f"the adapter does not do here what {PARITY_FILE} recorded: relative error "
            f"{parity.error:.2g} of its effect ({parity.effect_rms:.3g} logits), at most "
            f"{parity.limit:.2g} is accepted (of the base's own logits {parity.base_error:.2g}, at "
            f"most {parity.base_limit:.2g}). {unsaid}Its weights were changed after the record, or "
            f"this machine computes wrongly; remove {PARITY_FILE} only if you changed them on "
            "purpose",
            field=PARITY_FILE,
        )
    if tensors_sha256 is not None and record.tensors_sha256 not in (None, tensors_sha256):
        raise ParityFailed(
            f"the adapter's tensors were changed after {PARITY_FILE} was recorded: their file's "
            f"SHA-256 is {tensors_sha256[:12]}…, the recorded one {record.tensors_sha256[:12]}…; "
            f"remove {PARITY_FILE} only if you changed them on purpose",
            field=PARITY_FILE,
        )


def gate(
    record: ParityRecord | None,
    logits: Logits,
    dtype: str,
    tensors_sha256: str | None = None,
    *,
    exceeds_bfloat16: bool = False,
) -> Parity | None:
    """Check an adapter that is about to be served in `dtype`; None without a record.

    Raises: ParityFailed as `require` does.
    """
    if record is None:
        return None
    parity = compare(record, [forward() for forward in forwards(record, logits)], dtype)
    require(parity, record, tensors_sha256, exceeds_bfloat16=exceeds_bfloat16)
    return parity


def _measured(rows: Sequence[Row], exact: Logits) -> Iterator[Position]:
    """The last positions of every row."""
    places = [
        (index, position)
        for index, row in enumerate(rows)
        for position in range(max(0, len(row) - NUM_POSITIONS), len(row))
    ]
    logits_at = _laid_end_to_end(rows, places)
    found = (exact(rows, logits_at, with_adapter) for with_adapter in (False, True))
    for (index, position), base, adapter in zip(places, *found, strict=True):
        top = adapter.double().topk(min(NUM_TOP, len(adapter))).indices
        yield Position(
            row=index,
            position=position,
            token_ids=tuple(top.tolist()),
            base=tuple(_numbers(base, top).tolist()),
            adapter=tuple(_numbers(adapter, top).tolist()),
        )


def _numbers(logits: Tensor, token_ids: Tensor) -> Tensor:
    """Logits (vocab,) → the chosen ones and the logsumexp, (n + 1,) float64 on the host."""
    exact = logits.double()
    return torch.cat([exact[token_ids], exact.logsumexp(0)[None]]).cpu()


def _numbers_of(record: ParityRecord, logits: Tensor) -> Tensor:
    """The numbers that `record` holds of the base or of the adapter, from other logits."""
    ids = [torch.tensor(place.token_ids, device=logits.device) for place in record.positions]
    return torch.cat([_numbers(one, own) for one, own in zip(logits, ids, strict=True)])


def _laid_end_to_end(rows: Sequence[Row], places: Iterable[tuple[int, int]]) -> list[int]:
    """Index in all rows laid end to end of each row and position in it."""
    starts = list(accumulate(map(len, rows), initial=0))
    return [starts[row] + position for row, position in places]


def _recorded(record: ParityRecord) -> tuple[Tensor, Tensor]:
    """All numbers of the base and all of the adapter, in the record's order."""
    places = record.positions
    return _flat(place.base for place in places), _flat(place.adapter for place in places)


def _flat(numbers: Iterable[tuple[float, ...]]) -> Tensor:
    return torch.tensor([number for group in numbers for number in group], dtype=torch.float64)

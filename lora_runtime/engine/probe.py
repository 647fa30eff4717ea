"""Logits of base and adapter for the parity gate, outside the engine's pool and cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lora_runtime.adapters.packed_adapter import PackedAdapter, pack_for
from lora_runtime.adapters.parity import Logits
from lora_runtime.adapters.pool import AdapterPool
from lora_runtime.adapters.serving_form import ServingForm
from lora_runtime.base.loader import Base
from lora_runtime.base.model.attention import Attention
from lora_runtime.base.model.layer_order import LayerMap
from lora_runtime.base.model.layer_steps import layer_steps
from lora_runtime.base.model.recurrence import Recurrence
from lora_runtime.base.model.reordered_model import LayerSteps
from lora_runtime.base.model.varlen_attention import RowLengths, VarlenAttention
from lora_runtime.core import AdapterPlacement, activation_start
from lora_runtime.kernels import SlotUse, Span, StepMeta, spans_of_rows
from lora_runtime.kernels.cpu_library import num_threads, threads

TokenRows = Sequence[Sequence[int]]
Pause = Callable[[], None]
"""Called within a forward, before each layer and each part of the output layer: other forwards of
the base may run in it."""
MAX_KNOWN = 2
"""The public rows, of the base as it is served and as bfloat16 would hold it."""
HEAD_TOKENS = 16
"""Tokens of one call of the output layer, which takes about as long as two layers then."""


def no_pause() -> None:
    """Go on at once."""


class KnownRows:
    """The base's logits on the rows of the last records: nothing changes the base, and records are
    mostly of the same public rows. For the thread that runs the base.
    """

    def __init__(self) -> None:
        self._found: dict[object, Tensor] = {}

    def find(self, key: object, make: Callable[[], Tensor]) -> Tensor:
        """What `key` is known to give, made if it is not."""
        found = self._found.pop(key, None)
        self._found[key] = make() if found is None else found  # the last one used is the last
        if len(self._found) > MAX_KNOWN:
            del self._found[next(iter(self._found))]
        return self._found[key]


def adapter_logits(
    base: Base,
    adapter: PackedAdapter,
    known: KnownRows | None = None,
    pause: Pause = no_pause,
) -> Logits:
    """A function from token ids to logits for the parity gate, computed by the kernels that serve.

    The function must be called on the thread that runs the base. On a GPU the first call with the
    adapter copies it there. `known`: of this base, in whatever dtype it holds its values.
    """
    pool, known = cache(lambda: _pool_of(adapter, base)), known or KnownRows()
    if base.device.type == "cpu":
        pool()

    def logits(rows: TokenRows, logits_at: Sequence[int], with_adapter: bool) -> Tensor:
        if with_adapter:
            return _logits(base, _Bound(adapter, pool()), rows, logits_at, pause).cpu()
        # What a base in float32 holds of a checkpoint is another function once it is rounded.
        key = base.spec.exceeds_bfloat16, tuple(map(tuple, rows)), tuple(logits_at)
        return known.find(key, lambda: _logits(base, None, rows, logits_at, pause).cpu())

    return logits


def probe_logits(base: Base, form: ServingForm | None, rows: TokenRows) -> list[Tensor]:
    """Logits (len(row), vocab) at every token of each row, under the adapter or the base.

    Runs on the caller's thread, which must be the only one that runs the base.
    """
    adapter = None if form is None else pack_for(base, form)
    bound = None if adapter is None else _Bound(adapter, _pool_of(adapter, base))
    lengths = [len(row) for row in rows]
    return list(_logits(base, bound, rows, range(sum(lengths))).split(lengths))


class _Bound(NamedTuple):
    """An adapter, and a pool of its own that holds it."""

    adapter: PackedAdapter
    pool: AdapterPool


class _Pausing:
    """`Attention` that pauses before each layer's: a layer's q, k and v are there, and what was
    before them is done.
    """

    def __init__(self, inner: Attention, pause: Pause) -> None:
        self._inner, self._pause = inner, pause

    @property
    def recurrence(self) -> Recurrence:
        return self._inner.recurrence

    def attend(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        """See `Attention`."""
        self._pause()
        return self._inner.attend(q, k, v, **options)


def _logits(
    base: Base,
    bound: _Bound | None,
    rows: TokenRows,
    logits_at: Sequence[int],
    pause: Pause = no_pause,
) -> Tensor:
    """Logits (n, vocab) at the tokens `logits_at` of all rows laid end to end."""
    torchs, own = torch.get_num_threads(), num_threads()

    def pause_as_before() -> None:
        with base.context.set_aside(), threads(of_torch=torchs, of_library=own):
            pause()

    # torch's threads would look for more to do, and keep the cores, for longer than its small ops
    # here take.
    with threads(of_torch=1, of_library=own):
        return _pausing_logits(base, bound, rows, logits_at, pause_as_before)


@torch.inference_mode()
def _pausing_logits(
    base: Base, bound: _Bound | None, rows: TokenRows, logits_at: Sequence[int], pause: Pause
) -> Tensor:
    """See `_logits`."""
    spans = [] if bound is None else _spans(bound.adapter, rows)
    bindings = {} if bound is None else bound.pool.bindings
    with base.context.adapters(StepMeta.build(spans, base.device), bindings):
        states = _hidden_states(base, bound, rows, pause)
    parts = []
    for first in range(0, len(logits_at), HEAD_TOKENS):
        pause()
        some = list(logits_at[first : first + HEAD_TOKENS])
        head_meta = StepMeta.build(_spans_of_wanted(spans, some), base.device)
        with base.context.adapters(None, bindings, head_meta):
            parts.append(base.logits(states[some]))
    return torch.cat(parts)


def _hidden_states(base: Base, bound: _Bound | None, rows: TokenRows, pause: Pause) -> Tensor:
    """What the output layer is given of each token, (T, H)."""
    lengths = [len(row) for row in rows]
    attention = _Pausing(VarlenAttention([RowLengths(lengths)], base.device), pause)
    token_ids = torch.tensor([token for row in rows for token in row], device=base.device)
    positions = torch.cat([torch.arange(length) for length in lengths]).to(base.device)
    layer_map = None if bound is None else bound.adapter.facts.layer_map
    if bound is None or layer_map is None:
        return base.hidden_states(token_ids, positions, attention)
    steps = _layer_steps(layer_map, bound.adapter, rows, base, attention)
    return base.hidden_states(token_ids, positions, steps)


def _pool_of(adapter: PackedAdapter, base: Base) -> AdapterPool:
    like = torch.empty(0, dtype=adapter.dtype, device=base.device)
    pool = AdapterPool(base.spec.shapes, adapter.nbytes, 1, like)
    pool.load(AdapterPlacement(adapter.digest, slot=0, address=0), adapter)
    return pool


def _layer_steps(
    layer_map: LayerMap, adapter: PackedAdapter, rows: TokenRows, base: Base, attention: Attention
) -> LayerSteps:
    """The steps of one layer map that all rows share."""
    lengths = [len(row) for row in rows]

    def adapters(_: tuple[int, ...], visits: tuple[int, ...]) -> StepMeta | None:
        return StepMeta.build(_spans(adapter, rows, visits), base.device)

    maps = [layer_map] * len(rows)
    return layer_steps(maps, lengths, base.device, lambda _: attention, adapters)


def _spans(
    adapter: PackedAdapter, rows: TokenRows, replicas: Sequence[int] | None = None
) -> list[Span]:
    """A span for each row on which the adapter acts, from the first token on which it does."""
    invocation = adapter.facts.invocation_tokens
    starts = [activation_start(row, invocation) if invocation else 0 for row in rows]
    uses = [[] if start is None else [SlotUse(0, start=start)] for start in starts]
    return spans_of_rows([len(row) for row in rows], uses, replicas)


def _spans_of_wanted(spans: Sequence[Span], logits_at: Sequence[int]) -> list[Span]:
    """The spans of the tokens `logits_at` alone, which are numbered by their place in it."""
    adapted = {token for span in spans for token in range(span.rows.start, span.rows.stop)}
    return [
        Span(slot=0, first_token=index, num_tokens=1)
        for index, token in enumerate(logits_at)
        if token in adapted
    ]

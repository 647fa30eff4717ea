"""What requests change about their logits before a token is drawn: the one place that does it.

For every row, in this order, which is that of vLLM and transformers:

1. logit_bias is added: x_t + bias_t;
2. repetition_penalty p acts on each token t of prompt and output: x_t / p where x_t > 0, else
   x_t · p (arXiv:1909.05858);
3. frequency_penalty f and presence_penalty d act on each token that the output holds, c_t times:
   x_t − f · c_t − d (OpenAI's formula);
4. stop tokens are excluded before min_tokens: they get the lowest finite number;
5. so do tokens that would break the form of structured output (`structure_masks.py`).

The temperature and all cuts come after that. NaN and infinity stay what they are or become each
other, so that a row that is not finite is still seen as such. Nothing here waits for the device.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lora_runtime.core import Row
from lora_runtime.engine.row_tables import tables_of
from lora_runtime.engine.structure_masks import exclude_unstructured, is_structured
from lora_runtime.kernels import to_device

MAX_ROWS_AT_ONCE = 32
"""Rows whose tokens are counted at a time: each takes a number for every token there is."""

Ruled = tuple[int, Row]
"""A row, and its place among the logits."""


def modified(logits: Tensor, rows: Sequence[Row], drawn: Tensor | None = None) -> Tensor:
    """Logits (n, vocab) by the rules of each row: row i is rows[i]. They are `logits` themselves
    where no row has a rule, else a copy in float32.

    drawn (any,) int64: the tokens that rows ending in −1 − r stand for; see `Row`.
    """
    biased = [(i, row) for i, row in enumerate(rows) if row.request.sampling.logit_bias]
    penalised = [(i, row) for i, row in enumerate(rows) if _is_penalised(row)]
    early = [(i, row) for i, row in enumerate(rows) if _is_early(row)]
    structured = [(i, row) for i, row in enumerate(rows) if is_structured(row)]
    if not (biased or penalised or early or structured):
        return logits
    changed = logits.to(torch.float32, copy=True)
    if biased:
        _add_biases(changed, biased)
    for first in range(0, len(penalised), MAX_ROWS_AT_ONCE):
        _penalise(changed, penalised[first : first + MAX_ROWS_AT_ONCE], drawn)
    if early:
        _exclude_stops(changed, early)
    if structured:
        exclude_unstructured(changed, structured)
    return changed


def _is_penalised(row: Row) -> bool:
    return row.request.sampling.repetition_penalty != 1 or _counts_output(row)


def _counts_output(row: Row) -> bool:
    sampling = row.request.sampling
    return sampling.presence_penalty != 0 or sampling.frequency_penalty != 0


def _is_early(row: Row) -> bool:
    sampling = row.request.sampling
    return row.num_output_tokens < sampling.min_tokens and bool(sampling.stop_token_ids)


def _add_biases(logits: Tensor, biased: Sequence[Ruled]) -> None:
    """Of a row each id stands once, so that no order of additions matters."""
    tables = [tables_of(row).bias for _, row in biased]
    places = _places([index for index, _ in biased], tables)
    table = torch.cat([places[:, None].double(), torch.cat(tables)], dim=1)
    at, token_ids, bias = to_device(table, logits.device).T
    where = at.long() * logits.shape[1] + token_ids.long()
    logits.view(-1).index_add_(0, where, bias.float())


def _penalise(logits: Tensor, penalised: Sequence[Ruled], drawn: Tensor | None) -> None:
    """Count each row's tokens on the device, where alone the newest may be known. A token that a
    row holds several times gets its one new score as often.
    """
    places, token_ids, is_output = _history(penalised, logits.device)
    if drawn is not None:
        token_ids = torch.where(token_ids < 0, drawn[(-1 - token_ids).clamp(min=0)], token_ids)
    indices, repetition, frequency, presence = _numbers(penalised, logits.device)[:, places]
    where = indices.long() * logits.shape[1] + token_ids
    scores = logits.view(-1).index_select(0, where)
    scores = torch.where(scores > 0, scores / repetition, scores * repetition)
    if any(_counts_output(row) for _, row in penalised):
        counts = torch.zeros(len(penalised) * logits.shape[1], device=logits.device)
        at = places * logits.shape[1] + token_ids
        counts.index_add_(0, at, is_output.float())  # whole numbers: in any order the same sum
        num_times = counts.index_select(0, at)
        scores = scores - frequency * num_times - presence * (num_times > 0)
    logits.view(-1).index_copy_(0, where, scores)


def _numbers(penalised: Sequence[Ruled], device: torch.device) -> Tensor:
    """(4, k) float32: place among the logits, repetition, frequency and presence penalty."""
    values = []
    for index, row in penalised:
        sampling = row.request.sampling
        penalties = (sampling.repetition_penalty, sampling.frequency_penalty)
        values.append((index, *penalties, sampling.presence_penalty))
    return to_device(torch.tensor(values, dtype=torch.float32), device).T


def _history(penalised: Sequence[Ruled], device: torch.device) -> Tensor:
    """(3, t) int64: of every token that counts its row's place among `penalised`, its id, and 1 if
    it is of the output. A prompt counts for the repetition penalty alone.
    """
    tokens, flags = [], []
    for _, row in penalised:
        start = row.num_prompt_tokens if row.request.sampling.repetition_penalty == 1 else 0
        tokens.append(tables_of(row).token_ids(row)[start:])
        flag = torch.ones(len(tokens[-1]), dtype=torch.int64)
        flag[: row.num_prompt_tokens - start] = 0
        flags.append(flag)
    places = _places(range(len(penalised)), tokens)
    return to_device(torch.stack([places, torch.cat(tokens), torch.cat(flags)]), device)


def _places(indices: Sequence[int], tables: Sequence[Tensor]) -> Tensor:
    """(t,) int64: for each entry of every table the index that belongs to it."""
    parts = [torch.full((len(table),), index) for index, table in zip(indices, tables, strict=True)]
    return torch.cat(parts)


def _exclude_stops(logits: Tensor, early: Sequence[Ruled]) -> None:
    """What is NaN or infinite becomes NaN: 0 times it."""
    places = [(i, t) for i, row in early for t in sorted(row.request.sampling.stop_token_ids)]
    where = tuple(to_device(torch.tensor(places), logits.device).T)
    logits[where] = 0 * logits[where] + torch.finfo(torch.float32).min

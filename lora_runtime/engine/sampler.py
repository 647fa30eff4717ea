"""From logits to token ids, every row under its own parameters, all rows at once.

A row's draw depends on its own logits, parameters and random number only, never on its neighbours.
"""

from __future__ import annotations

import random
from collections.abc import Sequence as AbstractSequence

import torch
from torch import Tensor

from lora_runtime.core import SampledToken, SamplingParams, Sequence, TokenLogprob


def uniform(sequence: Sequence) -> float:
    """The row's random number in [0, 1) for its next token: by seed and position, if seeded."""
    seed = sequence.request.sampling.seed
    if seed is None:
        return random.random()
    return random.Random(f"{seed}/{sequence.num_output_tokens}").random()


def sample(logits: Tensor, sequences: AbstractSequence[Sequence]) -> list[SampledToken]:
    """Draw one token a row: logits (n, vocab), row i for sequences[i].

    temperature 0 takes the most likely token; else one is drawn by inversion from
    softmax(logits / temperature) cut to top_k, top_p and min_p. Stop tokens are excluded before
    min_tokens. Log probabilities are of the unmodified logits, in float32.
    """
    logits = logits.float()
    params = [sequence.request.sampling for sequence in sequences]
    is_finite = torch.isfinite(logits).all(dim=1)
    allowed = _without_early_stops(logits, sequences)
    token_ids = allowed.argmax(dim=1)
    drawn = [row for row, p in enumerate(params) if p.temperature > 0]
    if drawn:
        numbers = [uniform(sequences[row]) for row in drawn]
        token_ids[drawn] = _draw(allowed[drawn], [params[row] for row in drawn], numbers)
    logprobs = _logprobs(logits, token_ids, params)
    pairs = zip(token_ids.tolist(), is_finite.tolist(), logprobs, strict=True)
    return [SampledToken(token_id, finite, logprob) for token_id, finite, logprob in pairs]


def _without_early_stops(logits: Tensor, sequences: AbstractSequence[Sequence]) -> Tensor:
    rows, columns = [], []
    for row, sequence in enumerate(sequences):
        sampling = sequence.request.sampling
        if sequence.num_output_tokens < sampling.min_tokens:
            rows += [row] * len(sampling.stop_token_ids)
            columns += sorted(sampling.stop_token_ids)
    if not rows:
        return logits
    allowed = logits.clone()
    allowed[rows, columns] = float("-inf")
    return allowed


def _draw(logits: Tensor, params: list[SamplingParams], numbers: list[float]) -> Tensor:
    """Inverse-CDF draw over each row's kept tokens, most likely first."""

    def column(values: list) -> Tensor:
        return torch.tensor(values, device=logits.device)[:, None]

    ordered, order = torch.sort(logits, dim=1, descending=True, stable=True)
    probabilities = torch.softmax(ordered / column([p.temperature for p in params]), dim=1)
    before = probabilities.cumsum(dim=1) - probabilities
    rank = torch.arange(logits.shape[1], device=logits.device)
    vocab_size = logits.shape[1]
    is_kept = (
        (rank < column([p.top_k or vocab_size for p in params]))
        & (before < column([p.top_p for p in params]))
        & (probabilities >= column([p.min_p for p in params]) * probabilities[:, :1])
    )
    kept = torch.where(is_kept, probabilities, 0.0)
    cumulative = kept.double().cumsum(dim=1)
    target = column(numbers).double() * cumulative[:, -1:]
    place = torch.searchsorted(cumulative, target, right=True)
    last_kept = (is_kept.int().sum(dim=1, keepdim=True) - 1).clamp(min=0)  # a NaN row keeps none
    return order.gather(1, torch.minimum(place, last_kept))[:, 0]


def _logprobs(
    logits: Tensor, token_ids: Tensor, params: list[SamplingParams]
) -> list[TokenLogprob | None]:
    wanted = [row for row, p in enumerate(params) if p.num_logprobs is not None]
    found: list[TokenLogprob | None] = [None] * len(params)
    if not wanted:
        return found
    logprobs = torch.log_softmax(logits[wanted], dim=1)
    sampled = logprobs.gather(1, token_ids[wanted][:, None])[:, 0].tolist()
    values, ids = logprobs.topk(max(params[row].num_logprobs or 0 for row in wanted), dim=1)
    for index, row in enumerate(wanted):
        count = params[row].num_logprobs
        top = tuple(zip(ids[index, :count].tolist(), values[index, :count].tolist(), strict=True))
        found[row] = TokenLogprob(sampled[index], top)
    return found

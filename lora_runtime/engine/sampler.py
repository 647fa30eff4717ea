"""From logits to token ids, every row under its own parameters, all rows at once.

A row's draw depends on its own logits, parameters and random number only, never on its neighbours.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
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
    The host waits for the device once, or twice where log probabilities are wanted.
    """
    logits = logits.float()
    params = [sequence.request.sampling for sequence in sequences]
    is_finite = torch.isfinite(logits).all(dim=1)
    allowed = _without_early_stops(logits, sequences)
    token_ids = allowed.argmax(dim=1)
    for rows, draw in _by_way_of_drawing(params):
        numbers = [uniform(sequences[row]) for row in rows]
        columns = _columns([params[row] for row in rows], numbers, logits)
        index = _to_device(torch.tensor(rows), logits.device)
        drawn = draw(allowed.index_select(0, index), *columns)
        token_ids.index_copy_(0, index, drawn)
    logprobs = _logprobs(logits, token_ids, params)
    results = torch.stack([token_ids, is_finite.long()], 1).tolist()
    return [
        SampledToken(token_id, bool(finite), logprob)
        for (token_id, finite), logprob in zip(results, logprobs, strict=True)
    ]


Draw = Callable[..., Tensor]


def _by_way_of_drawing(params: list[SamplingParams]) -> Iterator[tuple[list[int], Draw]]:
    """Rows that draw, and how: by a row's own parameters, never by its neighbours'."""
    drawn = [row for row, p in enumerate(params) if p.temperature > 0]
    ordered = [row for row in drawn if params[row].top_k or params[row].top_p < 1]
    if ordered:
        yield ordered, _draw_in_order_of_likelihood
    if plain := [row for row in drawn if row not in ordered]:
        yield plain, _draw_in_order_of_vocabulary


def _columns(params: list[SamplingParams], numbers: list[float], like: Tensor) -> Iterable[Tensor]:
    """temperature, top_k, top_p, min_p and the random number of each row, (n, 1) float64 each."""
    vocab_size = like.shape[1]
    rows = [
        (p.temperature, p.top_k or vocab_size, p.top_p, p.min_p, number)
        for p, number in zip(params, numbers, strict=True)
    ]
    table = _to_device(torch.tensor(rows, dtype=torch.float64), like.device)
    return (column[:, None] for column in table.unbind(1))


def _to_device(table: Tensor, device: torch.device) -> Tensor:
    """A copy that the host does not wait for."""
    return (table.pin_memory() if device.type == "cuda" else table).to(device, non_blocking=True)


def _without_early_stops(logits: Tensor, sequences: AbstractSequence[Sequence]) -> Tensor:
    rows, columns = [], []
    for row, sequence in enumerate(sequences):
        sampling = sequence.request.sampling
        if sequence.num_output_tokens < sampling.min_tokens:
            rows += [row] * len(sampling.stop_token_ids)
            columns += sorted(sampling.stop_token_ids)
    if not rows:
        return logits
    places = _to_device(torch.tensor([rows, columns]), logits.device)
    forbidden = logits.new_full((), float("-inf"))
    return logits.index_put(tuple(places), forbidden)


def _draw_in_order_of_vocabulary(
    logits: Tensor, temperature: Tensor, _top_k: Tensor, _top_p: Tensor, min_p: Tensor,
    number: Tensor,
) -> Tensor:  # fmt: skip
    """For rows that keep tokens whatever their rank: nothing has to be sorted."""
    probabilities = torch.softmax(logits / temperature.float(), dim=1)
    least = min_p * probabilities.amax(dim=1, keepdim=True)
    return _invert(torch.where(probabilities >= least, probabilities, 0.0), number)


def _draw_in_order_of_likelihood(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor,
    number: Tensor,
) -> Tensor:  # fmt: skip
    """Most likely first, where top_k and top_p cut."""
    ordered, order = torch.sort(logits, dim=1, descending=True, stable=True)
    probabilities = torch.softmax(ordered / temperature.float(), dim=1)
    before = probabilities.cumsum(dim=1) - probabilities
    is_kept = (
        (torch.arange(logits.shape[1], device=logits.device) < top_k)
        & (before < top_p)
        & (probabilities >= min_p * probabilities[:, :1])
    )
    place = _invert(torch.where(is_kept, probabilities, 0.0), number)
    return order.gather(1, place[:, None])[:, 0]


def _invert(kept: Tensor, number: Tensor) -> Tensor:
    """(n,): the first place at which the running sum of a row exceeds number · its total."""
    cumulative = kept.double().cumsum(dim=1)
    place = torch.searchsorted(cumulative, number * cumulative[:, -1:], right=True)[:, 0]
    places = torch.arange(kept.shape[1], device=kept.device)
    last_kept = torch.where(kept > 0, places, 0).amax(dim=1)  # a NaN row keeps none
    return torch.minimum(place, last_kept)


def _logprobs(
    logits: Tensor, token_ids: Tensor, params: list[SamplingParams]
) -> list[TokenLogprob | None]:
    wanted = [row for row, p in enumerate(params) if p.num_logprobs is not None]
    found: list[TokenLogprob | None] = [None] * len(params)
    if not wanted:
        return found
    index = _to_device(torch.tensor(wanted), logits.device)
    logprobs = torch.log_softmax(logits.index_select(0, index), dim=1)
    sampled = logprobs.gather(1, token_ids.index_select(0, index)[:, None])
    count = max(params[row].num_logprobs or 0 for row in wanted)
    values, ids = logprobs.topk(count, dim=1)
    table = torch.cat([sampled, values, ids], 1).tolist()  # ids are exact: below 2²⁴
    for row, (own, *top) in zip(wanted, table, strict=True):
        pairs = zip(map(int, top[count:]), top[:count], strict=True)
        found[row] = TokenLogprob(own, tuple(pairs)[: params[row].num_logprobs])
    return found

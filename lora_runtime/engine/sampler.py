"""From logits to token ids, every row under its own parameters, all rows at once.

A row's draw depends on its own logits, parameters and random number only, never on its neighbours.
Nothing waits for the device but `Draw.result`, which the next steps may be started before.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from lora_runtime.core import PromptChunk, Row, SampledToken, SamplingParams, TokenLogprob
from lora_runtime.engine.batch import Rows, ScoredTokens
from lora_runtime.engine.logits_rules import modified
from lora_runtime.kernels import draw_cut, invert, most_likely, to_device

SMALLEST = torch.finfo(torch.float32).tiny
"""A top_p below it would be 0 in float32, and keep no token."""


def uniform(row: Row) -> float:
    """The row's random number in [0, 1) for its next token: by seed and position, if seeded."""
    seed = row.request.sampling.seed
    if seed is None:
        return random.random()
    return random.Random(f"{seed}/{row.num_output_tokens}").random()


@dataclass(frozen=True, slots=True)
class PromptScores:
    """Log probabilities of prompts' tokens, on their way to the host."""

    _rows: Rows
    _values: Tensor
    """As `token_logprobs` gives them, of all tokens of the rows."""

    @classmethod
    def of(cls, logits: Tensor, scored: ScoredTokens) -> PromptScores:
        """logits (g, vocab): those of the scored tokens."""
        values = token_logprobs(logits, scored.next_tokens, scored.num_top)
        return cls(scored.rows, values.to("cpu", non_blocking=True))

    def chunks(self) -> Iterator[PromptChunk]:
        """Yield each row's own part."""
        values = iter(self._values.tolist())
        for part in self._rows:
            num_top = part.row.request.sampling.num_prompt_logprobs
            own = tuple(_read(each, num_top) for each in islice(values, part.num_tokens))
            yield PromptChunk(part.row, part.start, own)


@dataclass(frozen=True, slots=True)
class Draw:
    """One token a row, on its way to the host."""

    token_ids: Tensor
    """(n,) int64, on the device."""
    _chosen: Tensor
    _logprobs: Tensor | None
    _params: list[SamplingParams]
    _prompts: Sequence[PromptScores]
    _is_copied: torch.cuda.Event | None

    def result(self) -> list[SampledToken]:
        """Wait for the step, not for later ones, and give what was drawn."""
        if self._is_copied is not None:
            self._is_copied.synchronize()
        logprobs = _read_logprobs(self._logprobs, self._params)
        return [
            SampledToken(token_id, bool(is_finite), logprob)
            for (token_id, is_finite), logprob in zip(self._chosen.tolist(), logprobs, strict=True)
        ]

    def prompt_chunks(self) -> list[PromptChunk]:
        """What the step says of prompts. Only after `result`, which waits for it."""
        return [chunk for scores in self._prompts for chunk in scores.chunks()]


def draw(
    logits: Tensor,
    rows: Sequence[Row],
    best: Tensor | None = None,
    drawn: Tensor | None = None,
    prompts: Sequence[PromptScores] = (),
) -> Draw:
    """Draw one token a row: logits (n, vocab), row i for rows[i]. `best`: `most_likely` of the
    logits, if it is known. `drawn`: what the step before drew; see `modified`. `prompts`: what is
    copied to the host beside the tokens.

    What `logits_rules` makes of the logits is drawn from: temperature 0 takes the most likely
    token; else one is drawn by inversion from softmax(logits / temperature) cut to top_k, top_p and
    min_p. Log probabilities are of the unmodified logits, in float32.
    """
    params = [row.request.sampling for row in rows]
    chosen = choose(logits, rows, best, drawn)
    logprobs = _logprobs(logits, chosen[:, 0], params)
    on_host = chosen.to("cpu", non_blocking=True)
    logprobs_on_host = None if logprobs is None else logprobs.to("cpu", non_blocking=True)
    copied = None
    if logits.is_cuda:
        copied = torch.cuda.current_stream(logits.device).record_event()
    return Draw(chosen[:, 0], on_host, logprobs_on_host, params, prompts, copied)


def choose(
    logits: Tensor,
    rows: Sequence[Row],
    best: Tensor | None = None,
    drawn: Tensor | None = None,
) -> Tensor:
    """What `draw` draws, still on the device: (n, 2) int64 as in `most_likely`.

    One copy goes there, of all parameters, if any row draws, beside those of `logits_rules`.
    """
    scores = modified(logits, rows, drawn)
    chosen = most_likely(scores) if best is None or scores is not logits else best.clone()
    random_rows = [index for index, s in enumerate(rows) if s.request.sampling.temperature > 0]
    if random_rows:
        random_rows.sort(key=lambda index: not _is_cut(rows[index].request.sampling))
        table = _parameters(rows, random_rows, logits.device)
        num_cut = sum(_is_cut(rows[index].request.sampling) for index in random_rows)
        indices = table[:, 0].long()
        token_ids = _draw(scores.index_select(0, indices).float(), table[:, 1:], num_cut)
        chosen[:, 0].index_copy_(0, indices, token_ids)
    return chosen


def _is_cut(sampling: SamplingParams) -> bool:
    """True for rows that are drawn most likely first; others are in the vocabulary's order."""
    return sampling.top_k > 0 or sampling.top_p < 1


def _on_device(values: Sequence[tuple[float, ...] | int], device: torch.device) -> Tensor:
    return to_device(torch.tensor(values, dtype=torch.float64), device)


def _parameters(rows: Sequence[Row], indices: list[int], device: torch.device) -> Tensor:
    """(rows, 6) float64: row, temperature, random number, top_k, top_p, min_p."""
    values = []
    for index in indices:
        sampling = rows[index].request.sampling
        top_k = sampling.top_k or float("inf")
        cuts = (top_k, max(sampling.top_p, SMALLEST), sampling.min_p)
        values.append((index, sampling.temperature, uniform(rows[index]), *cuts))
    return _on_device(values, device)


def _draw(logits: Tensor, parameters: Tensor, num_cut: int) -> Tensor:
    """Token ids (n,) by inversion: of the first `num_cut` rows most likely first, of the others
    in the vocabulary's order, which needs no sort. parameters (n, 5), see `_parameters`.
    """
    temperature, number, *cuts = parameters.T[:, :, None]
    smallest = torch.finfo(torch.float32).tiny
    scaled = (logits - logits.amax(dim=1, keepdim=True)) / temperature.float().clamp(min=smallest)
    top_k, top_p, min_p = (cut.float() for cut in cuts)
    found = []
    if num_cut > 0:
        limits = (top_k[:num_cut], top_p[:num_cut], min_p[:num_cut])
        found.append(draw_cut(scaled[:num_cut], number[:num_cut], *limits))
    if num_cut < len(logits):
        probabilities = torch.softmax(scaled[num_cut:], dim=1)
        is_kept = probabilities >= min_p[num_cut:] * probabilities.amax(dim=1, keepdim=True)
        found.append(invert(torch.where(is_kept, probabilities, 0.0), number[num_cut:]))
    return torch.cat(found)[:, 0]


def _logprobs(logits: Tensor, token_ids: Tensor, params: list[SamplingParams]) -> Tensor | None:
    """(w, 1 + 2k) float64: of the w rows that want them the sampled token's, the k most likely
    ones' and their ids. One more copy in each direction, if any row wants them.
    """
    wanted = _wanting_logprobs(params)
    if not wanted:
        return None
    indices = _on_device(wanted, logits.device).long()
    num_top = max(params[index].num_logprobs or 0 for index in wanted)
    wanted_ids = token_ids.index_select(0, indices)
    return token_logprobs(logits.index_select(0, indices), wanted_ids, num_top)


def token_logprobs(logits: Tensor, token_ids: Tensor, num_top: int) -> Tensor:
    """(n, 1 + 2k) float64: the log probability of token_ids (n,) under logits (n, vocab), the k
    largest, and their ids; k is num_top or the vocabulary's size.
    """
    logprobs = torch.log_softmax(logits.float(), dim=1)
    own = logprobs.gather(1, token_ids[:, None])
    values, ids = logprobs.topk(min(num_top, logprobs.shape[1]), dim=1)
    return torch.cat([own, values, ids.double()], dim=1)


def _wanting_logprobs(params: list[SamplingParams]) -> list[int]:
    return [index for index, p in enumerate(params) if p.num_logprobs is not None]


def _read_logprobs(
    logprobs: Tensor | None, params: list[SamplingParams]
) -> list[TokenLogprob | None]:
    found: list[TokenLogprob | None] = [None] * len(params)
    if logprobs is not None:
        for index, values in zip(_wanting_logprobs(params), logprobs.tolist(), strict=True):
            found[index] = _read(values, params[index].num_logprobs)
    return found


def _read(values: list[float], num_top: int | None) -> TokenLogprob:
    """A row of `token_logprobs`, which may have more most likely tokens than are wanted."""
    own, *rest = values
    middle = len(rest) // 2
    pairs = zip(map(int, rest[middle:]), rest[:middle], strict=True)
    return TokenLogprob(own, tuple(islice(pairs, num_top)))

"""Structured output: which tokens may follow in each row, and the logits of all others."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lora_runtime.core import Row, RowStatus
from lora_runtime.kernels import to_device
from lora_runtime.text.structured_output import Matcher, token_masks


def is_structured(row: Row) -> bool:
    """Tell whether a row's output has a form to keep. One that has ended meanwhile has not: what is
    drawn for it is discarded.
    """
    return row.matcher is not None and row.status is not RowStatus.FINISHED


def exclude_unstructured(logits: Tensor, structured: Sequence[tuple[int, Row]]) -> None:
    """Give tokens that may not follow the lowest finite number, in place.

    logits (n, vocab) float32; structured: each row and its place among the logits. A row that holds
    NaN or infinity still does. Where no token may follow, the row's matcher has an error, its
    logits stay, and what is drawn is not used.
    """
    allowed = allowed_tokens([row for _, row in structured], logits.shape[1])
    is_excluded = ~_on_device(allowed, logits.device)
    if len(structured) == len(logits):
        _exclude(logits, is_excluded)
        return
    places = to_device(torch.tensor([index for index, _ in structured]), logits.device)
    scores = logits.index_select(0, places)
    _exclude(scores, is_excluded)
    logits.index_copy_(0, places, scores)


def _exclude(scores: Tensor, is_excluded: Tensor) -> None:
    low, high = torch.aminmax(scores, dim=1)
    scores.masked_fill_(is_excluded, torch.finfo(torch.float32).min)
    scores[:, 0] += 0 * low + 0 * high  # NaN where the row held NaN or infinity


def allowed_tokens(rows: Sequence[Row], vocab_size: int) -> NDArray[np.uint8]:
    """(n, vocab) uint8: 1 where a token may follow. A stop token is no part of an output's text: it
    may follow where the form is whole, and not before min_tokens.
    """
    matchers = [_matcher(row) for row in rows]
    allowed = token_masks(matchers, vocab_size)
    for row, matcher, mask in zip(rows, matchers, allowed, strict=True):
        sampling = row.request.sampling
        mask[list(matcher.excluded)] = 0
        may_end = matcher.can_end and row.num_output_tokens >= sampling.min_tokens
        mask[[token for token in sampling.stop_token_ids if token < vocab_size]] = may_end
        if matcher.error or not mask.any():
            matcher.fail(
                "no token can follow: end or stop tokens are ruled out where only they fit"
            )
            mask[:] = 1
    return allowed


def _matcher(row: Row) -> Matcher:
    assert isinstance(row.matcher, Matcher)
    return row.matcher


def _on_device(allowed: NDArray[np.uint8], device: torch.device) -> Tensor:
    """(n, vocab) bool on a device, to which a bit a token is copied."""
    if device.type == "cpu":
        return torch.from_numpy(allowed).view(torch.bool)
    return unpacked(
        to_device(torch.from_numpy(np.packbits(allowed, axis=1)), device), allowed.shape
    )


def unpacked(bits: Tensor, shape: tuple[int, ...]) -> Tensor:
    """(n, vocab) bool from bits (n, ⌈vocab / 8⌉) uint8, the first of a byte its highest."""
    shifts = torch.arange(7, -1, -1, dtype=torch.uint8, device=bits.device)
    flags = (bits[:, :, None] >> shifts) & 1
    return flags.view(len(bits), -1)[:, : shape[1]].bool()

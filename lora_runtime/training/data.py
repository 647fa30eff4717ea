"""Training examples: from JSONL lines to token ids with targets, in a resumable random order.

Which tokens are targets is decided by the tokenizer's split, the same template serving uses. Knows
nothing of adapters or models.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lora_runtime.errors import DataError
from lora_runtime.text.tokenizer import Tokenizer

FORMATS: dict[str, tuple[str, ...]] = {
    "chat": ("messages",),
    "completion": ("prompt", "completion"),
}
"""Format → keys of a line that make it that format; other keys of a line are ignored."""


@dataclass(frozen=True, slots=True)
class Example:
    """token_ids (n,) int64; predictors (m,) int64, m ≥ 1: positions whose next token is learned."""

    token_ids: Tensor
    predictors: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Dataset:
    """All examples of one file."""

    path: Path
    examples: tuple[Example, ...]
    num_truncated: int
    """Examples cut at `max_seq_len`."""
    digest: str
    """SHA-256 over the token ids and targets of all examples."""

    @property
    def num_tokens(self) -> int:
        return sum(len(example.token_ids) for example in self.examples)

    @property
    def num_target_tokens(self) -> int:
        return sum(len(example.predictors) for example in self.examples)

    def describe(self) -> str:
        """One line of facts to show before training."""
        share = self.num_target_tokens / self.num_tokens
        return (
            f"{self.path}: {len(self.examples)} examples ({self.num_truncated} truncated), "
            f"{self.num_tokens} tokens, {self.num_target_tokens} of them targets ({share:.0%})"
        )


class ExampleStream:
    """The examples of all epochs one after another, each epoch in its own random order.

    The order is a function of (seed, epoch), so a position in the stream is the whole cursor.
    """

    def __init__(self, examples: Sequence[Example], seed: int) -> None:
        self._examples = examples
        self._seed = seed
        self._epoch, self._order = -1, list[int]()

    def take(self, start: int, count: int) -> list[Example]:
        """The `count` examples from position `start`."""
        return [self._at(position) for position in range(start, start + count)]

    def _at(self, position: int) -> Example:
        epoch, index = divmod(position, len(self._examples))
        if epoch != self._epoch:
            self._epoch, self._order = epoch, list(range(len(self._examples)))
            random.Random(f"{self._seed}:{epoch}").shuffle(self._order)
        return self._examples[self._order[index]]


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """Examples laid end to end, T tokens in all, n of them predictors of a target.

    token_ids, position_ids (T,) int64, positions restart at 0 in every example; logits_at (n,)
    int64: rows of the predictors; labels (n,) int64: the tokens after them.
    """

    token_ids: Tensor
    position_ids: Tensor
    lengths: list[int]
    logits_at: Tensor
    labels: Tensor

    @classmethod
    def of(cls, examples: Sequence[Example], device: torch.device | str = "cpu") -> PackedBatch:
        lengths = [len(example.token_ids) for example in examples]
        token_ids = torch.cat([example.token_ids for example in examples])
        starts = [sum(lengths[:i]) for i in range(len(lengths))]
        logits_at = torch.cat([e.predictors + s for e, s in zip(examples, starts, strict=True)])
        return cls(
            token_ids=token_ids.to(device),
            position_ids=torch.cat([torch.arange(length) for length in lengths]).to(device),
            lengths=lengths,
            logits_at=logits_at.to(device),
            labels=token_ids[logits_at + 1].to(device),
        )


def load_dataset(path: Path, tokenizer: Tokenizer, max_seq_len: int) -> Dataset:
    """Read and tokenize a JSONL file; every line is of the format of the first.

    Raises DataError naming file and line: not JSON, another format, wrong types, text the template
    refuses, or no target token within `max_seq_len`.
    """
    examples: list[Example] = []
    digest = hashlib.sha256()
    num_truncated = 0
    for where, token_ids, is_target in _split_lines(path, tokenizer):
        num_truncated += len(token_ids) > max_seq_len
        example = _example(token_ids[:max_seq_len], is_target[:max_seq_len])
        if not len(example.predictors):
            raise DataError(
                f"{where} has no target token within max_seq_len={max_seq_len}; "
                "shorten its prompt, raise max_seq_len, or remove it"
            )
        examples.append(example)
        for part in (example.token_ids, example.predictors):
            digest.update(len(part).to_bytes(8, "little") + part.numpy().tobytes())
    if not examples:
        raise DataError(f"{path} holds no example")
    return Dataset(
        path=path, examples=tuple(examples), num_truncated=num_truncated, digest=digest.hexdigest()
    )


def _example(token_ids: list[int], is_target: list[bool]) -> Example:
    """The first token has no predictor, so it is no target even if marked."""
    return Example(
        token_ids=torch.tensor(token_ids, dtype=torch.int64),
        predictors=torch.tensor(is_target[1:], dtype=torch.bool).nonzero()[:, 0],
    )


def _split_lines(path: Path, tokenizer: Tokenizer) -> Iterator[tuple[str, list[int], list[bool]]]:
    """Yield (file:line, token ids, target mask) of every line that is not blank."""
    expected: str | None = None
    for where, line in _lines(path):
        values = _parse(line, where)
        kind = _format(values, where)
        expected = expected or kind
        if kind != expected:
            raise DataError(f"{where} is a {kind} example in a file of {expected} examples")
        try:
            token_ids, is_target = _split(values, kind, tokenizer)
        except DataError as error:
            raise DataError(f"{where}: {error.message}", field=error.field) from error
        yield where, token_ids, is_target


def _split(
    values: dict[str, object], kind: str, tokenizer: Tokenizer
) -> tuple[list[int], list[bool]]:
    parts = [values[key] for key in FORMATS[kind]]
    if kind == "chat":
        if not isinstance(parts[0], list) or not all(isinstance(m, dict) for m in parts[0]):
            raise DataError("messages must be a list of objects with role and content")
        return tokenizer.split_chat(parts[0])
    if not all(isinstance(part, str) for part in parts):
        raise DataError("prompt and completion must be text")
    return tokenizer.split_completion(*parts)


def _lines(path: Path) -> Iterator[tuple[str, bytes]]:
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield f"{path}:{number}", line
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error


def _parse(line: bytes, where: str) -> dict[str, object]:
    try:
        values = json.loads(line)
        json.dumps(values, ensure_ascii=False).encode()  # fails on escapes of half a character
    except ValueError as error:
        raise DataError(f"{where} is not JSON in UTF-8: {error}") from error
    if not isinstance(values, dict):
        raise DataError(f"{where} is a {type(values).__name__}; each line must be a JSON object")
    return values


def _format(values: dict[str, object], where: str) -> str:
    matching = [name for name, keys in FORMATS.items() if all(key in values for key in keys)]
    if len(matching) != 1:
        problem = "both" if matching else "neither"
        raise DataError(
            f"{where} has {problem} 'messages' and 'prompt' with 'completion'; "
            f"its keys are {', '.join(values) or 'none'}"
        )
    return matching[0]

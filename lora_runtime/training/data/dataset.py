"""Examples of one file: token ids with targets, truncated, and split into train and held out."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch

from lora_runtime.errors import DataError
from lora_runtime.settings import in_group
from lora_runtime.text.tokenizer import Tokenizer
from lora_runtime.training.config import DATA, InstructionStyle, Truncation, UnitConfig
from lora_runtime.training.data.examples import Example, Item, Pair
from lora_runtime.training.data.formats import (
    Split,
    Values,
    choose_columns,
    content_of,
    find_format,
    note_of,
    split_row,
    unused_keys,
)
from lora_runtime.training.rows import read_rows

T = TypeVar("T")


_source = attrgetter(*in_group(UnitConfig, DATA))
"""The settings of a unit that decide what its data are."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Dataset:
    """The examples of one file, or its part to train on or its part held out."""

    path: Path
    format: str
    """A key of `formats.FORMATS`."""
    examples: tuple[Example, ...]
    """For preferences, chosen and rejected in turn."""
    num_truncated: int
    """Examples cut at `max_seq_len`."""
    num_dropped: int = 0
    """Rows left out because they are longer."""
    unused: tuple[str, ...] = ()
    """The file's keys or columns that no example is made of."""
    notes: tuple[str, ...] = ()
    """Remarks on how rows were read, to show before training."""
    digest: str
    """SHA-256 over the token ids and targets of all examples."""

    @property
    def pairs(self) -> tuple[Pair, ...]:
        """The preferences; empty for other formats."""
        chosen = self.examples[::2] if self.is_preference else ()
        return tuple(map(Pair, chosen, self.examples[1::2]))

    @property
    def is_preference(self) -> bool:
        return self.format == "preference"

    @property
    def items(self) -> Sequence[Item]:
        """The pairs of preferences, or else the examples."""
        return self.pairs or self.examples

    @property
    def weight(self) -> int:
        """Number of target tokens, or of pairs: what the sum of losses is divided by."""
        return sum(item.weight for item in self.items)

    @property
    def num_tokens(self) -> int:
        return sum(len(example.token_ids) for example in self.examples)

    @property
    def num_target_tokens(self) -> int:
        return sum(len(example.predictors) for example in self.examples)

    @property
    def longest(self) -> int:
        """Tokens of the longest example."""
        return max(len(example.token_ids) for example in self.examples)

    def describe(self) -> str:
        """One line of facts to show before training."""
        share = self.num_target_tokens / self.num_tokens
        counted = f"{len(self.items)} {'pairs' if self.is_preference else 'examples'}"
        dropped = f", {self.num_dropped} dropped" if self.num_dropped else ""
        facts = [
            f"{self.path}: {counted} ({self.num_truncated} truncated{dropped}), "
            f"{self.num_tokens} tokens, {self.num_target_tokens} of them targets ({share:.0%}), "
            f"the longest example {self.longest}",
            f"columns not used: {', '.join(self.unused)}" if self.unused else None,
            *self.notes,
        ]
        return "; ".join(fact for fact in facts if fact)


class _Entry(NamedTuple):
    """The examples of one row; `draw` in [0, 1) is a hash of the content, not of its place."""

    examples: list[Example]
    num_truncated: int
    draw: float
    note: str | None


class _File(NamedTuple):
    path: Path
    format: str
    entries: list[_Entry]
    num_dropped: int
    unused: tuple[str, ...]


def load_all(
    configs: Sequence[UnitConfig], tokenizer: Tokenizer, max_seq_len: int
) -> list[tuple[Dataset, Dataset | None]]:
    """`load_datasets` of every unit; units that ask for the same data share it."""
    found: list[tuple[object, tuple[Dataset, Dataset | None]]] = []
    for config in configs:
        source = _source(config)
        shared = next((datasets for other, datasets in found if other == source), None)
        found.append((source, shared or load_datasets(config, tokenizer, max_seq_len)))
    return [datasets for _, datasets in found]


def load_datasets(
    config: UnitConfig, tokenizer: Tokenizer, max_seq_len: int
) -> tuple[Dataset, Dataset | None]:
    """A unit's examples to train on and those held out, if there are any.

    `eval_fraction` holds out the rows whose content's hash says so: adding rows moves none from
    one side to the other, and equal rows stay together. Raises DataError.
    """
    options = (tokenizer, max_seq_len, config.truncation, config.columns, config.instructions)
    train = _read(config.data, *options)
    held_out = None
    if config.eval_data is not None:
        held_out = _read(config.eval_data, *options)
        if held_out.format != train.format:
            raise DataError(
                f"{held_out.path} is {held_out.format} and {train.path} {train.format}; "
                "held-out data must be of the same format",
                field="eval_data",
            )
    elif config.eval_fraction:
        train, held_out = _hold_out(train, config.eval_fraction)
    return _dataset(train), _dataset(held_out) if held_out else None


def load_dataset(
    path: Path,
    tokenizer: Tokenizer,
    max_seq_len: int,
    truncation: Truncation = "end",
    columns: Mapping[str, str] | None = None,
    instructions: InstructionStyle = "chat",
) -> Dataset:
    """Read and tokenize a file; every row is of the format of the first.

    Raises DataError naming file and line: not readable, another format, wrong types, text the
    template refuses, or no target token within `max_seq_len`.
    """
    return _dataset(_read(path, tokenizer, max_seq_len, truncation, columns or {}, instructions))


def _dataset(file: _File) -> Dataset:
    """The examples of a file; the digest covers their tokens and targets, not the file's bytes."""
    digest = hashlib.sha256()
    examples = [example for entry in file.entries for example in entry.examples]
    notes = Counter(entry.note for entry in file.entries if entry.note)
    for example in examples:
        for part in (example.token_ids, example.predictors):
            digest.update(len(part).to_bytes(8, "little") + part.numpy().tobytes())
    return Dataset(
        path=file.path,
        format=file.format,
        examples=tuple(examples),
        num_truncated=sum(entry.num_truncated for entry in file.entries),
        num_dropped=file.num_dropped,
        unused=file.unused,
        notes=tuple(f"{note} (rows: {count})" for note, count in notes.items()),
        digest=digest.hexdigest(),
    )


def _hold_out(file: _File, fraction: float) -> tuple[_File, _File]:
    kept = [entry for entry in file.entries if entry.draw >= fraction]
    held_out = [entry for entry in file.entries if entry.draw < fraction]
    if not kept or not held_out:
        raise DataError(
            f"{file.path}: eval_fraction {fraction} leaves {len(kept)} examples to train on "
            f"and {len(held_out)} held out; change it or give eval_data",
            field="eval_fraction",
        )
    return file._replace(entries=kept), file._replace(entries=held_out, num_dropped=0)


def _read(
    path: Path,
    tokenizer: Tokenizer,
    max_seq_len: int,
    truncation: Truncation,
    columns: Mapping[str, str],
    instructions: InstructionStyle,
) -> _File:
    """Read a file to examples. Raises DataError naming the row, or for a file without any."""
    entries: list[_Entry] = []
    unused: dict[str, None] = {}
    kind, num_dropped = "", 0
    for where, kind, row in _typed_rows(path, columns):
        unused.update(dict.fromkeys(key if key.strip() else repr(key) for key in row.unused))
        try:
            draw = _draw(content_of(row.values, kind))
            splits = split_row(row.values, kind, tokenizer, instructions)
            num_truncated = sum(len(token_ids) > max_seq_len for token_ids, _ in splits)
            if num_truncated and truncation == "drop":
                num_dropped += 1
                continue
            examples = [_example(split, max_seq_len, truncation) for split in splits]
            _check_different(examples)
        except DataError as error:
            raise DataError(f"{where}: {error.message}", field=error.field) from error
        entries.append(_Entry(examples, num_truncated, draw, note_of(row.values, kind)))
    if not entries:
        left = f": its {num_dropped} rows are all over max_seq_len={max_seq_len}"
        raise DataError(f"{path} holds no example{left if num_dropped else ''}", field="data")
    return _File(path, kind, entries, num_dropped, tuple(unused))


class _Row(NamedTuple):
    values: Values
    """By the format's keys."""
    unused: list[str]


def _typed_rows(path: Path, columns: Mapping[str, str]) -> Iterator[tuple[str, str, _Row]]:
    """Yield (place, format, row) of every row."""
    expected: str | None = None
    for where, row in read_rows(path):
        values = choose_columns(row, columns, where)
        kind = find_format(values, where)
        expected = expected or kind
        if kind != expected:
            raise DataError(f"{where} is a {kind} example in a file of {expected} examples")
        try:
            unused = unused_keys(values, kind)
        except DataError as error:
            raise DataError(f"{where}: {error.message}", field=error.field) from error
        others = [column for column in row if columns and column not in columns.values()]
        yield where, kind, _Row(values, [*unused, *others])


def _example(split: Split, max_seq_len: int, truncation: Truncation) -> Example:
    """The first token has no predictor, so it is no target even if marked."""
    token_ids, is_target = (_cut(part, max_seq_len, truncation) for part in split)
    predictors = torch.tensor(is_target[1:], dtype=torch.bool).nonzero()[:, 0]
    if not len(predictors):
        raise DataError(
            f"there is no target token within max_seq_len={max_seq_len}; shorten its prompt, raise "
            "max_seq_len, set truncation to start or drop, or remove the example",
            field="max_seq_len",
        )
    return Example(torch.tensor(token_ids, dtype=torch.int64), predictors)


def _check_different(examples: Sequence[Example]) -> None:
    first, *others = (example.token_ids.tolist() for example in examples)
    if first in others:
        raise DataError(
            "chosen and rejected are the same tokens, which teaches nothing; remove the pair, or "
            "raise max_seq_len or set truncation to drop if they are cut before they differ",
            field="rejected",
        )


def _cut(part: Sequence[T], max_seq_len: int, truncation: Truncation) -> Sequence[T]:
    if len(part) <= max_seq_len:
        return part
    if truncation == "error":
        raise DataError(
            f"it has {len(part)} tokens, over max_seq_len={max_seq_len}; shorten it, raise "
            "max_seq_len, or set truncation to end, start or drop",
            field="truncation",
        )
    return part[:max_seq_len] if truncation == "end" else part[-max_seq_len:]


def _draw(content: Mapping[str, object]) -> float:
    try:
        text = json.dumps(content, sort_keys=True, ensure_ascii=False)
    except TypeError as error:  # a table's dates, decimals, bytes
        raise DataError(f"{error}; make text of it: {', '.join(content)}", field="data") from error
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") / 2**32

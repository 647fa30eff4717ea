"""Rows of a data file, each with the place that an error about it names. Free of tensors."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from lora_runtime.errors import DataError
from lora_runtime.plain_file import check_plain_file

Row = tuple[str, dict[str, object]]
"""(`file:line`, or `file, item n` of a JSON list, or `file, row n`; key → value)."""

ROWS_AT_ONCE = 1024
"""Rows of a Parquet file that are in memory at once."""

csv.field_size_limit(2**31 - 1)
"""The module's own limit, 131,072 characters a cell, is for files that nobody has chosen; a long
text is cut or refused by `truncation`, as from any other file."""


def read_rows(path: Path) -> Iterator[Row]:
    """Yield every row of a file, blank lines left out.

    The name's ending decides: `.csv` and `.tsv` have their keys in the first line, `.parquet` takes
    pyarrow, everything else is JSON: an object a line, a list of objects, or one object. Inside a
    value, keys that are null are left out. Text is in UTF-8. Raises DataError.
    """
    try:
        if path.exists():
            check_plain_file(path)
        yield from _READERS.get(path.suffix.lower(), _json_rows)(path)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error


def _json_rows(path: Path) -> Iterator[Row]:
    """One object a line; where the first line is none, the file is one value: a list of objects,
    or an object over several lines.
    """
    with path.open("rb") as file:
        lines = ((number, line) for number, line in enumerate(file, 1) if line.strip())
        if (first := next(lines, None)) is None:
            return
        if not isinstance(_parsed_if_json(first[1]), dict):
            yield from _rows_of_one_value(path, first)
            return
        for number, line in chain([first], lines):
            where = f"{path}:{number}"
            yield where, _object(_parsed(line, where), where)


def _rows_of_one_value(path: Path, first: tuple[int, bytes]) -> Iterator[Row]:
    number, line = first
    content = path.read_bytes()
    is_line = path.suffix.lower() != ".json" or line.rstrip().endswith(b"}")
    if is_line and _parsed_if_json(content) is None:
        _parsed(line, f"{path}:{number}")  # names the line, which was to be an object
    values = _parsed(content, str(path))
    if not isinstance(values, list):
        yield str(path), _object(values, str(path))
        return
    for number, item in enumerate(values, 1):
        where = f"{path}, item {number}"
        yield where, _object(item, where)


def _parsed(content: bytes, where: str) -> object:
    try:
        values = json.loads(content, object_pairs_hook=_unique)
        json.dumps(values, ensure_ascii=False).encode()  # fails on escapes of half a character
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is not JSON in UTF-8: {error}") from error
    return values


def _parsed_if_json(content: bytes) -> object:
    """None where it is not JSON."""
    try:
        return _parsed(content, "")
    except DataError:
        return None


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    values = dict(pairs)
    if len(values) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} stands twice in one object; remove one")
    return values


def _object(values: object, where: str) -> dict[str, object]:
    if not isinstance(values, dict):
        raise DataError(f"{where} is a {type(values).__name__}; each example must be a JSON object")
    return {key: _without_nulls(value) for key, value in values.items()}


def _table_rows(path: Path, delimiter: str) -> Iterator[Row]:
    header: list[str] | None = None
    with path.open("rb") as file:
        for where, cells in _records(path, file, delimiter):
            if header is None:
                header = _header(cells, where)
            elif len(cells) != len(header):
                raise DataError(
                    f"{where} has {len(cells)} cells and the header {len(header)}; put cells that "
                    f"hold {delimiter!r}, quotes or line breaks in double quotes"
                )
            else:
                yield where, dict(zip(header, cells, strict=True))


def _records(path: Path, file: Iterable[bytes], delimiter: str) -> Iterator[tuple[str, list[str]]]:
    """Yield every record with the line it starts in."""
    reader = csv.reader(_decoded(path, file), delimiter=delimiter, strict=True)
    while True:
        where = f"{path}:{reader.line_num + 1}"
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise DataError(f"{where} is no record of the table: {error}") from error
        if cells is None:
            return
        if cells:
            yield where, cells


def _decoded(path: Path, lines: Iterable[bytes]) -> Iterator[str]:
    for number, line in enumerate(lines, 1):
        try:
            yield line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise DataError(f"{path}:{number} is not UTF-8: {error}") from error


def _header(cells: list[str], where: str) -> list[str]:
    if len(set(cells)) != len(cells):
        raise DataError(f"{where} names a column twice: {', '.join(cells)}; rename one")
    return cells


def _parquet_rows(path: Path) -> Iterator[Row]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise DataError(f"{path} is Parquet; install loramux[parquet]: {error}") from error
    with path.open("rb") as file:
        try:
            batches = pyarrow.parquet.ParquetFile(file).iter_batches(ROWS_AT_ONCE)
            rows = chain.from_iterable(_batch_rows(batch, str(path)) for batch in batches)
            for number, row in enumerate(rows, 1):
                yield f"{path}, row {number}", row
        except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
            raise DataError(f"{path} is no whole Parquet file: {error}") from error


def _batch_rows(batch: Any, where: str) -> Iterator[dict[str, object]]:
    header = _header(batch.schema.names, where)
    for cells in zip(*(column.to_pylist() for column in batch.columns), strict=True):
        yield {key: _without_nulls(cell) for key, cell in zip(header, cells, strict=True)}


def _without_nulls(value: object) -> object:
    """A column of objects gives every one of them every key, as do many writers of JSON; those
    without a value are no keys.
    """
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return value


_READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".csv": partial(_table_rows, delimiter=","),
    ".tsv": partial(_table_rows, delimiter="\t"),
    ".parquet": _parquet_rows,
}

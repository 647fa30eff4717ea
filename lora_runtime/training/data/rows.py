"""Rows of a data file, each with the place that an error about it names. Free of tensors."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

from lora_runtime.errors import DataError

Row = tuple[str, dict[str, object]]
"""(`file:line`, or `file, item n` of a JSON list; key → value)."""


def read_rows(path: Path) -> Iterator[Row]:
    """Yield every row of a file, blank lines left out.

    The name's ending decides: `.csv` and `.tsv` have their keys in the first line, `.json` is a
    list of objects or else JSONL, everything else is JSONL. All are UTF-8. Raises DataError.
    """
    try:
        yield from _READERS.get(path.suffix.lower(), _jsonl_rows)(path)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error


def _jsonl_rows(path: Path) -> Iterator[Row]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                where = f"{path}:{number}"
                yield where, _object(_parsed(line, where), where)


def _json_rows(path: Path) -> Iterator[Row]:
    content = path.read_bytes()
    if not content.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
        yield from _jsonl_rows(path)
        return
    for number, values in enumerate(_parsed(content, str(path)), 1):
        where = f"{path}, item {number}"
        yield where, _object(values, where)


def _parsed(content: bytes, where: str) -> object:
    try:
        values = json.loads(content)
        json.dumps(values, ensure_ascii=False).encode()  # fails on escapes of half a character
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is not JSON in UTF-8: {error}") from error
    return values


def _object(values: object, where: str) -> dict[str, object]:
    if not isinstance(values, dict):
        raise DataError(f"{where} is a {type(values).__name__}; each example must be a JSON object")
    return values


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


def _refuse_parquet(path: Path) -> Iterator[Row]:
    raise DataError(
        f"{path} is Parquet, which takes a large library (pyarrow) that nothing else here needs; "
        "write it as JSONL where there is one, for example by pandas: "
        "read_parquet(…).to_json(…, orient='records', lines=True)"
    )


_READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".csv": partial(_table_rows, delimiter=","),
    ".tsv": partial(_table_rows, delimiter="\t"),
    ".json": _json_rows,
    ".parquet": _refuse_parquet,
}

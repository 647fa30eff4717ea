"""File kinds: the same examples whatever holds them, and errors with their place."""

from __future__ import annotations

import csv
import datetime
import decimal
import json
import sys

import pyarrow
import pyarrow.parquet
import pytest

from lora_runtime.errors import DataError
from lora_runtime.training.data import load_dataset
from lora_runtime.training.rows import read_rows
from tests.lora_runtime.training.tiny_runs import write_jsonl

ROWS = [
    {"prompt": "the quick, brown fox", "completion": ' says "jumps"\nover two lines'},
    {"prompt": "", "completion": "über den Hund – 犬"},
    {"prompt": "a\ttab", "completion": "the end"},
]


def write_csv(path, rows, **options):
    with path.open("w", newline="", encoding=options.pop("encoding", "utf-8")) as file:
        writer = csv.DictWriter(file, list(rows[0]), **options)
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_json(path, rows):
    path.write_text(json.dumps(rows, indent=1))
    return path


def all_kinds(folder):
    return {
        "jsonl": write_jsonl(folder / "d.jsonl", ROWS),
        "jsonl in json": write_jsonl(folder / "lines.json", ROWS),
        "json": write_json(folder / "d.json", ROWS),
        "csv": write_csv(folder / "d.csv", ROWS),
        "csv of a spreadsheet": write_csv(folder / "s.csv", ROWS, encoding="utf-8-sig"),
        "unix csv": write_csv(folder / "u.CSV", ROWS, lineterminator="\n", quoting=csv.QUOTE_ALL),
        "tsv": write_csv(folder / "d.tsv", ROWS, delimiter="\t"),
    }


def test_the_same_examples_in_every_kind_of_file(tmp_path, tokenizer):
    paths = all_kinds(tmp_path)
    assert all([row for _, row in read_rows(path)] == ROWS for path in paths.values())
    digests = {load_dataset(path, tokenizer, 256).digest for path in paths.values()}
    assert len(digests) == 1


def test_places_are_those_an_editor_shows(tmp_path):
    paths = all_kinds(tmp_path)
    lines = {name: [w.removeprefix(str(p)) for w, _ in read_rows(p)] for name, p in paths.items()}
    assert lines["jsonl"] == [":1", ":2", ":3"]
    assert lines["json"] == [", item 1", ", item 2", ", item 3"]
    # the header is line 1, and the first record has a line break in it
    assert lines["csv"] == lines["unix csv"] == lines["tsv"] == [":2", ":4", ":5"]


HEADER = b"prompt,completion\n"


@pytest.mark.parametrize(
    ("name", "content", "place", "expected"),
    [
        ("d.csv", HEADER + b"a,b\na,b,c\n", ":3", "3 cells and the header 2"),
        ("d.csv", HEADER + b"a\n", ":2", "1 cells and the header 2"),
        ("d.csv", HEADER + b'a,b\n\n"a,b\nc,d\n', ":4", "no record of the table"),
        ("d.csv", HEADER + b'a,"b"c\n', ":2", "no record of the table"),
        ("d.csv", HEADER + b"a,\xff\n", ":2", "not UTF-8"),
        ("d.csv", b"prompt,prompt\na,b\n", ":1", "names a column twice"),
        ("d.csv", b"what,why\na,b\n", ":2", "has the keys what, why, which are no format's"),
        ("d.csv", HEADER + b"a,b\na,\n", ":3", "completion is empty"),
        ("d.tsv", HEADER + b"a,b\n", ":2", "prompt,completion"),
        ("d.json", b'[{"prompt": "a", "completion": "b"}, 3]', ", item 2", "is a int"),
        ("d.json", b'[{"prompt": "a", \n', "", "is not JSON in UTF-8"),
        ("d.json", b'{\n"prompt": "a"\n}', "", "has the keys prompt, which are no format's"),
        ("d.jsonl", b'{"prompt": "a", "completion": "b"\n{"prompt": "c"}', ":1", "is not JSON"),
        ("d.jsonl", b'[{"prompt": "a",\n"completion": 3}, 3]', ", item 1", "must be text"),
        ("d.json", b'{"text": "a", "text": "b"}', ":1", "'text' stands twice"),
        ("d.jsonl", b'{"text": "a"}\n{"text": "a", "text": "b"}', ":2", "'text' stands twice"),
        ("d.jsonl", b"[" * 100_000, ":1", "is not JSON in UTF-8"),
    ],
)
def test_broken_files_name_the_place(tmp_path, tokenizer, name, content, place, expected):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        load_dataset(path, tokenizer, 64)
    assert caught.value.message.startswith(f"{path}{place}")
    assert expected in caught.value.message


@pytest.mark.parametrize(("name", "content"), [("d.csv", HEADER), ("d.json", b"[]"), ("d", b"")])
def test_files_without_rows_are_refused(tmp_path, tokenizer, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match="holds no example"):
        load_dataset(tmp_path / name, tokenizer, 64)


CHATS = [
    {"messages": [{"role": "user", "content": f"question {n}"},
                  {"role": "assistant", "content": f"answer {n}"}]}
    for n in range(3)
]  # fmt: skip


@pytest.mark.parametrize("options", [{}, {"row_group_size": 2, "compression": "zstd"}])
@pytest.mark.parametrize("rows", [ROWS, CHATS])
def test_parquet_is_what_jsonl_is(tmp_path, tokenizer, monkeypatch, rows, options):
    monkeypatch.setattr("lora_runtime.training.rows.ROWS_AT_ONCE", 2)
    path = tmp_path / "d.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, **options)
    found = list(read_rows(path))
    assert [row for _, row in found] == rows
    assert [where for where, _ in found] == [f"{path}, row {n}" for n in (1, 2, 3)]
    as_jsonl = write_jsonl(tmp_path / "d.jsonl", rows)
    digests = {load_dataset(path, tokenizer, 256).digest for path in (path, as_jsonl)}
    assert len(digests) == 1


def test_keys_that_only_other_messages_have_are_none(tmp_path):
    """A chat template may ask whether there is a `name`."""
    messages = [[{"role": "user", "name": "Ann"}, {"role": "assistant", "content": "hi"}]]
    pyarrow.parquet.write_table(pyarrow.table({"messages": messages}), tmp_path / "d.parquet")
    ((_, row),) = read_rows(tmp_path / "d.parquet")
    assert row == {"messages": messages[0]}


def parquet_file(path, columns, names=None):
    table = pyarrow.table(columns)
    pyarrow.parquet.write_table(table.rename_columns(names) if names else table, path)
    return path


TODAY = datetime.date(2026, 11, 24)


@pytest.mark.parametrize(
    ("columns", "names", "expected"),
    [
        ({"prompt": ["a", "b"], "completion": ["c", None]}, None, ", row 2: completion is None"),
        (
            {"prompt": [TODAY], "completion": ["c"]},
            None,
            r", row 1: .*date.*make text of it: prompt",
        ),
        (
            {"prompt": ["a"], "completion": [b"c"]},
            None,
            r", row 1: .*bytes.*make text of it: .*completion",
        ),
        ({"text": [decimal.Decimal("1.5")]}, None, r", row 1: .*Decimal.*make text of it: text"),
        ({"text": [1.5]}, None, ", row 1: text is 1.5; it must be text"),
        ({"messages": [[{"role": "user", "content": b"x"}]]}, None, ", row 1: .*bytes"),
        ({"a": ["x"], "b": ["y"]}, ["text", "text"], "names a column twice"),
    ],
)
def test_parquet_values_that_are_no_text_name_the_row(
    tmp_path, tokenizer, columns, names, expected
):
    path = parquet_file(tmp_path / "d.parquet", columns, names)
    with pytest.raises(DataError, match=f"^{path}.*{expected}"):
        load_dataset(path, tokenizer, 64)


def test_columns_that_are_not_used_may_hold_anything(tmp_path, tokenizer):
    columns = {"text": ["a fox"], "at": [TODAY], "raw": [b"x"]}
    dataset = load_dataset(parquet_file(tmp_path / "d.parquet", columns), tokenizer, 64)
    assert len(dataset.examples) == 1


@pytest.mark.parametrize("damage", ["no parquet", "cut", "page"])
def test_broken_parquet_is_a_data_error(tmp_path, tokenizer, damage):
    path = parquet_file(tmp_path / "d.parquet", {"text": [f"fox number {n}" for n in range(500)]})
    content = path.read_bytes()
    damaged = {"no parquet": b"text\n" * 9, "cut": content[:-40], "page": None}[damage]
    path.write_bytes(damaged or content[:4] + bytes(200) + content[204:])
    with pytest.raises(DataError, match=f"{path} is no whole Parquet file: ."):
        load_dataset(path, tokenizer, 64)
    with pytest.raises(DataError, match="missing.parquet cannot be read: No such file"):
        load_dataset(tmp_path / "missing.parquet", tokenizer, 64)


def test_without_pyarrow_the_extra_is_named(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DataError, match=r"is Parquet.*install loramux\[parquet\]"):
        load_dataset(tmp_path / "d.parquet", tokenizer, 64)

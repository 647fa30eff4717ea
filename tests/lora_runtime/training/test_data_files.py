"""File kinds: the same examples whatever holds them, and errors with their place."""

from __future__ import annotations

import csv
import json

import pytest

from lora_runtime.errors import DataError
from lora_runtime.training.data import load_dataset
from lora_runtime.training.data.rows import read_rows
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
LONG = b"a" * 200_000


@pytest.mark.parametrize(
    ("name", "content", "place", "expected"),
    [
        ("d.csv", HEADER + b"a,b\na,b,c\n", ":3", "3 cells and the header 2"),
        ("d.csv", HEADER + b"a\n", ":2", "1 cells and the header 2"),
        ("d.csv", HEADER + b'a,b\n\n"a,b\nc,d\n', ":4", "no record of the table"),
        ("d.csv", HEADER + b'a,"b"c\n', ":2", "no record of the table"),
        ("d.csv", HEADER + b"a,b\n" + LONG + b",b\n", ":3", "field larger than field limit"),
        ("d.csv", HEADER + b"a,\xff\n", ":2", "not UTF-8"),
        ("d.csv", b"prompt,prompt\na,b\n", ":1", "names a column twice"),
        ("d.csv", b"what,why\na,b\n", ":2", "has the keys what, why, which are no format's"),
        ("d.csv", HEADER + b"a,b\na,\n", ":3", "completion is empty"),
        ("d.tsv", HEADER + b"a,b\n", ":2", "prompt,completion"),
        ("d.json", b'[{"prompt": "a", "completion": "b"}, 3]', ", item 2", "is a int"),
        ("d.json", b'[{"prompt": "a", \n', "", "is not JSON in UTF-8"),
        ("d.json", b'{\n"prompt": "a"\n}', ":1", "is not JSON in UTF-8"),
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


def test_parquet_is_refused_with_a_way_out(tmp_path, tokenizer):
    with pytest.raises(DataError, match="is Parquet.*lines=True"):
        load_dataset(tmp_path / "d.parquet", tokenizer, 64)

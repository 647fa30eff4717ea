"""Held-out examples: which they are, and what a run does with them."""

from __future__ import annotations

import csv
import json

import pytest

from lora_runtime.errors import ConfigError, DataError
from lora_runtime.training.config import UnitConfig
from lora_runtime.training.data import load_all, load_dataset, load_datasets
from tests.lora_runtime.training.tiny_runs import (
    quiet_console,
    ragged_data,
    run,
    shown,
    write_jsonl,
)


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def texts(dataset, tokenizer):
    return [tokenizer.decode(example.token_ids) for example in dataset.examples]


def split(path, tokenizer, fraction=0.3, **options):
    config = UnitConfig(name="u", data=path, eval_fraction=fraction, **options)
    return [texts(dataset, tokenizer) for dataset in load_datasets(config, tokenizer, 256)]


def test_a_fraction_is_held_out_and_nothing_is_lost(tmp_path, tokenizer):
    path = ragged_data(tmp_path / "d", 400)
    train, held_out = split(path, tokenizer)
    assert 80 <= len(held_out) <= 160
    assert sorted(train + held_out) == sorted(texts(load_dataset(path, tokenizer, 256), tokenizer))
    assert not set(train) & set(held_out)


def test_added_and_moved_rows_leave_the_others_where_they_are(tmp_path, tokenizer):
    rows = rows_of(ragged_data(tmp_path / "d", 60))
    train, held_out = split(tmp_path / "d", tokenizer)
    more = rows_of(ragged_data(tmp_path / "more", 30, seed=9))
    mixed = write_jsonl(tmp_path / "mixed", [*more[:7], *rows[::-1], *more[7:]])
    train_of_mixed, held_out_of_mixed = split(mixed, tokenizer)
    assert set(train) <= set(train_of_mixed) and set(held_out) <= set(held_out_of_mixed)


def test_equal_rows_stay_together_whatever_else_they_hold(tmp_path, tokenizer):
    rows = rows_of(ragged_data(tmp_path / "d", 60))
    doubled = [{**row, "id": number} for number, row in enumerate([*rows, *rows])]
    train, held_out = split(write_jsonl(tmp_path / "doubled", doubled), tokenizer)
    assert not set(train) & set(held_out)


def test_an_empty_field_is_as_a_missing_one(tmp_path, tokenizer):
    rows = [{"instruction": row["prompt"], "output": row["completion"]}
            for row in rows_of(ragged_data(tmp_path / "d", 60))]  # fmt: skip
    without = split(write_jsonl(tmp_path / "without", rows), tokenizer)
    empty = write_jsonl(tmp_path / "empty", [{**row, "input": ""} for row in rows])
    assert split(empty, tokenizer) == without


def test_the_same_rows_are_held_out_of_another_kind_of_file_and_of_a_larger_share(
    tmp_path, tokenizer
):
    rows = rows_of(ragged_data(tmp_path / "d", 60))
    with (tmp_path / "d.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["question", "answer"])
        writer.writerows(row.values() for row in rows)
    columns = {"prompt": "question", "completion": "answer"}
    train, held_out = split(tmp_path / "d", tokenizer)
    assert split(tmp_path / "d.csv", tokenizer, columns=columns) == [train, held_out]
    assert set(held_out) < set(split(tmp_path / "d", tokenizer, 0.6)[1])


def test_mistakes_are_named(tmp_path, tokenizer):
    path = ragged_data(tmp_path / "d", 3)
    with pytest.raises(DataError, match="eval_fraction 0.0001 leaves 3 examples .* 0 held out"):
        split(path, tokenizer, 0.0001)
    other = write_jsonl(tmp_path / "o", [{"text": "the dog"}])
    with pytest.raises(DataError, match="is text and .* completion") as caught:
        load_datasets(UnitConfig(name="u", data=path, eval_data=other), tokenizer, 256)
    assert caught.value.field == "eval_data"
    with pytest.raises(ConfigError, match="eval_fraction is 0.1; it must be 0 beside eval_data"):
        UnitConfig(name="u", data=path, eval_data=other, eval_fraction=0.1)
    with pytest.raises(ConfigError, match="eval_fraction is 1; it must be below 1"):
        UnitConfig(name="u", data=path, eval_fraction=1)


def test_units_share_data_only_where_they_ask_for_the_same(tmp_path, tokenizer):
    path = ragged_data(tmp_path / "d", 30)
    units = [
        UnitConfig(name="a", data=path, eval_fraction=0.3),
        UnitConfig(name="b", data=path, eval_fraction=0.3, rank=2),
        UnitConfig(name="c", data=path),
    ]
    a, b, c = load_all(units, tokenizer, 256)
    assert a[0] is b[0] and a[1] is b[1]
    assert c[1] is None and len(c[0].examples) == len(a[0].examples) + len(a[1].examples)


def test_a_run_evaluates_what_it_holds_out_and_reports_both(tmp_path, tokenizer, base):
    path = ragged_data(tmp_path / "d", 30)
    console = quiet_console()
    unit = UnitConfig(name="u", data=path, eval_fraction=0.3, rank=2, max_steps=2)
    (result,) = run(base, tokenizer, tmp_path / "out", [unit], console=console)
    assert len(result.eval_records) == 1
    train, held_out = load_datasets(unit, tokenizer, 256)
    table = [line.split() for line in shown(console).splitlines()]
    for name, dataset in ((["u"], train), (["held", "out"], held_out)):
        masked = 1 - dataset.num_target_tokens / dataset.num_tokens
        longest = max(len(example.token_ids) for example in dataset.examples)
        assert table.count([
            *name, path.name, "completion", str(len(dataset.examples)), "0", "0",
            f"{dataset.num_tokens:,}", f"{masked:.0%}", str(longest),
        ]) == 1  # fmt: skip

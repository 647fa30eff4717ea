"""The benchmark of training writes its parts, and compares losses of one order of examples only."""

from __future__ import annotations

import json

import pytest

from tests.bench.running import tiny_folder
from tests.fork_server import run_program


def run_training(tmp_path, *more: str):
    data = tmp_path / "data.csv"
    rows = (f"where is card number {n} of {n % 7},card_{n % 5}" for n in range(300))
    data.write_text("\n".join(["text,category", *rows]) + "\n")
    command = [
        "-m", "bench.training", "--data", data, "--base", tiny_folder(tmp_path), "--out",
        tmp_path / "out", "--updates", "3", "--batch", "4", "--unit-batch", "2", "--held-out", "8",
        "--threads", "1", *more,
    ]  # fmt: skip
    return run_program(command, timeout=280)


@pytest.mark.timeout(300)
def test_parts_that_are_asked_for_are_in_the_result(tmp_path):
    done = run_training(tmp_path, "--parts", "dtypes", "--dtype", "bfloat16")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    result = json.loads(done.stdout.splitlines()[-1])
    (file,) = (tmp_path / "out").glob("training-*.json")
    assert result == json.loads(file.read_text())
    beside = result["bfloat16 beside float32"]
    assert beside["bfloat16"]["held_out_loss"] == pytest.approx(
        beside["float32"]["held_out_loss"], rel=0.05
    )
    assert min(beside["bfloat16"]["tokens_per_s"], beside["float32"]["tokens_per_s"]) > 0
    assert beside["ratio"] > 0 and "date" in result
    assert not {"LoRA", "DoRA", "four units at once"} & result.keys()


@pytest.mark.timeout(300)
def test_losses_of_another_order_of_examples_are_not_compared(tmp_path):
    layout = "--kinds", "LoRA", "--peer-layouts", "grouped", "--peer-sizes", "4"
    done = run_training(tmp_path, "--parts", "peer", "--dtype", "float32", *layout)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    result = json.loads(done.stdout.splitlines()[-1])
    sides = [result["LoRA"][name] for name in ("peer", "ours", "ours, NF4")]
    assert [side["loss_over_peer"] for side in sides] == [None] * 3
    assert "not comparable" in done.stderr


def test_bfloat16_beside_float32_needs_bfloat16(tmp_path):
    done = run_training(tmp_path, "--parts", "dtypes", "--dtype", "float32")
    assert done.returncode == 2 and "--parts dtypes: the dtype is float32" in done.stderr

"""A run that dies by SIGKILL, again and again, ends bit for bit as one that was left alone."""

from __future__ import annotations

import csv
import random

import pytest

from tests.fork_server import run_program
from tests.lora_runtime.training.killed_runs import configs_of
from tests.lora_runtime.training.tiny_runs import run


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tokenizer, base):
    """`killed`, where processes died, with what each left, and `whole`, a run without any."""
    killed, whole = (tmp_path_factory.mktemp(name) for name in ("killed", "whole"))
    seed = random.Random().randrange(1 << 32)
    module = ["-m", "tests.lora_runtime.training.killed_runs", killed, str(seed)]
    expected = run(base, tokenizer, whole / "out", configs_of(whole))
    done = run_program(module, timeout=100)
    print(f"seed {seed}; checkpoints after each death:\n{done.stdout}")
    assert done.returncode == 0, done.stderr
    return killed, whole, expected, done.stdout.splitlines()


def loss_rows(folder):
    """loss.csv without the seconds."""
    with (folder / "out" / "report" / "loss.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    seconds = rows[0].index("seconds")
    return [row[:seconds] + row[seconds + 1 :] for row in rows]


def curves(results):
    return [
        [record[:-1] for record in (*result.records, *result.eval_records)] for result in results
    ]


def test_a_run_survives_kill_9_at_any_moment(folders, tokenizer, base):
    """Six times at random, and three times while a checkpoint is written; the whole run has 81
    forwards and a checkpoint after every second one.
    """
    killed, whole, expected, left = folders
    assert len(left) == 9
    assert left[2].endswith(".tmp") and left[5].endswith(".tmp")
    assert left[8].count(" ") >= 2 and ".tmp" not in left[8]  # the oldest is half removed
    output = killed / "out"
    results = run(base, tokenizer, output, configs_of(killed), resume=True)
    assert curves(results) == curves(expected)
    assert [len(result.eval_records) for result in results] == [20, 7, 0]
    assert loss_rows(killed) == loss_rows(whole)
    for result in results:
        file = f"out/{result.name}/adapter_model.safetensors"
        assert (killed / file).read_bytes() == (whole / file).read_bytes()
    assert not (output / "checkpoints").exists()

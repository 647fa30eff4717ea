"""The benchmark for a GPU runs from end to end without one, and keeps rows whatever happens."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench.gpu_rows import Recorder, Table
from tests.fork_server import run_program

REPO = Path(__file__).parents[2]


def rows_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]


TABLES = {
    "kernels": {
        "checks", "ceilings", "products", "values", "adapters", "attention", "recurrent", "experts",
    },
    "engine": {"ceilings", "start", "decode", "steps", "prefill", "latency"},
    "serve": {"ceilings", "served", "graphs", "many", "memory", "formats"},
    "training": {"training"},
}  # fmt: skip


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("stages", "interpret"), [(["kernels"], "1"), (["engine", "serve", "training"], "0")]
)
def test_a_dry_run_passes(stages, interpret, tmp_path):
    command = ["-m", "bench.gpu", *stages, "--out", str(tmp_path)]
    if os.environ.get("TRITON_INTERPRET") == interpret:
        done = run_program(command, timeout=590)
    else:  # Triton reads it when it is imported
        environment = {**os.environ, "TRITON_INTERPRET": interpret}
        done = subprocess.run(
            [sys.executable, *command], cwd=REPO, env=environment, capture_output=True, text=True
        )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    rows = rows_of(tmp_path)
    assert {row["table"] for row in rows} == set().union(*(TABLES[stage] for stage in stages))
    assert not any("failed" in row or "left_out" in row for row in rows)
    assert all(row["error"] < 1e-2 for row in rows if row["table"] == "checks")
    assert json.loads((tmp_path / "facts.json").read_text())["torch"]


def test_a_used_folder_is_refused(tmp_path):
    """Else rows of one card could stand under another's facts."""
    Recorder(tmp_path, 60, facts={})
    with pytest.raises(FileExistsError, match="a new folder"):
        Recorder(tmp_path, 60, facts={})


def test_a_row_that_fails_costs_only_itself(tmp_path):
    def measure(divisor):
        return {"result": 6 / divisor}

    recorder = Recorder(tmp_path, 60, facts={})
    recorder.run(Table("divisions", lambda: [{"divisor": d} for d in (2, 0, 3)], measure))
    recorder.run(Table("no cases", lambda: 1 / 0, measure))
    two, zero, three, none = rows_of(tmp_path)
    assert (two["result"], three["result"]) == (3.0, 2.0) and recorder.num_failed == 2
    assert "ZeroDivisionError" in zero["failed"] and zero["divisor"] == 0
    assert none["table"] == "no cases" and "ZeroDivisionError" in none["failed"]


def test_a_run_that_is_late_says_what_it_left_out(tmp_path):
    recorder = Recorder(tmp_path, 60, facts={})

    def measure(case):
        recorder._end = 0
        return {}

    recorder.run(Table("slow", lambda: [{"case": 1}, {"case": 2}, {"case": 3}], measure))
    assert [row.get("left_out") for row in rows_of(tmp_path)] == [None, 2]

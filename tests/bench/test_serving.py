"""The benchmark of serving runs from end to end on a tiny base, keeps whole rounds when it is
stopped, and its floor counts bytes.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import math
import signal
import statistics
import time

import matplotlib.image
import pytest
from rich.console import Console

from bench import machine, serving, serving_picture, turns
from bench.serving_load import BASE, EIGHT, MANY, MIXES, RANKS, ZIPF, Batch, Ceilings, owners
from tests.bench.running import run_bench, tiny_folder
from tests.fork_server import start_program
from tests.tiny import tiny_base

SIZES = {"prompt-tokens": 9, "new-tokens": 6, "rounds": 2}


class Clock:
    """A side that takes as long as it is told, and is stopped by Ctrl-C when nothing is left."""

    name, cells, step_ms = "loramux", [(BASE, 1), (BASE, 32), (EIGHT, 32)], (4.0, 1.0)

    def __init__(self, seconds: list[float]) -> None:
        self.seconds = seconds

    def run(self, batch: Batch) -> float:
        if not self.seconds:
            raise KeyboardInterrupt
        return self.seconds.pop(0)


def measured(tmp_path, monkeypatch, seconds: list[float], num_rounds: int):
    """The result of a run whose reading grows tenfold every round, and what it printed."""
    calls, printed = iter(range(1000)), io.StringIO()

    def rate(*_: object) -> float:
        return 1e3 * 10 ** (next(calls) // (2 * serving.NUM_SAMPLES))

    monkeypatch.setattr(machine, "read_bandwidth", rate)
    monkeypatch.setattr(machine, "gemm_rate", rate)
    args = argparse.Namespace(rows=[1, 32], prompt_tokens=9, new_tokens=6, rounds=num_rounds)
    workload = serving.Workload.of(args, tiny_base("llama"), [Clock(seconds)])
    path, console = tmp_path / "serving-now.json", Console(file=printed)
    with turns.kept(path, console):
        serving.measure(workload, args, {"date": "now"}, path, console)
    return json.loads(path.read_text()), printed.getvalue()


def cells_of(result: dict) -> dict[tuple[str, str, int], dict]:
    return {(cell["side"], cell["mix"], cell["rows"]): cell for cell in result["cells"]}


@pytest.mark.timeout(300)
def test_every_side_makes_every_token(tmp_path):
    result = run_bench("bench.serving", tmp_path, SIZES, ["--rows", "1", "32"])
    (picture,) = (tmp_path / "out").glob("*.png")
    found = cells_of(result)
    for side, mixes in (
        ("loramux", MIXES), ("loramux over gRPC", (BASE, EIGHT)), ("transformers", (BASE,)),
    ):  # fmt: skip
        for mix in mixes:
            for rows in (1, 32):
                cell = found[side, mix, rows]
                assert len(cell["seconds"]) == SIZES["rounds"] and min(cell["seconds"]) >= 0
                assert 0 < cell["tokens_per_s"] < math.inf
    assert found["PEFT", EIGHT, 32]["tokens_per_s"] > 0
    assert found["floor", MANY, 32]["tokens_per_s"] < found["floor", BASE, 32]["tokens_per_s"]
    assert result["ratios"]["8 adapters over PEFT"] > 0
    assert result["ratios"]["base over OpenVINO"] is None, "it was not asked for"
    assert matplotlib.image.imread(picture).std() > 0.05, "the picture is blank"


def test_ctrl_c_keeps_the_rounds_that_are_whole(tmp_path, monkeypatch):
    seconds = [1.0] * 3 + [2.0] * 3 + [4.0] * 3 + [9.0]  # the warm-up, two rounds, one turn
    result, printed = measured(tmp_path, monkeypatch, seconds, num_rounds=5)
    assert result["rounds"] == 2
    assert cells_of(result)["loramux", BASE, 32]["seconds"] == [2.0, 4.0]
    assert cells_of(result)["loramux", BASE, 32]["tokens_per_s"] == 32 * 6 / 3.0
    assert [path.name for path in tmp_path.iterdir()] == ["serving-now.json"], "no half of a file"
    assert f"interrupted: the rounds that are whole are kept in {tmp_path}" in printed


def test_ctrl_c_in_the_warm_up_says_that_nothing_is_kept(tmp_path):
    printed, path = io.StringIO(), tmp_path / "none.json"
    with pytest.raises(SystemExit) as ended, turns.kept(path, Console(file=printed)):
        raise KeyboardInterrupt
    assert ended.value.code == 130 and "there is no result" in printed.getvalue()


def test_progress_says_the_figure_the_round_and_the_time_left(tmp_path, monkeypatch):
    _, printed = measured(tmp_path, monkeypatch, [2.0] * 6, num_rounds=1)
    lines = printed.splitlines()
    assert lines[0].startswith("2 rounds of 11 measurements") and "about 6 s" in lines[0]
    told = [line for line in lines if "loramux, base, 32 rows: 96 tokens/s" in line]
    assert [line.partition(",")[0] for line in told] == ["warm-up", "round 1 of 1"]
    assert all(" s left" in line for line in lines[1:-1])
    for line, then in itertools.pairwise(lines[1:-1]):
        _, has_next, label = line.partition("; next: ")
        assert not has_next or f": {label}: " in then, "the next one is another"
    assert lines[-1].startswith("1 round in ")


def test_a_floor_is_of_its_own_rounds_ceilings(tmp_path, monkeypatch):
    seconds = [1.0] * 3 + [2.0] * 3 + [4.0] * 3 + [6.0] * 3
    result, _ = measured(tmp_path, monkeypatch, seconds, num_rounds=3)
    rates = [1e4, 1e5, 1e6]  # the warm-up had 1e3
    assert result["ceilings_by_round"] == {"read_bytes_per_s": rates, "multiply_adds_per_s": rates}
    assert result["read_bytes_per_s"] == result["multiply_adds_per_s"] == 1e5
    floors = cells_of(result)["floor", BASE, 32]["seconds"]
    assert floors == pytest.approx([floors[0], floors[0] / 10, floors[0] / 100], rel=0.01)
    share = statistics.median(floors[i] / took for i, took in enumerate((2.0, 4.0, 6.0)))
    assert result["ratios"]["share of the floor, base"] == pytest.approx(share, rel=0.01)
    assert result["ratios"]["8 adapters over base"] == 1.0


@pytest.mark.timeout(300)
def test_a_real_ctrl_c_leaves_a_result_a_table_and_a_picture(tmp_path):
    command = [
        "-m", "bench.serving", "--base", tiny_folder(tmp_path), "--out", tmp_path / "out",
        "--prompt-tokens", "9", "--new-tokens", "6", "--rounds", "999", "--rows", "1", "--no-peers",
    ]  # fmt: skip
    with (tmp_path / "stdout").open("w+") as out, (tmp_path / "stderr").open("w+") as err:
        program = start_program(command, stdout=out.fileno(), stderr=err.fileno())
        try:
            while not [*(tmp_path / "out").glob("*.json")] and program.poll() is None:
                time.sleep(0.1)
            program.send_signal(signal.SIGINT)
            code = program.wait(timeout=120)
        finally:
            program.kill()
    printed = (tmp_path / "stderr").read_text()
    assert code == 130, printed[-3000:]
    (file,) = (tmp_path / "out").glob("*.json")
    result = json.loads(file.read_text())
    assert result == json.loads((tmp_path / "stdout").read_text().splitlines()[-1])
    assert 1 <= result["rounds"] < 999
    assert "output tokens/s, medians of" in printed and "Traceback" not in printed
    assert file.with_suffix(".png").exists()
    sides = {cell["side"] for cell in result["cells"]}
    assert sides == {"loramux", "loramux over gRPC", "floor"}, "--no-peers"


def test_no_peers_beside_a_peer_is_a_contradiction(capsys, monkeypatch):
    command = ["serving", "--no-peers", "--peer", "vllm=http://127.0.0.1:1"]
    monkeypatch.setattr("sys.argv", command)
    with pytest.raises(SystemExit):
        serving.parsed()
    assert (
        "--no-peers leaves out what --peer vllm=http://127.0.0.1:1 adds" in capsys.readouterr().err
    )


def test_a_picture_is_drawn_anew_from_a_result(tmp_path):
    (source,) = machine.RESULTS.glob("serving-2026-11-28T024731Z.json")
    copy = tmp_path / source.name
    copy.write_bytes(source.read_bytes())
    assert matplotlib.image.imread(serving_picture.draw(copy)).std() > 0.05
    copy.write_text('{"cells": [{"rows": 1}]}')
    with pytest.raises(SystemExit, match="has no cells with a mix"):
        serving_picture.draw(copy)


def test_rows_use_the_adapters_that_their_mix_says():
    assert owners(BASE, 3) == [None] * 3
    assert set(owners(EIGHT, 32)) == {None, *range(8)} and owners(EIGHT, 1) == [0]
    assert sorted(owners(MANY, 32)) == [*range(8, 40)]
    assert {RANKS[owner] for owner in owners(MANY, 32)} == {8, 16, 32, 64}
    drawn = owners(ZIPF, 32)
    assert len(set(drawn)) < 32 and max(map(drawn.count, drawn)) > 2


def test_where_reading_is_slow_an_adapter_costs_the_floor_its_bytes():
    base = tiny_base("llama")
    sides = sum(s.in_features + s.out_features for s in base.spec.linears.values())
    ceilings = Ceilings(bytes_per_s=1000.0, multiply_adds_per_s=math.inf)
    plain, mixed = (Batch(mix, 32, 9, 6, base.spec.vocab_size) for mix in (BASE, MANY))
    extra = ceilings.seconds(base, mixed) - ceilings.seconds(base, plain)
    num_bytes = 4 * sides * sum(RANKS[owner] for owner in set(owners(MANY, 32)))  # float32
    assert extra == pytest.approx(5 * num_bytes / 1000)  # the prompt's step reads nothing again
    assert ceilings.adapter_seconds(base, mixed) == pytest.approx(extra)


def test_a_base_that_multiplies_for_longer_than_it_reads_hides_no_adapter():
    base = tiny_base("llama")
    ceilings = Ceilings(bytes_per_s=1000, multiply_adds_per_s=2000)
    mixed, plain = (Batch(mix, 32, 9, 6, base.spec.vocab_size) for mix in (EIGHT, BASE))
    sides = sum(s.in_features + s.out_features for s in base.spec.linears.values())
    num_bytes = 4 * sides * sum(RANKS[o] for o in {*mixed.owners()} - {None})  # float32
    found = ceilings.adapter_seconds(base, mixed)
    assert found > 5 * num_bytes / 1000  # and the prompt's products
    assert found > ceilings.seconds(base, mixed) - ceilings.seconds(base, plain)

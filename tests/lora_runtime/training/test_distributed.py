"""Two processes on CPUs, started as torchrun does, make the run that one process makes."""

from __future__ import annotations

import json

import pytest
from safetensors.torch import load_file

from lora_runtime.config import BaseConfig
from lora_runtime.errors import ConfigError
from lora_runtime.training.data import balanced
from lora_runtime.training.distributed import ALONE, joined
from tests.fork_server import run_program
from tests.lora_runtime.training.distributed_runs import Runs


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer, exact_base):
    """The runs of one process in `one`, those of two in `two`."""
    folder = tmp_path_factory.mktemp("distributed")
    for name in ("one", "two"):
        (folder / name).mkdir()
    module = ["-m", "tests.lora_runtime.training.distributed_runs", folder / "two"]
    done = run_program(module, timeout=100)
    assert done.returncode == 0, done.stderr
    Runs(folder / "one", exact_base, tokenizer).run("whole", "out")
    return folder


def facts_of(folder, name):
    return json.loads((folder / f"{name}.json").read_text())


def assert_close(ours, theirs):
    """Every number of every update and evaluation: losses, rates, clip norms, token counts."""
    for unit in ("lora", "dora", "dpo", "tiny"):
        assert ours[unit]["status"] == theirs[unit]["status"] == "done"
        for kind in ("records", "evaluations"):
            for one, other in zip(ours[unit][kind], theirs[unit][kind], strict=True):
                if unit == "dpo" and one[0] == 1:
                    one[2] = other[2]  # rounding decides which margins of 0 are above it
                assert one == pytest.approx(other, abs=1e-10)
    assert len(theirs["dora"]["evaluations"]) == 2


@pytest.mark.parametrize("name", ["resumed", "short"])
@pytest.mark.parametrize("rank", [0, 1])
def test_two_processes_do_what_one_does(folder, name, rank):
    """When stopped (as the second one wishes) and resumed, and when that one lacks memory."""
    expected = load_file(folder / "one" / "whole-0.safetensors")
    found = load_file(folder / "two" / f"{name}-{rank}.safetensors")
    assert found.keys() == expected.keys()
    assert max((found[key] - expected[key]).abs().max() for key in expected) <= 1e-10
    theirs = facts_of(folder / "one", "whole-0")
    assert_close(facts_of(folder / "two", f"{name}-{rank}"), theirs)
    norms = [record[5] for record in theirs["lora"]["records"]]
    assert max(norms) > 0.5  # clipped


def test_processes_stop_together_and_inside_an_update(folder):
    first, second = (facts_of(folder / "two", f"stopped-{rank}") for rank in (0, 1))
    assert {facts[unit]["status"] for facts in (first, second) for unit in ("lora", "tiny")} == {
        "running"
    }
    assert len(first["tiny"]["records"]) == len(second["tiny"]["records"]) == 3
    assert len(first["lora"]["records"]) == 1  # of two forwards a process


def test_the_first_writes_and_shows(folder):
    """What the second one lacks the first one says."""
    assert "out of memory; from here on" in facts_of(folder / "two", "short-0")["shown"]
    output = folder / "two" / "short"
    assert (output / "lora" / "adapter_model.safetensors").exists()
    assert (output / "report" / "summary.md").exists() and not (output / "checkpoints").exists()


@pytest.mark.parametrize("num_shares", [1, 2, 3, 7])
def test_shares_are_whole_ordered_and_balanced(num_shares):
    lengths = [5, 30, 7, 7, 1, 12, 28, 3, 9]
    shares = balanced(lengths, num_shares)
    assert sorted(place for share in shares for place in share) == list(range(len(lengths)))
    assert all(share == sorted(share) for share in shares)
    sums = [sum(lengths[place] for place in share) for share in shares]
    assert max(sums) - min(sums) <= max(lengths)
    if num_shares == 2:
        assert sums == [51, 51]
    assert balanced([3], 2) == [[0], []]


def test_one_process_is_a_world_of_its_own(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    config = BaseConfig()
    with joined(config) as (world, same):
        assert world == ALONE and same is config
    assert ALONE.is_main and ALONE.any(True) and not ALONE.any(False)


def test_processes_take_their_own_device(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="leave it at auto") as caught:
        with joined(BaseConfig(device="cuda:1")):
            pass
    assert caught.value.field == "device"

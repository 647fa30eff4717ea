"""Sweeps: which units they become, who is stopped when, who wins, and resuming in between."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lora_runtime.errors import ConfigError
from lora_runtime.training import sweep
from lora_runtime.training import units as trained_units
from lora_runtime.training.config import TrainConfig, UnitConfig
from lora_runtime.training.held_out import EvalRecord
from lora_runtime.training.sweep import expand
from lora_runtime.training.trainer import create_units, read_data
from lora_runtime.training.units import Unit, UnitStatus
from tests.lora_runtime.training.tiny_runs import (
    StopAfter,
    quiet_console,
    ragged_data,
    run,
    shown,
)
from tests.tiny import tiny_base, tiny_checkpoint

RATES = (1e-6, 1e-2, 1e-5, 3e-3)


def swept(tmp_path, **options):
    values = dict(
        name="u", data=ragged_data(tmp_path / "d", 8, seed=1), rank=2, max_steps=12,
        eval_data=ragged_data(tmp_path / "e", 6, seed=2), sweep={"learning_rate": RATES},
    )  # fmt: skip
    return UnitConfig(**{**values, **options})


def other(tmp_path):
    return UnitConfig(name="other", data=ragged_data(tmp_path / "o", 5, seed=3), max_steps=9)


def test_a_unit_becomes_one_for_every_combination(tmp_path):
    unit = swept(tmp_path, sweep={"lr": (1e-4, "3e-4"), "rank": (4, 8)})
    units, sweeps = expand([other(tmp_path), unit])
    names = ["u-lr=0.0001-rank=4", "u-lr=0.0001-rank=8", "u-lr=0.0003-rank=4", "u-lr=0.0003-rank=8"]
    assert [member.name for member in units] == ["other", *names]
    assert sweeps == {"u": names}
    assert [(u.learning_rate, u.rank) for u in units[1:]] == [
        (1e-4, 4), (1e-4, 8), (3e-4, 4), (3e-4, 8),
    ]  # fmt: skip
    assert all(member.data == unit.data and not member.sweep for member in units[1:])


@pytest.mark.parametrize(
    ("values", "field", "message"),
    [
        ({"learning_rat": [1e-4, 1e-3]}, "sweep.learning_rat", "did you mean 'learning_rate'"),
        ({"data": ["a", "b"]}, "sweep.data", "is not a field to sweep"),
        ({"rank": ["wide", 4]}, "sweep.rank", "it must be a whole number"),
        ({"rank": [0, 4]}, "rank", "at least 1"),
        ({"rank": [4]}, "sweep", "two or more different"),
        ({"rank": [4, 4]}, "sweep", "two or more different"),
    ],
)
def test_mistakes_are_named(tmp_path, values, field, message):
    with pytest.raises(ConfigError, match=message) as caught:
        expand([swept(tmp_path, sweep={key: tuple(found) for key, found in values.items()})])
    assert caught.value.field == field


def test_yaml_takes_a_sweep(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(
        "output: out\nunits: [{name: u, data: d, sweep: {learning_rate: [1e-4, 0.001], rank: [4]}}]"
    )
    (unit,) = TrainConfig.from_yaml(path).units
    assert unit.sweep == {"learning_rate": ("1e-4", 0.001), "rank": (4,)}
    assert [member.learning_rate for member in expand([unit])[0]] == [1e-4, 1e-3]
    path.write_text("output: out\nunits: [{name: u, data: d, sweep: {rank: 4}}]")
    with pytest.raises(ConfigError, match="rank is 4; it must be a list"):
        TrainConfig.from_yaml(path)


def test_a_sweep_needs_held_out_data(tmp_path, tokenizer, base):
    with pytest.raises(ConfigError, match="sweep needs held-out data") as caught:
        run(base, tokenizer, tmp_path / "out", [swept(tmp_path, eval_data=None)])
    assert caught.value.field == "sweep"


def test_the_worse_half_stops_and_the_best_is_exported(tmp_path, tokenizer, base):
    output, console = tmp_path / "out", quiet_console()
    results = run(base, tokenizer, output, [swept(tmp_path), other(tmp_path)], console=console)
    for name in ("u-lr=1e-06", "u-lr=1e-05", "u-lr=0.003"):
        assert any(name in line and "stopped: behind u-lr=0.01" in line for line in
                   shown(console).splitlines())  # fmt: skip
    by_name = {result.name: result for result in results}
    assert list(by_name) == [
        "u-lr=1e-06", "u-lr=0.01", "u-lr=1e-05", "u-lr=0.003", "other", "u",
    ]  # fmt: skip
    slow, winner, slower, second = (by_name[name] for name in list(by_name)[:4])
    for result in (slow, slower):
        assert result.status is UnitStatus.STOPPED and len(result.records) == 3
        assert result.folder is None and not (output / result.name).exists()
        assert result.note == "behind u-lr=0.01 after update 3"
    assert second.status is UnitStatus.STOPPED and len(second.records) == 6
    assert winner.status is UnitStatus.DONE and winner.sweep == "u"
    assert [record.step for record in winner.eval_records] == [3, 6, 12]
    assert by_name["u"].folder == output / "u" and by_name["u"].sweep is None
    assert by_name["u"].note == "the best of its sweep: u-lr=0.01"
    for file in ("adapter_model.safetensors", "adapter_config.json", "loramux_parity.json"):
        assert (output / "u" / file).read_bytes() == (output / winner.name / file).read_bytes()
    assert by_name["other"].status is UnitStatus.DONE and len(by_name["other"].records) == 9


@pytest.mark.parametrize("init", ["loftq", "pissa_niter_2", "default"])
def test_members_of_a_sweep_find_their_start_once(tmp_path, tokenizer, monkeypatch, init):
    base = tiny_base("llama", folder=tiny_checkpoint(tmp_path / "base"))
    unit = swept(tmp_path, init=init, use_dora=True, sweep={"lr": (1e-3, 1e-2), "rank": (2, 3)})
    units, sweeps = expand([unit])
    config = TrainConfig(output=tmp_path, units=units, max_seq_len=256)
    found = []
    real = trained_units.start_modules
    monkeypatch.setattr(
        trained_units, "start_modules", lambda c, *rest: found.append(c.rank) or real(c, *rest)
    )
    made = create_units(base, read_data(config, tokenizer), config, sweeps)
    assert found == [2, 3]
    for member in made:
        alone = Unit(member.config, member.dataset, base, seed=member.seed)
        for name, value in alone.named_parameters().items():
            assert torch.equal(member.named_parameters()[name], value)
    parameters = [parameter for member in made for parameter in member.parameters]
    assert len({parameter.data_ptr() for parameter in parameters}) == len(parameters)


def test_members_equal_runs_of_their_own(tmp_path, tokenizer, exact_base):
    unit = swept(tmp_path)
    together = {
        result.name: result for result in run(exact_base, tokenizer, tmp_path / "a", [unit])
    }
    for config in expand([unit])[0]:
        (alone,) = run(exact_base, tokenizer, tmp_path / config.name, [config])
        for ours, theirs in zip(together[config.name].records, alone.records, strict=False):
            assert ours.loss == pytest.approx(theirs.loss, abs=1e-9)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, tokenizer, base):
    folder = tmp_path_factory.mktemp("whole")
    return run(base, tokenizer, folder / "out", [swept(folder), other(folder)])


@pytest.mark.parametrize("num_passes", [2, 3, 5, 6, 11])
def test_resume_within_a_sweep(tmp_path, tokenizer, base, uninterrupted, num_passes):
    units, output, whole = [swept(tmp_path), other(tmp_path)], tmp_path / "out", uninterrupted
    stopped = run(base, tokenizer, output, units, should_stop=StopAfter(num_passes))
    assert "u" not in [result.name for result in stopped]
    resumed = run(base, tokenizer, output, units, resume=True)
    assert [(r.name, r.status, r.note) for r in resumed] == [
        (r.name, r.status, r.note) for r in whole
    ]
    for ours, theirs in zip(resumed, whole, strict=True):
        assert [r.loss for r in ours.eval_records] == [r.loss for r in theirs.eval_records]
        assert [r.loss for r in ours.records] == [r.loss for r in theirs.records]
    ours, theirs = (
        load_file(results[-1].folder / "adapter_model.safetensors") for results in (resumed, whole)
    )
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


class Member:
    """A unit reduced to what halving looks at."""

    def __init__(self, name: str, losses: list[float], num_steps: int = 8) -> None:
        self.name, self.num_steps, self.step = name, num_steps, 0
        self.status, self.note, self._losses = UnitStatus.RUNNING, None, losses
        config = UnitConfig(name=name, data=Path("d"))
        self.held_out = sweep.HeldOut(config, None)

    @property
    def is_running(self):
        return self.status is UnitStatus.RUNNING

    def end(self, status, note):
        self.status, self.note = status, note

    def advance(self, count: int = 1) -> None:
        for _ in range(count if self.is_running else 0):
            self.step += 1
            self.held_out.note(EvalRecord(self.step, self._losses[self.step - 1], None, 0.0), [])
            if self.step == self.num_steps:
                self.status = UnitStatus.DONE


def statuses(members):
    return "".join(str(member.status)[0] for member in members)


def members(*losses):
    return [Member(chr(ord("a") + i), [value] * 8) for i, value in enumerate(losses)]


def halve(units):
    sweep.stop_losers(units, {"u": [unit.name for unit in units]})


@pytest.mark.parametrize(
    ("losses", "first", "second"),
    [
        ([4, 3, 2, 1], "ssrr", "sssr"),
        ([1, 1, 1, 1], "rrss", "rsss"),  # level: the first stay
        ([3, 1, 2], "srr", "srs"),
        ([2, 1], "sr", "sr"),
        ([math.nan, 5, math.inf, 4], "srsr", "sssr"),
        ([5, 1, 4, 2, 3], "srsrr", "srsrs"),
    ],
)
def test_halving(losses, first, second):
    units = members(*losses)
    for expected in ("r" * len(units), first, first, second):
        for unit in units:
            unit.advance()
        halve(units)
        halve(units)  # deciding again changes nothing
        assert statuses(units) == expected


def test_nobody_is_judged_before_all_have_come():
    units = members(1, 2, 3)
    units[0].advance(5)
    units[1].advance(2)
    units[2].advance(1)
    halve(units)
    assert statuses(units) == "rrr"
    units[2].advance(1)
    halve(units)
    assert statuses(units) == "rrs"


def test_later_losses_of_a_faster_member_do_not_count():
    fast, slow = Member("a", [5, 5, 0, 0, 0, 0, 0, 0]), Member("b", [4] * 8)
    fast.advance(6)
    slow.advance(2)
    halve([fast, slow])
    assert statuses([fast, slow]) == "sr"


def test_a_member_that_failed_takes_no_place():
    units = members(1, 2, 3)
    units[0].status = UnitStatus.FAILED
    for unit in units:
        unit.advance(2)
    halve(units)
    assert statuses(units) == "frs"


def test_a_field_is_swept_once_and_by_what_its_name_means(tmp_path):
    def unit(sweep):
        return UnitConfig(name="a", data=tmp_path / "x", eval_fraction=0.5, sweep=sweep)

    with pytest.raises(ConfigError, match="sweep names learning_rate twice"):
        expand([unit({"lr": (1e-4, 1e-3), "learning_rate": (1e-2, 1e-1)})])
    with pytest.raises(ConfigError, match="sweep.warmup_ratio is 5; it must be below 1"):
        expand([unit({"warmup_ratio": (5, 6)})])
    members, _ = expand([unit({"warmup_ratio": (0.1, 0.2)})])
    assert [member.warmup for member in members] == [0.1, 0.2]

"""No update is lost to the schedule, and an adapter that does nothing or got worse says so."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from safetensors.torch import load_file
from transformers import get_scheduler

from lora_runtime.training.config import Schedule, UnitConfig
from lora_runtime.training.schedule import create_schedule
from tests.lora_runtime.training.tiny_runs import (
    preferences,
    quiet_console,
    ragged_data,
    run,
    shown,
    write_jsonl,
)


def rates(config, num_steps):
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    schedule = create_schedule(config, optimizer, num_steps)
    found = []
    for _ in range(num_steps):
        found.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    return found


WARMUPS = [0, 0.03, 0.5, 1, 5, 1000]


@pytest.mark.parametrize(
    ("name", "warmup"),
    [
        (name, w)
        for name in get_args(Schedule)
        for w in WARMUPS[: 2 if name == "constant" else None]
    ],
)
@pytest.mark.parametrize("num_steps", [1, 2, 33, 100])
def test_every_update_has_a_rate(tmp_path, name, warmup, num_steps):
    config = UnitConfig(name="u", data=tmp_path, schedule=name, warmup=warmup)
    found = rates(config, num_steps)
    assert all(0 < rate <= 1 for rate in found)
    if name == "constant":
        assert found == [1] * num_steps
    num_warmup = min(config.num_warmup_steps(num_steps), num_steps)
    rises = found[: num_warmup + 1]
    assert rises == sorted(rises)


@pytest.mark.parametrize("name", get_args(Schedule))
def test_after_the_warm_up_it_is_that_of_transformers(tmp_path, name):
    warmup = 0 if name == "constant" else 7
    config = UnitConfig(name="u", data=tmp_path, schedule=name, warmup=warmup)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = get_scheduler(name, optimizer, 7, 60).lr_lambdas[0]
    assert rates(config, 60)[7:] == [theirs(step) for step in range(7, 60)]


@pytest.mark.parametrize("data", [ragged_data, preferences])
@pytest.mark.parametrize("options", [{}, {"variant": "dora"}, {"init": "pissa"}])
def test_a_run_of_one_update_learns(tmp_path, tokenizer, base, data, options):
    config = UnitConfig(name="u", data=data(tmp_path / "d", 4), rank=2, **options)
    console = quiet_console()
    (result,) = run(base, tokenizer, tmp_path / "out", [config], console=console)
    assert len(result.records) == 1 and result.records[0].learning_rate > 0
    tensors = load_file(result.folder / "adapter_model.safetensors")
    assert all(value.any() for name, value in tensors.items() if name.endswith("lora_B.weight"))
    assert result.warnings == () and "warning" not in shown(console)


def warnings_in(output):
    page = (output / "report" / "summary.md").read_text()
    return [line.removeprefix("- warning: ") for line in page.splitlines() if "warning: " in line]


@pytest.mark.parametrize(
    "options",
    [{}, {"use_dora": True}, {"init": "pissa"}, {"target_modules": ("q_proj", "embed_tokens")}],
)
def test_an_adapter_that_changes_nothing_says_so(tmp_path, tokenizer, base, monkeypatch, options):
    config = UnitConfig(
        name="u", data=ragged_data(tmp_path / "d", 4), rank=2, max_steps=2, **options
    )
    monkeypatch.setattr(
        "lora_runtime.training.units.create_schedule",
        lambda _, optimizer, __: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 0.0),
    )
    console = quiet_console()
    (result,) = run(base, tokenizer, tmp_path / "out", [config], console=console)
    assert any("changes nothing: B·A is 0" in warning for warning in result.warnings)
    assert tuple(warnings_in(tmp_path / "out")) == result.warnings
    assert "u: warning: it changes nothing" in shown(console)


def test_a_loss_that_rose_is_said(tmp_path, tokenizer, base):
    """Every update reads all of the data, so that only the weights move the loss."""
    config = UnitConfig(
        name="u", data=ragged_data(tmp_path / "d", 8), rank=4, max_steps=2, learning_rate=3.0,
        schedule="constant", micro_batch_size=8, eval_interval=1, export="last",
        eval_data=ragged_data(tmp_path / "e", 4, seed=9),
    )  # fmt: skip
    console = quiet_console()
    (result,) = run(base, tokenizer, tmp_path / "out", [config], console=console)
    first, last = (record.loss for record in result.records)
    assert last > first
    assert f"its loss rose from {first:.4f} to {last:.4f}" in result.warnings[0]
    assert "u: warning: its loss rose from" in shown(console)
    assert tuple(warnings_in(tmp_path / "out")) == result.warnings
    sound = UnitConfig(
        name="v", data=config.data, rank=4, max_steps=6, micro_batch_size=8, learning_rate=1e-2
    )
    (result,) = run(base, tokenizer, tmp_path / "sound", [sound])
    assert result.warnings == ()


def test_a_held_out_loss_that_rose_is_said(tmp_path, tokenizer, base):
    """Other answers than those it learns."""
    learned, held_out = (
        write_jsonl(tmp_path / name, [{"prompt": "the fox", "completion": answer}] * 4)
        for name, answer in [("d", " jumps over the dog"), ("e", " sinks ships")]
    )
    config = UnitConfig(
        name="u", data=learned, eval_data=held_out, rank=4, max_steps=20, learning_rate=0.02,
        eval_interval=1,
    )  # fmt: skip
    (result,) = run(base, tokenizer, tmp_path / "out", [config])
    first, last = result.eval_records[0].loss, result.eval_records[-1].loss
    assert last > first
    (warning,) = result.warnings
    assert f"held-out loss rose from {first:.4f} after update 1 to {last:.4f}" in warning
    assert f"the weights of update {result.best.step} are written" in warning

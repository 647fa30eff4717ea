"""What a run leaves to read: curves, plot, page, and event files where TensorBoard is there."""

from __future__ import annotations

import csv
import sys
import types
from dataclasses import replace

import matplotlib.image
import pytest

from lora_runtime.errors import ConfigError
from lora_runtime.training.config import UnitConfig
from lora_runtime.training.report import write_report
from tests.lora_runtime.training.tiny_runs import StopAfter, quiet_console, ragged_data, run, shown


def units_of(tmp_path):
    return [
        UnitConfig(
            name="seen", data=ragged_data(tmp_path / "a", 6), rank=2, max_steps=7,
            eval_data=ragged_data(tmp_path / "e", 4, seed=3), eval_interval=3, learning_rate=5e-3,
        ),
        UnitConfig(name="blind", data=ragged_data(tmp_path / "b", 5, seed=1), max_steps=4),
    ]  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def no_drawing():
    """Everything is drawn here."""


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tokenizer, base):
    folder = tmp_path_factory.mktemp("report")
    return run(base, tokenizer, folder / "out", units_of(folder)), folder / "out" / "report"


def test_curves_have_training_and_held_out_losses(finished):
    results, folder = finished
    rows = list(csv.DictReader((folder / "loss.csv").read_text().splitlines()))
    assert [row["unit"] for row in rows] == ["seen"] * 7 + ["blind"] * 4
    found = {int(row["step"]): float(row["eval_loss"]) for row in rows if row["eval_loss"]}
    assert found == {record.step: record.loss for record in results[0].eval_records}
    assert sorted(found) == [3, 6, 7]


def test_page_has_settings_data_losses_and_speed(finished):
    results, folder = finished
    page = (folder / "summary.md").read_text()
    (row,) = [line for line in page.splitlines() if line.startswith("| seen |")]
    best = results[0].best
    assert f"{results[0].eval_records[-1].loss:.4f}" in row
    assert (
        f"{best.loss:.4f} (update {best.step})" in row and f"{results[0].num_parameters:,}" in row
    )
    assert int(row.split("|")[-2]) > 0  # tokens/s
    assert "settings: rank 2, learning_rate 0.005, max_steps 7, eval_interval 3" in page
    assert "settings: max_steps 4\n" in page
    assert "6 examples (0 truncated)" in page and "held out " in page
    assert f"{results[0].folder}: weights after update {best.step}" in page
    assert "| blind | done | 4/4 |" in page and "| - | - |" in page


def test_losses_have_the_same_meaning_wherever_they_are_shown(tmp_path, tokenizer, base):
    """Means over the last updates, here half of 7 and 4; the lines, the page and the result."""
    console = quiet_console()
    results = run(
        base, tokenizer, tmp_path / "out", units_of(tmp_path), console=console, log_interval=1
    )
    page = (tmp_path / "out" / "report" / "summary.md").read_text()
    for result, count in zip(results, (3, 2), strict=True):
        losses = [record.loss for record in result.records]
        first, last = sum(losses[:count]) / count, sum(losses[-count:]) / count
        assert (result.first_loss, result.loss) == pytest.approx((first, last), rel=1e-12)
        (row,) = [line for line in page.splitlines() if line.startswith(f"| {result.name} | ")]
        assert f"| {first:.4f} | {last:.4f} |" in row
        (line,) = [
            line
            for line in shown(console).splitlines()
            if line.startswith(f"{result.name}: {len(losses)}/{len(losses)} ")
        ]
        assert f" loss {last:.3f}, " in line
        assert ("held-out loss" in line) == (result.held_out_loss is not None)
    seen = results[0]
    assert seen.held_out_loss == seen.eval_records[-1].loss
    assert f"held-out loss {seen.held_out_loss:.3f}" in shown(console)


def has_colour(folder, colour):
    pixels = (matplotlib.image.imread(folder / "loss.png")[..., :3] * 255).round()
    return bool((pixels == colour).all(axis=-1).any())


def test_plot_shows_every_unit_in_its_colour(finished, tmp_path):
    results, folder = finished
    blue, orange = (31, 119, 180), (255, 127, 14)  # matplotlib's first two
    assert has_colour(folder, blue) and has_colour(folder, orange)
    write_report(tmp_path, results[:1])
    assert has_colour(tmp_path, blue) and not has_colour(tmp_path, orange)
    nothing = [replace(result, records=(), eval_records=()) for result in results]
    write_report(tmp_path, nothing)
    assert not has_colour(tmp_path, blue)


class Writer:
    """Stands for TensorBoard's SummaryWriter and keeps what it is given."""

    made: list[Writer] = []

    def __init__(self, log_dir, purge_step):
        self.log_dir, self.purge_step, self.scalars, self.is_closed = log_dir, purge_step, [], False
        Writer.made.append(self)

    def add_scalar(self, name, value, step):
        self.scalars.append((name, step, value))

    def close(self):
        self.is_closed = True


@pytest.fixture
def writers(monkeypatch):
    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = Writer
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    Writer.made = []
    return Writer.made


def test_event_files(tmp_path, tokenizer, base, writers):
    options = dict(tensorboard=True, output=tmp_path / "out", units=units_of(tmp_path))
    run(base, tokenizer, **options, should_stop=StopAfter(3))
    results = run(base, tokenizer, **options, resume=True)
    assert [writer.purge_step for writer in writers] == [1, 1, 4, 4]
    assert writers[0].log_dir == str(tmp_path / "out" / "report" / "tensorboard" / "seen")
    assert all(writer.is_closed for writer in writers)
    scalars = writers[0].scalars + writers[2].scalars
    records = results[0].records
    assert [(step, v) for name, step, v in scalars if name == "loss/train"] == [
        (record.step, record.loss) for record in records
    ]
    assert [(step, v) for name, step, v in scalars if name == "loss/held_out"] == [
        (record.step, record.loss) for record in results[0].eval_records
    ]
    rates = [v for name, _, v in scalars if name == "learning_rate"]
    assert rates == [record.learning_rate for record in records]
    assert not any(name == "loss/held_out" for name, *_ in writers[1].scalars)


def test_without_tensorboard_the_extra_is_named(tmp_path, tokenizer, base, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ConfigError, match=r"install loramux\[tensorboard\]") as caught:
        run(base, tokenizer, tmp_path / "out", units_of(tmp_path), tensorboard=True)
    assert caught.value.field == "tensorboard"

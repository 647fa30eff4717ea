"""What a full disk, a damaged checkpoint and a second run do to a run: nothing that is lost."""

from __future__ import annotations

import errno
import json
import shutil
import sys

import pytest

from lora_runtime.config import BaseConfig
from lora_runtime.errors import ConfigError, DataError
from lora_runtime.training import sweep, trainer
from lora_runtime.training.config import TrainConfig, UnitConfig
from lora_runtime.training.report import files
from lora_runtime.training.run_folder import run_folder
from lora_runtime.training.trainer import train
from lora_runtime.training.units import UnitStatus
from tests.lora_runtime.training.tiny_runs import (
    StopAfter,
    files_of_at_most,
    quiet_console,
    ragged_data,
    run,
    shown,
    write_jsonl,
)
from tests.tiny import tiny_checkpoint
from tests.tiny_tokenizer import write_tokenizer


def units_of(tmp_path):
    return [
        UnitConfig(
            name="one", data=ragged_data(tmp_path / "a", 7), rank=2, learning_rate=1e-2,
            max_steps=8, micro_batch_size=2, eval_data=ragged_data(tmp_path / "e", 3, seed=2),
            eval_interval=2,
        ),
        UnitConfig(
            name="two", data=ragged_data(tmp_path / "b", 8), rank=4, init="pissa",
            learning_rate=1e-2, max_steps=6, gradient_accumulation=2,
        ),
    ]  # fmt: skip


def content_of(output):
    return {
        f"{name}/{path.name}": path.read_bytes()
        for name in ("one", "two")
        for path in (output / name).glob("adapter_*")
    }


@pytest.fixture(scope="module")
def expected(tmp_path_factory, tokenizer, base):
    folder = tmp_path_factory.mktemp("whole")
    run(base, tokenizer, folder / "out", units_of(folder))
    return content_of(folder / "out")


def no_space(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("place", ["first", "second", "report", "plot"])
def test_a_full_disk_at_the_end_loses_nothing(
    tmp_path, tokenizer, base, monkeypatch, expected, place
):
    units, output, real = units_of(tmp_path), tmp_path / "out", trainer.export
    with monkeypatch.context() as patch:
        if place == "report":
            patch.setattr(trainer, "write_report", no_space)
        elif place == "plot":
            patch.setattr(files.Figure, "savefig", no_space)
        else:
            full_at = {"first": "one", "second": "two"}[place]
            patch.setattr(
                trainer, "export", lambda f, *r: no_space() if f.name == full_at else real(f, *r)
            )
        with pytest.raises(ConfigError, match="No space left.*keeps what was trained.*resume") as e:
            run(base, tokenizer, output, units)
    assert e.value.field == "output"
    monkeypatch.setattr(trainer, "run_pass", None)  # nothing is trained again
    results = run(base, tokenizer, output, units, resume=True)
    assert [result.status for result in results] == [UnitStatus.DONE] * 2
    assert content_of(output) == expected
    assert not (output / "checkpoints").exists()


def test_a_full_disk_where_a_sweeps_winner_is_copied(tmp_path, tokenizer, base, monkeypatch):
    unit = UnitConfig(
        name="u", data=ragged_data(tmp_path / "d", 6), rank=2, max_steps=4,
        eval_fraction=0.4, sweep={"rank": (2, 3)},
    )  # fmt: skip
    with monkeypatch.context() as patch:
        patch.setattr(sweep.shutil, "copytree", no_space)
        with pytest.raises(ConfigError, match="keeps what was trained"):
            run(base, tokenizer, tmp_path / "out", [unit])
    run(base, tokenizer, tmp_path / "out", [unit], resume=True)
    assert (tmp_path / "out" / "u" / "adapter_model.safetensors").exists()


def test_a_disk_with_room_for_the_adapters_alone_gets_them(tmp_path, tokenizer, base, expected):
    """A checkpoint has Adam's moments too."""
    units, output, console = units_of(tmp_path), tmp_path / "out", quiet_console()
    with files_of_at_most(max(map(len, expected.values())) + 20_000):
        run(base, tokenizer, output, units, console=console)
    assert content_of(output) == expected
    assert "warning: checkpoint" in shown(console) and "cannot be written" in shown(console)


def test_without_room_for_anything_the_error_says_so(
    tmp_path, tokenizer, base, monkeypatch, expected
):
    monkeypatch.setattr(trainer, "export", no_space)
    with (
        files_of_at_most(20_000),
        pytest.raises(ConfigError, match="no checkpoint either: make room and train again"),
    ):
        run(base, tokenizer, tmp_path / "out", units_of(tmp_path))


def truncate(folder):
    path = folder / "state.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def flip_a_bit(folder):
    content = bytearray((folder / "state.safetensors").read_bytes())
    content[len(content) // 2] ^= 1
    (folder / "state.safetensors").write_bytes(content)


def alter_a_fact(folder):
    facts = json.loads((folder / "state.json").read_text())
    facts["num_passes"] += 1
    (folder / "state.json").write_text(json.dumps(facts))


def rewrite(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def remove(name):
    return lambda folder: (folder / name).unlink()


def empty(folder):
    shutil.rmtree(folder)
    folder.mkdir()


DAMAGES = {
    "truncated": truncate,
    "a flipped bit": flip_a_bit,
    "an altered fact": alter_a_fact,
    "no tensors": remove("state.safetensors"),
    "no facts": remove("state.json"),
    "broken JSON": rewrite("state.json", b'{"num_passes": '),
    "empty facts": rewrite("state.json", b"{}"),
    "no sums": remove("SHA256SUMS"),
    "empty sums": rewrite("SHA256SUMS", b""),
    "binary sums": rewrite("SHA256SUMS", b"\xff\xfe"),
    "sums without names": rewrite("SHA256SUMS", b"00\n"),
    "an empty folder": empty,
}


@pytest.fixture(scope="module")
def stopped(tmp_path_factory, tokenizer, base):
    """The output of a run that was stopped before its eighth forward."""
    folder = tmp_path_factory.mktemp("stopped")
    output, units = folder / "out", units_of(folder)
    run(base, tokenizer, output, units, should_stop=StopAfter(7), checkpoint_interval=2)
    return output


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_found_and_the_one_before_is_used(
    tmp_path, tokenizer, base, expected, stopped, damage
):
    units, console = units_of(tmp_path), quiet_console()
    output = shutil.copytree(stopped, tmp_path / "out")
    folder = output / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["00000006", "00000007"]
    DAMAGES[damage](folder / "00000007")
    run(
        base, tokenizer, output, units, console=console, should_stop=StopAfter(1), resume=True,
        checkpoint_interval=200,
    )  # fmt: skip
    assert "00000007 is damaged" in shown(console) and "one before it is used" in shown(console)
    assert sorted(path.name for path in folder.iterdir()) == ["00000006", "00000007"]
    console = quiet_console()
    run(base, tokenizer, output, units, console=console, resume=True)
    assert "damaged" not in shown(console)  # it was written anew
    assert content_of(output) == expected


def test_a_run_with_damaged_checkpoints_only_says_so(tmp_path, tokenizer, base):
    units, output = units_of(tmp_path), tmp_path / "out"
    run(base, tokenizer, output, units, should_stop=StopAfter(3))
    flip_a_bit(output / "checkpoints" / "00000003")
    with pytest.raises(ConfigError, match="00000003 is damaged: state.safetensors is not") as e:
        run(base, tokenizer, output, units, resume=True)
    assert e.value.field == "resume"


@pytest.mark.parametrize("change", [lambda f: f.pop("units"), lambda f: f.update(units=3),
                                    lambda f: f["units"]["one"].pop("window")])  # fmt: skip
def test_a_whole_checkpoint_of_another_version_is_a_typed_error(
    tmp_path, tokenizer, base, monkeypatch, change
):
    units, output = units_of(tmp_path), tmp_path / "out"
    run(base, tokenizer, output, units, should_stop=StopAfter(3))
    path = output / "checkpoints" / "00000003" / "state.json"
    facts = json.loads(path.read_text())
    change(facts)
    path.write_text(json.dumps(facts))
    monkeypatch.setattr("lora_runtime.training.checkpoint._damage", lambda _: None)
    with pytest.raises(ConfigError, match="may be of another version"):
        run(base, tokenizer, output, units, resume=True)


def test_the_checksums_are_those_of_sha256sum(tmp_path, tokenizer, base):
    import subprocess

    run(base, tokenizer, tmp_path / "out", units_of(tmp_path), should_stop=StopAfter(1))
    (folder,) = (tmp_path / "out" / "checkpoints").iterdir()
    subprocess.run(["sha256sum", "--strict", "-c", "SHA256SUMS"], cwd=folder, check=True)


def test_a_folder_takes_one_run_at_a_time(tmp_path, tokenizer, base):
    units, output = units_of(tmp_path), tmp_path / "out"
    with run_folder(TrainConfig(output=output, units=tuple(units))):
        with pytest.raises(ConfigError, match="is in use by another run") as caught:
            run(base, tokenizer, output, units)
        assert caught.value.field == "output"
        assert not (output / "one").exists()
        run(base, tokenizer, tmp_path / "other", units[:1])
    run(base, tokenizer, output, units)


@pytest.fixture
def no_base(monkeypatch):
    def load(*_, **__):
        pytest.fail("the base was loaded before the mistake was found")

    monkeypatch.setattr(trainer, "load_base", load)


def mistakes(tmp_path):
    """name → (settings of the run, of the unit, error, field)."""
    pairs = ragged_data(tmp_path / "good", 4)
    broken = write_jsonl(tmp_path / "broken", [{"prompt": "a", "completion": 3}])
    labelled = write_jsonl(tmp_path / "kto", [{"prompt": "a", "completion": "b", "label": False}])
    return {
        "missing data": ({}, {"data": tmp_path / "none"}, DataError, None),
        "broken data": ({}, {"data": broken}, DataError, "completion"),
        "labels": ({}, {"data": labelled}, DataError, "label"),
        "broken eval data": ({}, {"data": pairs, "eval_data": broken}, DataError, "completion"),
        "nothing held out": ({}, {"data": pairs, "eval_fraction": 1e-9}, DataError, None),
        "for preferences": ({}, {"data": pairs, "dpo_beta": 0.3}, ConfigError, "dpo_beta"),
        "paged": ({}, {"data": pairs, "optimizer": "adamw-paged"}, ConfigError, "optimizer"),
        "output": ({"output": pairs / "below"}, {"data": pairs}, ConfigError, "output"),
        "resume": ({"resume": True}, {"data": pairs}, ConfigError, "resume"),
        "too long": ({"max_seq_len": 513}, {"data": pairs}, ConfigError, "max_seq_len"),
        "extra": ({"tensorboard": True}, {"data": pairs}, ConfigError, "tensorboard"),
    }


@pytest.mark.usefixtures("no_base")
@pytest.mark.parametrize(
    "name", ["missing data", "broken data", "labels", "broken eval data", "nothing held out",
             "for preferences", "paged", "output", "resume", "too long", "extra"],
)  # fmt: skip
def test_mistakes_are_found_before_the_base_is_loaded(tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    folder = tiny_checkpoint(tmp_path / "base")
    write_tokenizer(folder)
    options, unit, error, field = mistakes(tmp_path)[name]
    config = TrainConfig(
        **{"output": tmp_path / "out", "max_seq_len": 128, **options},
        units=(UnitConfig(name="u", **unit),),
        base=BaseConfig(model=str(folder), dtype="float32", device="cpu"),
    )  # fmt: skip
    with pytest.raises(error) as caught:
        train(config, quiet_console())
    if field:
        assert caught.value.field == field

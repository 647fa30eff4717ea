"""A run that stops continues as if it had not; `test_killed_runs.py` is about its death."""

from __future__ import annotations

import errno
import json
import random
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from lora_runtime.errors import ConfigError
from lora_runtime.training import checkpoint
from lora_runtime.training.config import UnitConfig
from tests.lora_runtime.training.tiny_runs import StopAfter, files_of_at_most, ragged_data, run


def make_units(tmp_path):
    """The second one is evaluated, and its best weights are not the last ones."""
    return [
        UnitConfig(
            name="one", data=ragged_data(tmp_path / "a", 7), rank=2, learning_rate=1e-2,
            max_steps=12, micro_batch_size=2, weight_decay=0.1,
        ),
        UnitConfig(
            name="two", data=ragged_data(tmp_path / "b", 8), rank=4, variant="rslora",
            use_dora=True, init="pissa", loraplus_ratio=2.0, num_epochs=5, micro_batch_size=1,
            gradient_accumulation=3, schedule="cosine", warmup=0,
            eval_data=ragged_data(tmp_path / "e", 5, seed=4), eval_interval=3, learning_rate=0.02,
        ),
    ]  # fmt: skip


def adapter_tensors(output):
    return {
        f"{name}/{key}": tensor
        for name in ("one", "two")
        for key, tensor in load_file(output / name / "adapter_model.safetensors").items()
    }


def curves(results):
    """Training and held-out losses, without the seconds."""
    return [
        [record[:-1] for record in (*result.records, *result.eval_records)] for result in results
    ]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, tokenizer, base):
    folder = tmp_path_factory.mktemp("whole")
    results = run(base, tokenizer, folder / "out", make_units(folder))
    assert not (folder / "out" / "checkpoints").exists()
    assert results[1].eval_records and results[1].best.step < results[1].num_steps
    return curves(results), adapter_tensors(folder / "out")


def assert_same(results, output, uninterrupted):
    expected_curves, expected_tensors = uninterrupted
    assert curves(results) == expected_curves
    tensors = adapter_tensors(output)
    assert tensors.keys() == expected_tensors.keys()
    assert all(torch.equal(tensors[name], expected_tensors[name]) for name in tensors)


@pytest.mark.parametrize("where", ["start", "early", "late"])
def test_resume_after_a_stop(tmp_path, tokenizer, base, uninterrupted, where):
    """At a random pass, so that every run of the suite tries another."""
    places = {"start": (0, 0), "early": (1, 19), "late": (20, 39)}
    num_passes = random.Random().randint(*places[where])
    print(f"stopped after {num_passes} passes")
    units, output = make_units(tmp_path), tmp_path / "out"
    run(base, tokenizer, output, units, should_stop=StopAfter(num_passes))
    assert not (output / "two").exists()
    results = run(base, tokenizer, output, units, resume=True)
    assert_same(results, output, uninterrupted)


def no_space(path):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("file", ["state.safetensors", "flush"])
def test_a_full_disk_loses_no_earlier_checkpoint(
    tmp_path, tokenizer, base, monkeypatch, uninterrupted, file
):
    units, output = make_units(tmp_path), tmp_path / "out"
    run(base, tokenizer, output, units, should_stop=StopAfter(5))
    folder = output / "checkpoints"
    (kept,) = folder.iterdir()
    before = {path.name: path.read_bytes() for path in kept.iterdir()}

    if file == "state.safetensors":
        limit = files_of_at_most(20_000)  # bytes; the tensors are larger
    else:
        limit = monkeypatch.context()
    with limit as patch:
        if patch:
            patch.setattr(checkpoint, "_flush", no_space)
        with pytest.raises(ConfigError, match="cannot be written.*make room and resume") as caught:
            run(base, tokenizer, output, units, resume=True, checkpoint_interval=2)
    assert caught.value.field == "output"
    assert list(folder.iterdir()) == [kept]
    assert {path.name: path.read_bytes() for path in kept.iterdir()} == before
    assert_same(run(base, tokenizer, output, units, resume=True), output, uninterrupted)


def test_checkpoint_is_safetensors_and_json_only(tmp_path, tokenizer, base):
    run(base, tokenizer, tmp_path / "out", make_units(tmp_path), should_stop=StopAfter(2))
    (folder,) = (tmp_path / "out" / "checkpoints").iterdir()
    assert sorted(path.name for path in folder.iterdir()) == [
        "SHA256SUMS", "state.json", "state.safetensors",
    ]  # fmt: skip
    json.loads((folder / "state.json").read_text())
    names = load_file(folder / "state.safetensors")
    assert any(name.startswith("two/") and name.endswith(".grad") for name in names)
    assert not any(name.startswith("one/") and name.endswith(".grad") for name in names)


def test_resume_refuses_another_run(tmp_path, tokenizer, base, exact_base):
    units, output = make_units(tmp_path), tmp_path / "out"
    with pytest.raises(ConfigError, match="no checkpoint to resume"):
        run(base, tokenizer, output, units, resume=True)
    run(base, tokenizer, output, units, should_stop=StopAfter(2))
    with pytest.raises(ConfigError, match="holds an unfinished run"):
        run(base, tokenizer, output, units)
    other_data = ragged_data(tmp_path / "c", 7, seed=9)
    for changed, field in [
        ([replace(units[0], learning_rate=1.0), units[1]], "learning_rate"),
        ([units[0], replace(units[1], gradient_accumulation=2)], "gradient_accumulation"),
        ([replace(units[0], data=other_data), units[1]], "data"),
        ([units[0], replace(units[1], eval_data=other_data)], "eval_data"),
        (units[:1], "units"),
    ]:
        with pytest.raises(ConfigError) as caught:
            run(base, tokenizer, output, changed, resume=True)
        assert caught.value.field == field
    with pytest.raises(ConfigError) as caught:
        run(base, tokenizer, output, units, seed=1, resume=True)
    assert caught.value.field == "seed"
    with pytest.raises(ConfigError, match="another base"):
        run(exact_base, tokenizer, output, units, resume=True)

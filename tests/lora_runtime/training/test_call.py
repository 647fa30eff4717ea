"""`train` as a call takes what a file takes, by the same names, and nothing else."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

import pytest

import loramux
from lora_runtime.errors import ConfigError
from lora_runtime.training import call
from lora_runtime.training.call import train
from lora_runtime.training.config import TrainConfig


@pytest.fixture
def runs(monkeypatch):
    asked = []
    monkeypatch.setattr(call, "train_run", lambda config: asked.append(config) or [])
    return asked


def test_it_is_what_a_file_says(runs, tmp_path):
    train(
        "a.jsonl", Path("out"), base=Path("/models/b"), quantization="int8", seed=3, max_length=64,
        lr="1e-3", num_train_epochs=2, gradient_checkpointing=True,
        units=[{"name": "a", "r": 8}, {"name": "b", "data": "b.jsonl", "seed": 5}],
    )  # fmt: skip
    file = tmp_path / "run.yaml"
    file.write_text(
        """
output: out
base: {model: /models/b, quantization: int8}
seed: 3
max_seq_len: 64
activation_checkpointing: true
units:
  - {name: a, data: a.jsonl, rank: 8, learning_rate: 1.0e-3, num_epochs: 2}
  - {name: b, data: b.jsonl, seed: 5, learning_rate: 1.0e-3, num_epochs: 2}
"""
    )
    assert runs == [TrainConfig.from_yaml(file)]
    train("a.jsonl", "out")
    assert runs[1].base.model == "smollm2-135m" and runs[1].units[0].name == "adapter"


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({"lr": 1e-3, "learning_rate": 1e-3}, "learning_rate"),
        ({"learning_rte": 1e-3}, "learning_rte"),
        ({"model": "x"}, "model"),
        ({"output_dir": "x"}, "output"),
        ({"lora_dropout": 0.05}, "dropout"),
        ({"warmup_ratio": 5}, "warmup_ratio"),
        ({"data": None}, "units[0].data"),
        ({"output": ""}, "output"),
        ({"units": ["a"]}, "units[0]"),
        ({"units": []}, "units"),
        ({"units": [{"name": "a", "base": "x"}]}, "units.base"),
    ],
)
def test_mistakes_are_named(runs, given, field):
    with pytest.raises(ConfigError) as refusal:
        train(**{"data": "a.jsonl", "output": "out", **given})
    assert refusal.value.field == field and not runs


def test_the_package_says_its_version():
    assert loramux.__version__ == version("loramux")

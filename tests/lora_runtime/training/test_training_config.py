"""A run's settings: what a YAML file gives, and which mistakes are named."""

from __future__ import annotations

from pathlib import Path

import pytest

from lora_runtime.config import BaseConfig
from lora_runtime.errors import ConfigError
from lora_runtime.training.config import TrainConfig, UnitConfig

GOOD = """
output: out
base: {model: some/model, quantization: none}
seed: 3
units:
  - name: pirate
    data: pirate.jsonl
    variant: rslora
    rank: 64
    alpha: 16
    target_modules: [q_proj, layers.1.self_attn.v_proj]
    learning_rate: 1e-4
    max_steps: 7
    max_grad_norm: null
  - {name: poet, data: poet.jsonl, seed: 5}
"""


def read(tmp_path, text):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return TrainConfig.from_yaml(path)


def test_yaml_gives_the_same_as_code(tmp_path):
    pirate = UnitConfig(
        name="pirate",
        data=Path("pirate.jsonl"),
        variant="rslora",
        rank=64,
        alpha=16.0,
        target_modules=("q_proj", "layers.1.self_attn.v_proj"),
        learning_rate=1e-4,
        max_steps=7,
        max_grad_norm=None,
    )
    poet = UnitConfig(name="poet", data=Path("poet.jsonl"), seed=5)
    config = read(tmp_path, GOOD)
    assert config == TrainConfig(
        output=Path("out"),
        base=BaseConfig(model="some/model", quantization="none"),
        seed=3,
        units=(pirate, poet),
    )
    assert [config.seed_of(unit) for unit in config.units] == [3, 5]
    assert pirate.scaling == 16 / 8
    assert poet.scaling == 32 / 16


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("    rank: 64", "    rnak: 64", "units[0].rnak is not a field; did you mean 'rank'?"),
        ("seed: 3", "seed: 18446744073709551616", "seed is 18446744073709551616; it must be"),
        ("seed: 5", "seed: -9223372036854775809", "unit 'poet': seed is -9223372036854775809"),
        ("seed: 5", "micro_batch_size: 1048577", "an update takes at most 1,048,576 examples"),
        ("seed: 3", "sead: 3", "sead is not a field; did you mean 'seed'?"),
        ("quantization:", "quantisation:", "base.quantisation is not a field; did you mean 'quant"),
        ("quantization: none", "quantization: int3", "base.quantization is 'int3'; it must be one"),
        ("    rank: 64", "    rank: many", "units[0].rank is 'many'; it must be a whole number"),
        ("    rank: 64", "    rank: true", "units[0].rank is True; it must be a whole number"),
        ("rank: 64", "rank: 0", "unit 'pirate': rank is 0; it must be at least 1"),
        ("1e-4", "fast", "units[0].learning_rate is 'fast'; it must be a number"),
        ("1e-4", "-1e-4", "learning_rate is -0.0001; it must be positive"),
        ("rslora", "dorra", "units[0].variant is 'dorra'; it must be one of 'lora', 'rslora'"),
        ("[q_proj, layers.1.self_attn.v_proj]", "q_proj", "units[0].target_modules is 'q_proj'"),
        ("[q_proj, layers.1.self_attn.v_proj]", "[]", "target_modules is ()"),
        ("    data: pirate.jsonl\n", "", "units[0].data is missing"),
        ("name: poet", "name: pirate", "it must be units of different names"),
        ("name: poet", "name: ../poet", "name is '../poet'; it must be letters"),
        ("name: poet", "name: report", "name is 'report'"),
        ("seed: 5", "dropout: 0.1", "dropout is 0.1; it must be 0"),
        ("seed: 5", "schedule: polynomial", "units[1].schedule is 'polynomial'"),
        ("output: out", "output: [", "cannot be read as YAML"),
        (GOOD, "- 1", "the file is [1]; it must be a mapping"),
    ],
)
def test_mistakes_are_named(tmp_path, old, new, expected):
    assert old in GOOD
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, GOOD.replace(old, new))
    assert expected in caught.value.message


def test_missing_file_is_a_config_error(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        TrainConfig.from_yaml(tmp_path / "none.yaml")


def test_number_of_updates_and_warmup():
    unit = UnitConfig(
        name="u", data=Path("d"), num_epochs=3, micro_batch_size=4, gradient_accumulation=2
    )
    assert unit.num_steps(10) == 4  # 30 examples, 8 an update
    assert UnitConfig(name="u", data=Path("d"), max_steps=9).num_steps(10) == 9
    assert UnitConfig(name="u", data=Path("d"), warmup=0.25).num_warmup_steps(40) == 10
    assert UnitConfig(name="u", data=Path("d"), warmup=6).num_warmup_steps(40) == 6

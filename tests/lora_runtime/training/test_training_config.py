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
        ("    rank: 64", "    rnak: 64", "units[0].rnak is not a setting; did you mean 'rank'?"),
        ("seed: 3", "seed: 18446744073709551616", "seed is 18446744073709551616; it must be"),
        ("seed: 5", "seed: -9223372036854775809", "units[1].seed is -9223372036854775809"),
        ("seed: 5", "micro_batch_size: 1048577", "an update takes at most 1,048,576 examples"),
        ("seed: 3", "sead: 3", "sead is not a setting; did you mean 'seed'?"),
        (
            "quantization:",
            "quantisation:",
            "base.quantisation is not a setting; did you mean 'quant",
        ),
        ("quantization: none", "quantization: int3", "quantization is 'int3'; it must be one"),
        ("    rank: 64", "    rank: many", "units[0].rank is 'many'; it must be a whole number"),
        ("    rank: 64", "    rank: true", "units[0].rank is True; it must be a whole number"),
        ("rank: 64", "rank: 0", "units[0].rank is 0; it must be at least 1"),
        ("1e-4", "fast", "units[0].learning_rate is 'fast'; it must be a number"),
        ("1e-4", "-1e-4", "units[0].learning_rate is '-1e-4'; it must be positive"),
        ("rslora", "dorra", "units[0].variant is 'dorra'; it must be one of 'lora', 'rslora'"),
        ("[q_proj, layers.1.self_attn.v_proj]", "q_proj", "units[0].target_modules is 'q_proj'"),
        ("[q_proj, layers.1.self_attn.v_proj]", "[]", "target_modules is ()"),
        ("    data: pirate.jsonl\n", "", "units[0].data is missing"),
        ("name: poet", "name: pirate", "units has 'pirate' 2 times; give each unit a name"),
        ("seed: 3", "rank: 8", "rank is a setting of a unit; write it into each of the units"),
        ("seed: 3", "lr: 1e-4", "lr is a setting of a unit; write it into each of the units"),
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


ALIASES = """
output_dir: out
max_length: 512
gradient_checkpointing: true
units:
  - {name: a, data: a, r: 4, lora_alpha: 8, lr: 1e-4, num_train_epochs: 3, warmup_ratio: 0.1,
     per_device_train_batch_size: 2, gradient_accumulation_steps: 5, lr_scheduler_type: linear}
"""


def test_the_ecosystems_names_are_taken(tmp_path):
    config = read(tmp_path, ALIASES)
    assert (config.output, config.max_seq_len) == (Path("out"), 512)
    assert config.activation_checkpointing
    assert config.units[0] == UnitConfig(
        name="a", data=Path("a"), rank=4, alpha=8, learning_rate=1e-4, num_epochs=3, warmup=0.1,
        micro_batch_size=2, gradient_accumulation=5, schedule="linear",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("r: 4", "r: 4, rank: 4", "units[0].rank and units[0].r are the same setting; remove one"),
        ("max_length: 512", "max_length: 512\nmax_seq_len: 512", "are the same setting"),
        ("num_train_epochs", "num_train_epoch", "did you mean 'num_train_epochs'?"),
        ("lora_alpha: 8", "lora_alpha: 0", "units[0].alpha is 0; it must be positive"),
    ],
)
def test_mistakes_with_the_ecosystems_names_are_named(tmp_path, old, new, expected):
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, ALIASES.replace(old, new))
    assert expected in caught.value.message


def test_no_message_shows_what_only_python_writes(tmp_path):
    for old, new in [
        ("output: out", "output: [a]"),
        ("data: poet.jsonl", "data: 3"),
        ("seed: 3", "seed: null"),
        ("max_steps: 7", "max_steps: 7.5"),
        ("seed: 5", "eval_data: p, eval_fraction: 0.5"),
        ("seed: 5", "rank_pattern: {q: x}"),
        ("seed: 5", "sweep: {rank: 4}"),
    ]:
        with pytest.raises(ConfigError) as caught:
            read(tmp_path, GOOD.replace(old, new))
        assert "must be" in caught.value.message
        for word in ("PosixPath", "Value error", "Input should", "pydantic"):
            assert word not in caught.value.message


@pytest.mark.parametrize("value", ["5", "1", "1.0", "'5'"])
def test_a_ratio_is_no_number_of_updates(tmp_path, value):
    """`warmup` from 1 on is a number of updates, which no library's `warmup_ratio` is."""
    with pytest.raises(ConfigError, match=r"warmup_ratio is .*; it must be below 1") as refusal:
        read(tmp_path, GOOD.replace("rank: 64", f"warmup_ratio: {value}"))
    assert refusal.value.field == "units[0].warmup_ratio"
    run = read(tmp_path, GOOD.replace("rank: 64", "warmup_ratio: 0.1"))
    assert run.units[0].warmup == 0.1


def test_code_that_writes_another_librarys_name_is_told_ours():
    with pytest.raises(ConfigError, match="lr is not a setting; did you mean 'learning_rate'"):
        UnitConfig(name="a", data=Path("a"), lr=1e-3)


@pytest.mark.parametrize(
    ("old", "new", "field"),
    [
        ("output: out", "output: ''", "output"),
        ("data: pirate.jsonl", "data: ''", "units[0].data"),
        ("rank: 64", "rank_pattern: {q_proj: 0}", "units[0].rank_pattern.q_proj"),
        ("rank: 64", "alpha_pattern: {q_proj: -1}", "units[0].alpha_pattern.q_proj"),
    ],
)
def test_what_means_nothing_is_named(tmp_path, old, new, field):
    with pytest.raises(ConfigError) as refusal:
        read(tmp_path, GOOD.replace(old, new))
    assert refusal.value.field == field


@pytest.mark.parametrize(
    ("field", "settings"),
    [
        ("warmup", {"schedule": "constant", "warmup": 0.5}),
        ("ensure_weight_tying", {"ensure_weight_tying": True}),
        ("ensure_weight_tying", {"ensure_weight_tying": True, "target_modules": ("q_proj",)}),
    ],
)
def test_a_setting_that_would_do_nothing_is_refused(field, settings):
    with pytest.raises(ConfigError, match=field) as caught:
        UnitConfig(name="u", data="d.jsonl", **settings)
    assert caught.value.field == field


def test_a_setting_that_does_something_beside_others_is_taken():
    for settings in (
        {"schedule": "constant"},
        {"schedule": "constant", "warmup": 0},
        {"schedule": "constant_with_warmup", "warmup": 5},
        {"ensure_weight_tying": True, "target_modules": ("model.embed_tokens", "q_proj")},
        {"ensure_weight_tying": True, "trainable_token_indices": (5,)},
        {"ensure_weight_tying": True, "modules_to_save": ("lm_head",)},
    ):
        UnitConfig(name="u", data="d.jsonl", **settings)

"""The estimates of a dry run against what a real run has and takes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lora_runtime.base.loader import prepare_base
from lora_runtime.config import BaseConfig
from lora_runtime.errors import ConfigError
from lora_runtime.training.config import TrainConfig, UnitConfig
from lora_runtime.training.dry_run import PeakBytes, estimate
from tests.lora_runtime.training.tiny_runs import make_unit, ragged_data, run
from tests.tiny import tiny_base, tiny_model


def two_units(tmp_path):
    return (
        UnitConfig(name="a", data=ragged_data(tmp_path / "a", 12), rank=4, num_epochs=2),
        UnitConfig(
            name="b", data=ragged_data(tmp_path / "b", 7, seed=1), rank=2, max_steps=9,
            target_modules=("q_proj", "layers.1.mlp.down_proj"), micro_batch_size=2,
            gradient_accumulation=3, eval_data=ragged_data(tmp_path / "e", 4, seed=2),
        ),
    )  # fmt: skip


def config_of(tmp_path, **options):
    return TrainConfig(
        output=tmp_path / "out", units=two_units(tmp_path), **{"max_seq_len": 256, **options}
    )


def test_counts_are_those_of_a_run(tmp_path, tokenizer, base):
    config = config_of(tmp_path)
    before = {name: value.clone() for name, value in base.model.state_dict().items()}
    found = estimate(base, tokenizer, config)
    assert not config.output.exists()
    after = base.model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    results = run(base, tokenizer, config.output, config.units)
    for ours, real in zip(found.units, results, strict=True):
        assert (ours.name, ours.num_parameters) == (real.name, real.num_parameters)
        assert ours.num_steps == real.num_steps
        num_tokens = sum(record.num_tokens for record in real.records)
        assert ours.num_tokens == pytest.approx(num_tokens, rel=0.15)
        assert ours.weight_bytes == ours.gradient_bytes == 4 * real.num_parameters
        assert 8 * real.num_parameters <= ours.optimizer_bytes <= 8.1 * real.num_parameters + 200
        assert ours.seconds > 0 and ours.activation_bytes > 0
    assert found.units[0].num_tokens == sum(record.num_tokens for record in results[0].records)
    assert found.units[1].targets == ("q_proj", "down_proj")
    together = found.together
    assert together.num_parameters == sum(unit.num_parameters for unit in found.units)
    assert together.activation_bytes > max(unit.activation_bytes for unit in found.units)
    assert together.total_bytes > together.activation_bytes + together.optimizer_bytes


def test_activations_shrink_with_recomputation_and_with_the_micro_batch(tmp_path, tokenizer, base):
    config = config_of(tmp_path)
    smaller = replace(config, units=tuple(replace(u, micro_batch_size=1) for u in config.units))
    plain, light, small = (
        estimate(base, tokenizer, each).together.activation_bytes
        for each in (config, replace(config, activation_checkpointing=True), smaller)
    )
    assert light < 0.8 * plain and small < 0.6 * plain


def test_sweeps_are_estimated_as_what_they_become(tmp_path, tokenizer, base):
    _, unit = two_units(tmp_path)
    config = config_of(tmp_path, max_seq_len=100)
    config = replace(config, units=(replace(unit, sweep={"rank": (2, 8)}),))
    found = estimate(base, tokenizer, config)
    assert [each.name for each in found.units] == ["b-rank=2", "b-rank=8"]
    assert found.units[1].num_parameters == 4 * found.units[0].num_parameters
    with pytest.raises(ConfigError, match="max_seq_len is 513"):
        estimate(base, tokenizer, replace(config, max_seq_len=513))


def test_base_is_counted_with_its_copies(tmp_path, tokenizer):
    sizes = {}
    for cached in (True, False):
        settings = BaseConfig(quantization="nf4", dequantized_cache=cached)
        base = prepare_base(tiny_model("llama"), settings, "llama", tmp_path)
        sizes[cached] = estimate(base, tokenizer, config_of(tmp_path)).base_bytes
    dense = sum(4 * s.in_features * s.out_features for s in base.spec.linears.values())
    assert sizes[True] >= sizes[False] + dense and sizes[False] < dense


def test_peak_is_what_is_alive_at_once():
    given = torch.ones(1000)
    with PeakBytes() as peak:
        a = given * 2  # 4000 bytes
        b = a + 1
        del a
        c = b.view(10, 100).exp()
        given.add_(1)
        given.view(10, 100).t()
        del b, c
        given.sum()
    assert peak.most == 8000


def test_peak_follows_backward():
    """y = x² keeps x only; backward makes the gradient of the sum (a view) and of x."""
    x = torch.ones(1000, requires_grad=True)
    with PeakBytes() as peak:
        (x * x).sum().backward()
    assert 8000 <= peak.most <= 16100


def test_peak_is_that_of_the_unit_alone(tmp_path, tokenizer, base):
    """Gradients, weights and optimizer are counted apart."""
    config = UnitConfig(name="u", data=ragged_data(tmp_path / "d", 4), rank=64)
    unit = make_unit(base, tokenizer, config)
    found = estimate(base, tokenizer, replace(config_of(tmp_path), units=(config,)))
    assert found.together is found.units[0]
    assert found.units[0].weight_bytes == sum(p.nbytes for p in unit.parameters)


def test_targets_have_the_names_by_which_people_know_them(tmp_path, tokenizer):
    """Of what target_parameters names too, where a file's name ends in `weight`."""
    unit = UnitConfig(
        name="a", data=ragged_data(tmp_path / "a", 3), rank=2, max_steps=2,
        target_modules=("q_proj",),
        target_parameters=("mlp.gate.weight", "o_proj.weight", "experts.down_proj"),
    )  # fmt: skip
    config = TrainConfig(output=tmp_path / "out", units=(unit,), max_seq_len=64)
    found = estimate(tiny_base("qwen3-moe"), tokenizer, config).units[0].targets
    assert set(found) == {"q_proj", "o_proj", "mlp.gate", "down_proj"}

"""QERA's start against its formula, written out densely in float64 on transformers' own model."""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from itertools import chain

import pytest
import torch
from safetensors.torch import load_file

from lora_runtime.training import calibration
from lora_runtime.training.config import UnitConfig
from lora_runtime.training.data import ExampleStream
from lora_runtime.training.inits import quantisation_loss
from tests.lora_runtime.training.tiny_runs import StopAfter, make_unit, ragged_data, run
from tests.lora_runtime.training.trained_variants import PATTERNS, lost_and_left, stacked
from tests.tiny import dense_twin, in_float64, tiny_base, tiny_checkpoint

SETTINGS = {
    "plain": {"alpha": 12.0},
    "patterns-rslora": {"variant": "rslora", "alpha": 6.0, **PATTERNS},
    "replicated": {
        "target_modules": ("q_proj", "down_proj"),
        "layer_replication": ((0, 2), (0, 3), (1, 2)),
    },
}
SEED = 7


@pytest.fixture(scope="module", params=["nf4", "int8"])
def qera_base(request, tmp_path_factory):
    folder = tiny_checkpoint(tmp_path_factory.mktemp("base"))
    base = tiny_base("llama", quantization=request.param, dtype=torch.float64, folder=folder)
    in_float64(base.model)
    return base


def unit_of(base, tokenizer, tmp_path, init="qera", *, count=40, **options):
    data = ragged_data(tmp_path / "data.jsonl", count)
    config = UnitConfig(name="unit", data=data, rank=4, init=init, **options)
    return make_unit(base, tokenizer, config, seed=SEED)


def first_rows(unit, num_tokens):
    """The first tokens of the unit's training, the last row cut."""
    rows = []
    for example in ExampleStream(unit.dataset.examples, SEED).take(0, len(unit.dataset.examples)):
        if num_tokens > 0:
            rows.append(example.token_ids[:num_tokens])
            num_tokens -= len(rows[-1])
    assert num_tokens == 0, "the data are too small"
    return rows


@torch.no_grad()
def dense_rms(base, unit, rows):
    """Module of the unit's own model → sqrt(E[x_i²]), one row at a time."""
    twin = in_float64(dense_twin(base, "llama"))
    twin.set_attn_implementation("sdpa")
    twin = stacked(twin, unit.layer_map)
    inputs = defaultdict(list)
    for name in unit.modules:
        twin.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: inputs[name].append(args[0][0])
        )
    for row in rows:
        twin(row[None])
    return {name: torch.cat(parts).square().mean(0).sqrt() for name, parts in inputs.items()}


@pytest.mark.parametrize("name", SETTINGS)
def test_the_start_is_the_formula_on_the_first_training_tokens(
    tmp_path, tokenizer, qera_base, name, monkeypatch
):
    monkeypatch.setattr(calibration, "MAX_TOKENS", 150)
    unit = unit_of(qera_base, tokenizer, tmp_path, **SETTINGS[name])
    rms = dense_rms(qera_base, unit, first_rows(unit, 150))
    for module_name, module in unit.modules.items():
        lost, _ = lost_and_left(qera_base, module)
        scale, rank = rms[module_name], len(module.a)
        left, values, right = torch.linalg.svd(lost * scale, full_matrices=False)
        best = left[:, :rank] * values[:rank] @ right[:rank] / scale
        change = (module.scaling * module.b @ module.a).detach()
        assert change.norm() > 0.1 * lost.norm()
        assert (change - best).norm() <= 1e-6 * best.norm(), module_name
        torch.testing.assert_close(module.a.norm(dim=1), module.scaling * module.b.norm(dim=0))


def test_each_visit_of_a_replicated_layer_has_its_own_inputs(tmp_path, tokenizer, qera_base):
    unit = unit_of(qera_base, tokenizer, tmp_path, **SETTINGS["replicated"])
    visits = [m for m in unit.modules.values() if m.path == "model.layers.0.mlp.down_proj"]
    one, other = (module.b @ module.a for module in visits)
    assert (one - other).norm() > 0.01 * one.norm()


def test_each_init_is_the_better_one_in_its_own_norm(tmp_path, tokenizer, qera_base):
    loftq, qera = (unit_of(qera_base, tokenizer, tmp_path, init) for init in ("loftq", "qera"))
    rms = dense_rms(qera_base, qera, [example.token_ids for example in qera.dataset.examples])
    for name, scale in rms.items():
        lost, left_by_loftq = lost_and_left(qera_base, loftq.modules[name])
        _, left_by_qera = lost_and_left(qera_base, qera.modules[name])
        assert (left_by_qera * scale).norm() < (left_by_loftq * scale).norm()
        assert (left_by_qera * scale).norm() < 0.95 * (lost * scale).norm()
        assert left_by_loftq.norm() <= left_by_qera.norm() < lost.norm()


def test_it_depends_on_data_and_seed_alone_and_leaves_the_base(tmp_path, tokenizer, qera_base):
    before = copy.deepcopy(qera_base.model.state_dict())
    first, again = (unit_of(qera_base, tokenizer, tmp_path) for _ in range(2))
    other = unit_of(qera_base, tokenizer, tmp_path, count=12)
    assert not any(module._forward_pre_hooks for module in qera_base.model.modules())
    for name, value in qera_base.model.state_dict().items():
        assert torch.equal(value, before[name])
    pairs = zip(first.parameters, again.parameters, strict=True)
    assert all(torch.equal(one, two) for one, two in pairs)
    assert not torch.equal(first.parameters[0], other.parameters[0])
    assert not first.named_constants(), "the parameters are all that a checkpoint has to keep"


def test_calibration_takes_what_is_trained_on_first(tmp_path, tokenizer, qera_base, monkeypatch):
    unit = unit_of(qera_base, tokenizer, tmp_path)
    examples, total = unit.dataset.examples, unit.dataset.num_tokens
    assert sum(map(len, calibration.calibration_rows(examples, SEED))) == total < 4096
    monkeypatch.setattr(calibration, "MAX_TOKENS", math.ceil(total / 3))
    found = calibration.calibration_rows(examples, SEED)
    wanted = first_rows(unit, math.ceil(total / 3))
    assert list(chain(*map(torch.Tensor.tolist, found))) == torch.cat(wanted).tolist()


def test_a_stopped_run_goes_on_from_its_own_start(tmp_path, tokenizer, qera_base):
    data = ragged_data(tmp_path / "data.jsonl", 8)
    options = {"rank": 4, "init": "qera", "max_steps": 6, "micro_batch_size": 2, "warmup": 0}
    units = [UnitConfig(name="one", data=data, **options)]
    run(qera_base, tokenizer, tmp_path / "whole", units)
    run(qera_base, tokenizer, tmp_path / "out", units, should_stop=StopAfter(3))
    run(qera_base, tokenizer, tmp_path / "out", units, resume=True)
    whole, resumed = (
        load_file(tmp_path / folder / "one" / "adapter_model.safetensors")
        for folder in ("whole", "out")
    )
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_inputs_that_are_always_zero_divide_nothing():
    torch.manual_seed(0)
    original, serving = torch.randn(2, 12, 9, dtype=torch.float64)
    rms = torch.rand(9, dtype=torch.float64)
    rms[[2, 5]] = 0
    a, b = quantisation_loss(original, serving, 4, 0.5, rms)
    assert a.isfinite().all() and b.isfinite().all()
    left = (original - serving - 0.5 * b @ a) * rms
    best = torch.linalg.svdvals((original - serving) * rms)[4:]
    assert left.norm().item() == pytest.approx(best.norm().item(), rel=1e-9)


@pytest.mark.parametrize("rms", [None, torch.ones(9), torch.zeros(9)])
def test_where_nothing_was_lost_b_can_still_be_trained(rms):
    weight = torch.randn(12, 9)
    a, b = quantisation_loss(weight, weight, 4, 0.5, rms)
    assert not b.any() and a.isfinite().all() and a.norm() > 1

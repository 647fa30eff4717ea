"""Held-out losses against transformers and PEFT; which weights are kept; who stops early."""

from __future__ import annotations

from dataclasses import replace

import peft
import pytest
import torch

from lora_runtime.adapters.files.folder import read_adapter
from lora_runtime.errors import ConfigError
from lora_runtime.training import trainer
from lora_runtime.training.config import UnitConfig
from lora_runtime.training.data import load_dataset
from lora_runtime.training.evaluation import evaluate_due, held_out_signals
from lora_runtime.training.held_out import EvalRecord, HeldOut
from lora_runtime.training.losses import loss_sums
from lora_runtime.training.units import UnitStatus
from lora_runtime.training.update import run_pass
from tests.lora_runtime.training.tiny_runs import (
    make_unit,
    quiet_console,
    ragged_data,
    run,
    shown,
)
from tests.tiny import dense_twin

DIGITS = list("0123456789")


@torch.no_grad()
def mean_loss(model, dataset):
    """transformers' own loss over all targets of a data set."""
    total = 0.0
    for example in dataset.examples:
        labels = torch.full_like(example.token_ids, -100)
        labels[example.predictors + 1] = example.token_ids[example.predictors + 1]
        loss = model(input_ids=example.token_ids[None], labels=labels[None]).loss
        total += float(loss) * len(example.predictors)
    return total / dataset.num_target_tokens


def evaluated_units(tmp_path):
    """Different data, different intervals; the second one learns fast, and other words than it is
    evaluated on, so that it does not end at its best.
    """
    return [
        UnitConfig(
            name="calm", data=ragged_data(tmp_path / "a", 9, seed=1), rank=2, max_steps=10,
            eval_data=ragged_data(tmp_path / "ae", 7, seed=11), eval_interval=4,
            micro_batch_size=2, learning_rate=1e-3,
        ),
        UnitConfig(
            name="hasty", data=ragged_data(tmp_path / "b", 6, seed=2), rank=4, max_steps=30,
            eval_data=ragged_data(tmp_path / "be", 5, seed=12, words=DIGITS), eval_interval=3,
            micro_batch_size=3, learning_rate=3e-2,
        ),
        UnitConfig(name="blind", data=ragged_data(tmp_path / "c", 5, seed=3), rank=2, max_steps=8),
    ]  # fmt: skip


@pytest.mark.parametrize("export", ["best", "last"])
def test_exported_adapter_has_the_recorded_loss_in_peft(tmp_path, tokenizer, base, export):
    units = [replace(unit, export=export) for unit in evaluated_units(tmp_path)]
    results = run(base, tokenizer, tmp_path / "out", units)
    assert results[1].best.step < 30 and results[1].best.loss < results[1].eval_records[-1].loss
    for unit, result in zip(units[:2], results[:2], strict=True):
        model = peft.PeftModel.from_pretrained(dense_twin(base, "llama"), result.folder)
        expected = mean_loss(model, load_dataset(unit.eval_data, tokenizer, 256))
        assert result.exported_loss == pytest.approx(expected, abs=2e-5)
        kept = result.best if export == "best" else result.eval_records[-1]
        assert result.exported_loss == kept.loss and result.exported_step == kept.step
        assert read_adapter(result.folder).metadata["loramux.steps"] == str(kept.step)


def test_units_are_evaluated_at_their_own_updates(tmp_path, tokenizer, base):
    results = run(base, tokenizer, tmp_path / "out", evaluated_units(tmp_path))
    steps = [[record.step for record in result.eval_records] for result in results]
    assert steps == [[4, 8, 10], list(range(3, 31, 3)), []]
    assert results[2].best is None and results[2].exported_step == 8


def test_together_equals_alone(tmp_path, tokenizer, exact_base):
    # at the rate of the hasty unit, rounding alone grows by a factor of ten in two updates
    units = [replace(unit, learning_rate=1e-3) for unit in evaluated_units(tmp_path)]
    together = run(exact_base, tokenizer, tmp_path / "out", units)
    for unit, result in zip(units, together, strict=True):
        (alone,) = run(exact_base, tokenizer, tmp_path / f"out-{unit.name}", [unit])
        assert [r.step for r in alone.eval_records] == [r.step for r in result.eval_records]
        for ours, theirs in zip(result.eval_records, alone.eval_records, strict=True):
            assert ours.loss == pytest.approx(theirs.loss, abs=1e-9)


def test_units_share_forwards(tmp_path, tokenizer, base):
    units = [make_unit(base, tokenizer, config) for config in evaluated_units(tmp_path)[:2]]
    pairs = []
    for unit in units:
        dataset = load_dataset(unit.config.eval_data, tokenizer, 256)
        pairs.append((unit, HeldOut(unit.config, dataset)))
    forwards = []

    def counted(base, units, batches):
        forwards.append([unit.name for unit in units])
        return loss_sums(base, units, batches)

    losses = [signal.loss for signal in held_out_signals(base, pairs, counted)]
    assert forwards == [["calm", "hasty"], ["calm", "hasty"], ["calm"], ["calm"]]
    twin = dense_twin(base, "llama")
    expected = [mean_loss(twin, held_out.dataset) for _, held_out in pairs]
    assert losses == pytest.approx(expected, abs=2e-5)


def test_evaluation_leaves_training_alone(tmp_path, tokenizer, exact_base):
    (config, *_) = evaluated_units(tmp_path)
    plain = make_unit(exact_base, tokenizer, config)
    watched = make_unit(exact_base, tokenizer, config)
    dataset = load_dataset(config.eval_data, tokenizer, 256)
    watched.held_out = HeldOut(replace(config, eval_interval=1), dataset)
    while plain.is_running:
        run_pass(exact_base, [plain])
        run_pass(exact_base, [watched])
        evaluate_due(exact_base, [watched], loss_sums)
    assert len(watched.held_out.records) == 10
    pairs = zip(plain.parameters, watched.parameters, strict=True)
    assert all(torch.equal(ours, theirs) for ours, theirs in pairs)


def test_patience_ends_a_unit_that_no_longer_improves(tmp_path, tokenizer, base):
    calm, hasty, _ = evaluated_units(tmp_path)
    units = [calm, replace(hasty, patience=2, max_steps=300)]
    console = quiet_console()
    results = run(base, tokenizer, tmp_path / "out", units, console=console)
    assert [result.status for result in results] == [UnitStatus.DONE, UnitStatus.DONE]
    losses = [record.loss for record in results[1].eval_records]
    assert len(results[1].records) < 300 and len(results[0].records) == 10
    assert results[1].note == "the held-out loss no longer falls"
    assert min(losses) == losses[-3] == results[1].best.loss
    assert "stopped: the held-out loss no longer falls" in shown(console)
    assert (results[1].folder / "adapter_model.safetensors").exists()


@pytest.mark.parametrize("field", ["patience", "eval_interval"])
def test_what_is_for_held_out_data_needs_some(tmp_path, tokenizer, base, field):
    unit = UnitConfig(name="u", data=ragged_data(tmp_path / "d", 4), **{field: 2})
    with pytest.raises(ConfigError, match=f"{field} needs held-out data") as caught:
        run(base, tokenizer, tmp_path / "out", [unit])
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("rank_pattern", {"q_proj": 2, "nothing": 4}, "'nothing', which no adapted module"),
        ("alpha_pattern", {r"layers\.9\..*": 4}, "which no adapted module"),
        ("rank_pattern", {"o_proj": 4}, "they are like .*q_proj"),
        ("instructions", "alpaca", "for data with instruction and output"),
    ],
)
def test_what_would_do_nothing_is_refused(tmp_path, tokenizer, base, field, value, message):
    data = ragged_data(tmp_path / "d", 4)
    targets = {"target_modules": ("q_proj",), "layers_to_transform": (0, 1)}
    unit = UnitConfig(name="u", data=data, **targets, **{field: value})
    with pytest.raises(ConfigError, match=message) as caught:
        run(base, tokenizer, tmp_path / "out", [unit])
    assert caught.value.field == field


def test_a_loss_that_is_not_finite_is_never_the_best(tmp_path, tokenizer):
    config = UnitConfig(name="u", data=tmp_path, eval_interval=1, patience=2)
    held_out = HeldOut(config, None)
    weights = [torch.nn.Parameter(torch.ones(2))]
    for step, loss in enumerate([float("nan"), 3.0, float("inf"), float("nan")], 1):
        assert not held_out.is_out_of_patience
        held_out.note(EvalRecord(step, loss, None, 0.0), weights)
        weights[0].data += 1
    assert held_out.best_record.step == 2 and held_out.is_out_of_patience
    held_out.restore_best(weights)
    assert weights[0].tolist() == [2, 2]
    assert held_out.lowest_loss(1) == float("inf") and held_out.lowest_loss(4) == 3.0


def test_evaluation_happens_once_after_each_update(tmp_path, tokenizer, base, monkeypatch):
    """Also where an update takes several forwards, and where the last update is due anyway."""
    config = replace(evaluated_units(tmp_path)[0], gradient_accumulation=3, max_steps=4)
    calls = []
    real = trainer.evaluate_due
    monkeypatch.setattr(
        trainer, "evaluate_due", lambda *arguments: (calls.append(1), real(*arguments))
    )
    (result,) = run(base, tokenizer, tmp_path / "out", [config])
    assert len(calls) == 12 and [record.step for record in result.eval_records] == [4]

"""Forwards formed by tokens: packed = one by one = one batch, however ragged the examples are."""

from __future__ import annotations

import json
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from lora_runtime.errors import ConfigError
from lora_runtime.training.config import TrainConfig, UnitConfig
from lora_runtime.training.data import Example, PackedBatch, micro_batches, packed_batch
from lora_runtime.training.losses import window_losses
from lora_runtime.training.update import run_pass
from tests.lora_runtime.training.tiny_runs import (
    WORDS,
    StopAfter,
    make_unit,
    ragged_data,
    run,
    write_jsonl,
)
from tests.tiny import dense_twin, in_float64, tiny_base


def example_of(length):
    return Example(torch.zeros(length, dtype=torch.int64), torch.tensor([0]))


@given(st.lists(st.integers(2, 40), max_size=30), st.integers(40, 90))
@settings(max_examples=50)
def test_every_example_is_in_one_group_within_the_budget(lengths, max_tokens):
    examples = [example_of(length) for length in lengths]
    groups = micro_batches(examples, 4, max_tokens)
    assert sorted(id(e) for group in groups for e in group) == sorted(map(id, examples))
    totals = [sum(len(example.token_ids) for example in group) for group in groups]
    assert all(total <= max_tokens for total in totals)
    # of first fit, at most one group is no more than half full
    assert sum(2 * total <= max_tokens for total in totals) <= 1


def test_by_number_the_order_stays():
    examples = [example_of(length) for length in (3, 9, 2, 5, 4)]
    assert micro_batches(examples, 2) == [examples[:2], examples[2:4], examples[4:]]


def test_budget_is_at_least_the_longest_example(tmp_path):
    unit = UnitConfig(name="u", data=tmp_path, max_tokens_per_batch=512)
    with pytest.raises(ConfigError, match="max_seq_len is 1024; it must be at most"):
        TrainConfig(output=tmp_path, units=(unit,))
    assert TrainConfig(output=tmp_path, units=(unit,), max_seq_len=512).units == (unit,)


def config_of(tmp_path, **options):
    defaults = dict(
        name="u", data=ragged_data(tmp_path / "d", 11), rank=2, num_epochs=2, learning_rate=1e-2,
        micro_batch_size=4,
    )  # fmt: skip
    return UnitConfig(**{**defaults, **options})


def trained(base, tokenizer, config):
    """The unit after its last update, and the number of forwards that took."""
    unit, num_passes = make_unit(base, tokenizer, config), 0
    while unit.is_running:
        run_pass(base, [unit])
        num_passes += 1
    return unit, num_passes


@pytest.mark.parametrize("shape_options", [dict(micro_batch_size=1, gradient_accumulation=4), {}])
def test_packed_training_is_unpacked_training(tmp_path, tokenizer, exact_base, shape_options):
    """Eleven examples twice by four: the windows are ragged in tokens and the last in number."""
    packed, num_packed = trained(
        exact_base, tokenizer, config_of(tmp_path, max_tokens_per_batch=60)
    )
    other, num_other = trained(exact_base, tokenizer, config_of(tmp_path, **shape_options))
    assert num_packed != num_other
    assert [record[-3] for record in packed.records] == [record[-3] for record in other.records]
    for ours, theirs in zip(packed.records, other.records, strict=True):
        assert ours.loss == pytest.approx(theirs.loss, abs=1e-12)
        assert ours.grad_norm == pytest.approx(theirs.grad_norm, rel=1e-9)
    for ours, theirs in zip(packed.parameters, other.parameters, strict=True):
        assert (ours - theirs).abs().max() <= 1e-10


def test_packed_loss_is_that_of_transformers_one_by_one(tmp_path, tokenizer, exact_base):
    unit = make_unit(
        exact_base, tokenizer, config_of(tmp_path, micro_batch_size=11, max_tokens_per_batch=256)
    )
    examples = unit.next_micro_batches()[0]
    assert len(examples) > 5
    loss = window_losses(exact_base, [unit], [examples])[0, 0].item() * unit.window_weight
    twin, expected = dense_twin(exact_base, "llama").double(), 0.0
    for example in examples:
        labels = torch.full_like(example.token_ids, -100)
        labels[example.predictors + 1] = example.token_ids[example.predictors + 1]
        row = twin(input_ids=example.token_ids[None], labels=labels[None])
        expected += row.loss.item() * len(example.predictors)
    assert loss == pytest.approx(expected, rel=1e-6)


def test_a_packed_run_resumes_inside_an_update(tmp_path, tokenizer, base):
    unit = config_of(tmp_path, gradient_accumulation=2, max_tokens_per_batch=48)
    whole, output = tmp_path / "whole", tmp_path / "out"
    (expected,) = run(base, tokenizer, whole, [unit], max_seq_len=48)
    run(base, tokenizer, output, [unit], should_stop=StopAfter(6), max_seq_len=48)
    (state,) = output.glob("checkpoints/*/state.json")
    assert json.loads(state.read_text())["units"]["u"]["window"]["done"]
    (resumed,) = run(base, tokenizer, output, [unit], resume=True, max_seq_len=48)
    assert [record[:-1] for record in resumed.records] == [r[:-1] for r in expected.records]
    ours, theirs = (load_file(at / "u" / "adapter_model.safetensors") for at in (output, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("shape", ["llama", "mistral"])
def test_a_shared_beginning_changes_no_loss_and_no_gradient(
    tmp_path, tokenizer, shape, monkeypatch
):
    """Rows of over 24 tokens, so that windows end inside and outside of what is shared."""
    base = tiny_base(shape, quantization="none", dtype=torch.float64)
    in_float64(base.model)
    rng, lines = random.Random(3), []
    for _ in range(5):
        words = " ".join(rng.choices(WORDS, k=rng.randint(1, 30)))
        lines.append({"prompt": 6 * "the lazy dog and " + words, "completion": " sink ships"})
    data = write_jsonl(tmp_path / "d", lines)
    mapped = ((0, 2), (1, 3)) if shape == "llama" else ()
    units = [
        make_unit(base, tokenizer, UnitConfig(name="u", data=data, rank=3)),
        make_unit(
            base,
            tokenizer,
            UnitConfig(name="v", data=data, use_dora=True, layer_replication=mapped),
        ),
    ]
    for parameter in units[0].parameters + units[1].parameters:
        parameter.data += 0.1 * torch.randn_like(parameter)
    batches = [units[0].dataset.examples[:3], units[1].dataset.examples]
    assert all(rows.prefix > 24 for (rows,) in PackedBatch.of(batches).rows)

    def gradients():
        losses = window_losses(base, units, batches)
        parameters = units[0].parameters + units[1].parameters
        return losses, torch.autograd.grad(losses.sum(), parameters)

    shared, found = gradients()
    monkeypatch.setattr(packed_batch, "shared_prefix", lambda one, other: 0)
    plain, expected = gradients()
    torch.testing.assert_close(shared, plain, rtol=0, atol=1e-12)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)

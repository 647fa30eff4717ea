"""Memory that takes only so many tokens at once changes nothing but the size of the forwards."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from lora_runtime.base.loader import Base
from lora_runtime.training import out_of_memory
from lora_runtime.training.config import UnitConfig
from lora_runtime.training.data import num_tokens
from lora_runtime.training.distributed import ALONE
from lora_runtime.training.evaluation import held_out_signals
from lora_runtime.training.held_out import HeldOut
from lora_runtime.training.losses import loss_sums
from lora_runtime.training.units import UnitStatus
from lora_runtime.training.update import run_pass
from tests.lora_runtime.training.tiny_runs import (
    StopAfter,
    make_unit,
    quiet_console,
    ragged_data,
    run,
    shown,
    train_until_done,
    write_jsonl,
)


class SmallMemory:
    """A forward of more than `limit` tokens raises, at once or at the end of its backward."""

    def __init__(self, monkeypatch, limit, *, in_backward=False):
        self.limit, self.num_failures, self.sizes = limit, 0, []
        real = Base.hidden_states

        def forward(base, token_ids, *others):
            self.sizes.append(len(token_ids))
            if not in_backward:
                self.check()
            return real(base, token_ids, *others)

        monkeypatch.setattr(Base, "hidden_states", forward)

    def check(self, *_):
        if self.sizes[-1] > self.limit:
            self.num_failures += 1
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    def watch(self, unit):
        """Fail after the gradients of the upper layers are done."""
        unit.modules["model.layers.0.self_attn.q_proj"].b.register_hook(self.check)


def configs_of(tmp_path):
    return [
        UnitConfig(
            name="counted", data=ragged_data(tmp_path / "a", 9, seed=1), rank=4, max_steps=2,
            micro_batch_size=4, gradient_accumulation=2, learning_rate=5e-3,
        ),
        UnitConfig(
            name="packed", data=ragged_data(tmp_path / "b", 7, seed=2), rank=3, num_epochs=2,
            micro_batch_size=3, gradient_accumulation=3, max_tokens_per_batch=90, use_dora=True,
            learning_rate=5e-3,
        ),
        UnitConfig(
            name="single", data=ragged_data(tmp_path / "c", 5, seed=3), rank=2, max_steps=4,
            micro_batch_size=1, learning_rate=5e-3, variant="rslora",
        ),
    ]  # fmt: skip


def units_of(base, tokenizer, tmp_path):
    return [make_unit(base, tokenizer, config) for config in configs_of(tmp_path)]


@pytest.fixture(scope="module")
def expected(tmp_path_factory, tokenizer, exact_base):
    """The units, trained with all the memory that they ask for."""
    units = units_of(exact_base, tokenizer, tmp_path_factory.mktemp("expected"))
    train_until_done(exact_base, units)
    return units


def assert_same(units, others):
    for unit, other in zip(units, others, strict=True):
        assert unit.status is other.status is UnitStatus.DONE
        for ours, theirs in zip(unit.records, other.records, strict=True):
            assert ours[:-1] == pytest.approx(theirs[:-1], abs=1e-10)
        for ours, theirs in zip(unit.parameters, other.parameters, strict=True):
            assert (ours - theirs).abs().max() <= 1e-10


def longest_of(units):
    return max(unit.dataset.longest for unit in units)


@pytest.mark.parametrize("in_backward", [False, True])
@pytest.mark.parametrize("room", [1, 2.3])
def test_less_memory_gives_the_same_training(
    tmp_path, tokenizer, exact_base, expected, monkeypatch, in_backward, room
):
    """Room for one longest example takes every unit apart; a failed backward leaves nothing."""
    units = units_of(exact_base, tokenizer, tmp_path)
    small = SmallMemory(monkeypatch, room * longest_of(units), in_backward=in_backward)
    for unit in units:
        small.watch(unit)
    said = train_until_done(exact_base, units)
    assert_same(units, expected)
    assert len(said) == small.num_failures > 2
    assert any("packed: out of memory; from here on forwards of" in line for line in said)
    assert units[0].limits.num_examples < 4 and units[2].limits.num_examples == 1
    if room == 1:
        assert units[0].limits.num_examples == 1 and any(u.limits.is_alone for u in units)


def test_many_units_take_several_forwards(tmp_path, tokenizer, exact_base, expected, monkeypatch):
    """Two of three fit together; a unit over the bound by itself is not divided."""
    units, most = units_of(exact_base, tokenizer, tmp_path), []

    def forward(base, token_ids, *others, real=Base.hidden_states):
        most.append(len(token_ids))
        return real(base, token_ids, *others)

    monkeypatch.setattr(Base, "hidden_states", forward)
    monkeypatch.setattr(out_of_memory, "TOKENS_PER_FORWARD", {"cpu": 60})
    run_pass(exact_base, units)
    assert len(most) == 3 and max(most) > 60 > min(most)
    train_until_done(exact_base, units)
    assert_same(units, expected)


def test_units_share_less_before_any_gets_smaller(
    tmp_path, tokenizer, exact_base, expected, monkeypatch
):
    """Where a forward may have more tokens than is the least of any device."""
    units = units_of(exact_base, tokenizer, tmp_path)
    monkeypatch.setattr(out_of_memory, "TOKENS_PER_FORWARD", {"cpu": 8192})
    monkeypatch.setattr(out_of_memory, "LEAST_PER_FORWARD", 10)
    items = [sorted(map(num_tokens, unit.dataset.items)) for unit in units]
    room = max(sum(own[-u.config.micro_batch_size :]) for u, own in zip(units, items, strict=True))
    small = SmallMemory(monkeypatch, room)
    said = train_until_done(exact_base, units)
    assert_same(units, expected)
    shared = [line for line in said if "units share forwards of up to" in line]
    assert shared == said and len(shared) == small.num_failures > 0
    assert all(unit.limits.num_examples == unit.config.micro_batch_size for unit in units)
    assert {unit.limits.num_shared_tokens for unit in units} != {None}


def test_an_example_that_never_fits_fails_its_unit_alone(
    tmp_path, tokenizer, exact_base, expected, monkeypatch
):
    units = units_of(exact_base, tokenizer, tmp_path)
    long = write_jsonl(tmp_path / "long", [{"prompt": "", "completion": "the fox " * 40}])
    config = UnitConfig(name="long", data=long, rank=2, max_steps=3)
    hopeless = make_unit(exact_base, tokenizer, config)
    assert hopeless.dataset.longest > longest_of(units)
    SmallMemory(monkeypatch, longest_of(units))
    said = train_until_done(exact_base, [hopeless, *units])
    assert_same(units, expected)
    assert hopeless.status is UnitStatus.FAILED and hopeless.step == 0
    assert f"one example of {hopeless.dataset.longest} tokens" in hopeless.error
    assert "lower max_seq_len or set activation_checkpointing" in hopeless.error
    assert all(parameter.grad is None for parameter in hopeless.parameters)
    assert "long: out of memory; from here on it has forwards of its own" in said


@pytest.mark.parametrize("num_passes", [1, 3])
def test_resume_keeps_the_sizes(tmp_path, tokenizer, base, monkeypatch, num_passes):
    configs = configs_of(tmp_path)[:2]
    SmallMemory(monkeypatch, 64)
    options = dict(max_seq_len=50)
    console = quiet_console()
    whole = run(base, tokenizer, tmp_path / "whole", configs, console=console, **options)
    assert shown(console).count("out of memory; from here on") > 1
    out = tmp_path / "out"
    run(base, tokenizer, out, configs, should_stop=StopAfter(num_passes), **options)
    (state,) = out.glob("checkpoints/*/state.json")
    assert json.loads(state.read_text())["units"]["counted"]["limits"]["num_examples"] < 4
    console = quiet_console()
    resumed = run(base, tokenizer, out, configs, console=console, resume=True, **options)
    assert num_passes == 1 or "out of memory" not in shown(console)
    for ours, theirs in zip(resumed, whole, strict=True):
        assert [r[:-1] for r in ours.records] == [r[:-1] for r in theirs.records]
        found, expected = (
            load_file(result.folder / "adapter_model.safetensors") for result in (ours, theirs)
        )
        assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("room", [1, 2.3])
def test_evaluation_is_the_same_with_less_memory(
    tmp_path, tokenizer, exact_base, monkeypatch, room
):
    units = units_of(exact_base, tokenizer, tmp_path)
    pairs = [(unit, HeldOut(unit.config, unit.dataset)) for unit in units]
    expected = held_out_signals(exact_base, pairs, loss_sums)
    small = SmallMemory(monkeypatch, room * longest_of(units))
    said = []
    found = held_out_signals(exact_base, pairs, loss_sums, ALONE, said.append)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-12)
    assert len(said) == small.num_failures > 0
    computed = sum(size for size in small.sizes if size <= small.limit)
    assert computed == sum(map(num_tokens, (e for u in units for e in u.dataset.examples)))


def test_other_errors_pass_through(tmp_path, tokenizer, exact_base, monkeypatch):
    def broken(*_):
        raise RuntimeError("another mistake")

    monkeypatch.setattr(Base, "hidden_states", broken)
    with pytest.raises(RuntimeError, match="another mistake"):
        train_until_done(exact_base, units_of(exact_base, tokenizer, tmp_path))

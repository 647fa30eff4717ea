"""The loop against transformers and PEFT, and against itself: alone, together, accumulated."""

from __future__ import annotations

import csv
import os
import signal

import peft
import pytest
import torch

from lora_runtime.adapters.files.file_names import FINGERPRINT_KEY, QUANTIZATION_KEY
from lora_runtime.adapters.files.folder import read_adapter
from lora_runtime.adapters.reduction import load_adapter
from lora_runtime.base.loader import load_base
from lora_runtime.base.model.varlen_attention import RowLengths, VarlenAttention
from lora_runtime.config import BaseConfig
from lora_runtime.errors import ConfigError
from lora_runtime.kernels import Span
from lora_runtime.training import trainer
from lora_runtime.training.binding import bind
from lora_runtime.training.config import TrainConfig, UnitConfig
from lora_runtime.training.distributed import World
from lora_runtime.training.losses import window_losses
from lora_runtime.training.starts import adapter_spec
from lora_runtime.training.trainer import stop_on_signals, train
from lora_runtime.training.units import UnitStatus
from lora_runtime.training.update import run_pass
from tests.lora_runtime.training.tiny_runs import (
    make_unit,
    quiet_console,
    ragged_data,
    run,
    shown,
    train_until_done,
    write_jsonl,
)
from tests.tiny import dense_twin, tiny_base, tiny_checkpoint, tiny_model
from tests.tiny_tokenizer import write_tokenizer

VARIANTS = ["lora", "rslora"]


def weights(unit):
    return {name: value.detach().clone() for name, value in unit.named_parameters().items()}


def largest_difference(one, other):
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def randomise(unit, scale=0.1):
    """Give the unit an effect, as B starts at zero."""
    generator = torch.Generator().manual_seed(unit.seed)
    for module in unit.modules.values():
        noise = torch.randn(module.b.shape, generator=generator, dtype=torch.float64)
        module.b.data.copy_(scale * noise)


def mean_loss(model, examples):
    """transformers' own loss of the same targets."""
    total, count = 0.0, 0
    for example in examples:
        labels = torch.full_like(example.token_ids, -100)
        labels[example.predictors + 1] = example.token_ids[example.predictors + 1]
        loss = model(input_ids=example.token_ids[None], labels=labels[None]).loss
        total = total + loss * len(example.predictors)
        count += len(example.predictors)
    return total / count


@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_first_loss_is_that_of_transformers(tmp_path, tokenizer, quantization):
    base = tiny_base("llama", quantization=quantization)
    config = UnitConfig(name="u", data=ragged_data(tmp_path / "d", 6), micro_batch_size=6)
    unit = make_unit(base, tokenizer, config)
    expected = mean_loss(dense_twin(base, "llama"), unit.next_micro_batches()[0])
    run_pass(base, [unit])
    assert unit.records[0].loss == pytest.approx(expected.item(), abs=2e-5)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("shape", ["llama", "gemma2", "phi3"])
def test_gradients_are_those_of_peft(tmp_path, tokenizer, shape, variant):
    base = tiny_base(shape)
    config = UnitConfig(
        name="u", data=ragged_data(tmp_path / "d", 4), variant=variant, rank=4, alpha=6.0
    )
    unit = make_unit(base, tokenizer, config)
    randomise(unit)
    examples = unit.next_micro_batches()[0]
    window_losses(base, [unit], [examples]).sum().backward()
    oracle = peft.get_peft_model(
        dense_twin(base, shape),
        peft.LoraConfig(
            r=4, lora_alpha=6, use_rslora=variant == "rslora", target_modules="all-linear"
        ),
    )
    layers = {path: oracle.base_model.model.get_submodule(path) for path in unit.modules}
    for path, factors in unit.modules.items():
        layers[path].lora_A.default.weight.data.copy_(factors.a.data)
        layers[path].lora_B.default.weight.data.copy_(factors.b.data)
    mean_loss(oracle, examples).backward()
    for path, factors in unit.modules.items():
        for ours, theirs in [
            (factors.a, layers[path].lora_A.default.weight),
            (factors.b, layers[path].lora_B.default.weight),
        ]:
            assert (ours.grad - theirs.grad).norm() <= 1e-4 * theirs.grad.norm()
            assert theirs.grad.norm() > 0


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_pass_of_many_units_reads_as_little_as_one_of_one(
    tmp_path, tokenizer, base, monkeypatch, accumulation
):
    """Every read waits for a GPU: one of the losses, after the gradients, and one of their lengths
    at the end of a window.
    """
    config = UnitConfig(
        name="u", data=ragged_data(tmp_path / "d", 8), rank=2, gradient_accumulation=accumulation
    )
    one, *many = [make_unit(base, tokenizer, config, seed=seed) for seed in range(4)]
    happened = []

    def seen(owner, name):
        real = getattr(owner, name)
        noted = lambda *a, **k: (happened.append(name), real(*a, **k))[1]  # noqa: E731
        monkeypatch.setattr(owner, name, noted)

    for name in ("tolist", "item", "__float__", "__bool__"):
        seen(torch.Tensor, name)
    seen(torch.autograd, "grad")
    monkeypatch.setattr(World, "total", lambda _, values: [float(value) for value in values])
    for units in ([one], many):
        happened.clear()
        run_pass(base, units)
        assert happened == ["grad", "tolist", "tolist"][: 4 - accumulation]


def mixed_units(tmp_path):
    return [
        UnitConfig(
            name="small", data=ragged_data(tmp_path / "a", 7, seed=1), rank=2, max_steps=14,
            learning_rate=1e-2, micro_batch_size=2,
        ),
        UnitConfig(
            name="wide", data=ragged_data(tmp_path / "b", 9, seed=2), rank=8, variant="rslora",
            target_modules=("q_proj", "v_proj", "down_proj"), num_epochs=3, micro_batch_size=3,
            schedule="linear", learning_rate=3e-3, weight_decay=0.1,
        ),
        UnitConfig(
            name="slow", data=ragged_data(tmp_path / "c", 5, seed=3), rank=3, max_steps=5,
            target_modules=("gate_proj",), gradient_accumulation=3, micro_batch_size=1, seed=7,
        ),
    ]  # fmt: skip


def test_units_together_equal_units_alone(tmp_path, tokenizer, exact_base):
    configs = mixed_units(tmp_path)
    together = [make_unit(exact_base, tokenizer, config, seed=3) for config in configs]
    train_until_done(exact_base, together)
    for unit, config in zip(together, configs, strict=True):
        alone = make_unit(exact_base, tokenizer, config, seed=3)
        start = weights(alone)
        train_until_done(exact_base, [alone])
        assert largest_difference(weights(unit), weights(alone)) <= 1e-10
        assert largest_difference(weights(unit), start) >= 1e-4
        assert unit.step == alone.step == unit.num_steps


def test_accumulated_micro_batches_equal_one_batch(tmp_path, tokenizer, exact_base):
    data = ragged_data(tmp_path / "d", 11)
    runs = []
    for micro_batch_size, accumulation in [(12, 1), (4, 3), (1, 12)]:
        config = UnitConfig(
            name="u", data=data, rank=4, learning_rate=1e-2, num_epochs=3,
            micro_batch_size=micro_batch_size, gradient_accumulation=accumulation,
        )  # fmt: skip
        unit = make_unit(exact_base, tokenizer, config)
        train_until_done(exact_base, [unit])
        runs.append(unit)
    for unit in runs[1:]:
        assert largest_difference(weights(unit), weights(runs[0])) <= 1e-10
        for ours, theirs in zip(unit.records, runs[0].records, strict=True):
            assert ours.loss == pytest.approx(theirs.loss, abs=1e-12)
            assert ours.num_target_tokens == theirs.num_target_tokens


@pytest.mark.parametrize("learning_rate", [1e300, 1e200])
def test_a_diverging_unit_stops_alone(tmp_path, tokenizer, exact_base, learning_rate):
    good, _, other = mixed_units(tmp_path)
    wild = UnitConfig(
        name="wild", data=good.data, rank=4, learning_rate=learning_rate, warmup=0, max_steps=30
    )
    units = [make_unit(exact_base, tokenizer, config) for config in (good, wild, other)]
    train_until_done(exact_base, units)
    assert [unit.status for unit in units] == ["done", "failed", "done"]
    assert "lower learning_rate" in units[1].error
    assert units[1].step < 30
    for unit in (units[0], units[2]):
        alone = make_unit(exact_base, tokenizer, unit.config)
        train_until_done(exact_base, [alone])
        assert largest_difference(weights(unit), weights(alone)) <= 1e-10


def test_weights_that_overflow_in_the_last_update_are_not_written(tmp_path, tokenizer, base):
    config = UnitConfig(
        name="u", data=ragged_data(tmp_path / "d", 4), learning_rate=1e39, warmup=0, max_steps=1
    )
    (result,) = run(base, tokenizer, tmp_path / "out", [config])
    assert result.status is UnitStatus.FAILED and "weights are not finite" in result.error
    assert not (tmp_path / "out" / "u").exists()


def test_a_failed_unit_leaves_no_adapter_and_says_why(tmp_path, tokenizer, base):
    data = ragged_data(tmp_path / "d", 6)
    wild = UnitConfig(name="wild", data=data, learning_rate=1e30, warmup=0, max_steps=9)
    good = UnitConfig(name="good", data=data, max_steps=9)
    console = quiet_console()
    results = run(base, tokenizer, tmp_path / "out", [wild, good], console=console)
    assert [result.status for result in results] == [UnitStatus.FAILED, UnitStatus.DONE]
    assert results[0].folder is None and not (tmp_path / "out" / "wild").exists()
    assert results[1].folder == tmp_path / "out" / "good" and results[1].error is None
    assert "wild: " in shown(console) and "failed: the " in shown(console)
    assert "wild failed: the " in (tmp_path / "out" / "report" / "summary.md").read_text()


def test_peft_loads_the_base_that_the_file_names(tmp_path, tokenizer, monkeypatch):
    """From any folder, though the base was given by a relative path and its name has capitals."""
    folder = tmp_path / "Tiny-Llama"
    tiny_model("llama").save_pretrained(folder)
    monkeypatch.chdir(tmp_path)
    base = load_base(BaseConfig(model="Tiny-Llama", quantization="none", dtype="float32"))
    unit = UnitConfig(name="u", data=ragged_data(tmp_path / "d", 3), rank=2, max_steps=2)
    (result,) = run(base, tokenizer, tmp_path / "out", [unit])
    monkeypatch.chdir("/")
    model = peft.AutoPeftModelForCausalLM.from_pretrained(result.folder)
    assert model.peft_config["default"].base_model_name_or_path == str(folder)
    weight = model.get_base_model().model.embed_tokens.weight
    assert torch.equal(weight, base.model.get_input_embeddings().weight)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("shape", ["llama", "qwen3", "phi3"])
def test_exported_adapter_gives_the_training_logits_in_peft(tmp_path, tokenizer, shape, variant):
    base = tiny_base(shape)
    config = UnitConfig(
        name="u", data=ragged_data(tmp_path / "d", 8), variant=variant, rank=4, warmup=0,
        learning_rate=2e-2, max_steps=12,
    )  # fmt: skip
    unit = make_unit(base, tokenizer, config)
    train_until_done(base, [unit])
    (result,) = run(base, tokenizer, tmp_path / "out", [config])
    twin = dense_twin(base, shape)
    tokens = torch.arange(3, 40)
    at = torch.arange(len(tokens))
    with torch.no_grad():
        plain = twin(tokens[None]).logits[0]
        loaded = peft.PeftModel.from_pretrained(twin, result.folder)
        theirs = loaded(tokens[None]).logits[0]
        spans = [Span(slot=0, first_token=0, num_tokens=len(tokens))]
        with base.context.adapters(spans, bind([unit], base)):
            ours = base.forward(tokens, at, VarlenAttention([RowLengths([len(tokens)])]), at)
    assert (ours - theirs).abs().max() <= 1e-4
    assert (ours - plain).abs().max() >= 0.5


def test_exported_adapter_is_bound_to_its_base(tmp_path, tokenizer, base):
    config = UnitConfig(name="u", data=ragged_data(tmp_path / "d", 4), rank=3, max_steps=2)
    (result,) = run(base, tokenizer, tmp_path / "out", [config])
    form = load_adapter(result.folder, base.spec, base.weights)
    assert form.ranks == (3,) and len(form.modules) == len(base.spec.linears)
    assert form.num_parameters == result.num_parameters
    metadata = read_adapter(result.folder).metadata
    assert metadata[FINGERPRINT_KEY] == base.spec.fingerprint
    assert metadata[QUANTIZATION_KEY] == base.spec.quantization == "nf4"
    assert metadata["loramux.steps"] == "2"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_tiny_set_is_learned_and_the_base_is_untouched(tmp_path, tokenizer, dtype):
    base = tiny_base("llama-bias", dtype=dtype)
    before = {name: value.clone() for name, value in base.model.state_dict().items()}
    pairs = [
        {"prompt": "the brown fox", "completion": " jumps over the ship"},
        {"prompt": "What is", "completion": " the name"},
        {"prompt": "a storm", "completion": " in the night sinks the lazy captain and his dog"},
    ]
    data = write_jsonl(tmp_path / "d", pairs)
    config = UnitConfig(name="u", data=data, rank=8, learning_rate=1e-2, max_steps=60)
    unit = make_unit(base, tokenizer, config)
    train_until_done(base, [unit])
    assert unit.records[0].loss > 3.0
    assert unit.records[-1].loss < 0.1
    assert all(parameter.dtype == torch.float32 for parameter in unit.parameters)
    after = base.model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_learning_rate_follows_the_schedule_and_clipping_acts(tmp_path, tokenizer, base):
    config = UnitConfig(
        name="u", data=ragged_data(tmp_path / "d", 4), schedule="linear", warmup=2, max_steps=6,
        learning_rate=1e-3, max_grad_norm=1e-3,
    )  # fmt: skip
    unit = make_unit(base, tokenizer, config)
    train_until_done(base, [unit])
    rates = [record.learning_rate for record in unit.records]
    expected = [1 / 3, 2 / 3, 1, 3 / 4, 1 / 2, 1 / 4]
    assert rates == pytest.approx([1e-3 * share for share in expected])
    assert min(record.grad_norm for record in unit.records) > 1e-3  # measured before clipping
    moments = [unit.optimizer.state[parameter]["exp_avg"] for parameter in unit.parameters]
    assert torch.stack([moment.norm() for moment in moments]).norm() <= 1e-3


def test_targets_match_as_in_peft(tmp_path, base):
    def targets(*names):
        config = UnitConfig(name="u", data=tmp_path, target_modules=names)
        return [site.path for site in adapter_spec(config, base.spec).targets]

    assert targets("layers.1.self_attn.q_proj", "up_proj") == [
        "model.layers.0.mlp.up_proj",
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.mlp.up_proj",
        "model.layers.2.mlp.up_proj",
    ]
    with pytest.raises(ConfigError, match="'q_porj'.*did you mean 'q_proj'"):
        targets("v_proj", "q_porj")
    with pytest.raises(ConfigError, match="'proj'"):
        targets("proj")


def test_report_holds_every_update(tmp_path, tokenizer, base):
    units = mixed_units(tmp_path)
    console = quiet_console()
    results = run(base, tokenizer, tmp_path / "out", units, console=console, log_interval=5)
    report = tmp_path / "out" / "report"
    rows = list(csv.DictReader((report / "loss.csv").read_text().splitlines()))
    assert [row["unit"] for row in rows] == ["small"] * 14 + ["wide"] * 9 + ["slow"] * 5
    assert [float(row["loss"]) for row in rows] == [r.loss for u in results for r in u.records]
    assert (report / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert "| wide | done | 9/9 |" in (report / "summary.md").read_text()
    lines = shown(console).splitlines()
    assert [line.split()[1] for line in lines if line.startswith("small: ") and "loss" in line] == [
        "5/14", "10/14", "14/14",
    ]  # fmt: skip
    assert any(line.split()[:4] == ["small", "a", "completion", "7"] for line in lines)


def test_terminal_shows_a_bar_per_unit(tmp_path, tokenizer, base):
    console = quiet_console()
    console._force_terminal = True
    run(base, tokenizer, tmp_path / "out", mixed_units(tmp_path), console=console)
    assert "14/14" in shown(console) and "9/9" in shown(console) and "tokens/s" in shown(console)


def test_output_that_is_a_file(tmp_path, tokenizer, base):
    unit = UnitConfig(name="u", data=ragged_data(tmp_path / "d", 4))
    with pytest.raises(ConfigError) as caught:
        run(base, tokenizer, tmp_path / "d", [unit])
    assert caught.value.field == "output"


def test_too_long_for_the_base(tmp_path, tokenizer, base):
    unit = UnitConfig(name="u", data=ragged_data(tmp_path / "d", 4))
    with pytest.raises(ConfigError, match="max_seq_len is 513"):
        run(base, tokenizer, tmp_path / "out", [unit], max_seq_len=513)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_train_from_files_and_stop_at_a_signal(tmp_path, monkeypatch, number):
    folder = tiny_checkpoint(tmp_path / "base")
    write_tokenizer(folder)
    data = ragged_data(tmp_path / "d", 12)
    options = dict(
        output=tmp_path / "out",
        units=(UnitConfig(name="u", data=data, rank=2, max_steps=6),),
        base=BaseConfig(model=str(folder), dtype="float32"),
        max_seq_len=128,
    )
    real_pass = trainer.run_pass

    def interrupted_pass(base, units, *others):
        if units[0].step == 3:
            os.kill(os.getpid(), number)
        return real_pass(base, units, *others)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "run_pass", interrupted_pass)
        (stopped,) = train(TrainConfig(**options), quiet_console())
    assert stopped.status is UnitStatus.RUNNING and len(stopped.records) == 4
    assert "| u | interrupted | 4/6 |" in (tmp_path / "out/report/summary.md").read_text()
    (resumed,) = train(TrainConfig(**options, resume=True), quiet_console())
    assert resumed.status is UnitStatus.DONE and len(resumed.records) == 6
    assert resumed.records[:4] == stopped.records


@pytest.fixture
def sigint_interrupts():
    """As in a terminal; a shell's background jobs are started with SIGINT ignored."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, previous)


def test_a_hangup_that_is_ignored_stays_so():
    """As nohup has it."""
    previous = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_on_signals() as should_stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not should_stop()
    finally:
        signal.signal(signal.SIGHUP, previous)


def test_a_second_signal_of_any_kind_acts_as_before():
    terminated = []
    previous = signal.signal(signal.SIGTERM, lambda *_: terminated.append(True))
    try:
        with stop_on_signals() as should_stop:
            os.kill(os.getpid(), signal.SIGINT)
            assert should_stop() and not terminated
            os.kill(os.getpid(), signal.SIGTERM)
        assert terminated
    finally:
        signal.signal(signal.SIGTERM, previous)


@pytest.mark.usefixtures("sigint_interrupts")
def test_second_sigint_interrupts():
    with stop_on_signals() as should_stop:
        assert not should_stop()
        os.kill(os.getpid(), signal.SIGINT)
        assert should_stop()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler

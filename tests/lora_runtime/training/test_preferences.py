"""DPO on the shared loop against the paper's formula on PEFT, and against itself."""

from __future__ import annotations

import copy
import csv
import functools
import json
import math
from types import SimpleNamespace

import peft
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from lora_runtime.errors import ConfigError, DataError
from lora_runtime.training import losses
from lora_runtime.training.config import TrainConfig, UnitConfig
from lora_runtime.training.data import load_dataset, num_tokens
from lora_runtime.training.dry_run import estimate
from lora_runtime.training.losses import window_losses
from lora_runtime.training.report import tensorboard
from lora_runtime.training.update import run_pass
from tests.lora_runtime.training.tiny_runs import (
    StopAfter,
    make_unit,
    preferences,
    quiet_console,
    ragged_data,
    randomise,
    run,
    shown,
    train_until_done,
    write_jsonl,
)
from tests.tiny import dense_twin, in_float64

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def config_of(tmp_path, **options):
    defaults = dict(
        name="u", data=preferences(tmp_path / "p.jsonl", 7), rank=4, alpha=6.0, micro_batch_size=3,
        num_epochs=2, learning_rate=5e-3, warmup=0,
    )  # fmt: skip
    return UnitConfig(**{**defaults, **options})


def in_peft(base, unit, config):
    """PEFT's own layers with the unit's weights."""
    model = peft.get_peft_model(
        in_float64(dense_twin(base, "llama")),
        peft.LoraConfig(
            r=config.rank, lora_alpha=config.alpha, use_dora=config.has_gain,
            target_modules="all-linear",
        ),
    ).double()  # fmt: skip
    for path, module in unit.modules.items():
        for part, leaf in peft_leaves(model, path).items():
            leaf.data.copy_(module.parameters[part].data)
    return model


def peft_leaves(model, path):
    layer = model.base_model.model.get_submodule(path)
    leaves = {"a": layer.lora_A.default.weight, "b": layer.lora_B.default.weight}
    if layer.lora_magnitude_vector:
        leaves["magnitude"] = layer.lora_magnitude_vector["default"].weight
    return leaves


def log_probability(model, example):
    """Of the target tokens, by log_softmax."""
    logits = model(input_ids=example.token_ids[None]).logits[0]
    labels = example.token_ids[example.predictors + 1]
    return logits[example.predictors].log_softmax(-1)[range(len(labels)), labels].sum()


def margin_of(model, pair, beta):
    policy = [log_probability(model, example) for example in pair]
    with torch.no_grad(), model.disable_adapter():
        reference = [log_probability(model, example) for example in pair]
    return beta * ((policy[0] - reference[0]) - (policy[1] - reference[1])), policy[0]


@pytest.mark.parametrize(
    ("variant", "options"),
    [
        ("lora", {}),
        ("dora", dict(dpo_beta=0.7, label_smoothing=0.2)),
        ("dora", dict(dpo_beta=0.03, dpo_sft_weight=0.5)),
    ],
)
def test_loss_and_gradients_are_those_of_dpo_on_peft(
    tmp_path, tokenizer, exact_base, variant, options
):
    config = config_of(tmp_path, variant=variant, micro_batch_size=7, **options)
    unit = make_unit(exact_base, tokenizer, config)
    randomise(unit)
    pairs = unit.next_micro_batches()[0]
    ours = window_losses(exact_base, [unit], [pairs])
    ours.sum().backward()
    model = in_peft(exact_base, unit, config)
    terms, margins = [], []
    for pair in pairs:
        margin, chosen = margin_of(model, pair, config.dpo_beta)
        smoothing = config.label_smoothing
        right, wrong = torch.sigmoid(margin).log(), torch.sigmoid(-margin).log()
        nll = -chosen / len(pair.chosen.predictors)
        terms.append(-(1 - smoothing) * right - smoothing * wrong + config.dpo_sft_weight * nll)
        margins.append(margin.detach())
    loss, margins = torch.stack(terms).mean(), torch.stack(margins)
    loss.backward()
    expected = [loss.item(), (margins > 0).double().mean().item(), margins.mean().item()]
    assert ours[0].tolist() == pytest.approx(expected, rel=1e-6)  # transformers' angles: float32
    assert margins.abs().min() > 0.1 * config.dpo_beta and 0 < expected[1] < 1
    for path, module in unit.modules.items():
        for part, leaf in peft_leaves(model, path).items():
            assert leaf.grad.norm() > 0
            assert (module.parameters[part].grad - leaf.grad).norm() <= 1e-6 * leaf.grad.norm()


STARTS = {
    "lora": {},
    "dora": dict(variant="dora"),
    "pissa": dict(init="pissa"),
    "pissa-dora": dict(init="pissa", use_dora=True, variant="rslora"),
    "vocabulary": dict(modules_to_save=("embed_tokens", "lm_head")),
    "replicated": dict(layer_replication=((0, 2), (1, 3), (0, 1))),
}


@pytest.mark.parametrize("name", STARTS)
def test_first_loss_is_log_2(tmp_path, tokenizer, base, exact_base, name):
    config = config_of(tmp_path, micro_batch_size=7, **STARTS[name])
    for on, tolerance in [(base, 1e-5), (exact_base, 1e-12)]:
        unit = make_unit(on, tokenizer, config)
        run_pass(on, [unit])
        (first,) = unit.records
        assert first.loss == pytest.approx(math.log(2), abs=tolerance)
        assert first.margin == pytest.approx(0, abs=tolerance) and first.grad_norm > 1e-2


def test_reference_is_the_base_in_the_units_order_of_layers(tmp_path, tokenizer, exact_base):
    config = config_of(tmp_path, micro_batch_size=7, **STARTS["replicated"])
    unit = make_unit(exact_base, tokenizer, config)
    randomise(unit)
    plain = make_unit(exact_base, tokenizer, config_of(tmp_path))
    batches = [each.next_micro_batches()[0] for each in (unit, plain)]
    window_losses(exact_base, [unit, plain], batches)
    model = in_float64(dense_twin(exact_base, "llama"))
    stacked = copy.deepcopy(model)
    stacked.model.layers = torch.nn.ModuleList(
        copy.deepcopy(model.model.layers[layer]) for layer in unit.layer_map
    )
    for index, layer in enumerate(stacked.model.layers):
        layer.self_attn.layer_idx = index
    stacked.config.num_hidden_layers = len(stacked.model.layers)
    assert unit.layer_map == (0, 1, 1, 2, 0) and len(unit.references) >= 14
    for owner, twin, expected in [(unit, stacked, 14), (plain, model, 6)]:
        known = {e: v for (layers, e), v in owner.references.items() if layers == owner.layer_map}
        assert len(known) == expected
        for example, value in known.items():
            assert value == pytest.approx(log_probability(twin, example).item(), rel=1e-7)


def train(base, units):
    train_until_done(base, units)
    return units


def assert_same(unit, other, tolerance=1e-8):
    assert len(unit.records) == len(other.records) == unit.num_steps
    for ours, theirs in zip(unit.records, other.records, strict=True):
        assert ours.loss == pytest.approx(theirs.loss, abs=tolerance)
        assert ours.num_tokens == theirs.num_tokens
        # at first all margins are 0, and rounding decides which are above it
        assert ours.step == 1 or ours.accuracy == theirs.accuracy
        assert ours.margin == pytest.approx(theirs.margin, abs=tolerance)
    for ours, theirs in zip(unit.parameters, other.parameters, strict=True):
        assert (ours - theirs).abs().max() <= tolerance


def mixed(tmp_path):
    return [
        config_of(tmp_path, name="dpo", gradient_accumulation=2),
        UnitConfig(
            name="sft", data=ragged_data(tmp_path / "s", 9), rank=3, max_steps=5,
            micro_batch_size=2, learning_rate=5e-3,
        ),
        config_of(
            tmp_path, name="deep", data=preferences(tmp_path / "q", 5, seed=2), dpo_beta=0.5,
            use_dora=True, micro_batch_size=1, **STARTS["replicated"],
        ),
    ]  # fmt: skip


def test_with_other_units_equals_alone(tmp_path, tokenizer, exact_base):
    together = train(exact_base, [make_unit(exact_base, tokenizer, c) for c in mixed(tmp_path)])
    for unit in together:
        (alone,) = train(exact_base, [make_unit(exact_base, tokenizer, unit.config)])
        assert_same(unit, alone)
    assert together[1].records[-1].margin is None and together[1].records[-1].accuracy is None


@pytest.fixture
def forwards(monkeypatch):
    """Tokens of the examples of every forward, and True when the base read them alone."""
    found = []
    real = losses._token_losses

    def counted(base, bindings, layer_maps, batches):
        tokens = sum(num_tokens(example) for examples in batches for example in examples)
        found.append((tokens, not bindings))
        return real(base, bindings, layer_maps, batches)

    monkeypatch.setattr(losses, "_token_losses", counted)
    return found


def test_any_micro_batches_are_one_batch(tmp_path, tokenizer, exact_base, forwards):
    """Windows of four pairs, the last of two; what the base says of a pair is read once."""
    found = []
    for options in [
        dict(micro_batch_size=4),
        dict(micro_batch_size=2, gradient_accumulation=2),
        dict(micro_batch_size=1, gradient_accumulation=4),
        dict(micro_batch_size=4, max_tokens_per_batch=90),
    ]:
        forwards.clear()
        unit = make_unit(exact_base, tokenizer, config_of(tmp_path, **options))
        found.append(*train(exact_base, [unit]))
        by_base = [tokens for tokens, is_base in forwards if is_base]
        assert sum(by_base) == unit.dataset.num_tokens
        assert sum(tokens for tokens, _ in forwards) == (1 + 2) * unit.dataset.num_tokens
    assert 60 < max(tokens for tokens, _ in forwards) <= 90
    for unit in found[1:]:
        assert_same(unit, found[0])


def test_members_of_a_sweep_share_what_the_base_says(tmp_path, tokenizer, base, forwards):
    config = config_of(
        tmp_path, data=preferences(tmp_path / "p", 4), eval_data=preferences(tmp_path / "e", 3),
        max_steps=2, micro_batch_size=4, sweep={"learning_rate": (1e-3, 1e-2)},
    )  # fmt: skip
    results = run(base, tokenizer, tmp_path / "out", [config])
    assert [len(result.records) for result in results[:2]] in ([1, 2], [2, 1])
    ours, held_out = (
        load_dataset(path, tokenizer, 256).num_tokens for path in (config.data, config.eval_data)
    )
    both = [(ours, True), (2 * ours, False), (held_out, True), (2 * held_out, False)]
    assert forwards[:6] == [*both, (ours, False), (held_out, False)]


def test_resumed_inside_an_update_it_ends_the_same(tmp_path, tokenizer, base, forwards):
    """In the third epoch; what the base says, to the bit, is not read again in other company."""
    units = [
        config_of(
            tmp_path, data=preferences(tmp_path / "p", 4), micro_batch_size=1, num_epochs=3,
            gradient_accumulation=3, eval_data=preferences(tmp_path / "e", 3, seed=3),
            eval_interval=2, target_modules=("q_proj", "down_proj"),
        ),
        UnitConfig(name="sft", data=ragged_data(tmp_path / "s", 9), rank=3, max_steps=3),
    ]  # fmt: skip
    whole, output = tmp_path / "whole", tmp_path / "out"
    expected = run(base, tokenizer, whole, units)
    run(base, tokenizer, output, units, should_stop=StopAfter(8))
    (state,) = output.glob("checkpoints/*/state.json")
    facts = json.loads(state.read_text())["units"]["u"]
    assert facts["window"]["done"] and None not in facts["references"]
    forwards.clear()
    resumed = run(base, tokenizer, output, units, resume=True)
    assert forwards and not any(is_base for _, is_base in forwards)
    for ours, theirs in zip(resumed, expected, strict=True):
        for name in ("records", "eval_records"):
            records = [[r._replace(seconds=0) for r in getattr(x, name)] for x in (ours, theirs)]
            assert records[0] == records[1]
    ours, theirs = (load_file(at / "u" / "adapter_model.safetensors") for at in (output, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tokenizer, base):
    folder = tmp_path_factory.mktemp("finished")
    config = config_of(
        folder, data=preferences(folder / "p", 16), eval_data=preferences(folder / "e", 8, seed=9),
        num_epochs=6, micro_batch_size=4, learning_rate=5e-3, eval_interval=6, label_smoothing=0.1,
    )  # fmt: skip
    sft = UnitConfig(name="sft", data=ragged_data(folder / "s", 5), rank=2, max_steps=2)
    console = quiet_console()
    results = run(base, tokenizer, folder / "out", [config, sft], console=console)
    return config, results, folder / "out" / "report", shown(console)


def test_a_run_learns_what_is_preferred(finished):
    _, (result, _), _, _ = finished
    first, last = result.records[0], result.records[-1]
    assert first.margin == pytest.approx(0, abs=1e-4)
    assert last.accuracy == 1 and last.margin > 0.5 and last.loss < 0.6 < first.loss
    evaluations = result.eval_records
    assert evaluations[-1].loss < evaluations[0].loss and evaluations[-1].accuracy >= 0.75


def test_held_out_loss_is_that_of_the_exported_adapter_in_peft(tokenizer, base, finished):
    config, (result, _), _, _ = finished
    model = peft.PeftModel.from_pretrained(dense_twin(base, "llama"), result.folder)
    pairs = load_dataset(config.eval_data, tokenizer, 256).pairs
    with torch.no_grad():
        margins = torch.stack([margin_of(model, pair, config.dpo_beta)[0] for pair in pairs])
    expected = (-0.9 * F.logsigmoid(margins) - 0.1 * F.logsigmoid(-margins)).mean()
    assert result.exported_loss == pytest.approx(expected.item(), abs=2e-5)
    assert result.best.accuracy == (margins > 0).float().mean()


def test_what_is_shown(finished):
    _, (result, _), folder, console = finished
    rows = list(csv.DictReader((folder / "loss.csv").read_text().splitlines()))
    ours = [row for row in rows if row["unit"] == "u"]
    assert [float(row["margin"]) for row in ours] == [r.margin for r in result.records]
    assert [float(row["accuracy"]) for row in ours] == [r.accuracy for r in result.records]
    accuracies = {int(r["step"]): float(r["eval_accuracy"]) for r in ours if r["eval_accuracy"]}
    assert accuracies == {r.step: r.accuracy for r in result.eval_records}
    empty = [row[key] for row in rows[len(ours) :] for key in ("accuracy", "margin", "eval_loss")]
    assert empty == [""] * 6
    page = (folder / "summary.md").read_text()
    assert "16 pairs (0 truncated)" in page and "last 10 updates: accuracy " in page
    assert f"held out, best: accuracy {result.best.accuracy:.0%}" in page
    assert f"accuracy {result.records[-1].accuracy:.0%}, margin " in console
    assert any(line.split()[:4] == ["u", "p", "preference", "16"] for line in console.splitlines())


def test_tensorboard_has_curves_of_preferences_only(finished):
    for result, has_them in zip(finished[1], (True, False), strict=True):
        values = {}
        add = functools.partial(lambda kept, name, value, step: kept.update({name: value}), values)
        writer = SimpleNamespace(add_scalar=add)
        tensorboard._add(writer, SimpleNamespace(records=result.records, held_out=None))
        found = {name: value for name, value in values.items() if name.startswith("preferences/")}
        last = result.records[-1]
        expected = {"preferences/accuracy": last.accuracy, "preferences/margin": last.margin}
        assert found == (expected if has_them else {}) and values["loss/train"] == last.loss


def test_dry_run_counts_pairs(tmp_path, tokenizer, base):
    config = config_of(tmp_path, num_epochs=3, micro_batch_size=2)
    found = estimate(base, tokenizer, TrainConfig(output=tmp_path / "o", units=(config,),
                     max_seq_len=256)).together  # fmt: skip
    (result,) = run(base, tokenizer, tmp_path / "out", [config])
    assert found.num_steps == len(result.records) == math.ceil(3 * 7 / 2)
    assert found.num_tokens == sum(record.num_tokens for record in result.records)


def test_pairs_that_teach_nothing_are_named(tmp_path, tokenizer, base):
    row = {"prompt": "the fox", "chosen": " jumps over", "rejected": " sinks"}
    for bad, field in [
        ({**row, "rejected": row["chosen"]}, "rejected"),
        ({**row, "rejected": ""}, "rejected"),
        ({**row, "prompt": [{"role": "user", "content": "a"}]}, "chosen"),
    ]:
        path = write_jsonl(tmp_path / "bad.jsonl", [row, bad])
        with pytest.raises(DataError, match="bad.jsonl:2") as caught:
            run(base, tokenizer, tmp_path / "out", [config_of(tmp_path, data=path)])
        assert caught.value.field == field
    path = write_jsonl(tmp_path / "cut.jsonl", [{**row, "rejected": " jumps up"}])
    (pair,) = load_dataset(path, tokenizer, 64).pairs
    tokens = zip(*(example.token_ids.tolist() for example in pair), strict=False)
    common = [one == other for one, other in tokens].index(False)
    with pytest.raises(DataError, match="cut.jsonl:1.*the same tokens"):
        load_dataset(path, tokenizer, common)


@pytest.mark.parametrize(
    "options", [dict(dpo_beta=0.2), dict(label_smoothing=0.1), dict(dpo_sft_weight=1.0)]
)
def test_settings_of_preferences_need_preferences(tmp_path, tokenizer, base, options):
    (field,) = options
    config = config_of(tmp_path, data=ragged_data(tmp_path / "s", 4), **options)
    with pytest.raises(ConfigError, match=f"{field} is .* for data with prompt, chosen") as caught:
        run(base, tokenizer, tmp_path / "out", [config_of(tmp_path, name="a"), config])
    assert caught.value.field == field
    with pytest.raises(ConfigError) as caught:
        config_of(tmp_path, **{field: -1.0})
    assert caught.value.field == field


def test_a_pair_longer_than_a_forward_is_refused(tmp_path, tokenizer, base):
    config = config_of(tmp_path, max_tokens_per_batch=40)
    with pytest.raises(ConfigError, match="the longest pair") as caught:
        run(base, tokenizer, tmp_path / "out", [config], max_seq_len=40)
    assert caught.value.field == "max_tokens_per_batch"


def test_what_the_loss_is_cannot_be_swept(tmp_path, tokenizer, base):
    config = config_of(tmp_path, sweep={"dpo_beta": (0.1, 0.2)})
    with pytest.raises(ConfigError, match="dpo_beta is not a field to sweep"):
        run(base, tokenizer, tmp_path / "out", [config])

"""Training over mixtures of experts: gradients, mixes and exports, against peft."""

from __future__ import annotations

import pytest
import torch
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from lora_runtime.adapters.files.parity_record import read_parity_record
from lora_runtime.adapters.packed_adapter import pack_for
from lora_runtime.adapters.parity import gate
from lora_runtime.adapters.reduction import load_adapter
from lora_runtime.base.fingerprint import fingerprint
from lora_runtime.base.recompute import recomputed
from lora_runtime.engine.probe import adapter_logits
from lora_runtime.errors import ConfigError
from lora_runtime.training.config import UnitConfig
from lora_runtime.training.export import adapter_files
from lora_runtime.training.losses import unit_logits, window_losses
from tests.lora_runtime.training.tiny_runs import (
    at_every_token,
    make_unit,
    ragged_data,
    randomise,
    run,
    train_until_done,
)
from tests.lora_runtime.training.trained_variants import ROWS, mean_loss
from tests.peft_adapters import load_in_peft
from tests.tiny import dense_twin, tiny_base

EXPERTS = ("experts.gate_up_proj", "experts.down_proj")
ATTENTION = ("q_proj", "o_proj")

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.fixture(scope="module", params=["qwen2-moe", "gpt-oss"])
def shape(request):
    return request.param


@pytest.fixture(scope="module")
def mixture(shape):
    return tiny_base(shape)


def unit_of(base, tokenizer, tmp_path, name="experts", **options):
    settings = {
        "rank": 3, "alpha": 6.0, "warmup": 0, "target_modules": ATTENTION,
        "target_parameters": EXPERTS, "micro_batch_size": 3, **options,
    }  # fmt: skip
    data = ragged_data(tmp_path / f"{name}.jsonl", 6)
    return make_unit(base, tokenizer, UnitConfig(name=name, data=data, **settings))


def in_peft(base, shape, unit, folder):
    """The unit as it is, exported and loaded by peft over the dequantised base."""
    adapter_files(unit.config, base.spec, unit.modules, {}).write(folder)
    return load_in_peft(dense_twin(base, shape), folder)


def test_gradients_are_those_of_peft(tmp_path, tokenizer, mixture, shape):
    unit = unit_of(mixture, tokenizer, tmp_path)
    randomise(unit, 0.2)
    items = unit.next_micro_batches()[0]
    window_losses(mixture, [unit], [items])[:, 0].sum().backward()
    oracle = in_peft(mixture, shape, unit, tmp_path / "a")
    examples = [example for item in items for example in item.examples]
    theirs = {n: p for n, p in oracle.named_parameters() if "lora_" in n}
    for parameter in theirs.values():
        parameter.requires_grad_(True)
    mean_loss(lambda ids: oracle(ids[None]).logits[0], examples).backward()
    assert len(theirs) == 2 * len(unit.modules)
    for name, module in unit.modules.items():
        holder = f"base_model.model.{module.holder or name}"
        a = theirs[f"{holder}.lora_A.default.weight"].grad
        b = theirs[f"{holder}.lora_B.default.weight"].grad
        if module.num_experts > 1:
            b = b.unflatten(1, (-1, module.num_experts)).transpose(1, 2).flatten(1)
        for ours, other in ((module.a.grad, a), (module.b.grad, b)):
            assert other.norm() > 0
            assert (ours - other).norm() <= 2e-3 * other.norm(), name


def test_units_together_equal_each_alone_and_the_base_stays(tmp_path, tokenizer, mixture):
    configs = [
        UnitConfig(
            name=name, data=ragged_data(tmp_path / name, 5 + i, seed=i), max_steps=6, rank=2 + i,
            learning_rate=3e-3, micro_batch_size=1 + i, **settings,
        )
        for i, (name, settings) in enumerate({
            "attention": dict(target_modules=ATTENTION),
            "experts": dict(target_modules=("q_proj",), target_parameters=EXPERTS),
            "down": dict(target_modules=("v_proj",), target_parameters=EXPERTS[1:]),
        }.items())
    ]  # fmt: skip
    before = fingerprint(mixture.model, "nf4")
    together = [make_unit(mixture, tokenizer, config, seed=3) for config in configs]
    train_until_done(mixture, together)
    for unit, config in zip(together, configs, strict=True):
        alone = make_unit(mixture, tokenizer, config, seed=3)
        train_until_done(mixture, [alone])
        for name, value in alone.named_parameters().items():
            assert (unit.named_parameters()[name] - value).abs().max() <= 1e-3, name
    assert fingerprint(mixture.model, "nf4") == before


def test_layers_computed_again_give_the_same_gradients(tmp_path, tokenizer, mixture):
    found = []
    unit = unit_of(mixture, tokenizer, tmp_path, router_aux_loss=0.1)
    randomise(unit, 0.2)
    for base in (mixture, recomputed(mixture)):
        unit.optimizer.zero_grad()
        window_losses(base, [unit], [unit.next_micro_batches()[0]])[:, 0].sum().backward()
        found.append([parameter.grad.clone() for parameter in unit.parameters])
    assert all(map(torch.equal, *found))
    assert all(gradient.abs().max() > 0 for gradient in found[0])


def test_exports_pass_the_parity_gate_and_load_in_peft(tmp_path, tokenizer, mixture, shape):
    """`all-linear` is all but experts and routers, shared experts' layers among them."""
    options = dict(max_steps=8, learning_rate=0.02, rank=2, warmup=0.0)
    configs = [
        UnitConfig(name="experts", data=ragged_data(tmp_path / "a", 6), target_modules=ATTENTION,
                   target_parameters=EXPERTS, **options),
        UnitConfig(name="linears", data=ragged_data(tmp_path / "b", 6, seed=1), **options),
    ]  # fmt: skip
    run(mixture, tokenizer, tmp_path / "out", configs)
    twin = dense_twin(mixture, shape)
    for config in configs:
        folder = tmp_path / "out" / config.name
        form = load_adapter(folder, mixture.spec, mixture.weights)
        packed = pack_for(mixture, form)
        record = read_parity_record(folder, mixture.spec)
        assert gate(record, adapter_logits(mixture, packed), "float32").passed
        served = at_every_token(adapter_logits(mixture, packed))(ROWS, True)
        oracle = load_in_peft(twin, folder)
        for row, ours in zip(ROWS, served, strict=True):
            with torch.no_grad():
                theirs = oracle(torch.tensor([row])).logits[0]
                plain = twin(torch.tensor([row])).logits[0]
            assert (ours - theirs).abs().max() <= 2e-4
            assert (theirs - plain).abs().max() >= 0.05
        paths = {key.path for key in form.modules}
        assert paths.isdisjoint(mixture.spec.routers)
        shared = {path for path in paths if "shared_expert." in path}
        assert bool(shared) == (shape == "qwen2-moe" and config.name == "linears")


def test_what_is_not_trained_on_experts_is_refused(tmp_path, tokenizer, mixture):
    for options, field in (
        (dict(variant="dora"), "target_parameters"),
        (dict(variant="pissa"), "init"),
        (dict(target_parameters=("experts.gate_proj",), target_modules=()), "target_parameters"),
        (dict(target_modules=("all-linear",)), "target_modules"),
        (dict(target_modules=("up_poj",)), "target_modules"),
    ):
        with pytest.raises(ConfigError) as refusal:
            unit_of(mixture, tokenizer, tmp_path, **options)
        assert refusal.value.field == field


@pytest.mark.parametrize("given", ["experts", "gate_up_proj", "in_proj_qkvz"])
def test_no_expert_is_proposed_as_a_module(tmp_path, tokenizer, mixture, given):
    with pytest.raises(ConfigError) as refusal:
        unit_of(mixture, tokenizer, tmp_path, target_modules=("q_proj", given))
    message = str(refusal.value)
    assert "experts are named in target_parameters" in message
    assert "gate_up_proj" not in message.replace(repr(given), "")


@pytest.mark.parametrize(
    ("given", "meant"),
    [("experts.gate_upproj", "experts.gate_up_proj"), ("gate", "weight"), ("q_proj", "weight")],
)
def test_a_parameter_that_the_base_has_not_is_refused(tmp_path, tokenizer, mixture, given, meant):
    """Beside others that it has, too."""
    targets = (*EXPERTS, given)
    with pytest.raises(ConfigError, match=f"{given!r}.*{meant}") as refusal:
        unit_of(mixture, tokenizer, tmp_path, target_parameters=targets)
    assert refusal.value.field == "target_parameters"


def test_the_auxiliary_loss_is_transformers_own(tmp_path, tokenizer):
    base = tiny_base("mixtral")
    twin = dense_twin(base, "mixtral")
    plain = unit_of(base, tokenizer, tmp_path)
    unit = unit_of(base, tokenizer, tmp_path, router_aux_loss=0.7)
    items = unit.next_micro_batches()[0]
    examples = [example for item in items for example in item.examples]
    logits = [[] for _ in range(base.spec.num_layers)]
    for example in examples:
        ids = torch.tensor(example.token_ids)[None]
        found = twin(ids, output_router_logits=True).router_logits
        for layer, own in zip(logits, found, strict=True):
            layer.append(own)
    gathered = tuple(torch.cat(layer) for layer in logits)
    expected = load_balancing_loss_func(gathered, 4, 2)
    losses = [window_losses(base, [one], [items])[0, 0] for one in (unit, plain)]
    share = sum(len(e.predictors) for e in examples) / unit.window_weight
    torch.testing.assert_close(losses[0] - losses[1], 0.7 * share * expected, rtol=1e-3, atol=1e-5)
    assert unit_logits(base, unit) is not None

"""Every variant against dense autograd, PEFT and serving: starts, gradients, mixes, exports."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from functools import cache

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch.func import functional_call

from lora_runtime.adapters.files.parity_record import read_parity_record
from lora_runtime.adapters.packed_adapter import pack_for
from lora_runtime.adapters.parity import gate
from lora_runtime.adapters.reduction import load_adapter
from lora_runtime.base.fingerprint import fingerprint
from lora_runtime.engine.probe import adapter_logits, probe_logits
from lora_runtime.errors import ConfigError
from lora_runtime.training.config import UnitConfig
from lora_runtime.training.export import adapter_files
from lora_runtime.training.losses import unit_logits, window_losses
from lora_runtime.training.optimizers import create_optimizer, decay_starts
from tests.lora_runtime.training.tiny_runs import (
    at_every_token,
    make_unit,
    ragged_data,
    randomise,
    run,
    train_until_done,
)
from tests.lora_runtime.training.trained_variants import (
    PATTERNS,
    ROWS,
    VARIANTS,
    lost_and_left,
    mean_loss,
    stacked,
    unit_of,
)
from tests.peft_adapters import load_in_peft
from tests.tiny import dense_twin, in_float64, tiny_base, tiny_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.fixture(scope="module")
def base_of():
    """(quantization, dtype) → a base, made once."""
    return cache(
        lambda quantization, dtype: tiny_base("llama", quantization=quantization, dtype=dtype)
    )


@pytest.mark.parametrize("quantization", ["nf4", "fp4", "int8", "none"])
@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_variant_starts_at_exactly_the_base(
    tmp_path, tokenizer, base_of, name, quantization, dtype
):
    base = base_of(quantization, dtype)
    unit = unit_of(base, tokenizer, tmp_path, name)
    started = at_every_token(unit_logits(base, unit))(ROWS, True)
    unit.modules = {}  # the base alone, in the unit's order of layers
    for ours, theirs in zip(
        started, at_every_token(unit_logits(base, unit))(ROWS, True), strict=True
    ):
        assert torch.equal(ours, theirs)


@dataclass
class DenseForm:
    """W' = g∘(W + s·(BA − B₀A₀)) of one module from leaves of its own, the formula of the paper."""

    weight: torch.Tensor
    module: object
    leaves: dict = field(default_factory=dict)

    def effective(self):
        module = self.module
        named = {n: p.detach().clone() for n, p in module.parameters.items()}
        if module.start is not None:
            named["a"] += module.start.a
            named["b"] += module.start.b
        self.leaves = {name: value.requires_grad_() for name, value in named.items()}
        delta = module.scaling * self.leaves["b"] @ self.leaves["a"]
        if module.start is not None:
            delta = delta - module.scaling * module.start.b @ module.start.a
        changed = self.weight + delta
        if "magnitude" not in self.leaves:
            return changed
        norm = changed.norm(dim=1).detach()
        return (self.leaves["magnitude"] / norm)[:, None] * changed


@pytest.mark.parametrize("name", VARIANTS)
def test_gradients_are_those_of_dense_autograd(tmp_path, tokenizer, exact_base, name):
    unit = unit_of(exact_base, tokenizer, tmp_path, name)
    randomise(unit)
    examples = unit.next_micro_batches()[0]
    window_losses(exact_base, [unit], [examples]).sum().backward()
    twin = in_float64(dense_twin(exact_base, "llama"))
    twin.set_attn_implementation("sdpa")  # of the config that copies of layers copy
    twin = stacked(twin, unit.layer_map)
    dense = {
        path: DenseForm(twin.get_submodule(path).weight.detach(), module)
        for path, module in unit.modules.items()
    }
    changed = {f"{path}.weight": form.effective() for path, form in dense.items()}
    mean_loss(lambda ids: functional_call(twin, changed, ids[None]).logits[0], examples).backward()
    for path, module in unit.modules.items():
        assert len(module.a) == (3 if path.endswith("1.self_attn.v_proj") and (
            "rank_pattern" in VARIANTS[name]) else 4)  # fmt: skip
        for part, parameter in module.parameters.items():
            expected = dense[path].leaves[part].grad
            assert expected.norm() > 0
            assert (parameter.grad - expected).norm() <= 1e-9 * expected.norm()


def copy_to_peft(unit, oracle):
    """Give PEFT's layers the unit's weights; returns each module's layer."""
    layers = {path: oracle.base_model.model.get_submodule(path) for path in unit.modules}
    for path, module in unit.modules.items():
        start = module.start
        a, b = module.a.data, module.b.data
        layers[path].lora_A.default.weight.data.copy_(a if start is None else start.a + a)
        layers[path].lora_B.default.weight.data.copy_(b if start is None else start.b + b)
        if module.magnitude is not None:
            layers[path].lora_magnitude_vector.default.weight.data.copy_(module.magnitude.data)
    return layers


def assert_gradients_of_peft(unit, layers, limit):
    for path, module in unit.modules.items():
        layer = layers[path]
        theirs = {"a": layer.lora_A.default.weight, "b": layer.lora_B.default.weight}
        if module.magnitude is not None:
            theirs["magnitude"] = layer.lora_magnitude_vector.default.weight
        assert theirs.keys() == module.parameters.keys()
        for part, parameter in module.parameters.items():
            grad = theirs[part].grad
            assert grad.norm() > 0
            assert (parameter.grad - grad).norm() <= limit * grad.norm()


@pytest.mark.parametrize("shape", ["llama-bias", "gemma2", "phi3"])
def test_gradients_of_dora_are_those_of_peft(tmp_path, tokenizer, shape):
    base = tiny_base(shape)
    unit = unit_of(base, tokenizer, tmp_path, variant="rslora", use_dora=True)
    randomise(unit, 0.05)
    examples = unit.next_micro_batches()[0]
    window_losses(base, [unit], [examples]).sum().backward()
    config = peft.LoraConfig(
        r=4, lora_alpha=6, use_rslora=True, use_dora=True, target_modules="all-linear"
    )
    oracle = peft.get_peft_model(dense_twin(base, shape), config)
    layers = copy_to_peft(unit, oracle)
    mean_loss(lambda ids: oracle(ids[None]).logits[0], examples).backward()
    assert_gradients_of_peft(unit, layers, 1e-4)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_starts_and_gradients_of_pefts_own_pissa_and_olora(tmp_path, tokenizer, init):
    base = tiny_base("llama", quantization="none")
    unit = unit_of(base, tokenizer, tmp_path, init=init)
    config = peft.LoraConfig(r=4, lora_alpha=6, init_lora_weights=init, target_modules="all-linear")
    oracle = peft.get_peft_model(dense_twin(base, "llama"), config)
    for path, module in unit.modules.items():
        layer = oracle.base_model.model.get_submodule(path)
        theirs = layer.lora_B.default.weight @ layer.lora_A.default.weight
        ours = module.start.b @ module.start.a
        assert (ours - theirs).norm() <= 1e-4 * theirs.norm()
    randomise(unit, 0.05)
    examples = unit.next_micro_batches()[0]
    window_losses(base, [unit], [examples]).sum().backward()
    layers = copy_to_peft(unit, oracle)
    mean_loss(lambda ids: oracle(ids[None]).logits[0], examples).backward()
    assert_gradients_of_peft(unit, layers, 1e-3)


def mixed_configs(tmp_path):
    names = ["lora", "rslora", "dora", "pissa", "pissa-dora-rslora", "olora"]
    names += ["replicated", "replicated-part"]
    sizes = {"rank": [2, 8, 3, 5, 4, 2, 3, 2], "weight_decay": [0, 0.1, 0, 0.1, 0.2, 0, 0, 0]}
    return [
        UnitConfig(
            name=name, data=ragged_data(tmp_path / name, 5 + index, seed=index), max_steps=20,
            learning_rate=1e-4 if name == "olora" else 3e-3, loraplus_ratio=1.0 + index % 4,
            micro_batch_size=1 + index % 3,
            rank=sizes["rank"][index], weight_decay=sizes["weight_decay"][index], **VARIANTS[name],
        )
        for index, name in enumerate(names)
    ]  # fmt: skip


def test_a_mix_of_variants_equals_each_alone_and_the_base_stays(tmp_path, tokenizer, exact_base):
    configs = mixed_configs(tmp_path)
    before = fingerprint(exact_base.model, "none")
    together = [make_unit(exact_base, tokenizer, config, seed=3) for config in configs]
    plain = at_every_token(unit_logits(exact_base, together[0]))(ROWS, False)
    train_until_done(exact_base, together)
    for unit, config in zip(together, configs, strict=True):
        alone = make_unit(exact_base, tokenizer, config, seed=3)
        start = {name: value.detach().clone() for name, value in alone.named_parameters().items()}
        train_until_done(exact_base, [alone])
        assert unit.step == alone.step == 20
        for name, value in alone.named_parameters().items():
            assert (unit.named_parameters()[name] - value).abs().max() <= 1e-8
            assert (start[name] - value).abs().max() >= 1e-4
    assert fingerprint(exact_base.model, "none") == before
    after = at_every_token(unit_logits(exact_base, together[0]))(ROWS, False)
    assert all(torch.equal(one, other) for one, other in zip(plain, after, strict=True))


@pytest.fixture(scope="module")
def disk_base(tmp_path_factory):
    """NF4, beside its 16-bit checkpoint."""
    return tiny_base("llama", folder=tiny_checkpoint(tmp_path_factory.mktemp("base")))


EXPORTED = {
    **VARIANTS,
    "loftq": {"variant": "loftq"},
    "qera": {"variant": "qera", **PATTERNS},
    "qera-replicated-dora": {**VARIANTS["replicated"], "use_dora": True, "init": "qera"},
}


@pytest.fixture(scope="module")
def exported(tmp_path_factory, tokenizer, disk_base):
    """All variants trained in one run on the NF4 base: name → folder."""
    folder = tmp_path_factory.mktemp("exported")
    return train_all(disk_base, tokenizer, folder, EXPORTED)


def train_all(base, tokenizer, folder, variants):
    """Train in one run, which must not change the base: name → folder."""
    configs = [
        UnitConfig(
            name=name, data=ragged_data(folder / f"{name}.jsonl", 8, seed=seed), rank=4, alpha=6.0,
            warmup=0, learning_rate=1e-2, max_steps=12, **options,
        )
        for seed, (name, options) in enumerate(variants.items())
    ]  # fmt: skip
    before = fingerprint(base.model, base.spec.quantization)
    results = run(base, tokenizer, folder / "out", configs)
    assert fingerprint(base.model, base.spec.quantization) == before
    return {result.name: result.folder for result in results}


def assert_served_as_trained_and_as_in_peft(base, folder):
    record = read_parity_record(folder, base.spec)
    form = load_adapter(folder, base.spec, base.weights)
    parity = gate(record, adapter_logits(base, pack_for(base, form)), "float32")
    assert parity.limit == 0.01 and parity.error < 1e-4 and parity.effect_rms > 0.3
    oracle = load_in_peft(dense_twin(base, "llama"), folder)
    with torch.no_grad():
        for row, ours in zip(ROWS, probe_logits(base, form, ROWS), strict=True):
            assert (oracle(torch.tensor([row])).logits[0] - ours).abs().max() <= 1e-4


@pytest.mark.parametrize("name", EXPORTED)
def test_exports_pass_the_parity_gate_and_do_the_same_in_peft(exported, disk_base, name):
    assert_served_as_trained_and_as_in_peft(disk_base, exported[name])


def test_files_in_bfloat16_pass_the_parity_gate(tmp_path, tokenizer, disk_base):
    names = ["lora", "dora", "pissa-dora-rslora", "replicated"]
    options = {name: {**EXPORTED[name], "adapter_dtype": "bfloat16"} for name in names}
    for folder in train_all(disk_base, tokenizer, tmp_path, options).values():
        tensors = load_file(folder / "adapter_model.safetensors")
        for key, tensor in tensors.items():
            is_factor = "lora_A" in key or "lora_B" in key
            assert tensor.dtype == (torch.bfloat16 if is_factor else torch.float32)
        form = load_adapter(folder, disk_base.spec, disk_base.weights)
        served = adapter_logits(disk_base, pack_for(disk_base, form))
        parity = gate(read_parity_record(folder, disk_base.spec), served, "float32")
        assert parity.error < 0.01 and parity.effect_rms > 0.3


@pytest.mark.parametrize("quantization", ["nf4-double", "fp4", "int8"])
def test_other_formats_of_the_base_train_what_they_serve(tmp_path, tokenizer, quantization):
    checkpoint = tiny_checkpoint(tmp_path / "base")
    base = tiny_base("llama", quantization=quantization, folder=checkpoint)
    names = ["lora", "dora", "pissa", "loftq", "qera"]
    folders = train_all(base, tokenizer, tmp_path, {name: EXPORTED[name] for name in names})
    for folder in folders.values():
        assert_served_as_trained_and_as_in_peft(base, folder)


@pytest.mark.parametrize("name", EXPORTED)
def test_rounding_an_export_to_bfloat16_keeps_the_change(exported, name):
    tensors = load_file(exported[name] / "adapter_model.safetensors")
    for key in [key for key in tensors if "lora_A" in key]:
        a, b = tensors[key], tensors[key.replace("lora_A", "lora_B")]
        change = b.double() @ a.double()
        rounded = b.bfloat16().double() @ a.bfloat16().double()
        assert (rounded - change).norm() <= 0.01 * change.norm()


@pytest.mark.parametrize("rank", [4, 40])
def test_ranks_above_half_the_layer_are_exported_too(tmp_path, tokenizer, base, rank):
    """Twice the rank of the first factors is more than such a layer has."""
    targets = ("gate_proj", "q_proj")
    options = {"target_modules": targets, "rank_pattern": {}, "alpha_pattern": {}}
    unit = unit_of(base, tokenizer, tmp_path, "pissa", rank=rank, **options)
    randomise(unit, 0.01)
    files = adapter_files(unit.config, base.spec, unit.modules, {})
    config, tensors = files.config, files.tensors
    assert config["r"] == 2 * rank and config["init_lora_weights"] is True
    for path, module in unit.modules.items():
        a, b = (tensors[f"base_model.model.{path}.lora_{part}.weight"] for part in "AB")
        assert a.shape[0] == b.shape[1] == 2 * rank
        wanted = module.unscaled()
        change = wanted.b @ wanted.a
        assert (b @ a - change).norm() <= 1e-5 * change.norm()


@pytest.mark.parametrize("quantization", ["nf4", "nf4-double", "fp4", "int8"])
def test_loftq_starts_nearer_to_the_checkpoint_than_the_quantised_base(
    tmp_path, tokenizer, quantization
):
    checkpoint = tiny_checkpoint(tmp_path / "base")
    base = tiny_base("llama", quantization=quantization, folder=checkpoint)
    unit = unit_of(base, tokenizer, tmp_path, init="loftq", alpha=12.0)
    for module in unit.modules.values():
        lost, left = lost_and_left(base, module)
        assert left.norm() < 0.95 * lost.norm()
        best = torch.linalg.svdvals(lost)[len(module.a) :].norm()
        assert left.norm().item() == pytest.approx(best.item(), rel=1e-4)


def test_weight_decay_acts_on_the_whole_factor(tmp_path, tokenizer, exact_base):
    options = {"learning_rate": 1e-2, "weight_decay": 0.3, "loraplus_ratio": 4.0}
    unit = unit_of(exact_base, tokenizer, tmp_path, "pissa", **options)
    module = next(iter(unit.modules.values()))
    whole = [torch.nn.Parameter(part.clone()) for part in module.start]
    groups = [{"params": [p], "lr": lr} for p, lr in zip(whole, (1e-2, 4e-2), strict=True)]
    reference = torch.optim.AdamW(groups, weight_decay=0.3)
    ours = create_optimizer(unit.config, {"one": module})
    for seed in range(3):
        torch.manual_seed(seed)
        for mine, theirs in zip((module.a, module.b), whole, strict=True):
            mine.grad = torch.randn_like(mine)
            theirs.grad = mine.grad.clone()
        ours.step()
        decay_starts(ours, {"one": module})
        reference.step()
    for mine, start, theirs in zip((module.a, module.b), module.start, whole, strict=True):
        assert (start + mine - theirs).abs().max() <= 1e-12


def test_rates_of_loraplus_and_decay_of_magnitudes(tmp_path, tokenizer, base):
    options = {"loraplus_ratio": 16.0, "learning_rate": 1e-3, "weight_decay": 0.5, "max_steps": 1}
    unit = unit_of(base, tokenizer, tmp_path, "dora", **options)
    before = copy.deepcopy(unit.named_parameters())
    norms = {name: value for name, value in before.items() if name.endswith("magnitude")}
    train_until_done(base, [unit])
    moved = {n: (p - before[n]).abs().max().item() for n, p in unit.named_parameters().items()}
    for name, most in moved.items():  # Adam's first step is the rate itself
        if name.endswith(".b"):
            assert most == pytest.approx(16e-3, rel=1e-2)
        if name in norms:
            assert most == pytest.approx(1e-3, rel=1e-2)
    assert unit.records[0].learning_rate == 1e-3


ON_K = {"target_modules": ("k_proj",)}


@pytest.mark.parametrize(
    ("options", "field", "message"),
    [
        ({"init": "pisa"}, "init", "pissa_niter_ and a number"),
        ({"init": "olora", "variant": "pissa"}, "init", "with the variant 'pissa'"),
        ({"init": "pissa", "rank": 33}, "rank", "k_proj has only 32 singular values"),
        ({**ON_K, "init": "qera", "rank": 33}, "rank", "k_proj has only 32 singular values"),
        ({"init": "qera", "variant": "loftq"}, "init", "with the variant 'loftq'"),
        ({"init": "loftq"}, "init", "was not loaded from a safetensors checkpoint"),
        ({"rank_pattern": {"(": 3}}, "rank_pattern", "not a regular expression"),
        ({"layers_to_transform": (7,)}, "layers_to_transform", "layers 0 to 2"),
        ({"layer_replication": ((0, 4),)}, "layer_replication", "the layers of this base"),
        ({"loraplus_ratio": 0.0}, "loraplus_ratio", "must be positive"),
        ({"target_modules": ("lm_haed",)}, "target_modules", "did you mean 'lm_head'"),
    ],
)
def test_settings_that_cannot_be_followed_are_named(
    tmp_path, tokenizer, base, options, field, message
):
    with pytest.raises(ConfigError, match=message) as caught:
        unit_of(base, tokenizer, tmp_path, **options)
    assert caught.value.field == field


@pytest.mark.parametrize("init", ["loftq", "qera"])
def test_what_quantisation_lost_needs_a_quantised_base(tmp_path, tokenizer, init):
    with pytest.raises(ConfigError, match=f"{init}.*this base is not quantised") as caught:
        unit_of(tiny_base("llama", quantization="none"), tokenizer, tmp_path, init=init)
    assert caught.value.field == "init"

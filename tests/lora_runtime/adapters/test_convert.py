"""Converted adapters: PEFT's logits of the source and of the result, and what is refused."""

from __future__ import annotations

import copy
import json

import peft
import pytest
import torch

from lora_runtime.adapters.convert import plain_files
from lora_runtime.adapters.facts import AdapterFacts
from lora_runtime.adapters.files.file_names import FINGERPRINT_KEY, QUANTIZATION_KEY
from lora_runtime.adapters.files.folder import CONFIG_FILE, read_adapter
from lora_runtime.adapters.reduction import load_adapter
from lora_runtime.adapters.serving_form import ModuleForm, ModuleKey, RowPatch, ServingForm
from lora_runtime.engine.probe import probe_logits
from lora_runtime.errors import AdapterRefused
from tests.lora_runtime.adapters.peft_oracle import ROWS, largest_difference, logits
from tests.tiny import dense_twin, tiny_base, tiny_checkpoint, tiny_model

LAST_LAYER = "model.layers.2.mlp.down_proj"

PLAIN = {
    "lora": {},
    "rslora": dict(use_rslora=True, lora_alpha=3.5),
    "patterns": dict(rank_pattern={"down_proj": 5, r"layers\.1\..*q_proj": 1},
                     alpha_pattern={"up_proj": 0.5}),
    "some-layers": dict(layers_to_transform=[0, 2], target_modules=["q_proj", "up_proj"]),
    "bias-lora-only": dict(bias="lora_only", target_modules=["q_proj", "down_proj"]),
    "bias-all": dict(bias="all", target_modules=["v_proj"]),
    "lora-bias": dict(lora_bias=True, target_modules=["k_proj", "up_proj"], use_rslora=True),
    "embedding": dict(target_modules=["embed_tokens", "q_proj"], lora_alpha=2),
    "lm-head": dict(target_modules=["lm_head", "o_proj"], lora_alpha=2),
    "whole-head": dict(modules_to_save=["lm_head"]),
    "whole-embedding": dict(modules_to_save=["embed_tokens"]),
    "tokens": dict(trainable_token_indices=[17, 3, 250]),
}  # fmt: skip
TIED = {
    "tied-whole": dict(modules_to_save=["embed_tokens"], ensure_weight_tying=True),
    "tied-lora": dict(target_modules=["embed_tokens", "q_proj"], ensure_weight_tying=True),
    "head-tokens": dict(trainable_token_indices={"lm_head": [33, 9]}),
    "other-tokens": dict(trainable_token_indices={"lm_head": [33, 9], "embed_tokens": [5]}),
}


def trained(model, config):
    """A PEFT model whose every trained part acts."""
    options = {"r": 4, "lora_alpha": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    adapted = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(**{**options, **config}))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad or "lora_" in name:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(0.15 * noise)
    return adapted.eval()


def write_converted(base, source, target):
    """Convert the adapter in `source`, through the serving form, into `target`."""
    form = load_adapter(source, base.spec, base.weights)
    plain_files(form, base.spec, base.weights, read_adapter(source).metadata).write(target)
    return form


def check_same(base, shape, source, target, expected):
    """PEFT on the plain base and our own serving give `expected`, which the base does not."""
    twin = dense_twin(base, shape)
    assert largest_difference(logits(twin), expected) > 0.5
    form = write_converted(base, source, target)
    found = logits(peft.PeftModel.from_pretrained(copy.deepcopy(twin), target))
    assert largest_difference(found, expected) < 1e-4
    ours = load_adapter(target, base.spec, base.weights)
    assert largest_difference(probe_logits(base, ours, ROWS), expected) < 2e-4
    assert largest_difference(probe_logits(base, form, ROWS), expected) < 2e-4
    config = json.loads((target / CONFIG_FILE).read_text())
    assert config["lora_alpha"] == config["r"] and not config["use_rslora"]
    assert config["bias"] == "none" and "init_lora_weights" not in config


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    made = {}

    def base_of(shape):
        if shape not in made:
            folder = tiny_checkpoint(tmp_path_factory.mktemp(shape), shape)
            made[shape] = tiny_base(shape, folder=folder)
        return made[shape]

    return base_of


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    ("shape", "config"),
    [
        pytest.param(shape, config, id=f"{shape}-{name}")
        for shape, configs in [
            ("llama", {**PLAIN, **TIED}), ("llama-bias", PLAIN), ("gemma2", {**PLAIN, **TIED}),
            ("phi3", {name: PLAIN[name] for name in ("lora", "rslora", "lm-head", "tokens")}),
        ]
        for name, config in configs.items()
        if not (shape == "phi3" and "target_modules" in config and "o_proj" not in str(config))
    ],
)  # fmt: skip
def test_the_converted_adapter_does_the_same(tmp_path, bases, shape, config):
    base = bases(shape)
    source = trained(dense_twin(base, shape), config)
    source.save_pretrained(tmp_path / "source")
    check_same(base, shape, tmp_path / "source", tmp_path / "plain", logits(source))


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_an_init_that_changed_the_base_becomes_a_difference(tmp_path, bases, init):
    base, original = bases("llama"), tiny_model("llama")
    source = trained(original, dict(init_lora_weights=init, lora_alpha=6))
    source.save_pretrained(tmp_path / "source")
    merged, expected = source.merge_and_unload(), dense_twin(base, "llama")
    with torch.no_grad():
        for path in base.spec.linears:
            change = merged.get_submodule(path).weight - original.get_submodule(path).weight
            expected.get_submodule(path).weight.add_(change)
    check_same(base, "llama", tmp_path / "source", tmp_path / "plain", logits(expected))


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    ("config", "field"),
    [
        (dict(use_dora=True), "use_dora"),
        (dict(layer_replication=[[0, 2], [1, 3]]), "layer_replication"),
        (dict(alora_invocation_tokens=[3, 4]), "alora_invocation_tokens"),
        (dict(target_modules=["embed_tokens", "q_proj"], bias="all"), "bias"),
    ],
)
def test_what_no_plain_lora_can_be_is_refused_by_name(tmp_path, bases, config, field):
    base = bases("llama-bias")
    trained(dense_twin(base, "llama-bias"), config).save_pretrained(tmp_path / "source")
    with pytest.raises(AdapterRefused, match="cannot be converted exactly") as refusal:
        write_converted(base, tmp_path / "source", tmp_path / "plain")
    assert refusal.value.field == field
    assert not (tmp_path / "plain").exists()


def form_of(modules):
    return ServingForm(facts=AdapterFacts(variant="lora"), modules=modules)


@pytest.mark.parametrize(
    ("extra", "field"),
    [
        ({"model.embed_tokens": [1, 4]}, "trainable_token_indices"),
        ({"model.embed_tokens": [1, 4], "lm_head": [1, 4]}, "trainable_token_indices"),
        ({LAST_LAYER: None}, "target_modules"),
    ],
)
def test_forms_that_no_file_of_peft_can_give_are_refused_too(bases, extra, field):
    base = bases("llama")
    modules = {} if None in extra.values() else {ModuleKey(LAST_LAYER): ModuleForm(
        a=torch.ones(2, 128), b=torch.ones(64, 2))}  # fmt: skip
    for path, ids in extra.items():
        if ids:
            patch = RowPatch(torch.randn(len(ids), 64), torch.tensor(ids, dtype=torch.int32))
            modules[ModuleKey(path)] = ModuleForm(patch=patch)
    with pytest.raises(AdapterRefused) as refusal:
        plain_files(form_of(modules), base.spec, base.weights, {})
    assert refusal.value.field == field


def test_the_result_is_bound_to_a_base_where_the_source_is(bases):
    base = bases("llama")
    form = form_of({ModuleKey(LAST_LAYER): ModuleForm(a=torch.ones(2, 128), b=torch.ones(64, 2))})
    bound = {FINGERPRINT_KEY: base.spec.fingerprint, "format": "pt", "note": "mine"}
    for metadata in (bound, {"format": "pt"}):
        files = plain_files(form, base.spec, base.weights, metadata)
        config, facts = files.config, files.metadata
        assert facts.get(FINGERPRINT_KEY) == metadata.get(FINGERPRINT_KEY)
        assert (QUANTIZATION_KEY in facts) == (FINGERPRINT_KEY in facts)
        assert facts.get("note") == metadata.get("note") and "format" not in facts
        assert config["target_modules"] == [LAST_LAYER]

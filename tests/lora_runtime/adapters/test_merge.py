"""Merged checkpoints, loaded by transformers, against PEFT's own merges and the served adapter."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lora_runtime.adapters.convert import plain_files
from lora_runtime.adapters.facts import AdapterFacts
from lora_runtime.adapters.merge import Merge, TensorLoss, merged_weight
from lora_runtime.adapters.reduction import load_adapter
from lora_runtime.adapters.serving_form import ModuleForm, ModuleKey, RowPatch, ServingForm
from lora_runtime.base import dense_checkpoint
from lora_runtime.base.dense_checkpoint import dense_tensors, write_checkpoint
from lora_runtime.base.loader import prepare_base
from lora_runtime.config import BaseConfig
from lora_runtime.engine.probe import probe_logits
from lora_runtime.errors import AdapterRefused
from tests.lora_runtime.adapters.peft_oracle import largest_difference, logits
from tests.peft_adapters import load_in_peft, write_adapter
from tests.tiny import SHAPES, dense_twin, tiny_base, tiny_checkpoint, tiny_model
from tests.variants import LAYER_MAPS, variant_names, write_variants

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]

PROMPT, TOKENS = [5, 9, 7, 250, 44, 130], [3, 8, 17, 100]
TOLERANCE = 2e-4


def base_on_disk(shape, tmp_path, **options):
    """A tiny base with a checkpoint: (base, its folder)."""
    return tiny_base(shape, folder=tiny_checkpoint(tmp_path / "base", shape), **options)


def merge(base, adapter, target, dtype=torch.float32):
    """Merge a folder's adapter into `target`; returns the merge and transformers' reading of it."""
    form = load_adapter(adapter, base.spec, base.weights)
    merging = Merge(form, base.spec, dtype)
    write_checkpoint(target, base, merging.merged(dense_tensors(base)), dtype, {})
    model, info = AutoModelForCausalLM.from_pretrained(
        target, dtype=dtype, output_loading_info=True, attn_implementation="eager"
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    return merging, model.eval()


@torch.no_grad()
def token_logits(model):
    ids = torch.tensor([[*PROMPT, *TOKENS[:-1]]])
    return model(ids).logits[0, len(PROMPT) - 1 :]


PEFTS = {
    "lora": dict(r=4, lora_alpha=8),
    "rslora": dict(r=6, use_rslora=True),
    "patterns": dict(rank_pattern={"down_proj": 3}, alpha_pattern={"q_proj": 2}),
    "dora": dict(r=4, use_dora=True),
}


@pytest.mark.parametrize(
    ("name", "quantization"),
    [*((name, "nf4") for name in PEFTS), ("dora", "fp4"), ("dora", "int8")],
)
def test_the_weights_are_pefts_merged_ones(tmp_path, name, quantization):
    base = base_on_disk("llama", tmp_path, quantization=quantization)
    twin = dense_twin(base, "llama")
    folder = write_adapter(twin, tmp_path / "a", seed=1, **PEFTS[name])
    merging, model = merge(base, folder, tmp_path / "merged")
    expected = load_in_peft(copy.deepcopy(twin), folder).merge_and_unload().state_dict()
    found = model.state_dict()
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        torch.testing.assert_close(found[key], tensor, rtol=0, atol=5e-6, msg=key)
    path = "model.layers.1.mlp.up_proj.weight"
    assert not torch.allclose(found[path], twin.state_dict()[path], atol=1e-2)
    assert merging.overall < 1e-6 and len(merging.losses) == 21


@pytest.mark.parametrize("shape", [*SHAPES, "llama-bias", "qwen2"])
def test_every_family_is_a_checkpoint_that_serves_like_the_adapter(tmp_path, shape):
    base = base_on_disk(shape, tmp_path)
    folder = write_adapter(dense_twin(base, shape), tmp_path / "a", seed=2, use_dora=True)
    form = load_adapter(folder, base.spec, base.weights)
    rows = [[5, 17, 2, 250, 33, 9, 120], [9, 9, 3, 141, 77]]
    served = probe_logits(base, form, rows)
    _, model = merge(base, folder, tmp_path / "merged")
    assert largest_difference(logits(model), served) <= TOLERANCE
    assert largest_difference(logits(model), probe_logits(base, None, rows)) >= 1.0


REFUSED = {
    "alora": "alora_invocation_tokens",
    **dict.fromkeys(LAYER_MAPS, "layer_replication"),
}


@pytest.mark.parametrize("shape", ["llama", "llama-bias"])
def test_every_variant_is_merged_exactly_or_refused_by_name(tmp_path, shape):
    base = base_on_disk(shape, tmp_path)
    refused = set()
    variants = write_variants(base, shape, tmp_path / "a", variant_names(shape == "llama-bias"))
    for variant in variants:
        try:
            _, model = merge(base, variant.folder, tmp_path / "merged" / variant.name)
        except AdapterRefused as error:
            refused.add((variant.name, error.field))
            assert not (tmp_path / "merged" / variant.name).exists()
            continue
        expected = variant.expected(PROMPT, TOKENS, torch.float32)
        found = token_logits(model)
        torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE, msg=variant.name)
    expected = {(v.name, REFUSED[v.name]) for v in variants if v.name in REFUSED}
    assert {(n, f) for n, f in refused if not f.endswith(".bias")} == expected
    unplaced = {name for name, field in refused if field.endswith(".bias")}
    assert unplaced <= ({"lora-bias"} if shape == "llama" else set())


def test_a_changed_table_of_a_tied_base_is_untied_and_an_unchanged_one_is_not(tmp_path):
    base = base_on_disk("llama", tmp_path)
    assert base.spec.is_tied
    names = ("embedding", "lm-head", "dora")
    is_tied = {}
    for variant in write_variants(base, "llama", tmp_path / "a", names):
        target = tmp_path / "merged" / variant.name
        merge(base, variant.folder, target)
        is_tied[variant.name] = json.loads((target / "config.json").read_text())[
            "tie_word_embeddings"
        ]
        assert ("lm_head.weight" in load_file(target / "model.safetensors")) is (
            not is_tied[variant.name]
        )
    assert is_tied == {"embedding": False, "lm-head": False, "dora": True}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sixteen_bits_say_what_they_lose(tmp_path, dtype):
    """The figures again, from the written files and PEFT's merge."""
    base = base_on_disk("llama", tmp_path)
    twin = dense_twin(base, "llama")
    folder = write_adapter(twin, tmp_path / "a", seed=3, scale=0.01)
    merging, _ = merge(base, folder, tmp_path / "merged", dtype)
    exact = load_in_peft(copy.deepcopy(twin), folder).merge_and_unload().state_dict()
    before, written = twin.state_dict(), load_file(tmp_path / "merged" / "model.safetensors")
    norms = {
        f"{path}.weight": (
            float((written[f"{path}.weight"].double() - exact[f"{path}.weight"].double()).norm()),
            float((exact[f"{path}.weight"].double() - before[f"{path}.weight"].double()).norm()),
        )
        for path in base.spec.linears
    }
    assert all(tensor.dtype == dtype for tensor in written.values())
    error, change = (math.hypot(*column) for column in zip(*norms.values(), strict=True))
    assert merging.overall == pytest.approx(error / change, rel=1e-2) and merging.overall > 1e-3
    worst = max(norms, key=lambda name: norms[name][0] / norms[name][1])
    assert merging.worst.name == worst
    assert merging.worst.ratio == pytest.approx(norms[worst][0] / norms[worst][1], rel=1e-2)


def test_what_the_dtype_cannot_hold_is_refused_and_nothing_is_written(tmp_path):
    base = base_on_disk("llama", tmp_path)
    path = next(iter(base.spec.linears))
    shape = base.spec.shapes[path]
    a, b = torch.full((1, shape.in_features), 300.0), torch.full((shape.out_features, 1), 300.0)
    merging = Merge(form_of({path: ModuleForm(a=a, b=b)}), base.spec, torch.float16)
    tensors = merging.merged(dense_tensors(base))
    with pytest.raises(AdapterRefused, match="float16 cannot hold") as caught:
        write_checkpoint(tmp_path / "merged", base, tensors, torch.float16, {})
    assert caught.value.field == f"{path}.weight"
    assert [entry.name for entry in tmp_path.iterdir()] == ["base"]


def test_many_shards_load_as_one(tmp_path, monkeypatch):
    base = base_on_disk("llama", tmp_path)
    folder = write_adapter(dense_twin(base, "llama"), tmp_path / "a", seed=4)
    _, whole = merge(base, folder, tmp_path / "whole")
    monkeypatch.setattr(dense_checkpoint, "SHARD_BYTES", 100_000)
    _, parts = merge(base, folder, tmp_path / "parts")
    assert len(list((tmp_path / "parts").glob("model-0*-of-0*.safetensors"))) > 3
    assert not list((tmp_path / "parts").glob("*.part"))
    for key, tensor in whole.state_dict().items():
        assert torch.equal(parts.state_dict()[key], tensor)


def test_one_module_in_float64(seed=0):
    """W' x is the serving form's own formula, with all its parts at once, and for tables."""
    rng = torch.Generator().manual_seed(seed)
    draw = lambda *size: torch.randn(*size, generator=rng)  # noqa: E731
    w, a, b, gain = draw(7, 5), draw(2, 5), draw(7, 2), draw(7)
    ids = torch.tensor([1, 4], dtype=torch.int32)
    patch = RowPatch(draw(2, 5), ids)
    x = draw(3, 5).double()
    expected = gain.double() * (x @ w.double().T) + (x @ a.double().T) @ b.double().T
    expected[:, [1, 4]] += x @ (patch.values.double() - w[[1, 4]].double()).T
    form = ModuleForm(a=a, b=b, gain=gain, patch=patch)
    torch.testing.assert_close(x @ merged_weight(w, form).double().T, expected, rtol=0, atol=1e-6)
    table = merged_weight(w.T.contiguous(), ModuleForm(a=a, b=b, gain=gain), is_table=True)
    plain = merged_weight(w, ModuleForm(a=a, b=b, gain=gain))
    torch.testing.assert_close(table, plain.T, rtol=0, atol=0)


def form_of(modules, **facts):
    return ServingForm(
        facts=AdapterFacts(variant="lora", **facts),
        modules={ModuleKey(path): module for path, module in modules.items()},
    )  # fmt: skip


def test_a_share_of_no_change():
    assert TensorLoss("x", 0.0, 0.0).ratio == 0.0
    assert TensorLoss("x", 0.0, 1.0).ratio == math.inf
    assert TensorLoss("x", 2.0, 1.0).ratio == 0.5


@pytest.mark.parametrize("shape", ["qwen3-moe", "gpt-oss"])
@torch.no_grad()
def test_a_mixture_with_an_adapter_of_attention_merges_to_what_peft_has(shape, tmp_path):
    """Experts are written as transformers holds them; adapters of experts are refused."""
    base = base_on_disk(shape, tmp_path)
    twin = dense_twin(base, shape)
    names = {"attention": {}, "experts": {"target_parameters": ["experts.down_proj"]}}
    folders = [
        write_adapter(twin, tmp_path / name, seed=1, r=4, target_modules=["q_proj"], **own)
        for name, own in names.items()
    ]
    _, merged = merge(base, folders[0], tmp_path / "merged")
    expected = token_logits(load_in_peft(twin, folders[0]))
    assert (token_logits(merged) - expected).abs().max() <= TOLERANCE
    assert (expected - token_logits(twin)).abs().max() > 0.1
    with pytest.raises(AdapterRefused, match="experts"):
        merge(base, folders[1], tmp_path / "refused")


def test_the_adapter_of_a_mixture_s_only_expert_is_refused_as_those_of_many(tmp_path):
    config = tiny_model("mixtral").config
    config.num_local_experts = config.num_experts_per_tok = 1
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    targets = dict(target_modules=[], target_parameters=["experts.down_proj"])
    folder = write_adapter(model, tmp_path, seed=1, r=4, **targets)
    base = prepare_base(model, BaseConfig(quantization="none"), "mixtral", tmp_path)
    form = load_adapter(folder, base.spec, base.weights)
    with pytest.raises(AdapterRefused, match="unmerged"):
        Merge(form, base.spec, torch.float32)
    with pytest.raises(AdapterRefused, match="experts"):
        plain_files(form, base.spec, base.weights, {})

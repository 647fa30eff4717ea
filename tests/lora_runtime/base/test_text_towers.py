"""Checkpoints of models of text and images: their text is served, all else is left out."""

from __future__ import annotations

import copy

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
)

from lora_runtime.adapters.reduction import load_adapter
from lora_runtime.base.dense_checkpoint import dense_tensors, write_checkpoint
from lora_runtime.base.loader import load_base
from lora_runtime.base.model.parts import towers
from lora_runtime.base.streamed_load import read_model
from lora_runtime.config import BaseConfig
from lora_runtime.errors import AdapterRefused, BaseRefused
from tests.driver import greedy, run, tiny_engine
from tests.families import tiny_config, tiny_family
from tests.family_checks import same_as
from tests.peft_adapters import random_adapter
from tests.tiny import randomised

TOWERS = ["gemma3", "gemma4", "mistral3", "qwen2_5_vl", "qwen3_vl"]


def checkpoint(folder, family, dtype=torch.bfloat16):
    tiny_family(family).to(dtype).save_pretrained(folder)
    return folder


def settings(folder, **options):
    return BaseConfig(model=str(folder), device="cpu", **{"quantization": "none", **options})


@pytest.mark.parametrize("family", TOWERS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_text_of_a_checkpoint_is_served_and_the_rest_named(tmp_path, family, dtype):
    said = []
    folder = checkpoint(tmp_path, family)
    base = load_base(settings(folder, dtype=dtype), on_progress=said.append)
    whole = tiny_family(family)
    (note,) = (line for line in said if "left out" in line)
    assert all(path in note for path in towers(whole)) and towers(whole)
    assert "vision" in note or "visual" in note
    names = {name for name, _ in base.model.named_parameters()}
    assert not any("vis" in name for name in names)
    assert all(path.startswith("model.language_model.") for path in base.spec.linears)
    if dtype == "float32":
        prompt = torch.randint(3, 300, (30,)).tolist()
        trace = run(tiny_engine(base), [greedy("r", prompt, max_tokens=5)])["r"]
        same_as(whole, prompt, trace)


@pytest.mark.parametrize("family", ["qwen3_5", "qwen3_5_moe"])
def test_a_hybrid_that_transformers_itself_reads_the_text_of(tmp_path, family):
    """Adapters trained on the whole model fit too: recurrent layers, experts of a mixture."""
    torch.manual_seed(0)
    whole = randomised(AutoModelForImageTextToText.from_config(tiny_config(family)))
    whole.save_pretrained(tmp_path / "base")
    said = []
    base = load_base(settings(tmp_path / "base", dtype="float32"), on_progress=said.append)
    assert "serving its text only" in said and base.spec.state_bytes
    paths = [path.replace("model.", "model.language_model.", 1) for path in base.spec.linears]
    targets = [path for path in paths if path.endswith(("in_proj_qkv", "out_proj", "q_proj"))]
    experts = [path for path in paths if "experts." in path]
    oracle = random_adapter(
        whole, seed=1, scale=4.0, target_modules=targets, target_parameters=experts
    )
    oracle.save_pretrained(tmp_path / "adapter")
    form = load_adapter(tmp_path / "adapter", base.spec, base.weights)
    engine = tiny_engine(base)
    engine.add_adapter(form)
    prompt = torch.randint(3, 300, (40,)).tolist()
    same_as(oracle, prompt, run(engine, [greedy("r", prompt, form.digest, 5)])["r"], whole)


def test_weights_of_towers_are_not_read(tmp_path):
    """They keep the checkpoint's dtype, and lie in its files, until they are dropped."""
    model = read_model(checkpoint(tmp_path, "gemma3"), torch.float32)
    for tower in towers(model).values():
        assert {p.dtype for p in tower.parameters()} == {torch.bfloat16}
    assert model.get_input_embeddings().weight.dtype == torch.float32


@pytest.mark.parametrize("prefix", ["model.language_model.", "model.", "language_model.model."])
@pytest.mark.parametrize("family", ["gemma3", "gemma4", "qwen2_5_vl"])
def test_adapters_of_the_text_fit_whatever_they_were_trained_in(tmp_path, family, prefix):
    """Names of the whole model, of its text alone, and of transformers 4."""
    folder = checkpoint(tmp_path / "base", family, torch.float32)
    base = load_base(settings(folder, dtype="float32"))
    whole = tiny_family(family)
    targets = sorted(path for path in base.spec.linears if path.endswith(("q_proj", "down_proj")))
    oracle = random_adapter(whole, seed=1, target_modules=targets)
    oracle.save_pretrained(tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    names = {name: name.replace("model.language_model.", prefix) for name in tensors}
    save_file({names[name]: tensor for name, tensor in tensors.items()}, file)
    config = tmp_path / "adapter" / "adapter_config.json"
    config.write_text(config.read_text().replace("model.language_model.", prefix))
    form = load_adapter(tmp_path / "adapter", base.spec, base.weights)
    engine = tiny_engine(base)
    engine.add_adapter(form)
    prompt = torch.randint(3, 300, (20,)).tolist()
    same_as(oracle, prompt, run(engine, [greedy("r", prompt, form.digest, 5)])["r"], whole)


@pytest.mark.parametrize("family", ["gemma4", "qwen2_5_vl", "qwen3_5"])
def test_an_adapter_of_everything_is_that_of_the_text(tmp_path, family):
    """PEFT's all-linear takes layers of the towers too, which no text reaches; its names for the
    ones that were passed over are no mistakes."""
    torch.manual_seed(0)
    whole = randomised(AutoModelForImageTextToText.from_config(tiny_config(family))).float()
    whole.save_pretrained(tmp_path / "base")
    base = load_base(settings(tmp_path / "base", dtype="float32"))
    assert set(base.spec.left_out) == set(towers(whole))
    text = copy.deepcopy(whole)
    oracle = random_adapter(whole, seed=1, scale=2.0, target_modules="all-linear")
    oracle.save_pretrained(tmp_path / "adapter")
    form = load_adapter(tmp_path / "adapter", base.spec, base.weights)
    (note,) = (note for note in form.facts.notes if "parts that are not served" in note)
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    count = sum("language_model" not in name for name in tensors)
    assert note.startswith(f"{count} of its tensors") and count
    assert not any("did you mean" in note for note in form.facts.notes)
    engine = tiny_engine(base)
    engine.add_adapter(form)
    prompt = torch.randint(3, 300, (20,)).tolist()
    same_as(oracle, prompt, run(engine, [greedy("r", prompt, form.digest, 5)])["r"], text)


def test_an_adapter_of_a_tower_alone_is_refused_by_its_name(tmp_path):
    base = load_base(settings(checkpoint(tmp_path / "base", "gemma3"), dtype="float32"))
    whole = tiny_family("gemma3")
    oracle = random_adapter(whole, seed=1, target_modules=r".*vision_tower.*(fc1|q_proj)")
    oracle.save_pretrained(tmp_path / "adapter")
    with pytest.raises(AdapterRefused, match=r"vision_tower alone.* only the text") as refusal:
        load_adapter(tmp_path / "adapter", base.spec, base.weights)
    assert refusal.value.field == "target_modules"


@pytest.mark.parametrize("family", ["gemma3", "gemma4", "mistral3"])
def test_what_is_written_of_a_base_is_the_model_of_its_text(tmp_path, family):
    base = load_base(settings(checkpoint(tmp_path / "base", family), dtype="float32"))
    tied = {f"{base.spec.head}.weight"} if base.spec.is_tied else set()
    tensors = [(name, tensor) for name, tensor in dense_tensors(base) if name not in tied]
    write_checkpoint(tmp_path / "text", base, tensors, torch.float32, {})
    found, about = AutoModelForCausalLM.from_pretrained(
        tmp_path / "text", output_loading_info=True, attn_implementation="eager"
    )
    assert not about["missing_keys"] and not about["unexpected_keys"]
    assert found.config.get_text_config() is found.config and not towers(found)
    row = torch.randint(3, 300, (1, 12))
    with torch.no_grad():
        expected = tiny_family(family)(row).logits
        torch.testing.assert_close(found(row).logits, expected, rtol=1e-4, atol=1e-4)
    written = load_base(settings(tmp_path / "text", dtype="float32"))
    assert {path.removeprefix("model.") for path in written.spec.linears} == {
        path.removeprefix("model.language_model.") for path in base.spec.linears
    }


def test_text_that_transformers_has_no_model_of_is_not_written(tmp_path):
    base = load_base(settings(checkpoint(tmp_path / "base", "qwen2_5_vl"), dtype="float32"))
    with pytest.raises(BaseRefused, match="no model of its text alone"):
        write_checkpoint(tmp_path / "text", base, dense_tensors(base), torch.float32, {})
    assert not (tmp_path / "text").exists()


def test_a_model_that_gives_no_logits_of_text_is_refused_by_name(tmp_path):
    sizes = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    AutoModel.from_config(AutoConfig.for_model("vit", **sizes)).save_pretrained(tmp_path)
    with pytest.raises(BaseRefused, match="vit is no language model"):
        load_base(settings(tmp_path))

"""The ends of a model, tied and untied: what PEFT does to them, or a refusal."""

from __future__ import annotations

import copy
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_runtime.adapters.files.folder import TENSORS_FILE
from lora_runtime.adapters.reduction import load_adapter
from lora_runtime.adapters.serving_form import ModuleKey, ServingForm
from lora_runtime.errors import AdapterRefused
from tests.lora_runtime.adapters.dense_form import form_logits
from tests.lora_runtime.adapters.peft_oracle import base_spec, base_weights
from tests.tiny import tiny_checkpoint, tiny_model
from tests.variants import perturb, randomise

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]

MODELS = {"tied": tiny_model("llama"), "untied": tiny_model("llama-bias")}
PROMPT, IDS = [5, 9, 30, 250, 44, 7, 77, 130], [3, 8, 100, 12]
EMBEDDING, HEAD = ModuleKey("model.embed_tokens"), ModuleKey("lm_head")


def load(kind: str, folder: Path, checkpoint: Path = Path("no checkpoint")) -> ServingForm:
    spec = base_spec(MODELS[kind])
    return load_adapter(folder, spec, base_weights(MODELS[kind], spec, checkpoint))


def write(kind: str, folder: Path, **config: object) -> None:
    options = {"r": 4, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM", **config}
    adapted = peft.get_peft_model(copy.deepcopy(MODELS[kind]), peft.LoraConfig(**options))
    randomise(adapted, 3, with_bias="bias" in options)
    adapted.save_pretrained(folder)


def peft_logits(kind: str, folder: Path) -> torch.Tensor:
    adapted = peft.PeftModel.from_pretrained(copy.deepcopy(MODELS[kind]), folder).eval()
    with torch.no_grad():
        ids = torch.tensor([[*PROMPT, *IDS[:-1]]])
        return adapted(ids, use_cache=False).logits[0, len(PROMPT) - 1 :]


def assert_same_logits(kind: str, folder: Path, checkpoint: Path = Path("none")) -> ServingForm:
    form = load(kind, folder, checkpoint)
    found = form_logits(form, base_spec(MODELS[kind]), MODELS[kind], PROMPT, IDS)
    expected = peft_logits(kind, folder)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-4)
    return form


QE = ["q_proj", "embed_tokens"]
ENDS = {
    "both ends": dict(target_modules=["embed_tokens", "lm_head"]),
    "ends by regex": dict(target_modules=".*(embed_tokens|lm_head|q_proj)", r=3),
    "tied from embedding": dict(target_modules=QE, ensure_weight_tying=True),
    "tied from head": dict(target_modules=["q_proj", "lm_head"], ensure_weight_tying=True),
    "tied by regex": dict(target_modules=".*(q_proj|embed_tokens)", ensure_weight_tying=True),
    "DoRA on both": dict(target_modules=["embed_tokens", "lm_head", "q_proj"], use_dora=True),
    "tied DoRA": dict(target_modules=QE, use_dora=True, ensure_weight_tying=True),
    "rank of the embedding": dict(target_modules=QE, rank_pattern={"embed_tokens": 7}),
    "save both": dict(modules_to_save=["embed_tokens", "lm_head"]),
    "save embedding, tied": dict(modules_to_save=["embed_tokens"], ensure_weight_tying=True),
    "save head, tied": dict(modules_to_save=["lm_head"], ensure_weight_tying=True),
    "save head, adapt embedding": dict(target_modules=QE, modules_to_save=["lm_head"]),
    "save what is targeted": dict(target_modules=QE, modules_to_save=["embed_tokens"]),
    "tokens": dict(trainable_token_indices=[7, 5, 100]),
    "tokens, tied": dict(trainable_token_indices=[7, 5, 100], ensure_weight_tying=True),
    "tokens of both": dict(trainable_token_indices={"embed_tokens": [5, 8], "lm_head": [5, 8]}),
    "other tokens of both": dict(trainable_token_indices={"embed_tokens": [5, 8], "lm_head": [3]}),
    "tokens of the head": dict(trainable_token_indices={"lm_head": [9, 8, 3]}),
    "all biases": dict(target_modules=["q_proj", "up_proj"], bias="all"),
    "all biases and lora_bias": dict(bias="all", lora_bias=True),
    "DoRA with all biases": dict(bias="all", use_dora=True, target_modules="all-linear"),
    "MiCA": dict(init_lora_weights="mica", target_modules=QE),
    "orthogonal": dict(init_lora_weights="orthogonal", target_modules=QE),
    "replicated ends": dict(target_modules=QE, layer_replication=[[0, 2], [1, 3]]),
}  # fmt: skip


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("name", ENDS)
def test_logits_are_pefts(name: str, kind: str, tmp_path: Path) -> None:
    write(kind, tmp_path, **ENDS[name])
    assert_same_logits(kind, tmp_path)


@pytest.mark.parametrize("kind", MODELS)
def test_the_base_below_a_targeted_embedding(kind: str, tmp_path: Path) -> None:
    """PEFT saves it with the adapter and copies it into the base: equal rows are no change."""
    write(kind, tmp_path, target_modules=QE)
    key = "base_model.model.model.embed_tokens.base_layer.weight"
    assert load(kind, tmp_path).modules[EMBEDDING].patch is None
    tensors = load_file(tmp_path / TENSORS_FILE)
    tensors[key][[5, 77]] += 0.5
    save_file(tensors, tmp_path / TENSORS_FILE, {"format": "pt"})
    form = assert_same_logits(kind, tmp_path)
    assert form.modules[EMBEDDING].patch.ids.tolist() == [5, 77]
    assert (HEAD in form.modules) == (kind == "tied")
    if kind == "tied":
        assert form.modules[HEAD].patch is form.modules[EMBEDDING].patch


@pytest.mark.parametrize("kind", MODELS)
def test_embeddings_saved_without_being_targeted(kind: str, tmp_path: Path) -> None:
    adapted = peft.get_peft_model(copy.deepcopy(MODELS[kind]), peft.LoraConfig(r=4))
    randomise(adapted, 3)
    adapted.save_pretrained(tmp_path, save_embedding_layers=True)
    form = assert_same_logits(kind, tmp_path)
    assert EMBEDDING not in form.modules


@pytest.mark.parametrize("is_in_file", [True, False])
def test_pissa_at_the_ends(is_in_file: bool, tmp_path: Path) -> None:
    """It changes no embedding. The output layer's changed weight is taken from the file if PEFT
    saved it there, else the first factors are subtracted as elsewhere.
    """
    checkpoint = tiny_checkpoint(tmp_path / "base", "llama-bias")
    targets = ["embed_tokens", "lm_head", "q_proj"]
    options = dict(r=4, init_lora_weights="pissa", target_modules=targets)
    adapted = peft.get_peft_model(copy.deepcopy(MODELS["untied"]), peft.LoraConfig(**options))
    perturb(adapted, 3)
    saved = "auto" if is_in_file else False
    adapted.save_pretrained(tmp_path / "a", save_embedding_layers=saved)
    form = assert_same_logits("untied", tmp_path / "a", checkpoint)
    assert form.modules[EMBEDDING].rank == 4
    assert form.modules[HEAD].rank == (4 if is_in_file else 8)
    assert (form.modules[HEAD].patch is not None) == is_in_file


MAGNITUDE = "base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector"
REFUSED = {
    "resized vocabulary": (
        dict(modules_to_save=["lm_head"]),
        lambda t: t.update({"base_model.model.lm_head.weight": torch.zeros(305, 64)}),
        "305 rows .* 300",
    ),
    "resized embedding below an adapter": (
        dict(target_modules=QE),
        lambda t: t.update(
            {"base_model.model.model.embed_tokens.base_layer.weight": torch.zeros(305, 64)}
        ),
        "305 rows .* 300",
    ),
    "tied copies that differ": (
        dict(modules_to_save=["embed_tokens"], ensure_weight_tying=True),
        lambda t: t.update({"base_model.model.lm_head.weight": torch.zeros(300, 64)}),
        "two different weights",
    ),
    "tied A that differs": (
        dict(target_modules=QE, ensure_weight_tying=True),
        lambda t: t.update({"base_model.model.lm_head.lora_A.weight": torch.zeros(4, 64)}),
        "ensure_weight_tying",
    ),
    "a changed base below DoRA": (
        dict(target_modules=QE, use_dora=True),
        lambda t: t["base_model.model.model.embed_tokens.base_layer.weight"].add_(1),
        "changes the base",
    ),
    "a norm's bias": (
        dict(bias="all"),
        lambda t: t.update({"base_model.model.model.norm.bias": torch.zeros(64)}),
        "belongs to no module",
    ),
    "no magnitude": (
        dict(use_dora=True),
        lambda t: t.pop(MAGNITUDE),
        "is missing",
    ),
    "no trained tokens": (
        dict(trainable_token_indices=[3]),
        lambda t: t.pop("base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"),
        "is missing",
    ),
    "a magnitude of the wrong size": (
        dict(use_dora=True),
        lambda t: t.update({MAGNITUDE: torch.ones(3)}),
        r"\(3,\).*\(64,\)",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name(name: str, tmp_path: Path) -> None:
    config, change, message = REFUSED[name]
    write("tied", tmp_path, **config)
    tensors = load_file(tmp_path / TENSORS_FILE)
    change(tensors)
    save_file(tensors, tmp_path / TENSORS_FILE, {"format": "pt"})
    with pytest.raises(AdapterRefused, match=message) as refusal:
        load("tied", tmp_path)
    assert refusal.value.field

"""The same adapter under the names of other writers reduces to the same form; doubt is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_runtime.adapters.files.folder import TENSORS_FILE
from lora_runtime.adapters.reduction import load_adapter
from lora_runtime.adapters.serving_form import ServingForm
from lora_runtime.core import BaseSpec
from lora_runtime.errors import AdapterRefused
from tests.lora_runtime.adapters.peft_oracle import (
    base_spec,
    base_weights,
    edit_config,
    write_peft_adapter,
)
from tests.tiny import tiny_model

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

LLAMA = tiny_model("llama")
SPEC = base_spec(LLAMA)
WEIGHTS = base_weights(LLAMA, SPEC)
TARGETS = ["q_proj", "up_proj", "embed_tokens", "lm_head"]
ROOT = "base_model.model."


def write(folder: Path) -> None:
    config = peft.LoraConfig(r=4, target_modules=TARGETS, use_dora=True)
    write_peft_adapter(LLAMA, config, folder)


def rename(folder: Path, change: Callable[[str], str]) -> None:
    path = folder / TENSORS_FILE
    save_file({change(key): t for key, t in load_file(path).items()}, path, {"format": "pt"})


def served_as(prefix: str) -> BaseSpec:
    """The same base, its decoder under another prefix."""
    move = lambda path: path.replace("model.", prefix, 1)  # noqa: E731
    linears = {move(path): shape for path, shape in SPEC.linears.items()}
    return replace(SPEC, linears=linears, embedding=move(SPEC.embedding))


class Moved:
    """Weights of a base under another prefix."""

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix
        self.dtype, self.folder = WEIGHTS.dtype, WEIGHTS.folder

    def __getattr__(self, name: str):
        return lambda path, *rest: getattr(WEIGHTS, name)(
            path.replace(self.prefix, "model.", 1), *rest
        )


def assert_same(found: ServingForm, expected: ServingForm, prefix: str = "model.") -> None:
    modules = {
        (k.path.replace(prefix, "model.", 1), k.replica): m for k, m in found.modules.items()
    }
    assert modules.keys() == expected.modules.keys()
    for key, module in expected.modules.items():
        for one, other in zip(modules[key].tensors, module.tensors, strict=True):
            assert torch.equal(one, other)


def at_adapter(key: str) -> str:
    """As a state dict that still has the adapter's own name: FSDP and DCP dumps, some trainers."""
    for part in ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B"):
        if f".{part}" in key:
            return key.replace(f".{part}", f".{part}.default")
    return key.replace("lora_magnitude_vector", "lora_magnitude_vector.default.weight")


DIALECTS: dict[str, Callable[[str], str]] = {
    "PEFT": lambda key: key,
    "the adapter's name left in": at_adapter,
    "wrapped in PEFT twice": lambda key: ROOT + key,
    "torch.compile of the model": lambda key: key.replace(ROOT, ROOT + "_orig_mod.", 1),
    "torch.compile of PEFT": lambda key: "_orig_mod." + key,
    "FSDP around layers": lambda key: key.replace(".self_attn", "._fsdp_wrapped_module.self_attn"),
    "checkpointed and compiled": lambda key: key.replace(
        ".mlp", "._checkpoint_wrapped_module.mlp._orig_mod"
    ),
    "all at once": lambda key: at_adapter(
        "_fsdp_wrapped_module." + key.replace(".layers.", "._orig_mod.layers.")
    ),
}


@pytest.mark.parametrize("name", DIALECTS)
def test_one_mapping_to_one_form(name: str, tmp_path: Path) -> None:
    write(tmp_path)
    expected = load_adapter(tmp_path, SPEC, WEIGHTS)
    rename(tmp_path, DIALECTS[name])
    assert_same(load_adapter(tmp_path, SPEC, WEIGHTS), expected)


@pytest.mark.parametrize("served", ["model.", "model.language_model."])
@pytest.mark.parametrize(
    ("trained", "head"),
    [
        ("model.", "lm_head"),
        ("model.language_model.", "lm_head"),
        ("language_model.model.", "language_model.lm_head"),
    ],
)
def test_text_decoders_inside_and_outside_multimodal_models(
    trained: str, head: str, served: str, tmp_path: Path
) -> None:
    """transformers 4 and 5 name them differently; the config's patterns follow the training."""
    write(tmp_path)
    expected = load_adapter(tmp_path, SPEC, WEIGHTS)

    def change(key: str) -> str:
        key = key.replace(f"{ROOT}model.", ROOT + trained, 1)
        return key.replace(f"{ROOT}lm_head", ROOT + head, 1)

    rename(tmp_path, change)
    pattern = trained.replace(".", r"\.") + r"(layers\.\d\..*(q|up)_proj|embed_tokens)"
    edit_config(tmp_path, target_modules=f"{pattern}|{head}")
    assert_same(load_adapter(tmp_path, served_as(served), Moved(served)), expected, served)


DOUBTFUL: dict[str, Callable[[dict], None]] = {
    "the same part twice": lambda t: t.update({"_orig_mod." + A: t[A]}),
    "two adapters": lambda t: t.update({A.replace("lora_A", "lora_A.other"): t.pop(A)}),
    "no prefix": lambda t: t.update({A.removeprefix(ROOT): t.pop(A)}),
    "another prefix": lambda t: t.update({A.replace("model.layers", "decoder.layers"): t.pop(A)}),
    "a part of no known kind": lambda t: t.update({A.replace("lora_A", "lora_C"): t.pop(A)}),
    "another dialect for one tensor": lambda t: t.update(
        {A.replace("model.layers", "model.language_model.layers"): t.pop(A)}
    ),
}  # fmt: skip
A = f"{ROOT}model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize("name", DOUBTFUL)
def test_doubt_is_refused(name: str, tmp_path: Path) -> None:
    write(tmp_path)
    tensors = load_file(tmp_path / TENSORS_FILE)
    tensors = {key: tensor.clone() for key, tensor in tensors.items()}
    DOUBTFUL[name](tensors)
    save_file({k: t.clone() for k, t in tensors.items()}, tmp_path / TENSORS_FILE)
    with pytest.raises(AdapterRefused) as refusal:
        load_adapter(tmp_path, SPEC, WEIGHTS)
    assert refusal.value.field

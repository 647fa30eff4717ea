"""Adapters written by the real `peft` on tiny random models, and what PEFT says they do."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import peft
import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from lora_runtime.adapters.files.folder import CONFIG_FILE
from lora_runtime.adapters.serving_form import ServingForm
from lora_runtime.base.model.quant_linear import DenseLinear
from lora_runtime.base.weights import BaseWeights
from lora_runtime.core import BaseSpec, LinearShape


def base_spec(model: PreTrainedModel, fingerprint: str = "f" * 64) -> BaseSpec:
    """What adapters need to know of a plain transformers model."""
    linears = {
        path: LinearShape(module.in_features, module.out_features)
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not model.get_output_embeddings()
    }
    config = model.config
    return BaseSpec(
        name="tiny",
        fingerprint=fingerprint,
        linears=linears,
        embedding="model.embed_tokens",
        head="lm_head",
        is_tied=bool(config.tie_word_embeddings),
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        vocab_size=config.vocab_size,
        max_model_len=config.max_position_embeddings,
        quantization="none",
        dtype="float32",
        device="cpu",
        model_type=config.model_type,
    )


def base_weights(
    model: PreTrainedModel, spec: BaseSpec, folder: Path = Path("no checkpoint")
) -> BaseWeights:
    """The weights of a plain model as those of an unquantised base."""
    frozen = copy.deepcopy(model)
    for path in (*spec.linears, spec.head):
        parent, _, name = path.rpartition(".")
        linear = frozen.get_submodule(path)
        setattr(frozen.get_submodule(parent), name, DenseLinear(linear.weight, linear.bias))
    return BaseWeights(frozen, spec, folder)


def edit_config(folder: Path, **changes: object) -> None:
    """Change fields of a saved adapter_config.json."""
    path = folder / CONFIG_FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def write_peft_adapter(
    model: PreTrainedModel, config: peft.LoraConfig, folder: Path, *, seed: int = 1
) -> dict[str, Tensor]:
    """Save an adapter with random weights; return PEFT's own ΔW of every module."""
    adapted = peft.get_peft_model(copy.deepcopy(model), config)
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.1 * torch.randn_like(parameter))
    adapted.save_pretrained(folder)
    return peft_deltas(adapted)


def read_peft_adapter(model: PreTrainedModel, folder: Path) -> dict[str, Tensor]:
    """PEFT's ΔW of every module after PEFT loads the folder."""
    return peft_deltas(peft.PeftModel.from_pretrained(copy.deepcopy(model), folder))


def peft_deltas(adapted: peft.PeftModel) -> dict[str, Tensor]:
    with torch.no_grad():
        return {
            name.removeprefix("base_model.model."): module.get_delta_weight("default")
            for name, module in adapted.named_modules()
            if isinstance(module, LoraLayer)
        }


def form_deltas(form: ServingForm) -> dict[str, Tensor]:
    """ΔW = B'A of every module of a serving form."""
    return {key.path: module.b @ module.a for key, module in form.modules.items()}


def assert_same_deltas(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for path, delta in expected.items():
        assert delta.abs().max() > 1e-3, f"{path} has no effect to compare"
        torch.testing.assert_close(found[path], delta, rtol=1e-5, atol=1e-6)


ROWS = [[5, 17, 2, 250, 33, 9, 120], [9, 9, 3, 141, 77]]


@torch.no_grad()
def logits(model):
    return [model(torch.tensor([row])).logits[0] for row in ROWS]


def largest_difference(one, other):
    return max(float((a - b).abs().max()) for a, b in zip(one, other, strict=True))

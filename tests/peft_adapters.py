"""Adapters written by the real `peft` library, with weights that visibly act."""

from __future__ import annotations

import contextlib
import copy
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

SEPARATE = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
FUSED = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]


def over_same_weights(model):
    """A copy of the modules, whose parameters are others over the same memory: PEFT replaces
    modules, and a parameter's `data` at some starts, but writes into none.
    """
    parameters = {id(p): nn.Parameter(p.data, requires_grad=False) for p in model.parameters()}
    return copy.deepcopy(model, parameters)


def write_adapter(model, folder: Path, *, seed: int, scale: float = 1.0, **config) -> Path:
    """Save a random PEFT adapter for `model`: B of standard deviation scale / √rank / alpha·r."""
    random_adapter(model, seed=seed, scale=scale, **config).save_pretrained(folder)
    return folder


def random_adapter(model, *, seed: int, scale: float = 1.0, **config) -> PeftModel:
    """PEFT's model with the adapter of `write_adapter`, over the weights of `model`."""
    options = {"r": 8, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    peft_model = get_peft_model(over_same_weights(model), LoraConfig(**{**options, **config}))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if "lora_B" in name or "lora_embedding_B" in name:
                rank = parameter.shape[1]
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(scale * noise / rank)
            elif "lora_A" in name:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(noise / parameter.shape[1] ** 0.5)
            elif "lora_embedding_A" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return peft_model.eval()


def load_in_peft(model, folder: Path):
    """The oracle: peft's own reading of the adapter over `model`, whose weights it shares: who
    merges it gives a copy of the model.
    """
    device = str(model.device)  # where PEFT would put the adapter on a GPU if there is one
    own = over_same_weights(model)
    return PeftModel.from_pretrained(own, folder, torch_device=device).eval()


def four_adapters(model, folder: Path, *, fused: bool = False, scale: float = 1.0) -> list[Path]:
    """Ranks 4, 8, 16 and 64 over different targets, one rsLoRA, one with patterns."""
    every = FUSED if fused else SEPARATE
    mlp = every[2:] if fused else every[4:]
    attention = every[:2] if fused else every[:4]
    options = [
        dict(r=4, lora_alpha=8, target_modules=attention),
        dict(r=8, lora_alpha=16, target_modules=every, use_rslora=True),
        dict(r=16, lora_alpha=16, target_modules=mlp),
        dict(
            r=64,
            lora_alpha=64,
            target_modules=every,
            rank_pattern={"down_proj": 24},
            alpha_pattern={"o_proj": 96},
        ),
    ]
    return [
        write_adapter(model, folder / f"a{index}", seed=index, scale=scale, **option)
        for index, option in enumerate(options)
    ]


def logits_of(model):
    """What the parity gate asks for, from a PEFT model."""

    @torch.no_grad()
    def logits(rows, logits_at, with_adapter):
        with contextlib.nullcontext() if with_adapter else model.disable_adapter():
            every = [model(torch.tensor([row])).logits[0] for row in rows]
        return torch.cat(every)[list(logits_at)]

    return logits

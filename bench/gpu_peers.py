"""What loramux is compared with on a GPU: transformers and PEFT over bitsandbytes' 4-bit layers,
and transformers on bfloat16 weights."""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import lru_cache

import bitsandbytes as bnb
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from bench.gpu_engine import (
    ADAPTERS,
    NEW_TOKENS,
    PROMPT,
    RANK,
    random_model,
    release,
    served_cases,
)
from bench.gpu_rows import Case, Figures, Table
from bench.gpu_timing import DEVICE


def four_bit_model() -> PreTrainedModel:
    """The random model with bitsandbytes' Linear4bit in every decoder layer."""
    model = random_model()
    layers = model.get_decoder().layers
    for path, linear in [(p, m) for p, m in layers.named_modules() if type(m) is nn.Linear]:
        parent, _, name = path.rpartition(".")
        with torch.device("meta"):  # random weights for 8B on the host take minutes
            layer = bnb.nn.Linear4bit(
                linear.in_features, linear.out_features, bias=False,
                compute_dtype=torch.bfloat16, quant_type="nf4", compress_statistics=False,
            )  # fmt: skip
        layer.weight = _four_bit_weight(linear.weight.data, layer)
        setattr(layers.get_submodule(parent), name, layer)
    model.is_loaded_in_4bit = True
    model.set_attn_implementation("sdpa")
    return model


def _four_bit_weight(weight: torch.Tensor, layer: bnb.nn.Linear4bit) -> bnb.nn.Params4bit:
    """Quantised where it is, and not on its way from the host."""
    packed, state = bnb.functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    return bnb.nn.Params4bit.from_prequantized(
        packed, state.as_dict(packed=True), device=weight.device, module=layer
    )


def with_adapters(model: PreTrainedModel, count: int) -> nn.Module:
    """PEFT's model with `count` random adapters of rank 16 on all linear layers."""
    config = LoraConfig(
        r=RANK, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM"
    )
    peft = get_peft_model(model, config, "adapter-0")
    for index in range(1, count):
        peft.add_adapter(f"adapter-{index}", config)
    return peft.to(DEVICE).eval()


@torch.inference_mode()
def tokens_per_second(model: nn.Module, rows: int, adapters: int = 0) -> float:
    """Output tokens a second of `generate`, prompts included; the second of two runs."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 200, (rows, PROMPT), generator=generator).to(DEVICE)
    names = [f"adapter-{i % adapters}" for i in range(rows)] if adapters else None
    extra = {"adapter_names": names} if names else {}
    speed = 0.0
    for _ in range(2):
        start = time.perf_counter()
        out = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False,
            min_new_tokens=NEW_TOKENS, max_new_tokens=NEW_TOKENS, pad_token_id=0, **extra,
        )  # fmt: skip
        num_tokens = (out.shape[1] - ids.shape[1]) * rows  # reads a shape; the copy waits
        out.cpu()
        speed = num_tokens / (time.perf_counter() - start)
    return speed


def peers_table() -> Table:
    """The cases of `served` by transformers' generate, and by PEFT where adapters are mixed."""

    @lru_cache(maxsize=1)
    def model_of(name: str) -> nn.Module:
        release()
        match name:
            case "transformers bfloat16":
                model = random_model()
                model.set_attn_implementation("sdpa")
                return model
            case "transformers nf4":
                return four_bit_model()
            case "peft nf4":
                return with_adapters(four_bit_model(), min(8, ADAPTERS))
        raise ValueError(name)

    def cases() -> Iterator[Case]:
        for name in ("transformers bfloat16", "transformers nf4", "peft nf4"):
            for case in served_cases(name):
                if (name == "peft nf4") == bool(case["adapters"]):
                    yield case

    def measure(contender: str, rows: int, adapters: int) -> Figures:
        return {"tokens_per_s": tokens_per_second(model_of(contender), rows, adapters)}

    return Table("served", cases, measure)

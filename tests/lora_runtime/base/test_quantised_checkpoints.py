"""Checkpoints that others have quantised: dequantised where that is exact, else refused by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lora_runtime.base.loader import load_base
from lora_runtime.base.model.parts import expert_modules
from lora_runtime.base.streamed_load import read_model
from lora_runtime.config import BaseConfig
from lora_runtime.errors import AdapterRefused, BaseRefused
from tests.tiny import tiny_checkpoint, tiny_model

FP8 = dict(quant_method="fp8", activation_scheme="dynamic", weight_block_size=[32, 32])
MXFP4 = dict(quant_method="mxfp4", modules_to_not_convert=["self_attn", "router", "lm_head"])
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
"""The magnitudes of mxfp4's codes, of which the fourth bit is the sign. Source: OCP Microscaling
Formats (MX) Specification 1.0, §5.3.3.
"""


def quantised(folder: Path, config: dict) -> Path:
    """The folder of a checkpoint, whose config says that it is quantised."""
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "quantization_config": config}))
    return folder


def fp8_checkpoint(folder: Path) -> dict[str, Tensor]:
    """Write a mixture of which every projection is in fp8, each block of 32 × 32 with a scale of
    its own; returns what the tensors stand for.
    """
    tiny_checkpoint(folder, "qwen3-moe")
    stored, meant = {}, {}
    generator = torch.Generator().manual_seed(0)
    for name, weight in load_file(folder / "model.safetensors").items():
        stored[name] = meant[name] = weight
        if name.endswith("_proj.weight"):
            blocks = [-(-size // 32) for size in weight.shape]
            scale = 2.0 ** torch.randint(-3, 4, blocks, generator=generator)
            whole = scale.repeat_interleave(32, 0).repeat_interleave(32, 1)
            stored[name] = (weight.float() / 8).to(torch.float8_e4m3fn)
            stored[f"{name}_scale_inv"] = scale
            meant[name] = stored[name].float() * whole[: len(weight), : weight.shape[1]]
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    quantised(folder, FP8)
    return meant


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fp8_is_what_its_codes_and_scales_say(tmp_path, dtype):
    meant = fp8_checkpoint(tmp_path)
    model = read_model(tmp_path, dtype)
    found = dict(model.named_parameters())
    for name in ("self_attn.q_proj.weight", "self_attn.o_proj.weight"):
        path = f"model.layers.0.{name}"
        assert found[path].float().equal(meant[path])
    for path, module in expert_modules(model).items():
        for expert in range(module.num_experts):
            own = {
                name: meant[f"model.{path}.{expert}.{name}_proj.weight"]
                for name in ("gate", "up", "down")
            }
            assert module.gate_up_proj[expert].float().equal(torch.cat([own["gate"], own["up"]]))
            assert module.down_proj[expert].float().equal(own["down"])


def test_an_fp8_base_is_served_in_float32(tmp_path):
    fp8_checkpoint(tmp_path)
    base = load_base(BaseConfig(model=str(tmp_path), dtype="float32", device="cpu"))
    assert base.dtype == torch.float32 and not hasattr(base.model.config, "quantization_config")
    with pytest.raises(AdapterRefused, match="16-bit weight"):
        base.weights.original("model.layers.0.self_attn.q_proj")


def test_mxfp4_is_what_its_codes_and_scales_say(tmp_path):
    tiny_checkpoint(tmp_path, "gpt-oss")
    stored, meant = {}, {}
    generator = torch.Generator().manual_seed(0)
    for name, weight in load_file(tmp_path / "model.safetensors").items():
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            stored[name] = weight
            continue
        num_experts, inputs, outputs = weight.shape
        blocks = (num_experts, outputs, inputs // 32)
        codes = torch.randint(256, (*blocks, 16), generator=generator, dtype=torch.uint8)
        scales = torch.randint(118, 126, blocks, generator=generator, dtype=torch.uint8)
        stored |= {f"{name}_blocks": codes, f"{name}_scales": scales}
        nibbles = torch.stack([codes & 15, codes >> 4], dim=-1).flatten(3).long()
        values = E2M1[nibbles & 7] * (1 - 2 * (nibbles >> 3))
        values = values * 2.0 ** (scales.float() - 127)[..., None]
        meant[name] = values.flatten(2).transpose(1, 2)
    save_file(stored, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model = read_model(quantised(tmp_path, MXFP4), torch.float32)
    found = dict(model.named_parameters())
    assert len(meant) == 6
    for name, values in meant.items():
        assert found[name].float().equal(values)


@pytest.mark.parametrize("method", ["bitsandbytes", "awq", "gptq", "compressed-tensors", "own"])
def test_other_formats_are_refused_by_name(tmp_path, method):
    tiny_model("llama").save_pretrained(tmp_path)
    with pytest.raises(BaseRefused, match=rf"quantised \({method}\).*16-bit checkpoint"):
        read_model(quantised(tmp_path, {"quant_method": method, "bits": 4}), torch.bfloat16)

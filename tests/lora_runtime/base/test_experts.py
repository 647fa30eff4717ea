"""Mixtures of experts as bases: against transformers' own modules and bitsandbytes' own bits."""

from __future__ import annotations

import copy
from pathlib import Path

import bitsandbytes.functional as bnb
import pytest
import torch
from transformers import AutoModelForCausalLM

from lora_runtime.base.dense_checkpoint import dense_tensors
from lora_runtime.base.loader import load_base, prepare_base
from lora_runtime.base.model.experts import AdaptedExperts
from lora_runtime.base.model.routers import AdaptedRouter
from lora_runtime.base.model.varlen_attention import RowLengths, VarlenAttention
from lora_runtime.config import BaseConfig
from lora_runtime.errors import BaseRefused
from tests.families import tiny_family
from tests.family_checks import base_of
from tests.lora_runtime.base.test_streamed_load import DenseCopies
from tests.tiny import MIXTURES, VOCAB_SIZE, dense_twin, tiny_base, tiny_checkpoint, tiny_model

SERVED = list(MIXTURES)


def packed_logits(base, rows):
    lengths = [len(row) for row in rows]
    positions = torch.cat([torch.arange(n) for n in lengths])
    ends = torch.tensor(lengths).cumsum(0) - 1
    return base.forward(torch.cat(rows), positions, VarlenAttention([RowLengths(lengths)]), ends)


@pytest.mark.parametrize("shape", SERVED)
@torch.no_grad()
def test_packed_rows_equal_the_original_model_alone(shape):
    base = tiny_base(shape)
    twin = dense_twin(base, shape)
    rows = [torch.randint(VOCAB_SIZE, (n,)) for n in (3, 60, 17)]
    logits = packed_logits(base, rows)
    for row, got in zip(rows, logits, strict=True):
        torch.testing.assert_close(got, twin(row[None]).logits[0, -1], rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("quantization", ["nf4", "fp4", "int8", "none"])
@pytest.mark.parametrize("shape", ["qwen3-moe", "mixtral"])
@torch.no_grad()
def test_every_expert_has_the_bits_that_it_would_have_alone(shape, quantization):
    base = tiny_base(shape, quantization=quantization, dequantized_cache=False)
    original = tiny_model(shape)
    for path, linear in base.spec.linears.items():
        module = base.model.get_submodule(path)
        if linear.experts is None:
            continue
        assert isinstance(module, AdaptedExperts)
        for expert, weight in enumerate(original.get_parameter(path)):
            ours = module.linear.group_values(expert, linear.experts.count)
            if quantization == "none":
                expected = weight
            elif quantization == "int8":
                absmax = weight.abs().amax(1, keepdim=True)
                expected = (weight * (127 / absmax)).round() * (absmax / 127)
            else:
                packed, state = bnb.quantize_4bit(
                    weight.bfloat16().contiguous(), blocksize=64, quant_type=quantization
                )
                size = packed.numel()
                own = slice(expert * size, (expert + 1) * size)
                assert torch.equal(module.linear.packed[own], packed.flatten())
                state.dtype = torch.float32
                expected = bnb.dequantize_4bit(packed, state)
            torch.testing.assert_close(ours, expected, rtol=1e-6, atol=0)


def test_routers_and_gates_of_shared_experts_are_not_quantised():
    base = tiny_base("qwen2-moe")
    original = tiny_model("qwen2-moe")
    names = [f"model.layers.0.mlp.{name}" for name in ("gate", "shared_expert_gate")]
    for name in names:
        module = base.model.get_submodule(name)
        assert torch.equal(module.linear.weight, original.get_submodule(name).weight)
    assert isinstance(base.model.get_submodule(names[0]), AdaptedRouter)
    assert base.spec.routers == tuple(f"model.layers.{i}.mlp.gate" for i in range(3))


@torch.no_grad()
def test_memory_is_that_of_the_packed_bytes():
    base = tiny_base("qwen3-moe", dequantized_cache=False)
    base.model.model(
        torch.randint(VOCAB_SIZE, (1, 4)), attention=VarlenAttention([RowLengths([4])])
    )
    for path, linear in base.spec.linears.items():
        if linear.experts is not None:
            size = linear.experts.count * linear.in_features * linear.out_features
            resident = base.model.get_submodule(path).linear.resident_bytes
            assert resident <= 1.01 * (size / 2 + size / 64 * 4)


def test_the_fingerprint_sees_an_expert_and_a_router():
    prints = {tiny_base("qwen3-moe").spec.fingerprint}
    for name in ("model.layers.2.mlp.experts.down_proj", "model.layers.0.mlp.gate.weight"):
        model = tiny_model("qwen3-moe")
        with torch.no_grad():
            model.get_parameter(name).view(-1)[-1] += 0.5
        prints.add(prepare_base(model, BaseConfig(), "x", ".").spec.fingerprint)
    in_bfloat16 = tiny_base("qwen3-moe", dtype=torch.bfloat16).spec.fingerprint
    assert len(prints) == 3 and in_bfloat16 in prints


@pytest.mark.parametrize("shape", ["qwen3-moe", "mixtral"])
def test_a_checkpoint_on_disk_gives_the_same_base(tmp_path, shape):
    """transformers writes a tensor for each expert, and joins them when it loads."""
    folder = tiny_checkpoint(tmp_path / "tiny", shape)
    base = load_base(BaseConfig(model=str(folder), dtype="float32", device="cpu"))
    assert base.spec.fingerprint == tiny_base(shape).spec.fingerprint
    assert not any(p.requires_grad for p in base.model.parameters())


@pytest.mark.parametrize("shape", ["qwen3-moe", "glm4-moe"])
def test_dense_tensors_are_the_family_s_own(shape):
    base = tiny_base(shape)
    twin, found = dense_twin(base, shape), dict(dense_tensors(base))
    for name, tensor in twin.state_dict().items():
        torch.testing.assert_close(found.pop(name), tensor, msg=name)
    assert not found


def test_experts_that_no_block_of_codes_fits_are_refused():
    """With the sizes that would fit."""
    words = "64 inputs and 128 outputs.*double.* also one of 16384.*or 'nf4'"
    with pytest.raises(BaseRefused, match=words) as refusal:
        tiny_base("qwen3-moe", quantization="nf4-double")
    assert refusal.value.field == "quantization"
    config = copy.deepcopy(tiny_model("qwen3-moe").config)
    config.moe_intermediate_size = 32
    for quantization in ("nf4", "fp4", "int8", "none"):
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
        settings = BaseConfig(quantization=quantization)
        if quantization in ("int8", "none"):
            prepare_base(model, settings, "x", Path("."))
            continue
        with pytest.raises(BaseRefused, match="32 inputs.* a multiple of 64.*'none'$"):
            prepare_base(model, settings, "x", Path("."))


@pytest.mark.parametrize("shape", ["qwen3-moe", "gpt-oss"])
def test_one_expert_at_a_time_is_unquantised(tmp_path, shape):
    """float32 copies of the experts of a 16-bit checkpoint: all of one layer's while the original
    runs, one expert's otherwise.
    """
    folder = tiny_checkpoint(tmp_path / "tiny", shape)
    spec = tiny_base(shape).spec
    layouts = {p: s for p, s in spec.linears.items() if s.experts is not None}
    sizes = {(s.out_features, s.in_features) for s in layouts.values()}
    stacks = {(s.experts.count, *size) for s in layouts.values() for size in sizes}
    one_layer = sum(4 * s.experts.count * s.in_features * s.out_features for s in layouts.values())
    one_layer //= len(layouts) // 2
    one_expert = max(4 * out * width for out, width in sizes)
    config = BaseConfig(model=str(folder), dtype="float32", device="cpu", dequantized_cache=False)
    whole = DenseCopies({*stacks, *((n, i, o) for n, o, i in stacks)})
    with whole, DenseCopies({*sizes, *((i, o) for o, i in sizes)}) as alone:
        load_base(config)
    assert 0 < whole.most <= one_layer
    assert 0 < alone.most <= 6 * one_expert


def test_a_router_near_a_tie_does_not_look_like_a_wrong_model():
    """In bfloat16 rounding alone sends some tokens of these models to other experts."""
    for shape, seed in (("gpt-oss", 0), ("gpt-oss", 1), ("mixtral", 1)):
        assert tiny_base(shape, dtype=torch.bfloat16, seed=seed).spec.routers


@pytest.mark.parametrize(
    ("family", "linear"), [("gemma4_text (experts)", "router.proj"), ("afmoe", "mlp.router.gate")]
)
@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_a_router_around_a_linear_layer_gives_its_logits_and_choices(family, linear, quantization):
    """The linear layer stays unquantised, is one of the base's routers, and is collected."""
    theirs, ids = [], torch.randint(VOCAB_SIZE, (1, 20))
    model = tiny_family(family)
    paths = [path for path, _ in model.named_modules() if path.endswith(linear)]
    weights = {path: model.get_submodule(path).weight.clone() for path in paths}
    for path in paths:
        model.get_submodule(path).register_forward_hook(lambda _m, _x, y: theirs.append(y))
    model(ids, use_cache=False)
    base = base_of(tiny_family(family), quantization)
    assert base.spec.routers == tuple(paths)
    for path, weight in weights.items():
        assert torch.equal(base.model.get_submodule(path).linear.weight_values(), weight)
    attention = VarlenAttention([RowLengths([20])])
    with base.context.collecting() as routed:
        base.forward(ids[0], torch.arange(20), attention, torch.arange(1))
    assert len(routed) == len(paths)
    for ours, logits in zip(routed, theirs, strict=True):
        assert ours.chosen.shape == (20, 2)
        if quantization == "none":
            torch.testing.assert_close(ours.logits, logits.view_as(ours.logits))


def test_a_router_that_gives_other_logits_is_refused(monkeypatch):
    real = AdaptedRouter.forward

    def shifted(self, x):
        logits, *rest = real(self, x)
        return logits + 0.1 * logits.abs().max(), *rest

    monkeypatch.setattr(AdaptedRouter, "forward", shifted)
    with pytest.raises(BaseRefused, match="on a router"):
        tiny_base("qwen3-moe")

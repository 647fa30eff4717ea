"""Fused modules inside whole models: transformers' own logits, and the slow twin where it must."""

from __future__ import annotations

import copy
from collections import Counter

import pytest
import torch
from torch import nn

from lora_runtime.base import fused_modules
from lora_runtime.base.fused_modules import fuse_modules
from lora_runtime.base.varlen_attention import Rows, VarlenAttention
from lora_runtime.kernels import gpu
from tests.lora_runtime.kernels.on_triton import DEVICE
from tests.tiny import CONFIGS, dense_twin, tiny_base

NORMS = {"qwen3": 4, "gemma2": 4, "gemma3": 6}
"""Norms of a layer, where it is not two."""


@pytest.fixture
def calls(monkeypatch):
    """How often each fused op ran."""
    found = Counter()
    for name in ("rms_norm", "rotate", "gated_activation"):
        real = getattr(fused_modules, name)

        def counted(*args, _real=real, _name=name, **kwargs):
            found[_name] += 1
            return _real(*args, **kwargs)

        monkeypatch.setattr(fused_modules, name, counted)
    return found


def logits(base, ids):
    positions = torch.arange(len(ids))
    attention = VarlenAttention([Rows([len(ids)])], base.device)
    return base.forward(ids, positions, attention, positions)


@pytest.mark.parametrize("shape", [name for name in CONFIGS if name != "phi3-longrope"])
def test_logits_are_transformers(monkeypatch, calls, shape):
    base = tiny_base(shape, dequantized_cache=False)
    ids = torch.randint(3, 300, (5,), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = dense_twin(base, shape)(ids[None]).logits[0]
        assert not calls, "a CPU runs transformers' own code"
        monkeypatch.setattr(gpu, "DEVICES", {DEVICE})
        found = logits(base, ids)
    layers = base.spec.num_layers
    assert calls == {
        "rms_norm": NORMS.get(shape, 2) * layers + 1,
        "rotate": layers,
        "gated_activation": layers,
    }
    assert (found - expected).abs().max() <= 2e-4


def test_the_slow_twin_runs_where_a_gradient_is_wanted(monkeypatch, calls):
    base = tiny_base("llama")
    monkeypatch.setattr(gpu, "DEVICES", {DEVICE})
    layer = base.model.get_submodule("model.layers.0")
    x = torch.randn(1, 3, 64, requires_grad=True)
    layer.mlp.act_fn(layer.input_layernorm(x)).sum().backward()
    assert x.grad is not None and not calls


def test_names_and_parameters_stay_and_what_is_not_in_the_table_is_left_alone():
    base = tiny_base("gemma2")
    model = base.model
    assert type(model.model.norm).__name__ == "FusedGemma2RMSNorm"
    assert isinstance(copy.deepcopy(model.model.norm), type(model.model.norm))
    assert "model.layers.0.self_attn.q_proj" in base.spec.linears
    other = nn.Sequential(nn.RMSNorm(8), nn.Linear(8, 8))
    before = [type(module) for module in other]
    fuse_modules(other)
    assert [type(module) for module in other] == before


def test_an_activation_that_is_not_known_is_left_alone():
    base = tiny_base("llama")
    mlp = copy.deepcopy(base.model.get_submodule("model.layers.0.mlp"))
    original = type(mlp).__mro__[2]
    mlp.__class__, mlp.config = original, copy.copy(mlp.config)
    mlp.config.hidden_act = "relu"
    fuse_modules(mlp)
    assert type(mlp) is original

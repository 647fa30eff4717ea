"""Fused modules inside whole models: transformers' own logits, and the slow twin where it must."""

from __future__ import annotations

import copy
from collections import Counter

import pytest
import torch
import transformers
from torch import nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from lora_runtime.base.model import fused_modules, quant_linear
from lora_runtime.base.model.attention import PagedAttention
from lora_runtime.base.model.fused_modules import fuse_modules
from lora_runtime.base.model.rotary import fix_rotary
from lora_runtime.base.model.stacked_linears import stack_linears
from lora_runtime.base.model.varlen_attention import RowLengths, VarlenAttention
from lora_runtime.errors import BaseRefused
from lora_runtime.kernels import AttentionMeta, cpu, gpu
from lora_runtime.training.calibration import input_rms
from tests.lora_runtime.kernels.on_triton import DEVICE
from tests.tiny import CONFIGS, dense_twin, in_float64, tiny_base

PARTIAL = CONFIGS["phi3"] | {
    "rope_parameters": CONFIGS["phi3"]["rope_parameters"] | {"partial_rotary_factor": 0.5}
}
"""Half of a head is rotated."""


@pytest.fixture
def calls(monkeypatch):
    """How often each fused op ran."""
    found = Counter()
    fused = ("rms_norm", "add_rms_norm", "rotate", "gated_activation")
    places = [(fused_modules, name) for name in fused]
    places += [(quant_linear, name) for name in ("gated_activation", "four_bit_gated_product")]
    for module, name in places:
        real = getattr(module, name)

        def counted(*args, _real=real, _name=name, **kwargs):
            found[_name] += 1
            return _real(*args, **kwargs)

        monkeypatch.setattr(module, name, counted)
    return found


def logits(base, ids):
    positions = torch.arange(len(ids))
    attention = VarlenAttention([RowLengths([len(ids)])], base.device)
    return base.forward(ids, positions, attention, positions)


def paged_logits(base, ids):
    """Of the last two tokens, through the cache: all others as a prompt, then one step."""
    found, block_size = [], 4
    cache = base.allocate_kv(4 * block_size)
    cache.keys.fill_(float("nan")), cache.values.fill_(float("nan"))
    table = torch.tensor([[2, 0, 3]])
    for tokens in torch.arange(len(ids)).tensor_split([len(ids) - 1]):
        meta = AttentionMeta(
            rows=torch.zeros(len(tokens), dtype=torch.int32),
            positions=tokens.int(),
            cache_slots=table[0, tokens // block_size] * block_size + tokens % block_size,
            block_tables=table.int(),
            block_size=block_size,
        )
        attention = PagedAttention(cache, meta)
        found.append(base.forward(ids[tokens], tokens, attention, torch.tensor([len(tokens) - 1])))
    return torch.cat(found)


def token_ids():
    return torch.randint(3, 300, (5,), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("backend", ["cpu", "triton"])
@pytest.mark.parametrize("shape", [*CONFIGS, "phi3-partial"])
def test_logits_are_transformers(monkeypatch, calls, shape, backend):
    monkeypatch.setitem(CONFIGS, "phi3-partial", PARTIAL)
    base, ids = tiny_base(shape, dequantized_cache=False), token_ids()
    twin = dense_twin(base, shape)
    fix_rotary(twin, 512)
    with torch.no_grad():
        expected = twin(ids[None]).logits[0]
        calls.clear()  # those of the self-check
        if backend == "triton":
            monkeypatch.setattr(gpu, "DEVICES", {DEVICE})
        found = logits(base, ids)
    layers = base.spec.num_layers
    reads_codes = backend == "triton" or cpu.can_multiply_codes(torch.empty(0, 64))
    is_joined = reads_codes and shape != "llama-bias"
    gated = "four_bit_gated_product" if is_joined else "gated_activation"
    assert calls == {
        "rms_norm": 1,
        "add_rms_norm": 2 * layers,
        "rotate": layers,
        gated: layers,
    }
    assert (found - expected).abs().max() <= 2e-4
    calls.clear()
    with torch.no_grad():
        found = paged_logits(base, ids)
    assert calls["rotate"] == 0 and calls["rms_norm"] == 2, "the cache is written by the rotation"
    assert (found - expected[-2:]).abs().max() <= 2e-4


@pytest.mark.parametrize("backend", ["cpu", "triton"])
@pytest.mark.parametrize("shape", ["qwen3", "gemma3"])
def test_bfloat16_is_no_worse_than_transformers(monkeypatch, shape, backend):
    """Root mean square errors against the same weights in float64."""
    base, ids = tiny_base(shape, dtype=torch.bfloat16, dequantized_cache=False), token_ids()
    with torch.no_grad():
        exact = in_float64(dense_twin(base, shape, dtype=torch.float64))(ids[None]).logits[0]
        plain = dense_twin(base, shape)(ids[None]).logits[0]
        if backend == "triton":
            monkeypatch.setattr(gpu, "DEVICES", {DEVICE})
        fused = logits(base, ids)
    error, allowed = ((found.double() - exact).square().mean().sqrt() for found in (fused, plain))
    assert fused.dtype == torch.bfloat16 and 0 < error <= 1.25 * allowed


def gradient_of_embedded(monkeypatch, base, x, wanted):
    """∂(wanted · logits) / ∂x of one row with these embedded tokens x (n, hidden)."""
    embedded = base.model.get_input_embeddings().embedding
    monkeypatch.setattr(embedded, "forward", lambda ids: x[ids])
    (found,) = torch.autograd.grad(logits(base, torch.arange(len(x))), x, wanted)
    return found


@pytest.mark.parametrize("shape", [*CONFIGS, "phi3-partial"])
def test_gradients_on_a_cpu_are_transformers(monkeypatch, calls, shape):
    monkeypatch.setitem(CONFIGS, "phi3-partial", PARTIAL)
    base = tiny_base(shape)
    twin = dense_twin(base, shape)
    fix_rotary(twin, 512)
    x = torch.randn(5, twin.config.hidden_size, requires_grad=True)
    given = twin(inputs_embeds=x[None]).logits[0]
    wanted = torch.randn_like(given)
    (expected,) = torch.autograd.grad(given, x, wanted)
    calls.clear()  # those of the self-check
    found = gradient_of_embedded(monkeypatch, base, x, wanted)
    layers = base.spec.num_layers
    assert calls["add_rms_norm"] == calls["rotate"] == calls["gated_activation"] == layers
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


def test_on_a_gpu_the_slow_twin_runs_where_a_gradient_is_wanted(monkeypatch, calls):
    base = tiny_base("llama")
    calls.clear()  # those of the self-check
    monkeypatch.setattr(gpu, "DEVICES", {DEVICE})
    x = torch.randn(3, 64, requires_grad=True)
    found = gradient_of_embedded(monkeypatch, base, x, torch.ones(3, base.spec.vocab_size))
    assert found.abs().sum() > 0 and not calls


def test_gradients_of_one_projection_alone_are_those_of_the_slow_twin(monkeypatch):
    """What the first layer is given wants no gradient, nor do its keys and values."""
    base, ids = tiny_base("qwen3"), token_ids()
    q_proj = base.model.get_submodule("model.layers.0.self_attn.q_proj")
    scale = torch.ones(q_proj.out_features, requires_grad=True)
    forward = q_proj.forward
    monkeypatch.setattr(q_proj, "forward", lambda x: forward(x) * scale)
    found = []
    for devices in (set(), {DEVICE}):
        monkeypatch.setattr(gpu, "DEVICES", devices)
        (gradient,) = torch.autograd.grad(logits(base, ids).square().sum(), scale)
        found.append(gradient)
    largest = float(found[0].abs().max())
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5 * largest)


def test_a_version_of_transformers_that_lacks_what_is_read_is_named():
    attention = type("Phi3Attention", (nn.Module,), {"config": None, "head_dim": 8})()
    with pytest.raises(BaseRefused, match=r"Phi3Attention of transformers .* scaling, .*qkv_proj"):
        fuse_modules(attention)


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


@pytest.mark.parametrize("shape", ["llama", "phi3"])
def test_who_listens_to_a_linear_layer_hears_every_call(monkeypatch, shape):
    """QERA measures its inputs so, gate's and up's too, which else end in one product."""
    monkeypatch.setattr(gpu, "DEVICES", {DEVICE})
    base = tiny_base(shape, device=DEVICE, dequantized_cache=False)
    stack_linears(base.model)
    paths = list(base.spec.linears)
    rows = [torch.arange(3, 9, device=DEVICE)]
    found = input_rms(base, None, paths, rows)
    assert found.keys() == {(path, 0) for path in paths}


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("model.layers.0.self_attn", "scaling"),
        ("model.layers.0.mlp", "up_proj"),
        ("model.norm", "variance_epsilon"),
    ],
)
def test_a_transformers_that_lacks_something_is_refused_by_name(path, name):
    model = dense_twin(tiny_base("llama"), "llama")
    module = model.get_submodule(path)
    delattr(module, name)
    with pytest.raises(BaseRefused) as refused:
        fuse_modules(model)
    for word in (type(module).__name__, f"transformers {transformers.__version__}", name, "5.17"):
        assert word in refused.value.message


def test_rotary_tables_that_transformers_no_longer_makes_are_refused_by_name(monkeypatch):
    model = dense_twin(tiny_base("phi3"), "phi3")
    model.model.rotary_emb.rope_type = "longrope"
    monkeypatch.delitem(ROPE_INIT_FUNCTIONS, "longrope")
    with pytest.raises(BaseRefused, match=rf"transformers {transformers.__version__}.*longrope"):
        fix_rotary(model, 64)

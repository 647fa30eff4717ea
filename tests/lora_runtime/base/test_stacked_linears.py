"""q, k, v and gate, up as one product: the same numbers and bits as each layer alone."""

from __future__ import annotations

import pytest
import torch

from lora_runtime.adapters.reduction import load_adapter
from lora_runtime.base import stacked_linears
from lora_runtime.base.int8_linear import Int8Linear
from lora_runtime.base.quant_linear import DenseLinear, QuantLinear
from lora_runtime.base.stacked_linears import join_layers
from lora_runtime.kernels import gpu
from tests.driver import greedy, run, teacher_forced, tiny_engine
from tests.lora_runtime.kernels.on_triton import DEVICE
from tests.peft_adapters import four_adapters, load_in_peft
from tests.tiny import dense_twin, tiny_base

KINDS = {
    "nf4": QuantLinear,
    "fp4": lambda weight, bias: QuantLinear(weight, bias, quant_type="fp4"),
    "int8": Int8Linear,
    "none": DenseLinear,
}


@pytest.fixture
def on_triton(monkeypatch):
    monkeypatch.setattr(gpu, "DEVICES", {DEVICE})


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_joined_layers_keep_their_bits_and_share_their_memory(kind, has_bias):
    sizes = [(70, 128), (33, 128), (1, 128)]
    biases = [torch.randn(n) if has_bias else None for n, _ in sizes]
    layers = [
        KINDS[kind](torch.randn(size), bias) for size, bias in zip(sizes, biases, strict=True)
    ]
    before = [{name: t.clone() for name, t in layer.state_dict().items()} for layer in layers]
    values = [layer.weight_values().clone() for layer in layers]
    x = torch.randn(5, 128)
    expected = torch.cat([layer(x) for layer in layers], 1)
    joined = join_layers(layers)
    torch.testing.assert_close(joined(x), expected)
    assert torch.equal(joined.weight_values(), torch.cat(values))
    for layer, bits, value in zip(layers, before, values, strict=True):
        assert torch.equal(layer.weight_values(), value)
        assert all(torch.equal(layer.state_dict()[name], bits[name]) for name in bits)
        name = layer.joined_parts[0]
        storages = {getattr(part, name).untyped_storage().data_ptr() for part in (layer, joined)}
        assert len(storages) == 1


def test_what_cannot_be_joined_is_left_alone():
    weight = torch.randn(8, 64)
    plain = QuantLinear(weight, None)
    assert join_layers([plain, QuantLinear(weight, torch.randn(8))]) is None
    assert join_layers([plain, QuantLinear(weight, None, is_nested=True)]) is None
    assert join_layers([QuantLinear(weight, None, is_nested=True) for _ in range(2)]) is None
    assert join_layers([plain, Int8Linear(weight, None)]) is None
    assert join_layers([QuantLinear(torch.randn(8, 96), None) for _ in range(2)]) is None


def test_mixed_rows_of_peft_adapters_through_stacks(on_triton, monkeypatch, tmp_path):
    """On Triton end to end, against peft; every layer runs four products for its seven modules."""
    calls, real = [], stacked_linears.apply_stacked_adapters
    monkeypatch.setattr(
        stacked_linears, "apply_stacked_adapters", lambda *a: calls.append(a[-1]) or real(*a)
    )
    base = tiny_base("llama-bias", dequantized_cache=False)
    twin = dense_twin(base, "llama-bias")
    folders = four_adapters(twin, tmp_path)[1::2]
    engine = tiny_engine(base)
    forms = [load_adapter(folder, base.spec, base.weights) for folder in folders]
    for form in forms:
        engine.add_adapter(form)
    digests = [None, forms[0].digest, forms[1].digest]
    prompts = [[5, 6, 7], [9, 8], [11, 12, 13, 14, 15]]
    requests = [
        greedy(str(i), prompt, digest, max_tokens=3)
        for i, (prompt, digest) in enumerate(zip(prompts, digests, strict=True))
    ]
    traces = run(engine, requests)
    assert {len(widths) for widths in calls} == {2, 3}
    assert len(calls) == 3 * 2 * base.spec.num_layers
    for i, (prompt, oracle) in enumerate(
        zip(prompts, [twin, *(load_in_peft(twin, f) for f in folders)], strict=True)
    ):
        expected = teacher_forced(oracle, prompt, traces[str(i)].token_ids)
        assert (torch.stack(traces[str(i)].logits) - expected).abs().max() <= 2e-4


def test_a_module_without_adapters_beside_others_runs_alone(on_triton):
    """The adapter touches v_proj only: q and k have no binding, so the three do not go together."""
    base = tiny_base("llama", dequantized_cache=False)
    stack = base.model.get_submodule("model.layers.0.self_attn.q_proj").stack
    x = torch.randn(1, 4, 64)
    with base.context.effect(object(), {"model.layers.0.self_attn.v_proj": object()}):
        assert not stack.takes(x)
    assert stack.takes(x) and not stack.takes(x.requires_grad_())

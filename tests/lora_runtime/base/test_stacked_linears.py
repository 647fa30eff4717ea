"""q, k, v and gate, up as one product: the same numbers and bits as each layer alone."""

from __future__ import annotations

import pytest
import torch

from lora_runtime.base.model.int8_linear import Int8Linear
from lora_runtime.base.model.quant_linear import DenseLinear, QuantLinear
from lora_runtime.base.model.stacked_linears import join_layers
from lora_runtime.kernels import gated_activation, gpu
from tests.lora_runtime.kernels.on_triton import DEVICE
from tests.tiny import tiny_base

KINDS = {
    "nf4": QuantLinear,
    "fp4": lambda weight, bias: QuantLinear(weight, bias, quant_type="fp4"),
    "nf4-double": lambda weight, bias: QuantLinear(weight, bias, is_nested=True),
    "int8": Int8Linear,
    "none": DenseLinear,
}


def test_gate_and_up_are_one_launch_unless_adapters_act_on_them(on_triton):
    base = tiny_base("llama", dequantized_cache=False)
    mlp = base.model.get_submodule("model.layers.0.mlp")
    x = torch.randn(1, 3, 64).to(DEVICE)
    alone = mlp.gate_proj.stack.gated(x, "silu")
    assert torch.equal(alone, gated_activation(mlp.gate_proj(x), mlp.up_proj(x), "silu"))
    for name, is_one in (("up_proj", False), ("down_proj", True)):
        with base.context.adapters(object(), {f"model.layers.0.mlp.{name}": object()}):
            assert (mlp.gate_proj.stack.gated(x, "silu") is not None) == is_one


@pytest.fixture
def on_triton(monkeypatch):
    monkeypatch.setattr(gpu, "DEVICES", {DEVICE})


def rounding_of_sums(x: torch.Tensor, weight: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """How far float32 sums of x (T, in) by weight (out, in) may be off y, in whatever order they
    are made: threads and the number of outputs cut them up differently.

    For normal x and weight a partial sum of k of n products is about √k ‖w‖ ‖x‖ / n, and it is
    rounded by at most u of that, evenly: n such roundings, independent of one another, have a
    standard deviation of u ‖w‖ ‖x‖ / √6. Five of these bound every element of every case;
    roundings of the result itself (scale, bias) come on top.
    """
    u = torch.finfo(torch.float32).eps / 2
    norms = x.double().norm(dim=1)[:, None] * weight.double().norm(dim=1)
    return u * (5 / 6**0.5 * norms + 4 * y.abs())


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_joined_layers_keep_their_bits_and_share_their_memory(kind, has_bias):
    width = 16384 if kind == "nf4-double" else 128  # whole blocks of 256 scales
    sizes = [(70, 128), (33, 128), (1, 128)] if width == 128 else [(2, width), (1, width)]
    biases = [torch.randn(n) if has_bias else None for n, _ in sizes]
    layers = [
        KINDS[kind](torch.randn(size), bias) for size, bias in zip(sizes, biases, strict=True)
    ]
    before = [{name: t.clone() for name, t in layer.state_dict().items()} for layer in layers]
    values = [layer.weight_values().clone() for layer in layers]
    x, weight = torch.randn(5, width), torch.cat(values)
    exact = x.double() @ weight.double().T
    if has_bias:
        exact += torch.cat(biases)
    limit = rounding_of_sums(x, weight, exact)
    alone = torch.cat([layer(x) for layer in layers], 1)
    joined = join_layers(layers)
    assert ((alone - exact).abs() <= limit).all()
    assert ((joined(x) - exact).abs() <= limit).all()
    assert torch.equal(joined.weight_values(), weight)
    for layer, bits, value in zip(layers, before, values, strict=True):
        assert torch.equal(layer.weight_values(), value)
        assert all(torch.equal(layer.state_dict()[name], bits[name]) for name in bits)
        name = layer.joined_parts[0]
        storages = {getattr(part, name).untyped_storage().data_ptr() for part in (layer, joined)}
        assert len(storages) == 1


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_joined_layers_and_their_members_keep_copies_of_their_own(kind):
    """Whoever multiplies first, before or after they are joined."""
    width = 16384 if kind == "nf4-double" else 128
    x = torch.randn(5, width)
    for is_used_before in (True, False):
        weights = [torch.randn(rows, width).bfloat16().float() for rows in (64, 33)]
        layers = [KINDS[kind](weight, None) for weight in weights]
        for layer in layers:
            layer.keep_copies = True
        if is_used_before:
            for layer in layers:
                layer.product(x), layer.kept_values()
        joined = join_layers(layers)
        expected = [x @ layer.weight_values().T for layer in layers]
        torch.testing.assert_close(joined.product(x), torch.cat(expected, 1), rtol=1e-4, atol=1e-3)
        assert torch.equal(joined.kept_values(), joined.weight_values())
        for layer, product in zip(layers, expected, strict=True):
            torch.testing.assert_close(layer.product(x), product, rtol=1e-4, atol=1e-3)


def test_what_cannot_be_joined_is_left_alone():
    weight = torch.randn(8, 64)
    plain = QuantLinear(weight, None)
    assert join_layers([plain, QuantLinear(weight, torch.randn(8))]) is None
    assert join_layers([plain, QuantLinear(weight, None, is_nested=True)]) is None
    assert join_layers([QuantLinear(weight, None, is_nested=True) for _ in range(2)]) is None
    assert join_layers([plain, Int8Linear(weight, None)]) is None
    assert join_layers([plain, QuantLinear(torch.randn(8, 128), None)]) is None
    assert join_layers([QuantLinear(torch.randn(8, 96), None) for _ in range(2)]) is None


def test_a_module_without_adapters_beside_others_runs_alone(on_triton):
    """The adapter touches v_proj only: q and k have no binding, so the three do not go together."""
    base = tiny_base("llama", dequantized_cache=False)
    stack = base.model.get_submodule("model.layers.0.self_attn.q_proj").stack
    x = torch.randn(1, 4, 64)
    with base.context.adapters(object(), {"model.layers.0.self_attn.v_proj": object()}):
        assert not stack.takes(x)
    assert stack.takes(x) and not stack.takes(x.requires_grad_())

"""Layers computed again in backward: the same gradients, less memory, nothing else changed."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from lora_runtime.base.model.reordered_model import LayerStep, LayerSteps
from lora_runtime.base.model.varlen_attention import RowLengths, VarlenAttention
from lora_runtime.base.recompute import recomputed
from lora_runtime.training.config import UnitConfig
from lora_runtime.training.losses import window_losses
from tests.lora_runtime.training.tiny_runs import make_tokenizer, make_unit, ragged_data, run
from tests.tiny import SHAPES, tiny_base


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def random_units(base, tokenizer, tmp_path, count=2):
    units = []
    for index in range(count):
        config = UnitConfig(
            name=f"u{index}", data=ragged_data(tmp_path / str(index), 6, seed=index), rank=3 + index
        )
        unit = make_unit(base, tokenizer, config, seed=index)
        for parameter in unit.parameters:
            torch.manual_seed(index)
            parameter.data += 0.1 * torch.randn_like(parameter)
        units.append(unit)
    return units


def gradients(base, units):
    for unit in units:
        unit.optimizer.zero_grad()
    losses = window_losses(base, units, [unit.next_micro_batches()[0] for unit in units])
    losses.sum().backward()
    return losses.detach(), [p.grad.clone() for unit in units for p in unit.parameters]


@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_are_the_same_bits(tmp_path, tokenizer, shape, quantization):
    dtype = torch.float64 if quantization == "none" else torch.float32
    base = tiny_base(shape, quantization=quantization, dtype=dtype)
    units = random_units(base, tokenizer, tmp_path)
    losses, expected = gradients(base, units)
    lighter = recomputed(base)
    found_losses, found = gradients(lighter, units)
    assert torch.equal(found_losses, losses)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))
    assert all(float(gradient.abs().max()) > 0 for gradient in expected)
    again, unchanged = gradients(base, units)
    assert torch.equal(again, losses)
    assert all(torch.equal(a, b) for a, b in zip(unchanged, expected, strict=True))


def saved_bytes(base, units):
    """Bytes that autograd keeps between forward and backward, the base's own not counted."""
    own = {p.untyped_storage().data_ptr() for p in base.model.state_dict().values()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        losses = window_losses(base, units, [unit.next_micro_batches()[0] for unit in units])
    return sum(kept.values()), losses


def test_each_layer_runs_twice_and_keeps_little(tmp_path, tokenizer):
    base = tiny_base("llama")
    units = random_units(base, tokenizer, tmp_path)
    calls = []
    for index, layer in enumerate(base.model.get_decoder().layers):
        layer.register_forward_pre_hook(lambda *_, index=index: calls.append(index))
    lighter = recomputed(base)
    gradients(lighter, units)
    assert calls == [0, 1, 2, 2, 1, 0]
    calls.clear()
    plain_bytes, plain_losses = saved_bytes(base, units)
    light_bytes, light_losses = saved_bytes(lighter, units)
    assert light_bytes < plain_bytes / 2 and torch.equal(plain_losses, light_losses)


def test_without_gradient_nothing_is_kept_or_repeated(tmp_path):
    base = tiny_base("qwen3")
    lighter = recomputed(base)
    tokens = torch.arange(3, 40)
    at = torch.arange(len(tokens))
    with torch.no_grad():
        plain = base.forward(tokens, at, VarlenAttention([RowLengths([len(tokens)])]), at)
        assert torch.equal(
            lighter.forward(tokens, at, VarlenAttention([RowLengths([len(tokens)])]), at), plain
        )


def test_planned_layers_are_recomputed_too(tmp_path):
    base = tiny_base("gemma3", quantization="none", dtype=torch.float64)
    tokens = torch.arange(3, 40)
    at = torch.arange(len(tokens))
    layers = (0, 1, 0, 1, 2)
    attention = VarlenAttention([RowLengths([len(tokens)])])
    steps = LayerSteps([LayerStep(layer, None, attention, None) for layer in layers])
    expected = base.forward(tokens, at, steps, at)
    assert torch.equal(recomputed(base).forward(tokens, at, steps, at), expected)


def test_a_run_trains_the_same_adapter(tmp_path, tokenizer):
    base = tiny_base("llama", quantization="none", dtype=torch.float64)
    unit = UnitConfig(
        name="u", data=ragged_data(tmp_path / "d", 6), max_steps=4, learning_rate=0.01
    )
    results = [
        run(base, tokenizer, tmp_path / str(light), [unit], activation_checkpointing=light)
        for light in (False, True)
    ]
    (plain,), (light,) = results
    assert [r[:-1] for r in light.records] == [r[:-1] for r in plain.records]  # without seconds
    tensors = (load_file(each.folder / "adapter_model.safetensors") for each in (plain, light))
    expected, found = tensors
    assert all(torch.equal(found[name], expected[name]) for name in expected)

"""Optimizers against those of torch and bitsandbytes themselves, and across stop and resume."""

from __future__ import annotations

from functools import cache

import bitsandbytes.optim
import pytest
import torch
from safetensors.torch import load_file

from lora_runtime.errors import ConfigError
from lora_runtime.training.config import TrainConfig, UnitConfig
from lora_runtime.training.dry_run import estimate
from lora_runtime.training.update import step
from tests.lora_runtime.training.tiny_runs import StopAfter, make_unit, ragged_data, run

THEIRS = {"adamw": torch.optim.AdamW, "adamw-8bit": bitsandbytes.optim.AdamW8bit}
BIG = 4096
"""Elements from which on bitsandbytes keeps 8 bits."""


def config_of(tmp_path, optimizer, **options):
    """Rank 32 has 8-bit tensors, beside the MLP, and 32-bit ones."""
    settings = dict(
        rank=32, max_steps=6, micro_batch_size=2, gradient_accumulation=2, weight_decay=0.1,
        learning_rate=5e-3, loraplus_ratio=4.0, use_dora=True, warmup=0,
    )  # fmt: skip
    data = ragged_data(tmp_path / "d", 7)
    return UnitConfig(name="u", data=data, optimizer=optimizer, **{**settings, **options})


def groups_of(unit, copies):
    """The groups as LoRA+ has them: B learns faster, magnitudes do not decay."""
    names = list(unit.named_parameters())
    rate = unit.config.learning_rate
    kinds = {
        ".a": dict(lr=rate),
        ".b": dict(lr=4.0 * rate),
        ".magnitude": dict(lr=rate, weight_decay=0.0),
    }
    return [
        {"params": [c for n, c in zip(names, copies, strict=True) if n.endswith(end)], **values}
        for end, values in kinds.items()
    ]


@pytest.mark.parametrize("optimizer", THEIRS)
def test_updates_are_those_of_the_library(tmp_path, tokenizer, base, optimizer):
    config = config_of(tmp_path, optimizer, max_grad_norm=None, schedule="constant")
    unit = make_unit(base, tokenizer, config)
    before = [parameter.detach().clone() for parameter in unit.parameters]
    copies = [torch.nn.Parameter(value.clone()) for value in before]
    theirs = THEIRS[optimizer](groups_of(unit, copies), weight_decay=0.1)
    generator = torch.Generator().manual_seed(3)
    for _ in range(4):
        for parameter, copy in zip(unit.parameters, copies, strict=True):
            gradient = torch.randn(copy.shape, generator=generator)
            parameter.grad, copy.grad = gradient.clone(), gradient
        step(unit, grad_norm=0.0)
        theirs.step()
    for ours, expected, start in zip(unit.parameters, copies, before, strict=True):
        torch.testing.assert_close(ours.data, expected.data, rtol=0, atol=1e-6)
        assert (ours - start).abs().max() > 0.01


def tensors_of(folder):
    return load_file(folder / "u" / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory, tokenizer, base):
    """init → (updates, tensors) of a run in 8 bits that nothing stopped."""

    @cache
    def whole(init):
        folder = tmp_path_factory.mktemp("whole")
        config = config_of(folder, "adamw-8bit", init=init)
        (result,) = run(base, tokenizer, folder / "out", [config])
        return result.records, tensors_of(folder / "out")

    return whole


@pytest.mark.parametrize("init", ["default", "pissa"])
@pytest.mark.parametrize("num_passes", [1, 2, 7])
def test_8bit_resumes_exactly(tmp_path, tokenizer, base, whole_run, num_passes, init):
    """Also where first factors are a fixed part of what decays."""
    config = config_of(tmp_path, "adamw-8bit", init=init)
    records, expected = whole_run(init)
    out = tmp_path / "out"
    run(base, tokenizer, out, [config], should_stop=StopAfter(num_passes))
    (folder,) = (out / "checkpoints").iterdir()
    dtypes = {tensor.dtype for tensor in load_file(folder / "state.safetensors").values()}
    assert (torch.uint8 in dtypes) == (num_passes > 1)
    resumed = run(base, tokenizer, out, [config], resume=True)
    assert [r[:-1] for r in resumed[0].records] == [r[:-1] for r in records]
    found = tensors_of(out)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


def test_8bit_learns_as_32bit_does(tmp_path, tokenizer, base):
    losses = {
        name: run(base, tokenizer, tmp_path / name, [config_of(tmp_path, name)])[0].records[-1].loss
        for name in THEIRS
    }
    assert losses["adamw-8bit"] != losses["adamw"]
    assert losses["adamw-8bit"] == pytest.approx(losses["adamw"], rel=0.02)


@pytest.mark.parametrize("optimizer", ["adamw-paged", "adamw-paged-8bit"])
def test_paged_needs_cuda(tmp_path, tokenizer, base, optimizer):
    with pytest.raises(ConfigError, match=f"optimizer is '{optimizer}'.*use 'adamw") as caught:
        run(base, tokenizer, tmp_path / "out", [config_of(tmp_path, optimizer)])
    assert caught.value.field == "optimizer"
    assert not (tmp_path / "out" / "checkpoints").exists()


def test_a_dry_run_counts_8bit_moments(tmp_path, tokenizer, base):
    """Two bytes an element, two scales a block of 256, and two maps of 256 values for all."""
    config = config_of(tmp_path, "adamw-8bit")
    unit = make_unit(base, tokenizer, config)
    sizes = [parameter.numel() for parameter in unit.parameters]
    expected = 2 * 256 * 4 + sum(
        2 * size + 2 * 4 * -(-size // 256) if size >= BIG else 8 * size for size in sizes
    )
    runs = TrainConfig(output=tmp_path / "out", units=(config,), max_seq_len=256)
    assert estimate(base, tokenizer, runs).units[0].optimizer_bytes == expected
    assert min(sizes) < BIG <= max(sizes)

"""What training records beside an adapter is what PEFT and serving then give."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_runtime.adapters.files.folder import TENSORS_FILE, read_adapter
from lora_runtime.adapters.files.parity_record import read_parity_record
from lora_runtime.adapters.parity import LIMIT, PARITY_FILE, gate
from lora_runtime.base.loader import load_base
from lora_runtime.config import BaseConfig
from lora_runtime.engine.load import AdapterLoad
from lora_runtime.errors import ParityFailed
from lora_runtime.training import export
from lora_runtime.training.config import UnitConfig
from tests.lora_runtime.training.tiny_runs import ragged_data, run
from tests.peft_adapters import load_in_peft, logits_of
from tests.tiny import dense_twin, float32_checkpoint, tiny_base


def units(tmp_path):
    return [
        UnitConfig(
            name=variant, data=ragged_data(tmp_path / variant, 8, seed=seed), variant=variant,
            rank=4, max_steps=12, learning_rate=2e-2, micro_batch_size=4,
        )
        for seed, variant in enumerate(["lora", "rslora", "dora", "pissa", "olora"])
    ]  # fmt: skip


def float32_twin(base):
    """W is not rounded; what the base has in fewer bits is cast."""
    twin = dense_twin(base, "llama").float()
    with torch.no_grad():
        for path in base.spec.linears:
            values = base.model.get_submodule(path).linear.dequantize()
            twin.get_submodule(path).weight.copy_(values)
    return twin


def peft_logits(base, folder):
    return logits_of(load_in_peft(float32_twin(base), folder))


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tokenizer, base):
    folder = tmp_path_factory.mktemp("trained")
    return run(base, tokenizer, folder / "out", units(folder))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_peft_gives_the_recorded_effect_in_float32(tmp_path, tokenizer, base, trained, dtype):
    """Whatever the training's dtype; and the noise recorded beside it is bfloat16's."""
    results, noises = trained, []
    if dtype != torch.float32:
        base = tiny_base("llama", dtype=dtype)
        results = run(base, tokenizer, tmp_path / "out", units(tmp_path))
    for result in results:
        record = read_parity_record(result.folder, base.spec)
        parity = gate(record, peft_logits(base, result.folder), "float32")
        assert parity.error < 1e-4 and parity.effect_rms > 0.5
        assert record.dtype == "float32" and 1e-3 < record.noise < 0.5
        noises.append(record.noise)
    assert len(set(noises)) == len(noises) == 5


def test_weights_changed_after_training_are_caught(tmp_path, base, trained):
    """By the numbers, where one tensor's share of the effect is large enough, and by the digest."""
    folder = shutil.copytree(trained[0].folder, tmp_path / "changed")
    tensors = load_file(folder / TENSORS_FILE)
    name = next(name for name in tensors if "layers.2.mlp.down_proj.lora_B" in name)
    tensors[name] *= 1.5
    save_file(tensors, folder / TENSORS_FILE)
    record = read_parity_record(folder, base.spec)
    with pytest.raises(ParityFailed, match="relative error"):
        gate(record, peft_logits(base, folder), "float32")
    assert record.tensors_sha256 != read_adapter(folder).tensors_sha256


def checked(folder, base):
    load = AdapterLoad.read(folder, base)
    return load.gate(load.pack(base.spec.num_layers))


@pytest.mark.parametrize("shape", ["llama", "qwen3-moe", "qwen3.5"])
@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_a_float32_checkpoint_is_one_base_in_both_dtypes(tmp_path, tokenizer, shape, quantization):
    """Whichever the adapter was trained in, it is served in both, in float32 by the narrow limit;
    changed weights are not.
    """
    settings = {"quantization": quantization, "device": "cpu"}
    settings["model"] = str(float32_checkpoint(tmp_path / "base", shape))
    kinds = ("bfloat16", "float32")
    bases = {dtype: load_base(BaseConfig(dtype=dtype, **settings)) for dtype in kinds}
    assert len({base.spec.fingerprint for base in bases.values()}) == 1
    assert [bases[dtype].spec.exceeds_bfloat16 for dtype in kinds] == [False, True]
    assert not tiny_base(shape).spec.exceeds_bfloat16
    for trained_in in kinds:
        unit, *_ = units(tmp_path)
        (result,) = run(bases[trained_in], tokenizer, tmp_path / trained_in, [unit])
        parities = [checked(result.folder, bases[served_in]) for served_in in kinds]
        assert all(parity.passed for parity in parities)
        assert parities[1].limit == LIMIT and parities[1].error < 2e-3
        damage(result.folder)
        with pytest.raises(ParityFailed, match="relative error"):
            checked(result.folder, bases["float32"])


def damage(folder):
    tensors = load_file(folder / TENSORS_FILE)
    for name in tensors:
        tensors[name] *= 1.1
    save_file(tensors, folder / TENSORS_FILE)
    content = json.loads((folder / PARITY_FILE).read_text())
    (folder / PARITY_FILE).write_text(json.dumps(content | {"tensors_sha256": None}))


def test_no_old_record_stands_beside_new_weights(tmp_path, tokenizer, base, monkeypatch):
    out = tmp_path / "out"
    (result, *_) = run(base, tokenizer, out, units(tmp_path)[:2])
    before = (result.folder / PARITY_FILE).read_text()

    def die(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(export, "write_parity_record", die)
    with pytest.raises(KeyboardInterrupt):
        run(base, tokenizer, out, units(tmp_path)[:2], seed=5)
    assert not (result.folder / PARITY_FILE).exists()
    monkeypatch.undo()
    run(base, tokenizer, out, units(tmp_path)[:2], seed=5, resume=True)
    assert (result.folder / PARITY_FILE).read_text() != before


def test_a_record_holds_no_training_data(trained):
    """Its rows depend on the base alone: other data, the same rows."""
    rows = {
        json.dumps(json.loads((result.folder / PARITY_FILE).read_text())["rows"])
        for result in trained
    }
    assert len(rows) == 1

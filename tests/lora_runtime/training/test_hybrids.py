"""Training through recurrent layers, against PEFT with each row alone; what it exports."""

from __future__ import annotations

import random

import peft
import pytest

from lora_runtime.adapters.files.parity_record import read_parity_record
from lora_runtime.adapters.packed_adapter import pack_for
from lora_runtime.adapters.parity import gate
from lora_runtime.adapters.reduction import load_adapter
from lora_runtime.base.model.recurrence import Recurrence
from lora_runtime.base.recompute import recomputed
from lora_runtime.engine.probe import adapter_logits
from lora_runtime.training.config import UnitConfig
from lora_runtime.training.losses import window_losses
from tests.lora_runtime.training.test_trainer import mean_loss, randomise
from tests.lora_runtime.training.tiny_runs import WORDS, make_unit, run, write_jsonl
from tests.peft_adapters import load_in_peft, logits_of
from tests.tiny import HYBRIDS, dense_twin, tiny_base

TARGETS = {
    "qwen3.5": ["in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "out_proj", "k_proj"],
    "qwen3-next": ["in_proj_qkvz", "in_proj_ba", "out_proj", "v_proj"],
    "lfm2": ["in_proj", "out_proj", "w1"],
    "granite-h": ["in_proj", "q_proj", "shared_mlp.input_linear"],
    "bamba": ["in_proj", "up_proj"],
    "falcon-h1": ["in_proj", "v_proj"],
    "nemotron-h": ["in_proj", "k_proj"],
}


def data_with_a_shared_start(path, count):
    rng = random.Random(1)

    def text(least, most):
        return " ".join(rng.choices(WORDS, k=rng.randint(least, most)))

    start = text(9, 9)
    rows = [{"prompt": f"{start} {text(1, 9)}", "completion": text(1, 30)} for _ in range(count)]
    return write_jsonl(path, rows)


def pieces_of_forwards(monkeypatch):
    """Of all that run from now on."""
    found, prepare = [], Recurrence.__init__

    def spy(self, pieces, *given):
        found.extend(pieces)
        prepare(self, pieces, *given)

    monkeypatch.setattr(Recurrence, "__init__", spy)
    return found


@pytest.mark.parametrize(
    ("shape", "has_recompute"),
    [*((shape, False) for shape in HYBRIDS), ("qwen3.5", True), ("granite-h", True)],
)
def test_gradients_are_those_of_peft_with_each_row_alone(
    tmp_path, tokenizer, shape, has_recompute, monkeypatch
):
    """All rows in one forward, in which what they begin with is computed once."""
    pieces = pieces_of_forwards(monkeypatch)
    base = tiny_base(shape)
    pieces.clear()
    data = data_with_a_shared_start(tmp_path / "d", 5)
    config = UnitConfig(
        name="u", data=data, rank=4, alpha=6.0, target_modules=TARGETS[shape], micro_batch_size=5
    )
    unit = make_unit(base, tokenizer, config)
    randomise(unit)
    examples = unit.next_micro_batches()[0]
    trained = recomputed(base) if has_recompute else base
    window_losses(trained, [unit], [examples]).sum().backward()
    assert [piece.after for piece in pieces] == [None, *[0] * 5]
    oracle = peft.get_peft_model(
        dense_twin(base, shape), peft.LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS[shape])
    )
    layers = {path: oracle.base_model.model.get_submodule(path) for path in unit.modules}
    for path, factors in unit.modules.items():
        layers[path].lora_A.default.weight.data.copy_(factors.a.data)
        layers[path].lora_B.default.weight.data.copy_(factors.b.data)
    mean_loss(oracle, examples).backward()
    assert len(unit.modules) >= len(TARGETS[shape])
    for path, factors in unit.modules.items():
        for ours, theirs in [
            (factors.a, layers[path].lora_A.default.weight),
            (factors.b, layers[path].lora_B.default.weight),
        ]:
            assert theirs.grad.norm() > 0
            assert (ours.grad - theirs.grad).norm() <= 2e-4 * theirs.grad.norm()


@pytest.mark.parametrize("shape", ["qwen3.5", "lfm2", "granite-h"])
def test_what_is_exported_does_the_same_in_peft_and_in_serving(tmp_path, tokenizer, shape):
    base = tiny_base(shape)
    units = [
        UnitConfig(
            name=variant, data=data_with_a_shared_start(tmp_path / variant, 8), variant=variant,
            rank=4, max_steps=8, learning_rate=2e-2, micro_batch_size=4,
            target_modules=TARGETS[shape],
        )
        for variant in ("lora", "dora")
    ]  # fmt: skip
    twin = dense_twin(base, shape)
    for result in run(base, tokenizer, tmp_path / "out", units):
        assert result.error is None
        record = read_parity_record(result.folder, base.spec)
        model = load_in_peft(twin, result.folder)
        assert gate(record, logits_of(model), "float32").error < 1e-4
        form = load_adapter(result.folder, base.spec, base.weights)
        assert gate(record, adapter_logits(base, pack_for(base, form)), "float32").error < 1e-4

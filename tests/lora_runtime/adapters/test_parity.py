"""The parity gate against adapters of the real `peft`, rightly and wrongly served."""

from __future__ import annotations

import copy
import json
import os
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.tuners.lora import LoraLayer

from lora_runtime.adapters.files import parity_file
from lora_runtime.adapters.files.parity_file import read_golden, remove_golden, write_golden
from lora_runtime.adapters.parity import (
    NUM_POSITIONS,
    NUM_TOP,
    ROW_LENGTH,
    SIDECAR_FILE,
    TOLERANCES,
    check,
    gate,
    measure,
    public_rows,
)
from lora_runtime.core import BaseSpec, activation_start
from lora_runtime.errors import AdapterRefused, AdapterSourceRefused, BaseMismatch, ParityFailed
from tests.peft_adapters import load_in_peft, write_adapter
from tests.tiny import VOCAB_SIZE, tiny_model

FINGERPRINT = "f" * 64
FACTS = {"vocab_size": VOCAB_SIZE, "fingerprint": FINGERPRINT, "dtype": "float32"}
SPEC = BaseSpec(
    name="tiny", fingerprint=FINGERPRINT, linears={}, embedding="e", head="h", is_tied=True,
    num_layers=3, hidden_size=64, vocab_size=VOCAB_SIZE, max_model_len=512, quantization="none",
    dtype="float32", device="cpu", model_type="llama",
)  # fmt: skip


def logits_of(model):
    """What the gate asks for, from a PEFT model."""

    @torch.no_grad()
    def logits(rows, with_adapter):
        if not with_adapter:
            with model.disable_adapter():
                return [model(torch.tensor([row])).logits[0] for row in rows]
        return [model(torch.tensor([row])).logits[0] for row in rows]

    return logits


@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
    model = tiny_model("llama")
    folder = write_adapter(model, tmp_path_factory.mktemp("adapter"), seed=1)
    return load_in_peft(model, folder)


@pytest.fixture(scope="module")
def golden(adapted):
    return measure(logits_of(adapted), **FACTS)


def test_the_record_holds_what_the_model_gives(adapted, golden):
    assert golden.rows == public_rows(VOCAB_SIZE)
    assert len(golden.positions) == len(golden.rows) * NUM_POSITIONS
    for place in golden.positions:
        row = torch.tensor([golden.rows[place.row]])
        with torch.no_grad():
            expected = adapted(row).logits[0, place.position].double()
            with adapted.disable_adapter():
                base = adapted(row).logits[0, place.position].double()
        assert list(place.token_ids) == expected.topk(NUM_TOP).indices.tolist()
        for found, whole in [(place.adapter, expected), (place.base, base)]:
            values = [*whole[list(place.token_ids)], whole.exp().sum().log()]
            assert found == pytest.approx([float(value) for value in values], abs=1e-9)


@pytest.mark.parametrize("shape", ["llama", "gemma2", "qwen3"])
def test_a_faithful_server_passes(tmp_path, shape):
    adapter = write_adapter(tiny_model(shape), tmp_path / "a", seed=2)
    logits = logits_of(load_in_peft(tiny_model(shape), adapter))
    recorded = measure(logits, **FACTS)
    exact = logits_of(load_in_peft(tiny_model(shape, dtype=torch.float64), adapter))
    parity = check(recorded, exact, TOLERANCES["float32"])
    assert parity.passed and parity.error < 1e-4 and parity.effect > 0.1


def change_scaling(model, factor=1.02):
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.scaling["default"] *= factor


def drop_one_module(model):
    model.get_submodule("base_model.model.model.layers.1.mlp.up_proj").scaling["default"] = 0.0


def swap_two_modules(model):
    layer = model.get_submodule("base_model.model.model.layers.0.mlp")
    first, second = layer.up_proj.lora_B.default, layer.gate_proj.lora_B.default
    values = first.weight.data.clone()
    first.weight.data.copy_(second.weight.data)
    second.weight.data.copy_(values)


def remove(model):
    change_scaling(model, factor=0.0)


def poison(model):
    layer = model.get_submodule("base_model.model.model.layers.0.mlp.up_proj")
    layer.lora_B.default.weight.data[0, 0] = torch.nan


@pytest.mark.parametrize(
    "damage", [change_scaling, drop_one_module, swap_two_modules, remove, poison]
)
def test_an_unfaithful_server_is_caught(adapted, golden, damage):
    damaged = copy.deepcopy(adapted)
    damage(damaged)
    with pytest.raises(ParityFailed) as refusal:
        gate(golden, logits_of(damaged), "float32")
    parity = check(golden, logits_of(damaged), TOLERANCES["float32"])
    assert f"{parity.error:.2g}" in refusal.value.message and "0.01" in refusal.value.message
    assert refusal.value.field == SIDECAR_FILE


def test_the_error_is_that_of_the_effect(adapted, golden):
    """An adapter whose effect is 2 % too large is off by 2 %, whatever the base's own logits."""
    logits = logits_of(adapted)

    def stretched(rows, with_adapter):
        base = logits(rows, False)
        if not with_adapter:
            return [row + 7.0 for row in base]
        wide = [0.02 * (a - b) for a, b in zip(logits(rows, True), base, strict=True)]
        return [a + 7.0 + d for a, d in zip(logits(rows, True), wide, strict=True)]

    parity = check(golden, stretched, TOLERANCES["float32"])
    assert parity.error == pytest.approx(0.02, rel=0.05)


def test_the_coarser_dtype_decides(adapted, golden):
    off_by_two_percent = copy.deepcopy(adapted)
    change_scaling(off_by_two_percent)
    logits = logits_of(off_by_two_percent)
    assert gate(golden, logits, "bfloat16").limit == 0.05
    coarse = replace(golden, dtype="bfloat16")
    assert gate(coarse, logits, "float32").limit == 0.05
    assert gate(None, logits, "float32") is None


def test_an_adapter_without_effect_passes_in_spite_of_rounding_only(adapted):
    silent = copy.deepcopy(adapted)
    remove(silent)
    logits = logits_of(silent)
    recorded = measure(logits, **FACTS)

    def noisy(size):
        def run(rows, with_adapter):
            generator = torch.Generator().manual_seed(int(with_adapter))
            return [
                row + size * torch.randn(row.shape, generator=generator)
                for row in logits(rows, with_adapter)
            ]

        return run

    quiet = check(recorded, noisy(1e-6), TOLERANCES["float32"])
    assert quiet.passed and quiet.effect == 0.0
    assert not check(recorded, noisy(1e-2), TOLERANCES["float32"]).passed
    assert not check(recorded, logits_of(adapted), TOLERANCES["float32"]).passed


def test_public_rows_never_change():
    """A record made by one release is compared with the next one's."""
    rows = public_rows(49152)
    assert [row[:4] for row in rows] == [(28507, 5496, 47258, 15424), (1673, 3296, 14634, 24777)]
    assert [len(row) for row in rows] == [ROW_LENGTH] * 2


@given(vocab_size=st.integers(20, 300_000), data=st.data())
def test_public_rows_invoke_an_activated_adapter_before_what_is_recorded(vocab_size, data):
    invocation = data.draw(st.lists(st.integers(0, vocab_size - 1), min_size=1, max_size=12))
    for row in public_rows(vocab_size, invocation):
        start = activation_start(row, invocation)
        assert start + len(invocation) == len(row) - NUM_POSITIONS
        assert all(0 <= token < vocab_size for token in row)
        assert len(row) >= ROW_LENGTH


def test_a_record_survives_the_disk(tmp_path, golden):
    assert read_golden(tmp_path, SPEC) is None
    write_golden(tmp_path, golden)
    assert read_golden(tmp_path, SPEC) == golden
    assert os.listdir(tmp_path) == [SIDECAR_FILE]
    remove_golden(tmp_path)
    remove_golden(tmp_path)
    assert read_golden(tmp_path, SPEC) is None


def test_a_record_of_another_base_is_a_mismatch(tmp_path, golden):
    write_golden(tmp_path, golden)
    with pytest.raises(BaseMismatch) as refusal:
        read_golden(tmp_path, replace(SPEC, fingerprint="e" * 64))
    assert refusal.value.field == SIDECAR_FILE


def edited(tmp_path, golden, edit):
    write_golden(tmp_path, golden)
    content = json.loads((tmp_path / SIDECAR_FILE).read_text())
    edit(content)
    (tmp_path / SIDECAR_FILE).write_text(json.dumps(content))


BAD_EDITS = {
    "no rows": lambda c: c.update(rows=[]),
    "rows of text": lambda c: c.update(rows=["ab"]),
    "too many rows": lambda c: c.update(rows=c["rows"] * 5),
    "a token beyond the vocabulary": lambda c: c["rows"][0].__setitem__(0, VOCAB_SIZE),
    "a negative token": lambda c: c["rows"][0].__setitem__(0, -1),
    "true as a token": lambda c: c["rows"][0].__setitem__(0, True),
    "a row longer than the base": lambda c: c["rows"].__setitem__(0, [1] * 513),
    "a position past its row": lambda c: c["positions"][0].update(position=ROW_LENGTH),
    "a row that is not there": lambda c: c["positions"][0].update(row=2),
    "a logit too few": lambda c: c["positions"][0]["base"].pop(),
    "text for a logit": lambda c: c["positions"][0]["base"].__setitem__(0, "1.0"),
    "NaN": lambda c: c["positions"][0]["adapter"].__setitem__(0, float("nan")),
    "no positions": lambda c: c.update(positions=[]),
    "an unknown key": lambda c: c.update(prompt="secret"),
    "a missing key": lambda c: c.pop("dtype"),
    "an unknown dtype": lambda c: c.update(dtype="int4"),
    "another version": lambda c: c.update(version=2),
}


@pytest.mark.parametrize("edit", BAD_EDITS.values(), ids=BAD_EDITS)
def test_a_broken_record_is_refused_by_name(tmp_path, golden, edit):
    edited(tmp_path, golden, edit)
    with pytest.raises(AdapterRefused) as refusal:
        read_golden(tmp_path, SPEC)
    assert refusal.value.field == SIDECAR_FILE


def paths_in(value, path=()):
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in items if isinstance(value, dict | list) else ():
        if isinstance(inner, dict | list):
            yield from paths_in(inner, (*path, key))
        else:
            yield (*path, key)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_other_content_is_refused_or_read_and_nothing_else(tmp_path_factory, golden, data):
    folder = tmp_path_factory.mktemp("fuzz")
    write_golden(folder, golden)
    content = json.loads((folder / SIDECAR_FILE).read_text())
    path = data.draw(st.sampled_from([p for p in paths_in(content) if p]))
    junk = st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=3),
        st.lists(st.integers(), max_size=3), st.dictionaries(st.text(max_size=2), st.none()),
    )  # fmt: skip
    parent = content
    for key in path[:-1]:
        parent = parent[key]
    parent[path[-1]] = data.draw(junk)
    (folder / SIDECAR_FILE).write_text(json.dumps(content))
    try:
        read = read_golden(folder, SPEC)
    except AdapterRefused:
        return
    check(read, lambda rows, _: [torch.zeros(len(row), VOCAB_SIZE) for row in rows],
          TOLERANCES["float32"])  # fmt: skip


def test_a_link_or_a_large_file_is_not_read(tmp_path, golden, monkeypatch):
    write_golden(tmp_path, golden)
    (tmp_path / SIDECAR_FILE).rename(tmp_path / "real.json")
    (tmp_path / SIDECAR_FILE).symlink_to(tmp_path / "real.json")
    with pytest.raises(AdapterSourceRefused, match=SIDECAR_FILE):
        read_golden(tmp_path, SPEC)
    (tmp_path / SIDECAR_FILE).unlink()
    write_golden(tmp_path, golden)
    monkeypatch.setattr(parity_file, "MAX_SIDECAR_BYTES", 100)
    with pytest.raises(AdapterRefused, match="at most 100"):
        read_golden(tmp_path, SPEC)

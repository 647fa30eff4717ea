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

from lora_runtime.adapters.files import parity_record
from lora_runtime.adapters.files.parity_record import (
    read_parity_record,
    remove_parity_record,
    write_parity_record,
)
from lora_runtime.adapters.parity import (
    LIMIT,
    NUM_POSITIONS,
    NUM_TOP,
    PARITY_FILE,
    PUBLIC_TEXTS,
    ROUGH_LIMIT,
    ROW_LENGTH,
    compare,
    forwards,
    gate,
    measure,
    public_rows,
)
from lora_runtime.core import BaseSpec
from lora_runtime.errors import AdapterRefused, AdapterSourceRefused, BaseMismatch, ParityFailed
from tests.peft_adapters import load_in_peft, logits_of, write_adapter
from tests.tiny import VOCAB_SIZE, tiny_model

FINGERPRINT = "f" * 64
TENSORS = "a" * 64
SPEC = BaseSpec(
    name="tiny", fingerprint=FINGERPRINT, linears={}, embedding="e", head="h", is_tied=True,
    num_layers=3, hidden_size=64, vocab_size=VOCAB_SIZE, max_model_len=512, quantization="none",
    dtype="float32", device="cpu", model_type="llama",
)  # fmt: skip


def spread(text):
    """Stands for a tokenizer: ids that depend on the text, all over the vocabulary."""
    return [(31 * i + ord(letter) * 7) % VOCAB_SIZE for i, letter in enumerate(text)]


ROWS = public_rows(spread, VOCAB_SIZE, 512)


def noisy(logits, size, seed=0):
    """The same, off by random numbers of this root mean square."""
    generator = torch.Generator().manual_seed(seed)

    def run(rows, logits_at, with_adapter):
        found = logits(rows, logits_at, with_adapter)
        return found + size * torch.randn(found.shape, generator=generator)

    return run


def recorded(logits, rounded=None):
    return measure(ROWS, logits, rounded or logits, fingerprint=FINGERPRINT)


def checked(record, logits, dtype="float32"):
    return compare(record, [forward() for forward in forwards(record, logits)], dtype)


@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
    model = tiny_model("llama")
    folder = write_adapter(model, tmp_path_factory.mktemp("adapter"), seed=1)
    return load_in_peft(model, folder)


@pytest.fixture(scope="module")
def record(adapted):
    return replace(recorded(logits_of(adapted)), tensors_sha256=TENSORS)


def old(record, dtype="float32"):
    """As version 1 wrote it."""
    short = [place for place in record.positions if place.position >= ROW_LENGTH - 4]
    return replace(record, positions=tuple(short), noise=None, tensors_sha256=None, dtype=dtype)


def test_the_record_holds_what_the_model_gives(adapted, record):
    assert record.rows == ROWS and [len(row) for row in ROWS] == [ROW_LENGTH] * 2
    assert len(record.positions) == len(record.rows) * NUM_POSITIONS
    assert record.noise == 0.0 and record.dtype == "float32"
    for place in record.positions:
        row = torch.tensor([record.rows[place.row]])
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
    record = recorded(logits_of(load_in_peft(tiny_model(shape), adapter)))
    exact = logits_of(load_in_peft(tiny_model(shape, dtype=torch.float64), adapter))
    parity = checked(record, exact)
    assert parity.passed and parity.error < 1e-4 and parity.effect_rms > 0.1


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
def test_an_unfaithful_server_is_caught(adapted, record, damage):
    damaged = copy.deepcopy(adapted)
    damage(damaged)
    with pytest.raises(ParityFailed) as refusal:
        gate(record, logits_of(damaged), "float32")
    parity = checked(record, logits_of(damaged))
    assert f"{parity.error:.2g}" in refusal.value.message and "0.01" in refusal.value.message
    assert refusal.value.field == PARITY_FILE


def test_the_error_is_that_of_the_effect(adapted, record):
    """An adapter whose effect is 2 % too large is off by 2 %, whatever the base's own logits."""
    logits = logits_of(adapted)

    def stretched(rows, logits_at, with_adapter):
        base = logits(rows, logits_at, False)
        if not with_adapter:
            return base + 7.0
        return base + 7.0 + 1.02 * (logits(rows, logits_at, True) - base)

    assert checked(record, stretched).error == pytest.approx(0.02, rel=0.05)


def test_the_limit_follows_from_the_recorded_noise_in_bfloat16_alone(adapted):
    """The formula, from its parts: noise of base and adapter are independent here."""
    logits = logits_of(adapted)
    for size in (1e-6, 0.02, 0.3):
        record = recorded(logits, noisy(logits, size))
        assert record.noise == pytest.approx(2**0.5 * size, rel=0.05)
        exact = recorded(logits)
        assert record.positions == exact.positions
        parity = checked(record, logits, "bfloat16")
        assert parity.limit == pytest.approx(max(LIMIT, 2 * record.noise / parity.effect_rms))
        assert checked(record, logits, "float32").limit == LIMIT
        for seed in range(5):
            assert checked(record, noisy(logits, size, seed), "bfloat16").passed
            assert not checked(record, noisy(logits, 3 * size + 0.02, seed), "bfloat16").passed


def test_a_tensor_changed_by_a_tenth_is_caught_where_noise_allows(adapted):
    logits = logits_of(adapted)
    record = recorded(logits, noisy(logits, 2e-3))
    damaged = copy.deepcopy(adapted)
    layer = damaged.get_submodule("base_model.model.model.layers.1.mlp.down_proj")
    layer.lora_B.default.weight.data *= 1.1
    for dtype in ("float32", "bfloat16"):
        assert checked(record, logits, dtype).passed
        assert not checked(record, logits_of(damaged), dtype).passed


def test_an_old_record_is_read_and_refuses_nothing_that_rounding_explains(adapted, record):
    """Version 1: exact in float32; in bfloat16 by the wide limit, as its noise is unknown."""
    changed = copy.deepcopy(adapted)
    change_scaling(changed)
    for dtype, limit in (("float32", LIMIT), ("bfloat16", ROUGH_LIMIT)):
        assert checked(old(record), logits_of(adapted), dtype).limit == limit
        assert checked(old(record, dtype), logits_of(adapted), "float32").limit == limit
    assert not checked(old(record), logits_of(changed)).passed
    assert checked(old(record, "bfloat16"), logits_of(changed)).passed
    remove(changed)
    lost = checked(old(record, "bfloat16"), logits_of(changed), "bfloat16")
    assert lost.passed == (lost.effect_rms < 0.15 * size_of(record))


def size_of(record):
    numbers = torch.tensor([place.adapter for place in old(record).positions])
    return float(numbers.square().mean().sqrt())


def test_without_a_record_nothing_is_checked(adapted):
    assert gate(None, logits_of(adapted), "float32") is None


def test_an_adapter_without_effect_passes_in_spite_of_rounding_only(adapted):
    silent = copy.deepcopy(adapted)
    remove(silent)
    logits = logits_of(silent)
    record = recorded(logits)
    quiet = checked(record, noisy(logits, 1e-6))
    assert quiet.passed and quiet.effect_rms == 0.0
    assert not checked(record, noisy(logits, 1e-2)).passed
    assert not checked(record, logits_of(adapted)).passed


def test_a_check_asks_for_its_recorded_positions_only_of_base_and_adapter(adapted, record):
    asked = []

    def logits(rows, logits_at, with_adapter):
        asked.append((rows, tuple(logits_at), with_adapter))
        return logits_of(adapted)(rows, logits_at, with_adapter)

    parts = forwards(record, logits)
    last = range(ROW_LENGTH - NUM_POSITIONS, ROW_LENGTH)
    wanted = [(ROWS, (*last, *(ROW_LENGTH + place for place in last)), on) for on in (False, True)]
    for number, part in enumerate(parts, 1):
        part()
        assert asked == wanted[:number]
    assert len(parts) == len(wanted)


@given(
    encoded=st.lists(st.integers(0, 99), max_size=200),
    vocab_size=st.integers(1, 99),
    max_model_len=st.integers(1, 99),
)
def test_public_rows_exist_for_any_tokenizer_and_vocabulary(encoded, vocab_size, max_model_len):
    """A base's table may be smaller than its tokenizer, which may know none of the words."""
    said = []
    rows = public_rows(lambda text: said.append(text) or encoded, vocab_size, max_model_len)
    assert tuple(said) == PUBLIC_TEXTS and len(rows) == len(PUBLIC_TEXTS)
    for row in rows:
        assert 1 <= len(row) <= min(ROW_LENGTH, max_model_len)
        assert all(0 <= token < vocab_size for token in row)
    if vocab_size > max(encoded, default=0):
        assert list(rows[0]) == (encoded or [0])[: min(ROW_LENGTH, max_model_len)]


@pytest.mark.parametrize("lengths", [(1, 64), (40, 7), (16, 16)])
def test_rows_may_be_short(adapted, lengths):
    rows = [ROWS[0][: lengths[0]], ROWS[1][: lengths[1]]]
    logits = logits_of(adapted)
    record = measure(rows, logits, logits, fingerprint=FINGERPRINT)
    assert len(record.positions) == sum(min(length, NUM_POSITIONS) for length in lengths)
    assert checked(record, logits).error == 0.0


def test_a_record_survives_the_disk(tmp_path, record):
    assert read_parity_record(tmp_path, SPEC) is None
    write_parity_record(tmp_path, record)
    assert read_parity_record(tmp_path, SPEC) == record
    assert os.listdir(tmp_path) == [PARITY_FILE]
    remove_parity_record(tmp_path)
    remove_parity_record(tmp_path)
    assert read_parity_record(tmp_path, SPEC) is None


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_record_of_version_1_survives_the_disk(tmp_path, record, dtype):
    write_parity_record(tmp_path, old(record, dtype))
    content = json.loads((tmp_path / PARITY_FILE).read_text())
    assert content["version"] == 1 and content["dtype"] == dtype
    assert content.keys() == {"version", "base_fingerprint", "dtype", "rows", "positions"}
    assert read_parity_record(tmp_path, SPEC) == old(record, dtype)


def test_a_record_of_version_2_does_not_say_how_the_base_was_held(tmp_path, adapted, record):
    """It is read and held as ever; a refusal says it where that may be the cause."""
    for dtype, version in ((None, 2), ("bfloat16", 3), ("float32", 3)):
        write_parity_record(tmp_path, replace(record, base_dtype=dtype))
        assert json.loads((tmp_path / PARITY_FILE).read_text())["version"] == version
        read = read_parity_record(tmp_path, SPEC)
        assert read == replace(record, base_dtype=dtype)
        for exceeds in (False, True):
            shifted = noisy(logits_of(adapted), 0.5)
            with pytest.raises(ParityFailed) as refusal:
                gate(read, shifted, "float32", exceeds_bfloat16=exceeds)
            is_said = "serve it with dtype bfloat16" in refusal.value.message
            assert is_said == (dtype is None and exceeds)


@pytest.mark.parametrize("dtype", [7, None, "int8"])
def test_a_base_held_in_no_dtype_of_floats_is_refused(tmp_path, record, dtype):
    record = replace(record, base_dtype="bfloat16")
    edited(tmp_path, record, lambda content: content.update(base_dtype=dtype))
    with pytest.raises(AdapterRefused, match="base_dtype .*; known are"):
        read_parity_record(tmp_path, SPEC)


def test_a_record_holds_for_the_file_it_was_written_beside(tmp_path, adapted, record):
    """However well the numbers agree; what a record does not name may be any file."""
    logits = logits_of(adapted)
    for one, other in [(record, "b" * 64), (replace(record, tensors_sha256=None), None)]:
        write_parity_record(tmp_path, one)
        read = read_parity_record(tmp_path, SPEC)
        assert read == one and gate(read, logits, "float32", TENSORS).passed
        if other is not None:
            with pytest.raises(ParityFailed, match="were changed after") as refusal:
                gate(read, logits, "float32", other)
            assert refusal.value.field == PARITY_FILE


def test_a_record_of_another_base_is_a_mismatch(tmp_path, record):
    write_parity_record(tmp_path, record)
    with pytest.raises(BaseMismatch) as refusal:
        read_parity_record(tmp_path, replace(SPEC, fingerprint="e" * 64))
    assert refusal.value.field == PARITY_FILE


def edited(tmp_path, record, edit):
    write_parity_record(tmp_path, record)
    content = json.loads((tmp_path / PARITY_FILE).read_text())
    edit(content)
    (tmp_path / PARITY_FILE).write_text(json.dumps(content))


BAD_EDITS = {
    "no rows": lambda c: c.update(rows=[]),
    "rows of text": lambda c: c.update(rows=["ab"]),
    "too many rows": lambda c: c.update(rows=[*c["rows"], [1]]),
    "too many positions": lambda c: c.update(positions=[*c["positions"], c["positions"][0]]),
    "a long row": lambda c: c["rows"].__setitem__(0, [1] * (ROW_LENGTH + 1)),
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
    "a missing key": lambda c: c.pop("noise"),
    "negative noise": lambda c: c.update(noise=-0.1),
    "no noise": lambda c: c.update(noise=None),
    "a number for a digest": lambda c: c.update(tensors_sha256=7),
    "a key of version 1": lambda c: c.update(dtype="float32"),
    "another version": lambda c: c.update(version=3),
    "version 1 with keys of version 2": lambda c: c.update(version=1),
    "true as a version": lambda c: c.update(version=True),
    "a list as a version": lambda c: c.update(version=[2]),
}


@pytest.mark.parametrize("edit", BAD_EDITS.values(), ids=BAD_EDITS)
def test_a_broken_record_is_refused_by_name(tmp_path, record, edit):
    edited(tmp_path, record, edit)
    with pytest.raises(AdapterRefused) as refusal:
        read_parity_record(tmp_path, SPEC)
    assert refusal.value.field == PARITY_FILE


def paths_in(value, path=()):
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in items if isinstance(value, dict | list) else ():
        if isinstance(inner, dict | list):
            yield from paths_in(inner, (*path, key))
        else:
            yield (*path, key)


@settings(max_examples=60)
@given(data=st.data())
def test_any_other_content_is_refused_or_read_and_nothing_else(tmp_path_factory, record, data):
    folder = tmp_path_factory.mktemp("fuzz")
    write_parity_record(folder, record)
    content = json.loads((folder / PARITY_FILE).read_text())
    path = data.draw(st.sampled_from([p for p in paths_in(content) if p]))
    junk = st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=3),
        st.lists(st.integers(), max_size=3), st.dictionaries(st.text(max_size=2), st.none()),
    )  # fmt: skip
    parent = content
    for key in path[:-1]:
        parent = parent[key]
    parent[path[-1]] = data.draw(junk)
    (folder / PARITY_FILE).write_text(json.dumps(content))
    try:
        read = read_parity_record(folder, SPEC)
    except AdapterRefused:
        return
    parity = checked(read, lambda rows, logits_at, _: torch.zeros(len(logits_at), VOCAB_SIZE))
    assert isinstance(parity.passed, bool)


def test_a_link_out_of_the_folder_or_a_large_file_is_not_read(tmp_path, record, monkeypatch):
    outside, tmp_path = tmp_path / "real.json", tmp_path / "adapter"
    tmp_path.mkdir()
    write_parity_record(tmp_path, record)
    (tmp_path / PARITY_FILE).rename(outside)
    (tmp_path / PARITY_FILE).symlink_to(outside)
    with pytest.raises(AdapterSourceRefused, match=PARITY_FILE):
        read_parity_record(tmp_path, SPEC)
    (tmp_path / PARITY_FILE).unlink()
    write_parity_record(tmp_path, record)
    monkeypatch.setattr(parity_record, "MAX_PARITY_BYTES", 100)
    with pytest.raises(AdapterRefused, match="at most 100"):
        read_parity_record(tmp_path, SPEC)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_record_of_other_base_logits_is_refused(adapted, dtype):
    """Shifted by so much that the adapter's own effect would drown in the error's denominator."""
    logits = logits_of(adapted)
    record = recorded(logits)
    shifted = [
        replace(
            place,
            base=tuple(number + 1e6 for number in place.base),
            adapter=tuple(number + 1e6 for number in place.adapter),
        )
        for place in record.positions
    ]
    parity = checked(replace(record, positions=tuple(shifted)), logits, dtype)
    assert parity.base_error > parity.base_limit and not parity.passed

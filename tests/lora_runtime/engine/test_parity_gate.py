"""Every variant of PEFT through the gate, and converted: what is recorded is PEFT's own."""

from __future__ import annotations

import copy
import dataclasses

import peft
import pytest
import torch

from lora_runtime.adapters.convert import plain_files
from lora_runtime.adapters.files.folder import read_adapter
from lora_runtime.adapters.packed_adapter import pack_for
from lora_runtime.adapters.parity import NUM_POSITIONS, ROW_LENGTH, gate, measure
from lora_runtime.adapters.reduction import load_adapter
from lora_runtime.engine.probe import adapter_logits
from lora_runtime.errors import AdapterRefused, ParityFailed
from tests.tiny import VOCAB_SIZE, dense_twin, tiny_base, tiny_checkpoint
from tests.variants import variant_names, write_variants

SHAPE = "llama-bias"
NOT_PLAIN = {"alora": "alora_invocation_tokens", "replication": "layer_replication"}
"""Start of a variant's name → the field for which it cannot be converted; else DoRA."""


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_base(SHAPE, folder=tiny_checkpoint(tmp_path_factory.mktemp("base"), SHAPE))


@pytest.fixture(params=variant_names(has_bias=True))
def variant(request, base, tmp_path):
    (written,) = write_variants(base, SHAPE, tmp_path, [request.param])
    return written


def rows_for(form):
    """Rows in which an activated adapter is invoked before what is recorded."""
    generator = torch.Generator().manual_seed(9)
    rows = []
    for _ in range(2):
        tokens = torch.randint(20, VOCAB_SIZE, (ROW_LENGTH,), generator=generator).tolist()
        end = ROW_LENGTH - NUM_POSITIONS
        tokens[end - len(form.facts.invocation_tokens) : end] = form.facts.invocation_tokens
        rows.append(tuple(tokens))
    return rows


def recorded_by_peft(base, variant, form):
    """The record record, of which PEFT gives the numbers."""
    twin = dense_twin(base, SHAPE)

    @torch.no_grad()
    def last(row, with_adapter):
        start = max(1, len(row) - NUM_POSITIONS + 1)
        if not with_adapter:
            return twin(torch.tensor([row])).logits[0, start - 1 :]
        return variant.expected(list(row[:start]), [*row[start:], 0], torch.float32)

    def logits(rows, logits_at, with_adapter):
        found = torch.cat([last(row, with_adapter) for row in rows])
        assert len(found) == len(logits_at)
        return found

    return measure(rows_for(form), logits, logits, fingerprint="")


def served_logits(base, form):
    return adapter_logits(base, pack_for(base, form))


def without_one_part(form):
    """The form with one module left out: a server that loses a part of an adapter."""
    lost = sorted(form.modules)[len(form.modules) // 2]
    kept = {key: module for key, module in form.modules.items() if key != lost}
    return dataclasses.replace(form, modules=kept)


def test_what_peft_recorded_is_served(base, variant):
    form = load_adapter(variant.folder, base.spec, base.weights)
    record = recorded_by_peft(base, variant, form)
    parity = gate(record, served_logits(base, form), "float32")
    assert parity.error < 1e-4 and parity.effect_rms > 0.3
    with pytest.raises(ParityFailed):
        gate(record, served_logits(base, without_one_part(form)), "float32")


def test_what_is_converted_does_the_same_in_peft(base, variant, tmp_path):
    form = load_adapter(variant.folder, base.spec, base.weights)
    metadata = read_adapter(variant.folder).metadata
    try:
        files = plain_files(form, base.spec, base.weights, metadata)
    except AdapterRefused as refusal:
        prefix = variant.name.split("-")[0]
        is_dora = "dora" in variant.name
        assert refusal.field == ("use_dora" if is_dora else NOT_PLAIN[prefix])
        return
    assert not variant.name.startswith(("dora", *NOT_PLAIN))
    files.write(tmp_path / "plain")
    plain = peft.PeftModel.from_pretrained(
        copy.deepcopy(dense_twin(base, SHAPE)), tmp_path / "plain"
    )
    row = [5, 17, 2, 250, 33, 9, 120]
    with torch.no_grad():
        found = plain(torch.tensor([row])).logits[0]
    assert (found - variant.expected(row[:1], [*row[1:], 0], torch.float32)).abs().max() < 1e-4

"""`loramux merge`: the checkpoint that transformers loads says what the adapter says."""

from __future__ import annotations

import json
import re

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from loramux.server.cli import app
from tests.peft_adapters import load_in_peft, write_adapter
from tests.tiny import dense_twin, tiny_base, tiny_checkpoint, tiny_model
from tests.tiny_tokenizer import write_tokenizer

IDS = torch.tensor([[5, 17, 2, 250, 33, 9, 120]])


@pytest.fixture
def merge(monkeypatch, tmp_path):
    """Runs the command on a tiny base in `tmp_path/base`."""
    write_tokenizer(tiny_checkpoint(tmp_path / "base"))
    monkeypatch.setenv("LORAMUX_BASE", str(tmp_path / "base"))
    return lambda *arguments: CliRunner().invoke(app, ["merge", *map(str, arguments)])


@torch.no_grad()
def test_a_merged_folder_is_a_whole_model_with_tokenizer_and_template(merge, tmp_path):
    folder = write_adapter(tiny_model("llama"), tmp_path / "a", seed=1, use_dora=True)
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}!")
    result = merge(folder, tmp_path / "out")
    assert result.exit_code == 0, result.output
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    expected = load_in_peft(dense_twin(tiny_base("llama"), "llama"), folder)
    assert model.dtype == torch.float32
    assert float((model(IDS).logits - expected(IDS).logits).abs().max()) <= 2e-4
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    chat = [{"role": "user", "content": "hi"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == "hi!"
    found = re.search(r"lost to rounding: (\S+) of the adapter", result.stdout)
    assert float(found[1]) < 1e-6


def test_sixteen_bits_are_written_and_their_loss_is_shown(merge, tmp_path):
    folder = write_adapter(tiny_model("llama"), tmp_path / "a", seed=1, scale=0.02)
    result = merge(folder, tmp_path / "out", "--dtype", "bfloat16")
    found = re.search(r"to rounding: (\S+) of .* at worst (\S+), (model\.\S+)", result.stdout)
    assert 0.001 < float(found[1]) <= float(found[2])
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


def test_what_has_no_weight_is_refused_with_the_reason(merge, tmp_path):
    folder = write_adapter(
        tiny_model("llama"), tmp_path / "a", seed=1, layer_replication=[[0, 2], [1, 3]]
    )
    result = merge(folder, tmp_path / "out")
    assert result.exit_code == 1 and "layer_replication cannot be merged" in result.stderr
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["a", "base"]


def test_a_folder_that_exists_is_not_written_over(merge, tmp_path):
    folder = write_adapter(tiny_model("llama"), tmp_path / "a", seed=1)
    result = merge(folder, tmp_path / "base")
    assert result.exit_code == 1 and "exists already" in result.stderr

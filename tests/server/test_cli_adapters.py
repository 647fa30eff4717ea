"""`loramux adapters verify` and `convert` on folders that PEFT and our trainer wrote."""

from __future__ import annotations

import copy
import json
import re

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from lora_runtime.adapters.files.folder import CONFIG_FILE
from lora_runtime.adapters.parity import PARITY_FILE
from lora_runtime.base import loader
from lora_runtime.training.config import UnitConfig
from loramux.server.cli import app
from tests.lora_runtime.training.tiny_runs import make_tokenizer, ragged_data, run
from tests.peft_adapters import write_adapter
from tests.tiny import dense_twin, tiny_base, tiny_checkpoint, tiny_model
from tests.tiny_tokenizer import write_tokenizer


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """The base's folder, and an adapter that our trainer made on it."""
    folder = tmp_path_factory.mktemp("base")
    write_tokenizer(tiny_checkpoint(folder))
    return folder


@pytest.fixture(scope="module")
def trained(served, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    unit = UnitConfig(
        name="u", data=ragged_data(folder / "d", 4), rank=4, max_steps=6, learning_rate=2e-2
    )
    (result,) = run(tiny_base("llama"), make_tokenizer(folder), folder / "out", [unit])
    return result.folder


@pytest.fixture
def invoke(monkeypatch, served):
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("LORAMUX_BASE", str(served))
    monkeypatch.setenv("LORAMUX_DTYPE", "float32")

    def call(*arguments):
        return CliRunner().invoke(app, ["adapters", *map(str, arguments)])

    return call


def rows(output):
    """First cell → the others, of every table in an output."""
    cells = [re.split(r"\s*│\s*", line.strip("│ ")) for line in output.splitlines() if "│" in line]
    return {first: rest for first, *rest in cells if first}


def edit_config(folder, **fields):
    path = folder / CONFIG_FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def test_a_trained_adapter_is_verified_with_its_record(invoke, trained):
    result = invoke("verify", trained)
    assert result.exit_code == 0, result.output
    table = rows(result.stdout)
    assert table["lora_alpha"][1] == "honoured" and table["lora_dropout"][1] == "inert"
    assert table["q_proj"][:2] == ["3", "4"]
    assert table["variant"] == ["lora"] and table["base"][0].endswith("(nf4, float32)")
    found = re.search(r"parity: error (\S+) of an effect of (\S+) logits", result.stdout)
    assert float(found[1]) < 0.01 and float(found[2]) > 0.1


def test_an_adapter_of_peft_has_no_record(invoke, tmp_path):
    write_adapter(tiny_model("llama"), tmp_path / "a", seed=0, rank_pattern={"up_proj": 2})
    result = invoke("verify", tmp_path / "a")
    assert result.exit_code == 0 and "no parity record" in result.stdout
    table = rows(result.stdout)
    assert table["up_proj"][:2] == ["3", "2"] and table["down_proj"][:2] == ["3", "8"]


def test_damaged_weights_fail_the_gate(invoke, trained, tmp_path):
    write_adapter(tiny_model("llama"), tmp_path / "a", seed=0, scale=0.3)
    (tmp_path / "a" / PARITY_FILE).write_bytes((trained / PARITY_FILE).read_bytes())
    result = invoke("verify", tmp_path / "a")
    assert result.exit_code == 1
    assert re.search(rf"{PARITY_FILE}.*relative error .* at most 0\.01", result.stderr)


def test_all_refused_fields_are_listed(invoke, tmp_path):
    write_adapter(tiny_model("llama"), tmp_path / "a", seed=0)
    edit_config(tmp_path / "a", use_qalora=True, task_type="SEQ_CLS", new_field=3, r=8)
    for flags in ([], ["--config-only"]):
        result = invoke("verify", tmp_path / "a", *flags)
        assert result.exit_code == 1
        table = rows(result.stdout)
        for name in ("use_qalora", "task_type", "new_field"):
            assert table[name][1] == "refused"
        assert table["r"][1] == "honoured"
        assert re.fullmatch(r"error: .*(use_qalora|task_type|new_field).*\n", result.stderr)


def test_a_value_refused_for_this_base_is_named_in_the_table(invoke, tmp_path):
    write_adapter(tiny_model("llama"), tmp_path / "a", seed=0)
    edit_config(tmp_path / "a", target_modules=["nonesuch"])
    result = invoke("verify", tmp_path / "a")
    assert result.exit_code == 1 and "nonesuch" in result.stderr
    assert rows(result.stdout)["target_modules"][1] == "refused"
    alone = invoke("verify", tmp_path / "a", "--config-only")
    assert alone.exit_code == 0 and "as far as the config alone says" in alone.stdout


def test_wrong_tensors_are_refused_after_the_table(invoke, tmp_path):
    write_adapter(tiny_model("llama"), tmp_path / "a", seed=0)
    file = tmp_path / "a" / "adapter_model.safetensors"
    tensors = load_file(file)
    name = min(name for name in tensors if "lora_A" in name)
    save_file({**tensors, name: tensors[name][:, 1:].contiguous()}, file)
    result = invoke("verify", tmp_path / "a")
    assert result.exit_code == 1 and "lora_A" in result.stderr
    assert rows(result.stdout)["r"][1] == "honoured"


def test_a_rank_that_the_tensors_do_not_have_is_refused_in_the_table(invoke, tmp_path):
    write_adapter(tiny_model("llama"), tmp_path / "a", seed=0)
    edit_config(tmp_path / "a", r=4)
    result = invoke("verify", tmp_path / "a")
    assert result.exit_code == 1 and "r is 4" in result.stderr
    assert rows(result.stdout)["r"][1] == "refused"


def test_what_is_special_about_an_adapter_is_shown(invoke, tmp_path):
    options = dict(use_dora=True, layer_replication=[[0, 2], [1, 3]])
    write_adapter(tiny_model("llama"), tmp_path / "a", seed=0, **options)
    table = rows(invoke("verify", tmp_path / "a").stdout)
    assert table["q_proj"][:3] == ["4", "8", "gain"]
    assert table["layer map"] == ["4 layers: 0, 1, 1, 2"]
    options = dict(alora_invocation_tokens=[7, 8], use_rslora=True)
    write_adapter(tiny_model("llama"), tmp_path / "b", seed=0, **options)
    (tmp_path / "b" / "chat_template.jinja").write_text("{{ messages[0].content }}")
    table = rows(invoke("verify", tmp_path / "b").stdout)
    assert table["invocation tokens"] == ["7, 8"] and table["chat template"] == [
        "its own, 25 characters"
    ]


def test_an_adapter_larger_than_the_pool_would_not_be_served(invoke, tmp_path, monkeypatch):
    monkeypatch.setenv("LORAMUX_ADAPTER_POOL_BYTES", "1000")
    write_adapter(tiny_model("llama"), tmp_path / "a", seed=0)
    result = invoke("verify", tmp_path / "a")
    assert result.exit_code == 1 and "pool" in result.stderr


def test_a_missing_folder_is_one_line(invoke, tmp_path):
    result = invoke("verify", tmp_path / "nowhere")
    assert result.exit_code == 1 and "error: adapter folder 'nowhere'" in result.stderr
    (tmp_path / "empty").mkdir()
    assert CONFIG_FILE in invoke("verify", tmp_path / "empty").stderr


@torch.no_grad()
def logits(model):
    return model(torch.tensor([[4, 99, 250, 17]])).logits


def test_conversion_keeps_the_effect_in_peft_and_here(invoke, tmp_path):
    original, base = tiny_model("llama"), tiny_base("llama")
    write_adapter(original, tmp_path / "a", seed=0, init_lora_weights="pissa", lora_alpha=12)
    source = peft.PeftModel.from_pretrained(copy.deepcopy(original), tmp_path / "a")
    merged, expected = source.merge_and_unload(), dense_twin(base, "llama")
    with torch.no_grad():
        for path in base.spec.linears:
            change = merged.get_submodule(path).weight - original.get_submodule(path).weight
            expected.get_submodule(path).weight.add_(change)
    (tmp_path / "a" / "chat_template.jinja").write_text("{{ messages[0].content }}")
    result = invoke("convert", tmp_path / "a", tmp_path / "out")
    assert result.exit_code == 0, result.output
    twin = dense_twin(base, "llama")
    found = peft.PeftModel.from_pretrained(copy.deepcopy(twin), tmp_path / "out")
    assert (logits(found) - logits(expected)).abs().max() < 1e-4
    assert (logits(twin) - logits(expected)).abs().max() > 0.5
    shown = invoke("verify", tmp_path / "out")
    assert shown.exit_code == 0 and "its own, 25 characters" in shown.stdout


def test_a_converted_adapter_keeps_its_record_and_its_base(invoke, trained, tmp_path):
    assert invoke("convert", trained, tmp_path / "out").exit_code == 0
    shown = invoke("verify", tmp_path / "out")
    assert shown.exit_code == 0 and re.search(r"parity: error \S+ of .*passed", shown.stdout)
    other = invoke("verify", tmp_path / "out", "--quantization", "none")
    assert other.exit_code == 1 and "fingerprint" in other.stderr


def test_an_adapter_of_another_base_than_the_default_is_told_so(invoke, tmp_path, monkeypatch):
    write_adapter(tiny_model("qwen3"), tmp_path / "a", seed=0)
    monkeypatch.setattr(loader, "load_base", lambda *_, **__: tiny_base("llama"))
    for arguments in (["convert", tmp_path / "a", tmp_path / "out"], ["verify", tmp_path / "a"]):
        named = invoke(*arguments)
        assert named.exit_code == 1 and "default" not in named.stderr
        with monkeypatch.context() as context:
            context.delenv("LORAMUX_BASE")
            result = invoke(*arguments)
        said = "this base is the default one, smollm2-135m: --base names another"
        assert result.exit_code == 1 and said in result.stderr


def test_what_cannot_be_converted_is_refused_and_leaves_nothing(invoke, tmp_path):
    write_adapter(tiny_model("llama"), tmp_path / "a", seed=0, use_dora=True)
    result = invoke("convert", tmp_path / "a", tmp_path / "out")
    assert result.exit_code == 1 and "use_dora" in result.stderr
    assert not (tmp_path / "out").exists()
    write_adapter(tiny_model("llama"), tmp_path / "b", seed=0)
    taken = invoke("convert", tmp_path / "b", tmp_path / "a")
    assert taken.exit_code == 1 and "exists already" in taken.stderr


@pytest.mark.parametrize("command", ["verify", "convert"])
def test_commands_explain_themselves(invoke, command):
    result = invoke(command, "--help")
    options = re.findall(r"│ \*? *(--[\w-]+).*?(?:<.+?>|  )(.*)│", result.stdout)
    assert result.exit_code == 0 and options and all(text.strip() for _, text in options)

"""One order of settings in every command, and nothing of them that is ignored in silence."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from lora_runtime.config import BaseConfig
from lora_runtime.errors import ConfigError
from lora_runtime.training import trainer
from lora_runtime.training.config import TrainConfig
from loramux.server.cli import app, local
from loramux.server.cli.connection import FLAGS
from loramux.server.cli.settings import VARIABLES
from loramux.server.config import SETTINGS, check_environment, load_config

ROOT = typer.main.get_command(app)
GROUPS = {name: group for name, group in ROOT.commands.items() if hasattr(group, "commands")}
COMMANDS = {
    **{name: command for name, command in ROOT.commands.items() if name not in GROUPS},
    **{
        f"{group} {name}": each
        for group, found in GROUPS.items()
        for name, each in found.commands.items()
    },
}
ACTIONS = {"dry_run", "deploy", "deploy_name", "sample", "unit", "print_config", "help"}
ACTIONS |= set(FLAGS)  # of a connection, which are the same for every command


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch):
    for name in [name for name in os.environ if name.startswith("LORAMUX_")]:
        if name != "LORAMUX_CACHE":
            monkeypatch.delenv(name)


@pytest.fixture
def invoke():
    return lambda *arguments: CliRunner().invoke(app, list(map(str, arguments)))


@pytest.fixture(autouse=True)
def data_is_not_read(monkeypatch):
    """Flags are looked at here, of runs whose files do not exist."""
    monkeypatch.setattr("loramux.server.cli.train.check_data", lambda run: None)


@pytest.fixture
def runs(monkeypatch):
    asked = []
    monkeypatch.setattr(trainer, "train", lambda config, _: asked.append(config) or [])
    return asked


def flags_of(command):
    return [p for p in COMMANDS[command].params if p.param_type_name == "option"]


def test_a_variable_has_its_flags_name():
    for flag in flags_of("train"):
        if flag.name not in ACTIONS:
            assert flag.opts[0].removeprefix("--").replace("-", "_").upper() in VARIABLES
    settings = {flag.opts[0]: flag.name for flag in flags_of("serve")}
    for name in SETTINGS:
        assert settings[f"--{name.replace('_', '-')}"] == name


def test_train_takes_file_then_environment_then_flags(invoke, runs, monkeypatch, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(
        "output: out\nseed: 1\nbase: {model: f, quantization: fp4, dtype: float32}\n"
        "units: [{name: a, data: a, rank: 2, alpha: 2}, {name: b, data: b, learning_rate: 1}]\n"
    )
    monkeypatch.setenv("LORAMUX_RANK", "3")
    monkeypatch.setenv("LORAMUX_SEED", "3")
    monkeypatch.setenv("LORAMUX_BASE", "e")
    monkeypatch.setenv("LORAMUX_QUANTIZATION", "int8")
    monkeypatch.setenv("LORAMUX_TENSORBOARD", "true")
    result = invoke("train", file, "--base", "g", "--learning-rate", "0.5", "--seed", "4")
    assert result.exit_code == 0, result.output
    (run,) = runs
    assert run.base == BaseConfig(model="g", quantization="int8", dtype="float32")
    assert (run.output, run.seed, run.tensorboard) == (Path("out"), 4, True)
    assert [(u.name, u.rank, u.alpha, u.learning_rate) for u in run.units] == [
        ("a", 3, 2.0, 0.5), ("b", 3, 32.0, 0.5),
    ]  # fmt: skip
    result = invoke("train", "--unit", "name: c, rank: 8", "--unit", "name: d", "--data", "x",
                    "--output", "o", "--device", "cpu", "--no-dequantized-cache")  # fmt: skip
    assert result.exit_code == 0, result.output
    assert [(unit.name, unit.rank) for unit in runs[1].units] == [("c", 8), ("d", 3)]
    assert runs[1].base == BaseConfig(
        model="e", quantization="int8", device="cpu", dequantized_cache=False
    )


def test_a_runs_base_is_written_as_the_servers(tmp_path):
    file = tmp_path / "run.yaml"
    units = "output: out\nunits: [{name: a, data: a}]\n"
    file.write_text(f"{units}base: b\nquantization: none\ndevice: cpu\n")
    config = TrainConfig.from_yaml(file)
    assert config.base == BaseConfig(model="b", quantization="none", device="cpu")
    file.write_text(f"{units}dtype: float32\n")
    assert TrainConfig.from_yaml(file).base == BaseConfig(dtype="float32")
    file.write_text(f"{units}base: {{dtype: bfloat16}}\ndtype: float32\n")
    with pytest.raises(ConfigError, match="dtype and base.dtype are the same setting; remove one"):
        TrainConfig.from_yaml(file)


@pytest.mark.parametrize("command", ["doctor", "merge", "adapters verify", "adapters convert"])
def test_other_commands_take_the_servers_settings(invoke, monkeypatch, tmp_path, command):
    seen = []

    def load(path, settings):
        seen.append(settings.base)
        raise ConfigError("seen")

    monkeypatch.setattr(local, "load_on_base", load)
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2}')
    file = tmp_path / "serve.yaml"
    file.write_text(f"base: {tmp_path}/f\nquantization: fp4\ndevice: cpu\n")
    monkeypatch.setenv("LORAMUX_QUANTIZATION", "int8")
    arguments = {
        "doctor": [], "merge": [tmp_path, tmp_path / "out"], "adapters verify": [tmp_path],
        "adapters convert": [tmp_path, tmp_path / "out"],
    }[command]  # fmt: skip

    def chosen(*flags):
        seen.clear()
        result = invoke(*command.split(), *arguments, *flags)
        if command == "doctor":
            assert result.exit_code == 0, result.output
            words = result.stdout.split()
            return [w for w in words if w.startswith(str(tmp_path))][0].rstrip(":"), next(
                w for w in words if w in ("fp4", "int8", "nf4")
            )
        assert len(seen) == 1, result.output
        return seen[0].model, seen[0].quantization

    monkeypatch.setenv("COLUMNS", "300")
    assert chosen("--config", file) == (f"{tmp_path}/f", "int8")
    monkeypatch.setenv("LORAMUX_BASE", f"{tmp_path}/e")
    assert chosen("--config", file, "--quantization", "nf4") == (f"{tmp_path}/e", "nf4")
    monkeypatch.setenv("LORAMUX_CONFIG", str(file))
    monkeypatch.delenv("LORAMUX_BASE")
    assert chosen("--base", f"{tmp_path}/g") == (f"{tmp_path}/g", "int8")
    assert chosen() == (f"{tmp_path}/f", "int8")


REQUIRED = {
    "generate": ["hi"], "merge": ["a", "b"], "adapters load": ["a", "b"],
    "adapters upload": ["a", "b"], "adapters rollback": ["a"], 
    "adapters delete": ["a"], "adapters stored": [], "adapters unload": ["a"],
    "keys new": ["--file", "f", "--tenant", "t", "--adapter", "*"],
    "keys list": ["--file", "f"], "keys revoke": ["k", "--file", "f"],
    "adapters show": ["a"], "adapters verify": ["a"], "adapters convert": ["a", "b"],
    "train": ["--data", "d", "--output", "o"],
}  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
def test_an_unknown_variable_is_an_error_in_every_command(invoke, runs, monkeypatch, command):
    monkeypatch.setenv("LORAMUX_QUANTISATION", "int8")
    result = invoke(*command.split(), *REQUIRED.get(command, ()))
    assert result.exit_code == 1 and runs == []
    assert "LORAMUX_QUANTISATION is set in the environment and is no setting" in result.stderr
    assert "did you mean LORAMUX_QUANTIZATION?" in result.stderr
    assert invoke(*command.split(), "--help").exit_code == 0


@pytest.mark.parametrize("command", COMMANDS)
def test_an_empty_variable_is_an_error_in_every_command(invoke, runs, monkeypatch, command):
    for name in ("BASE", "RANK", "RESUME", "MAX_NUM_SEQS", "ADAPTER", "ADDRESS", "CONFIG"):
        with monkeypatch.context() as patch:
            patch.setenv(f"LORAMUX_{name}", "")
            result = invoke(*command.split(), *REQUIRED.get(command, ()))
        assert result.exit_code == 1 and runs == [], (name, result.output)
        assert f"LORAMUX_{name} is set in the environment and empty" in result.stderr


def test_no_variable_may_be_empty(monkeypatch):
    of_flags = {f"LORAMUX_{name}" for name in VARIABLES}
    of_settings = {f"LORAMUX_{name.upper()}" for name in SETTINGS}
    for variable in of_flags | of_settings | {"LORAMUX_CACHE"}:
        with monkeypatch.context() as patch:
            patch.setenv(variable, "")
            with pytest.raises(ConfigError, match=f"{variable} is .* empty; .* unset it"):
                check_environment(VARIABLES)


def test_what_kubernetes_sets_for_a_service_is_no_mistake(monkeypatch):
    for name in [
        "SERVICE_HOST", "SERVICE_PORT", "SERVICE_PORT_GRPC", "PORT", "PORT_50051_TCP",
        "PORT_50051_TCP_PROTO", "PORT_50051_TCP_ADDR", "METRICS_SERVICE_HOST",
        "METRICS_PORT_8080_TCP_PORT",
    ]:  # fmt: skip
        monkeypatch.setenv(f"LORAMUX_{name}", "tcp://10.0.0.1:50051")
    check_environment()
    monkeypatch.setenv("LORAMUX_PORTS", "1")
    with pytest.raises(ConfigError, match="LORAMUX_PORTS is set"):
        check_environment()


@pytest.mark.parametrize("command", COMMANDS)
def test_a_flag_with_one_value_given_twice_is_refused(invoke, runs, command):
    """Of `--data a --data b` the last would win."""
    for flag in flags_of(command):
        if flag.multiple or flag.name == "help":
            continue
        once = [flag.opts[0]] if flag.is_flag else [flag.opts[0], "1"]
        result = invoke(*command.split(), *REQUIRED.get(command, ()), *once, *once)
        assert result.exit_code == 2 and runs == [], (flag.name, result.output)
        words = " ".join(result.stderr.replace("│", " ").split())
        assert "holds one value; give it once" in words, flag.name


@pytest.mark.parametrize(
    "flags", [["--column", "prompt=a", "--column", "prompt=b"],
              ["--sweep", "rank=1,2", "--sweep", "rank=4,8"]],
)  # fmt: skip
def test_a_key_given_twice_is_refused(invoke, runs, flags):
    result = invoke("train", "--data", "d", "--output", "o", *flags)
    assert result.exit_code == 2 and "twice" in result.stderr and runs == []


def test_a_key_that_stands_twice_in_a_file_is_refused(invoke, runs, tmp_path):
    file = tmp_path / "file.yaml"
    for text, key in [
        ("output: a\noutput: b\nunits: [{name: a, data: a}]\n", "output"),
        ("output: a\nunits: [{name: a, data: a, data: b}]\n", "data"),
    ]:
        file.write_text(text)
        result = invoke("train", file)
        assert result.exit_code == 1 and f"the key '{key}' stands twice" in result.stderr
    result = invoke("train", "--data", "d", "--output", "o", "--unit", "name: a, name: b")
    assert result.exit_code == 1 and "the key 'name' stands twice" in result.stderr
    file.write_text("base: a\nbase: b\n")
    with pytest.raises(ConfigError, match="the key 'base' stands twice"):
        load_config(file)
    assert runs == []


def test_yaml_may_still_merge_and_override(tmp_path):
    file = tmp_path / "file.yaml"
    file.write_text(
        "output: o\nunits:\n- &x {name: a, data: a, rank: 3}\n- {<<: *x, name: b, rank: 4}\n"
    )
    assert [unit.rank for unit in TrainConfig.from_yaml(file).units] == [3, 4]


def test_the_ecosystems_names_are_flags_and_variables(invoke, runs, monkeypatch):
    flags = ("train", "--data", "d", "--output-dir", "o")
    result = invoke(*flags, "--r", "4", "--lr=1e-3", "--gradient-checkpointing")
    assert result.exit_code == 0, result.output
    unit = runs[0].units[0]
    assert (unit.rank, unit.learning_rate, runs[0].activation_checkpointing) == (4, 1e-3, True)
    assert invoke(*flags, "--r", "4", "--rank", "4").exit_code == 2
    monkeypatch.setenv("LORAMUX_LR", "1e-4")
    monkeypatch.setenv("LORAMUX_COLUMN", "prompt=a completion=b")
    result = invoke(*flags, "--target-modules", "q_proj,v_proj", "--layers-to-transform", "0,2")
    assert result.exit_code == 0, result.output
    unit = runs[1].units[0]
    assert (unit.learning_rate, unit.columns) == (1e-4, {"prompt": "a", "completion": "b"})
    assert (unit.target_modules, unit.layers_to_transform) == (("q_proj", "v_proj"), (0, 2))
    assert invoke(*flags, "--target-modules", "all-linear").exit_code == 0
    assert runs[2].units[0].target_modules == "all-linear"
    monkeypatch.setenv("LORAMUX_LEARNING_RATE", "1e-4")
    result = invoke(*flags)
    assert result.exit_code == 1 and "are the same setting" in result.stderr


@pytest.mark.parametrize("flags", [["--warmup-ratio", "5"], ["--warmup-ratio=1"], []])
def test_a_name_that_means_less_is_held_to_it(invoke, runs, monkeypatch, flags):
    if not flags:
        monkeypatch.setenv("LORAMUX_WARMUP_RATIO", "5")
    found = invoke("train", "--data", "x", "--output", "y", *flags)
    assert found.exit_code == 1 and not runs
    assert "must be below 1" in found.stderr and "ratio" in found.stderr
    monkeypatch.delenv("LORAMUX_WARMUP_RATIO", raising=False)
    invoke("train", "--data", "x", "--output", "y", "--warmup-ratio", "0.5")
    assert runs[0].units[0].warmup == 0.5


@pytest.mark.parametrize(
    "command",
    [["train", "--data", "x", "--output", ""], ["train", "--data", "", "--output", "y"],
     ["serve", "--print-config", "--adapter-store", ""],
     ["serve", "--print-config", "--adapter-roots", ""]],
)  # fmt: skip
def test_an_empty_path_is_refused(invoke, runs, command):
    found = invoke(*command)
    assert found.exit_code == 1 and not runs and "it must be a path" in found.stderr

"""The command line against a real server process with a real, tiny base."""

from __future__ import annotations

import io
import json
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lora_runtime import kernels
from lora_runtime.kernels import gpu_needs
from lora_runtime.kernels.gpu_needs import Need
from lora_runtime.terminal import Terminal
from lora_runtime.training import checkpoint, dry_run, trainer
from lora_runtime.training.held_out import EvalRecord
from lora_runtime.training.report import UnitResult
from lora_runtime.training.units import UnitStatus
from loramux.server.cli import app
from loramux.server.cli.settings import TRAIN_SETTINGS
from loramux.server.cli.tables import show_table
from loramux.server.config import SETTINGS
from tests.families import tiny_family
from tests.peft_adapters import write_adapter
from tests.tiny import tiny_base, tiny_checkpoint, tiny_model
from tests.tiny_tokenizer import write_tokenizer

REPO = Path(__file__).parents[2]
SECRET = "the captain keeps a parrot"


@dataclass
class Server:
    """A server process: where it listens, and what it has logged."""

    process: subprocess.Popen
    log: Path
    ready: dict

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.ready['grpc_port']}"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    write_tokenizer(tiny_checkpoint(folder / "base"))
    write_adapter(tiny_model("llama"), folder / "adapters" / "parrot", seed=0, r=4)
    shutil.copytree(folder / "adapters" / "parrot", folder / "adapters" / "mute")
    (folder / "adapters" / "mute" / "chat_template.jinja").write_text("{% for m in messages %}")
    settings = folder / "serve.yaml"
    settings.write_text(
        f"base: {folder / 'base'}\nadapter_roots: [{folder / 'adapters'}]\ndtype: float32\n"
        f"adapter_store: {folder / 'store'}\n"
        "grpc_address: 127.0.0.1:0\nhttp_address: 127.0.0.1:0\nlog_format: json\n"
        "max_num_batched_tokens: 64\nkv_bytes: 4000000\nadapter_pool_bytes: 4000000\n"
    )
    log = folder / "log"
    command = [sys.executable, "-m", "loramux", "--config", str(settings), "--log-level", "debug"]
    with log.open("w") as stream:
        process = subprocess.Popen(command, cwd=REPO, stderr=stream, stdout=stream)
    try:
        yield Server(process, log, wait_until_ready(process, log))
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0, log.read_text()
        assert events(log)[-1]["event"] == "stopped"
        for line in log.read_text().splitlines():
            assert line.startswith("{"), "nothing that was imported writes there too"
    finally:
        process.kill()
        process.wait()


def events(log: Path) -> list[dict]:
    return [json.loads(line) for line in log.read_text().splitlines() if line.startswith("{")]


def wait_until_ready(process: subprocess.Popen, log: Path) -> dict:
    for _ in range(900):
        for event in events(log):
            if event["event"] == "ready":
                return event
        assert process.poll() is None, log.read_text()
        time.sleep(0.1)
    raise AssertionError(log.read_text())


@pytest.fixture
def invoke(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")

    def call(*arguments: str, **options):
        return CliRunner().invoke(app, list(arguments), **options)

    return call


@pytest.fixture
def ask(server, invoke, monkeypatch):
    """Run a command that talks to the server."""
    monkeypatch.setenv("LORAMUX_ADDRESS", server.address)
    return invoke


def test_an_adapter_comes_serves_and_goes(ask):
    loaded = ask("adapters", "load", "polly", "parrot")
    assert loaded.exit_code == 0, loaded.output
    assert "already" in ask("adapters", "load", "polly", "parrot").stdout
    listed = ask("adapters", "list").stdout
    assert re.search(r"polly.*loaded.*lora.*4", listed)
    shown = ask("adapters", "show", "polly").stdout
    assert re.search(r"digest +│ [0-9a-f]{64}", shown) and "lora_alpha" in shown
    assert re.search(r"layers +│ the base's", shown)
    sampling = ("--max-tokens", "16", "--temperature", "0", "--ignore-eos")
    with_adapter = ask("generate", SECRET, "--adapter", "polly", *sampling)
    without = ask("generate", SECRET, *sampling)
    assert with_adapter.exit_code == without.exit_code == 0
    assert with_adapter.stdout != without.stdout
    assert ask("generate", SECRET, "--adapter", "polly=0", *sampling).stdout == without.stdout
    ask("adapters", "load", "molly", "parrot")
    shared = ("--adapter", "polly=1.5", "--adapter", "molly=-0.5")
    assert ask("generate", SECRET, *shared, *sampling).stdout == with_adapter.stdout
    ask("adapters", "unload", "molly")
    assert ask("adapters", "unload", "polly", "--wait").exit_code == 0
    gone = ask("generate", SECRET, "--adapter", "polly", *sampling)
    assert gone.exit_code == 1 and "polly" in gone.stderr and gone.stdout == ""
    assert "polly" not in ask("adapters", "list").stdout


def test_a_broken_template_of_an_adapter_is_shown_and_refused_for_chats_only(ask):
    assert ask("adapters", "load", "mute", "mute").exit_code == 0
    shown = ask("adapters", "show", "mute").stdout
    assert re.search(r"chat template +│ its own", shown) and re.search(r"note +│ .*trial", shown)
    chat = ask("generate", "Ahoy", "--adapter", "mute")
    assert chat.exit_code == 1 and "the adapter's chat template" in chat.stderr
    assert ask("generate", "Ahoy", "--text", "--adapter", "mute").exit_code == 0
    ask("adapters", "unload", "mute")


def test_text_goes_to_stdout_and_counts_to_stderr(ask):
    result = ask("generate", SECRET, "--text", "--max-tokens", "3", "--ignore-eos", "--seed", "1")
    assert result.exit_code == 0
    assert re.fullmatch(r"\d+ prompt \+ 3 output tokens, length\n", result.stderr)
    piped = ask("generate", "-", "--text", "--max-tokens", "3", "--ignore-eos", "--seed", "1",
                input=SECRET)  # fmt: skip
    assert piped.stdout == result.stdout


def test_several_answers_penalties_and_the_prompts_log_probabilities(ask):
    flags = ("--text", "--max-tokens", "3", "--ignore-eos", "--seed", "1")
    one = ask("generate", SECRET, *flags)
    result = ask("generate", SECRET, *flags, "--n", "3", "--prompt-logprobs", "1")
    assert result.exit_code == 0 and result.stdout.startswith(one.stdout)
    summary = r"^\d+ prompt(?: \(16 cached\))? \+ 3 output tokens, length$"
    assert len(re.findall(summary, result.stderr, re.M)) == 3
    num_prompt = int(one.stderr.split()[0])
    assert len(re.findall(r"^prompt token \d+: -.*", result.stderr, re.M)) == num_prompt - 1
    penalties = ("--presence-penalty", "2", "--frequency-penalty", "2", "--repetition-penalty", "2")
    assert ask("generate", SECRET, *flags, *penalties, "--logit-bias", "5=-100").exit_code == 0
    refused = ask("generate", SECRET, "--logit-bias", "5=200")
    assert refused.exit_code == 1 and "sampling.logit_bias" in refused.stderr


@pytest.mark.parametrize("given", ["5", "x=1", "5=much", "="])
def test_a_bias_that_cannot_be_read_is_a_usage_error(invoke, given):
    result = invoke("generate", "Ahoy", "--logit-bias", given)
    assert result.exit_code == 2 and "--logit-bias" in result.stderr


def test_an_answer_keeps_to_its_form(ask, tmp_path):
    schema = tmp_path / "schema.json"
    schema.write_text('{"type": "array", "items": {"const": 1}, "maxItems": 2}')
    flags = ("--text", "--seed", "1", "--max-tokens", "60")
    shown = ask("generate", SECRET, *flags, "--json-schema", str(schema)).stdout
    assert set(json.loads(shown)) <= {1}
    shown = ask("generate", SECRET, *flags, "--choice", "aye", "--choice", "nay").stdout
    assert shown.strip() in ("aye", "nay")
    shown = ask("generate", SECRET, *flags, "--regex", "[a-c]{2}-").stdout
    assert re.fullmatch("[a-c]{2}-", shown.strip())
    grammar = tmp_path / "sums.lark"
    grammar.write_text('start: NUMBER "+" NUMBER "="\nNUMBER: /[1-3]{1,2}/')
    shown = ask("generate", SECRET, *flags, "--grammar", str(grammar)).stdout
    assert re.fullmatch(r"[1-3]{1,2}\+[1-3]{1,2}=", shown.strip())
    both = ask("generate", SECRET, "--regex", "a", "--choice", "a")
    assert both.exit_code == 2 and "--json-schema" in both.stderr
    for flag in ("--json-schema", "--grammar"):
        missing = ask("generate", SECRET, flag, str(tmp_path / "none.json"))
        assert missing.exit_code == 2 and "none.json" in missing.stderr and flag in missing.stderr


def test_chat_goes_through_the_template(ask):
    tokens = {
        mode: int(ask("generate", "Ahoy", mode, "--max-tokens", "1").stderr.split()[0])
        for mode in ("--chat", "--text")
    }
    assert tokens["--chat"] > tokens["--text"]


@pytest.mark.parametrize("given", [["a=much"], ["a="], ["a", "a=0.5"]])
def test_a_weight_that_cannot_be_read_is_a_usage_error(invoke, given):
    result = invoke("generate", "Ahoy", *(part for text in given for part in ("--adapter", text)))
    assert result.exit_code == 2 and "--adapter" in result.stderr


def test_a_refused_value_is_one_line_that_names_its_field(ask):
    result = ask("generate", "Ahoy", "--temperature", "-1")
    assert result.exit_code == 1
    assert re.fullmatch(r"error: .*sampling\.temperature.*\n", result.stderr)


def test_prompts_are_not_logged(ask, server):
    ask("generate", SECRET, "--max-tokens", "2")
    ask("generate", SECRET, "--adapter", "nobody")
    log = server.log.read_text()
    assert not any(word in log for word in set(SECRET.split()) - {"the", "a", "parrot"})
    assert SECRET not in log


def test_no_server_is_one_line_that_names_the_address(invoke):
    result = invoke("adapters", "list", "--address", "127.0.0.1:1")
    assert result.exit_code == 1
    assert result.stderr.startswith(
        "error: no server at 127.0.0.1:1 (is it running, and has it loaded its base? `loramux"
    )
    assert result.stderr.count("\n") == 1 and "Traceback" not in result.output


@pytest.mark.parametrize(
    "command",
    ["", "serve", "generate", "adapters", "adapters load", "adapters unload", "adapters list",
     "adapters show", "adapters upload", "adapters rollback", "adapters stored",
     "adapters delete", "train", "merge", "doctor"],
)  # fmt: skip
def test_every_command_and_option_explains_itself(invoke, command):
    result = invoke(*command.split(), "--help")
    assert result.exit_code == 0
    options = re.findall(r"│ \*? *(--[\w-]+).*?(?:<.+?>)(.*)│", result.stdout)
    assert options and all(text.strip() for _, text in options)


def test_every_setting_is_a_flag_of_serve(invoke):
    page = invoke("serve", "--help").stdout
    for name in SETTINGS:
        assert f"--{name.replace('_', '-').replace('roots', 'root')}" in page


def test_settings_can_be_shown_and_are_checked(invoke):
    shown = invoke("serve", "--print-config", "--block-size", "8")
    assert "block_size: 8\n" in shown.stdout
    assert "max_num_seqs: 64\nmax_num_batched_tokens: 512\n" in shown.stdout
    refused = invoke("serve", "--block-size", "0")
    assert refused.exit_code == 1 and refused.stderr.startswith("error: block_size")
    assert invoke("serve", "--block-size", "x").exit_code == 2


def test_doctor_names_what_is_here(invoke):
    result = invoke("doctor", "--base", "someone/model")
    assert result.exit_code == 0
    for what in ("torch", "transformers", "device", "kernel backend", "memory", "will fetch"):
        assert what in result.stdout


@pytest.mark.parametrize("base", ["/does/not/exist", "./nope", "smollm3"])
def test_doctor_promises_no_base_that_serve_refuses(invoke, base):
    shown = " ".join(invoke("doctor", "--base", base).stdout.replace("│", " ").split())
    assert f"base '{base}' is no folder" in shown and "will fetch" not in shown


def shown_by_doctor(invoke, *flags) -> str:
    result = invoke("doctor", "--dtype", "float32", "--device", "cpu", *flags)
    assert result.exit_code == 0
    return " ".join(result.stdout.replace("│", " ").split())


@pytest.mark.parametrize(("backend", "is_missing"), [("torch", True), ("cpu-avx2", False)])
def test_doctor_says_that_the_compiled_library_is_missing(invoke, monkeypatch, backend, is_missing):
    monkeypatch.setattr(kernels, "BACKEND", backend)
    shown = shown_by_doctor(invoke, "--base", "someone/model")
    assert f"kernel backend {backend}" in shown
    assert ("the compiled library is missing" in shown) is is_missing


def test_doctor_says_whether_a_base_would_be_served_and_what_its_rows_take(invoke, tmp_path):
    folder = str(tiny_checkpoint(tmp_path, "qwen3.5"))
    state_bytes = f"{tiny_base('qwen3.5').spec.state_bytes:,}"
    shown = shown_by_doctor(invoke, "--base", folder)
    assert "served nothing in the config speaks against qwen3_5_text" in shown
    assert f"a row takes {state_bytes} bytes of recurrent state" in shown
    checked = shown_by_doctor(invoke, "--base", folder, "--check")
    assert "served yes: qwen3_5_text gave its own logits here" in checked
    kv_bytes = 2 * 4 * 2 * 32  # keys and values of two heads of the only layer that attends
    assert f"a token takes {kv_bytes:,} bytes" in checked
    assert f"a row takes {state_bytes} bytes" in checked


def test_doctor_says_what_serve_would_refuse(invoke, tmp_path):
    """One family by its config, another by a run alone."""
    tiny_family("gpt2").bfloat16().save_pretrained(tmp_path / "gpt2")
    assert "served no: gpt2" in shown_by_doctor(invoke, "--base", str(tmp_path / "gpt2"))
    other = str(tmp_path / "diffllama")
    tiny_family("diffllama").bfloat16().save_pretrained(other)
    assert "speaks against diffllama" in shown_by_doctor(invoke, "--base", other)
    checked = shown_by_doctor(invoke, "--base", other, "--check")
    assert "served no: diffllama cannot be served: layer 0" in checked


def test_doctor_says_that_a_quantization_cannot_hold_a_mixture(invoke, tmp_path):
    folder = str(tiny_checkpoint(tmp_path, "qwen3-moe"))
    for quantization, said in (("nf4-double", "served no: the experts of"), ("nf4", "served yes")):
        options = ("--base", folder, "--quantization", quantization)
        assert said in shown_by_doctor(invoke, *options, "--check")


def test_doctor_says_what_to_change(invoke, monkeypatch):
    needs = [Need(name="a", found="well"), Need(name="b", found="ill", advice="Mend it.")]
    monkeypatch.setattr(gpu_needs, "gpu_needs", lambda: iter(needs))
    lacking = invoke("doctor", "--base", "/does/not/exist")
    assert lacking.exit_code == 0 and lacking.stdout.endswith("\n- b: ill. Mend it.\n")
    needs.pop()
    assert invoke("doctor").stdout.endswith("\nA GPU can be used.\n")


@pytest.fixture(autouse=True)
def data_is_not_read(monkeypatch):
    """Flags are looked at here, of runs whose files do not exist."""
    monkeypatch.setattr("loramux.server.cli.train.check_data", lambda run: None)


@pytest.fixture
def runs(monkeypatch):
    """Training runs that were asked for; none is made."""
    asked = []

    def record(config, console):
        asked.append(config)
        return [
            UnitResult(
                name=unit.name,
                status=UnitStatus.FAILED if unit.name == "bad" else UnitStatus.DONE,
                error="loss is not finite" if unit.name == "bad" else None,
                folder=None if unit.name == "bad" else config.output / unit.name,
                data="",
                num_parameters=1,
                num_steps=1,
                records=(),
            )
            for unit in config.units
        ]

    monkeypatch.setattr(trainer, "train", record)
    return asked


def test_train_by_flags(invoke, runs, tmp_path):
    result = invoke("train", "--data", "d.jsonl", "--output", str(tmp_path), "--rank", "4",
                    "--variant", "rslora", "--optimizer", "adamw-8bit", "--base", "b",
                    "--seed", "7", "--name", "a")  # fmt: skip
    assert result.exit_code == 0, result.output
    (run,) = runs
    (unit,) = run.units
    assert (run.output, run.base.model, run.seed, run.resume) == (tmp_path, "b", 7, False)
    assert (unit.name, unit.rank, unit.variant, unit.data) == ("a", 4, "rslora", Path("d.jsonl"))
    assert unit.optimizer == "adamw-8bit"


def test_train_several_by_flags(invoke, runs, tmp_path):
    result = invoke("train", "--data", "d.jsonl", "--output", str(tmp_path), "--rank", "4",
                    "--unit", "name: a, variant: dora", "--unit",
                    "name: b, data: b.csv, rank: 8, target_modules: [q_proj, v_proj]")  # fmt: skip
    assert result.exit_code == 0, result.output
    one, other = runs[0].units
    assert (one.name, one.variant, one.rank, one.data) == ("a", "dora", 4, Path("d.jsonl"))
    assert (other.name, other.rank, other.data) == ("b", 8, Path("b.csv"))
    assert other.target_modules == ("q_proj", "v_proj")
    flags = ("train", "--output", "o", "--unit", "name: a, data: d")
    assert invoke(*flags).exit_code == 0
    assert invoke(*flags, "--unit", "name: b").exit_code == 2
    for text, named in [("name: b, data: d, rnk: 3", "did you mean 'rank'"), ("rank: {", "YAML")]:
        refused = invoke(*flags, "--unit", text)
        assert refused.exit_code == 1 and named in refused.stderr


def test_data_in_the_place_of_a_yaml_file_is_told_its_flag(invoke, runs):
    refused = invoke("train", "chats.jsonl", "--output", "o")
    assert refused.exit_code == 2 and "write --data chats.jsonl" in refused.stderr


def test_train_by_file(invoke, runs, monkeypatch, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("output: out\nunits: [{name: good, data: a}, {name: bad, data: b}]\n")
    (tmp_path / "out" / "checkpoints").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(checkpoint, "has_checkpoint", lambda folder: folder.is_dir())
    result = invoke("train", str(file), "--resume")
    assert result.exit_code == 1 and "loss is not finite" in result.stdout
    assert runs[0].resume and [unit.name for unit in runs[0].units] == ["good", "bad"]
    assert invoke("train", str(file), "--unit", "name: c, data: d").exit_code == 2
    assert invoke("train", "--data", "d.jsonl").exit_code == 2
    file.write_text("output: out\nunit: []\n")
    refused = invoke("train", str(file))
    assert refused.exit_code == 1 and "units" in refused.stderr


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], ["--help"]),
        (["--help"], ["--help"]),
        (["-h"], ["-h"]),
        (["--version"], ["--version"]),
        (["--base", "b"], ["serve", "--base", "b"]),
        (["train", "run.yaml"], ["train", "run.yaml"]),
    ],
)
def test_python_m_loramux_is_the_command_and_flags_alone_serve(monkeypatch, arguments, expected):
    """torchrun starts modules: `torchrun -m loramux train run.yaml`."""
    called = []
    monkeypatch.setattr("loramux.server.cli.main", called.append)
    monkeypatch.setattr(sys, "argv", ["loramux", *arguments])
    runpy.run_module("loramux", run_name="__main__")
    assert called == [expected]


def test_of_several_processes_one_has_results_to_show(invoke, monkeypatch, tmp_path):
    monkeypatch.setattr(trainer, "train", lambda config, console: [])
    result = invoke("train", "--data", "d", "--output", str(tmp_path))
    assert (result.exit_code, result.output) == (0, "")


def test_train_flags_of_the_data(invoke, runs, tmp_path):
    result = invoke("train", "--data", "d.csv", "--output", str(tmp_path), "--column",
                    "prompt=a=b", "--column", "completion=label", "--truncation", "start",
                    "--instructions", "alpaca", "--eval-fraction", "0.1",
                    "--max-tokens-per-batch", "4096")  # fmt: skip
    assert result.exit_code == 0, result.output
    (unit,) = runs[0].units
    assert unit.columns == {"prompt": "a=b", "completion": "label"}
    assert (unit.truncation, unit.instructions) == ("start", "alpaca")
    assert (unit.eval_fraction, unit.max_tokens_per_batch) == (0.1, 4096)
    flags = ("train", "--data", "d", "--output", "o")
    assert invoke(*flags, "--column", "prompt").exit_code == 2
    refused = invoke(*flags, "--column", "promt=a")
    assert refused.exit_code == 1 and "columns" in refused.stderr


def test_train_flags_of_the_run(invoke, runs, tmp_path):
    result = invoke("train", "--data", "d", "--eval-data", "e", "--output", str(tmp_path),
                    "--sweep", "learning_rate=1e-4,3e-4", "--sweep", "rank=4,8", "--patience", "3",
                    "--sweep", "variant=lora,rslora", "--eval-interval", "7", "--tensorboard",
                    "--activation-checkpointing")  # fmt: skip
    assert result.exit_code == 0, result.output
    (run,) = runs
    (unit,) = run.units
    assert unit.sweep == {
        "learning_rate": (1e-4, 3e-4), "rank": (4, 8), "variant": ("lora", "rslora"),
    }  # fmt: skip
    assert (unit.eval_data, unit.eval_interval, unit.patience) == (Path("e"), 7, 3)
    assert run.tensorboard and run.activation_checkpointing
    assert invoke("train", "--data", "d", "--output", "o", "--sweep", "rank").exit_code == 2


def test_train_shows_held_out_losses_and_who_was_stopped(invoke, monkeypatch, tmp_path):
    facts = dict(error=None, data="", num_parameters=1, num_steps=9, records=())
    best = EvalRecord(step=4, loss=1.23456, accuracy=None, seconds=0.1)
    results = [
        UnitResult(name="u-lr=1", status=UnitStatus.STOPPED, folder=None, note="behind u-lr=2",
                   sweep="u", **facts),
        UnitResult(name="u", status=UnitStatus.DONE, folder=tmp_path, best=best, **facts),
    ]  # fmt: skip
    monkeypatch.setattr(trainer, "train", lambda config, console: results)
    result = invoke("train", "--data", "d", "--output", str(tmp_path))
    assert result.exit_code == 0
    assert "behind u-lr=2" in result.stdout and "1.2346" in result.stdout


def test_dry_run_shows_estimates_and_trains_nothing(invoke, runs, monkeypatch, tmp_path):
    facts = dict(targets=("q_proj", "up_proj"), num_parameters=12345, num_steps=7, num_tokens=999,
                 weight_bytes=4000, gradient_bytes=5000, optimizer_bytes=8000,
                 activation_bytes=1_200_000, seconds=3725.0)  # fmt: skip
    one, two, both = (dry_run.Estimate(name=name, **facts) for name in ("one", "two", "one, two"))
    asked = []

    def measure(config, on_progress):
        asked.append(config)
        return dry_run.DryRun(units=(one, two), together=both, base_bytes=2_000_000, data=())

    monkeypatch.setattr(dry_run, "dry_run", measure)
    monkeypatch.setenv("COLUMNS", "200")
    file = tmp_path / "run.yaml"
    file.write_text(f"output: {tmp_path}/out\nunits: [{{name: one, data: a}}]\n")
    result = invoke("train", str(file), "--dry-run")
    assert result.exit_code == 0, result.output
    assert runs == [] and len(asked) == 1 and not (tmp_path / "out").exists()
    for text in ("12,345", "q_proj up_proj", "1.2 MB", "8.0 kB", "1:02:05", "all at once"):
        assert text in result.stdout
    assert "the whole run 3.2 MB" in result.stdout


def test_resume_may_stay_in_a_job(invoke, runs, tmp_path):
    flags = ("train", "--data", "d", "--name", "a", "--output", str(tmp_path), "--resume")
    assert invoke(*flags).exit_code == 0
    assert [run.resume for run in runs] == [False]
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "adapter_config.json").write_text("{}")
    done = invoke(*flags)
    assert done.exit_code == 0 and "nothing to resume" in done.stdout and len(runs) == 1
    unsent = invoke(*flags, "--deploy", "127.0.0.1:1")
    assert unsent.exit_code == 0 and f"upload NAME {tmp_path}/NAME" in "".join(
        unsent.stdout.splitlines()
    )


@pytest.mark.parametrize(
    ("number", "expected"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_a_run_that_a_signal_stopped_says_so(invoke, runs, monkeypatch, tmp_path, number, expected):
    record = trainer.train

    def stopped(config, console):
        with trainer.stop_on_signals() as should_stop:
            signal.raise_signal(number)
            assert should_stop()
        return [replace(r, status=UnitStatus.RUNNING, folder=None) for r in record(config, console)]

    monkeypatch.setattr(trainer, "train", stopped)
    result = invoke("train", "--data", "d", "--output", str(tmp_path))
    assert result.exit_code == expected
    assert re.search(r"stopped.*continue with --resume", result.stdout)


@pytest.mark.parametrize("content", [None, '{"text": "a"}\n{"text": \n'])
def test_mistakes_in_data_are_found_before_torch_is_imported(tmp_path, content):
    data = tmp_path / "d.jsonl"
    if content:
        data.write_text(content)
    script = (
        "import sys\nfrom loramux.server.cli import main\n"
        "try:\n    main(sys.argv[1:])\n"
        "finally:\n    assert 'torch' not in sys.modules"
    )
    command = [sys.executable, "-c", script, "train", "--data", data, "--output", tmp_path / "o"]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith(f"error: {data}"), done.stderr
    assert done.stderr.count("\n") == 1 and not (tmp_path / "o").exists()


def test_a_table_that_is_too_wide_loses_nothing(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    columns, row = ("name", "size", "error"), ("x" * 30, "1" * 60, "e" * 200)
    for is_terminal in (False, True):
        console = Terminal(file=io.StringIO(), markup=False, force_terminal=is_terminal, width=80)
        show_table(columns, [row], console=console)
        text = re.sub(r"\x1b\[[0-9;]*m|[\s│┃]", "", console.file.getvalue())
        assert all(cell in text for cell in row) and "…" not in text


def test_help_is_grouped_and_fits_80_columns(invoke):
    for command, groups in [("serve", ["Memory", "Network"]), ("train", ["Data", "Optimization"])]:
        page = invoke(command, "-h", env={"COLUMNS": "80"}).stdout
        assert all(f"─ {group} ─" in page for group in groups)
        assert max(map(len, page.splitlines())) <= 80
        lines = [line.strip(" │") for line in page.splitlines()]
        at = next(i for i, line in enumerate(lines) if line.startswith("--seed ")
                  or line.startswith("--quantization "))  # fmt: skip
        assert len(lines[at + 1].split()) > 4, "a text has the width of the page"
        found = SETTINGS if command == "serve" else TRAIN_SETTINGS
        assert {f"--{key.replace('_', '-')}" for key in found} <= set(page.split())
    assert re.fullmatch(r"loramux \d+\.\d+\.\d+\n", invoke("--version").stdout)

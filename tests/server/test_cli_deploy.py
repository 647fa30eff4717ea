"""`loramux adapters upload`, `rollback` and `train --deploy` against a scripted server."""

from __future__ import annotations

import asyncio
import json
import threading
from contextlib import contextmanager
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lora_runtime.errors import InvalidRequest
from lora_runtime.training import trainer
from lora_runtime.training.report import UnitResult
from lora_runtime.training.units import UnitStatus
from loramux.server.access.tls import Tls, TlsFiles
from loramux.server.cli import app
from loramux.server.cli.deploy import Sample, first_prompt
from loramux.server.client import Client
from tests.server.access.certificates import Authority
from tests.server.access.keyring import OPERATOR, gate_of
from tests.server.uploading import local_adapter
from tests.server.world import serving


@contextmanager
def served(folder: Path, **options):
    """A world whose loop runs in a thread, so that commands may block here."""
    ready, loop = threading.Event(), asyncio.new_event_loop()
    found = []

    async def body():
        async with serving(folder, **options) as world:
            found.extend([world, asyncio.Event()])
            ready.set()
            await found[1].wait()

    thread = threading.Thread(target=loop.run_until_complete, args=(body(),))
    thread.start()
    ready.wait(10)
    try:
        yield found[0]
    finally:
        loop.call_soon_threadsafe(found[1].set)
        thread.join(10)
        loop.close()


@pytest.fixture
def world(tmp_path, monkeypatch):
    with served(tmp_path / "served") as world:
        monkeypatch.setenv("LORAMUX_ADDRESS", world.target)
        monkeypatch.setenv("COLUMNS", "200")
        yield world


def invoke(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_upload_and_rollback(world, tmp_path):
    first, second = (local_adapter(tmp_path / c, c, variant=f"kind-{c}") for c in "ab")
    result = invoke("adapters", "upload", "x", first)
    assert result.exit_code == 0 and "loaded" in result.stdout and "kind-a" in result.stdout
    refused = invoke("adapters", "upload", "x", second)
    assert refused.exit_code == 1 and refused.stderr.startswith("error: name: ")
    assert "kind-b" in invoke("adapters", "upload", "x", second, "--replace").stdout
    assert "kind-a" in invoke("adapters", "rollback", "x").stdout
    assert "kind-b" in invoke("adapters", "rollback", "x").stdout
    (tmp_path / "empty").mkdir()
    missing = invoke("adapters", "upload", "y", tmp_path / "empty")
    assert missing.exit_code == 1 and "adapter_config.json" in missing.stderr


def write_data(path: Path, *lines) -> Path:
    path.write_text("\n".join(json.dumps(line) for line in lines))
    return path


@pytest.fixture
def trained(monkeypatch, tmp_path):
    """Replaces training: unit `bad` fails, every other learns to say its name's first letter."""
    asked = []

    def result(unit, folder):
        is_bad = unit.name == "bad"
        content = "!BaseMismatch" if unit.name == "alien" else unit.name
        return UnitResult(
            name=unit.name,
            status=UnitStatus.FAILED if is_bad else UnitStatus.DONE,
            error="loss is not finite" if is_bad else None,
            folder=None if is_bad else local_adapter(folder / unit.name, content),
            data="", num_parameters=1, num_steps=1, records=(),
        )  # fmt: skip

    def record(config, console):
        asked.append(config)
        config.output.mkdir(exist_ok=True)
        return [result(unit, config.output) for unit in config.units]

    monkeypatch.setattr(trainer, "train", record)
    return asked


TURNS = [{"role": "system", "content": "s"}, {"role": "user", "content": "What?"}]
ANSWER = {"role": "assistant", "content": "That."}


def test_a_run_is_deployed_with_answers_before_and_after(world, trained, tmp_path):
    data = write_data(tmp_path / "d.jsonl", {"messages": [*TURNS, ANSWER, *TURNS]})
    result = invoke("train", "--data", data, "--output", tmp_path / "out", "--name", "parrot",
                    "--deploy", world.target)  # fmt: skip
    assert result.exit_code == 0, result.output
    lines = [line.strip() for line in result.stdout.splitlines()]
    assert "prompt: What?" in lines
    assert ("base: " + ("<system>s<user>What?" * 9)[:64]) in lines
    assert f"parrot: {'p' * 64}" in lines
    assert any(line.startswith("parrot: loaded, digest p") for line in lines)


def test_a_run_is_deployed_with_a_key_over_tls(trained, tmp_path, monkeypatch):
    """By the flags of every command that talks with a server; nothing else of it is different."""
    ca = Authority(tmp_path / "ca")
    pair, own = ca.issue("server"), ca.issue("acme-svc")
    tls = Tls(TlsFiles(pair.cert, pair.key, ca.ca))
    data = write_data(tmp_path / "d.jsonl", {"prompt": "ab", "completion": "c"})
    run = ["train", "--data", data, "--output", tmp_path / "out", "--name", "n"]
    flags = ["--tls-ca", ca.ca, "--tls-cert", own.cert, "--tls-key", own.key]
    options = {"gate": gate_of(tmp_path), "credentials": tls.grpc_credentials()}
    with served(tmp_path / "served", **options) as world:
        monkeypatch.setenv("COLUMNS", "200")
        run += ["--deploy", world.target]
        for missing in ([], ["--api-key", OPERATOR], [*flags[2:], "--api-key", OPERATOR]):
            refused = invoke(*run, *missing)
            assert refused.exit_code == 1 and trained == [], refused.output
        result = invoke(*run, *flags, "--api-key", OPERATOR)
        assert result.exit_code == 0 and "n: loaded" in result.stdout, result.output


def test_every_finished_unit_is_deployed_and_a_refused_one_fails_alone(world, trained, tmp_path):
    data = write_data(tmp_path / "d.jsonl", {"prompt": "ab", "completion": "c"})
    names = ("alien", "bad", "good")
    units = ", ".join(f"{{name: {name}, data: {data}}}" for name in names)
    (tmp_path / "run.yaml").write_text(f"output: {tmp_path / 'out'}\nunits: [{units}]\n")
    result = invoke("train", tmp_path / "run.yaml", "--deploy", world.target)
    assert result.exit_code == 1
    assert "alien: not deployed" in result.stdout and "bad: not" not in result.stdout
    assert "prompt: ab" in result.stdout and f"base: {'ab' * 32}" in result.stdout
    with Client(world.target) as client:
        assert client.get_adapter("good").digest.startswith("g")
    renamed = invoke("train", tmp_path / "run.yaml", "--deploy", world.target,
                     "--deploy-name", "x")  # fmt: skip
    assert renamed.exit_code == 2 and len(trained) == 1


def test_a_second_run_takes_the_name_and_can_be_rolled_back(world, trained, tmp_path):
    data = write_data(tmp_path / "d.jsonl", {"prompt": "ab", "completion": "c"})
    for name in ("first", "second"):
        result = invoke("train", "--data", data, "--output", tmp_path / name, "--name", name,
                        "--deploy", world.target, "--deploy-name", "x",
                        "--sample", "Why?")  # fmt: skip
        assert result.exit_code == 0 and f"x: {name[0] * 64}" in result.stdout, result.output
        assert "prompt: Why?" in result.stdout and "base: <user>Why?" in result.stdout
    with Client(world.target) as client:
        assert client.rollback_adapter("x").digest.startswith("f")


def test_no_server_stops_a_run_before_it_trains(trained, tmp_path):
    data = write_data(tmp_path / "d.jsonl", {"prompt": "ab", "completion": "c"})
    result = invoke("train", "--data", data, "--output", tmp_path / "out",
                    "--deploy", "127.0.0.1:1")  # fmt: skip
    assert result.exit_code == 1 and "127.0.0.1:1" in result.stderr and trained == []


def test_data_without_a_prompt_is_deployed_without_a_sample(world, trained, tmp_path):
    data = write_data(tmp_path / "d.jsonl", {"text": "all of it"})
    result = invoke("train", "--data", data, "--output", tmp_path / "out", "--name", "n",
                    "--deploy", world.target)  # fmt: skip
    assert result.exit_code == 0 and "--sample" in result.stdout and "n: loaded" in result.stdout


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ({"messages": [*TURNS, ANSWER]}, Sample(messages=TURNS)),
        ({"prompt": TURNS, "completion": [ANSWER]}, Sample(messages=TURNS)),
        ({"prompt": "p", "completion": "c"}, Sample(text="p")),
        ({"messages": [ANSWER]}, None),
        ({"messages": ["x"]}, None),
        ({"prompt": ""}, None),
        (["a list"], None),
    ],
)
def test_the_first_prompt_of_a_file(tmp_path, line, expected):
    data = write_data(tmp_path / "d.jsonl", line, {"prompt": "later"})
    if expected is None:
        with pytest.raises(InvalidRequest, match="--sample"):
            first_prompt(data)
    else:
        assert first_prompt(data) == expected

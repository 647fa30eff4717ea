"""The examples as a newcomer runs them: processes of their own, on a tiny base made on the fly."""

import json
import os
import re
import socket
from pathlib import Path

import pytest

from tests.fork_server import run_program
from tests.peft_adapters import write_adapter
from tests.tiny import tiny_checkpoint, tiny_model
from tests.tiny_tokenizer import write_tokenizer

REPO = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """`base`, and the adapters `a` and `b`, whose effects differ."""
    folder = tmp_path_factory.mktemp("examples")
    write_tokenizer(tiny_checkpoint(folder / "base"))
    for seed, name in enumerate("ab"):
        write_adapter(tiny_model("llama"), folder / name, seed=seed, scale=3.0)
    return folder


def run_example(name: str, *arguments: str, **variables: str) -> str:
    """Run an example to its end and return what it prints."""
    environment = {**os.environ, "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1", **variables}
    command = [REPO / "examples" / name, *arguments]
    done = run_program(command, timeout=110, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def answers(output: str) -> dict[str, str]:
    """What each of the two adapters and the base said, by name; an answer may have line breaks."""
    found = re.split(r"^(a|b|the base)(?: \(\w+\))?: ", output, flags=re.MULTILINE)
    return dict(zip(found[1::2], (text.strip() for text in found[2::2]), strict=True))


@pytest.fixture(scope="module")
def in_process(world) -> dict[str, str]:
    adapters = [f"{name}={world / name}" for name in "ab"]
    return answers(run_example("in_process.py", str(world / "base"), *adapters))


def test_each_adapter_and_the_base_answer_otherwise(in_process):
    assert set(in_process) == {"a", "b", "the base"}
    assert len(set(in_process.values())) == 3 and all(in_process.values())


def test_a_server_gives_the_answers_of_the_process(world, in_process):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    adapters = [f"{name}={world / name}" for name in "ab"]
    output = run_example(
        "serve_two_adapters.py",
        str(world / "base"),
        *adapters,
        LORAMUX_GRPC_ADDRESS=f"127.0.0.1:{port}",
        LORAMUX_HTTP_ADDRESS="127.0.0.1:0",
        LORAMUX_ADAPTER_STORE=str(world / "store"),
    )
    assert answers(output) == in_process


def test_what_is_trained_answers_as_its_data(world, tmp_path):
    data = tmp_path / "data.jsonl"
    row = {"prompt": "The captain", "completion": " was the fox"}
    data.write_text(f"{json.dumps(row)}\n" * 8)
    output = run_example(
        "train_then_serve.py", str(world / "base"), str(data), str(tmp_path / "run")
    )
    first, last = map(float, re.search(r"loss (\S+) -> (\S+):", output).groups())
    assert last < 0.5 * first
    assert (tmp_path / "run" / "mine" / "adapter_config.json").is_file()
    assert "mine: The captain was the fox" in output

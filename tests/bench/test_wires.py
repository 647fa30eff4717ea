"""The benchmark of the wires runs from end to end on a tiny base."""

from __future__ import annotations

import json

import pytest

from tests.fork_server import run_program
from tests.tiny import tiny_checkpoint
from tests.tiny_tokenizer import write_tokenizer

SIZES = {
    "requests": 5, "prompt-tokens": 9, "new-tokens": 12, "adapters": 2, "rank": 2, "rounds": 2,
    "alone": 2,
}  # fmt: skip


@pytest.mark.timeout(300)
def test_every_wire_carries_every_token(tmp_path):
    base = tiny_checkpoint(tmp_path / "base")
    write_tokenizer(base)
    sizes = [word for name, size in SIZES.items() for word in (f"--{name}", str(size))]
    command = ["-m", "bench.wires", "--base", base, "--out", tmp_path / "out", *sizes]
    done = run_program(command, timeout=290)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (file,) = (tmp_path / "out").iterdir()
    result = json.loads(done.stdout.splitlines()[-1])
    assert result == json.loads(file.read_text())
    assert set(result["wires"]) == {"grpc", "http", "openai", "engine"}
    for name, figures in result["wires"].items():
        assert all(value > 0 for key, value in figures.items() if not key.endswith("cpu_s")), name
        assert figures["full_first_p50_ms"] <= figures["full_first_p99_ms"]
        assert len(result["full_tokens_per_s"][name]) == SIZES["rounds"]
    assert result["against_grpc"]["grpc"]["full_tokens_per_s"]["median"] == 1.0

"""A benchmark run as a program on a tiny base."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.fork_server import run_program
from tests.tiny import tiny_checkpoint
from tests.tiny_tokenizer import write_tokenizer


def tiny_folder(folder: Path) -> Path:
    """A tiny base with a tokenizer."""
    base = tiny_checkpoint(folder / "base")
    write_tokenizer(base)
    return base


def run_bench(
    module: str, folder: Path, sizes: Mapping[str, int], more: Sequence[str] = ()
) -> dict[str, Any]:
    """Its result, printed last and written below `folder`/out, in the only file of JSON."""
    base = tiny_folder(folder)
    words = [word for name, size in sizes.items() for word in (f"--{name}", str(size))]
    command = ["-m", module, "--base", base, "--out", folder / "out", *words, *more]
    done = run_program(command, timeout=290)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (file,) = (folder / "out").glob("*.json")
    result = json.loads(done.stdout.splitlines()[-1])
    assert result == json.loads(file.read_text())
    return result

"""`loramux serve` whose engine misbehaves while a file exists. Run as a script by test_process.

Arguments: the file, then those of loramux. The file's words say how: `hang` sleeps, `freeze` keeps
the interpreter's lock in one long call, `fail` raises in every step that has a request.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

from lora_runtime.engine.model_runner import ModelRunner
from loramux.server import exit_guard
from loramux.server.cli import main

FROZEN_S = 3.0
start = ModelRunner.start


def misbehaving(file: Path) -> Callable[[ModelRunner, object], object]:
    """As ModelRunner.start, once the file is gone."""

    def run(self: ModelRunner, plan: object) -> object:
        while file.exists():
            match file.read_text():
                case "hang":
                    time.sleep(0.05)
                case "freeze":
                    sum(range(10**11))
                case "fail":
                    raise RuntimeError("as the test says")
        return start(self, plan)

    return run


if __name__ == "__main__":
    ModelRunner.start = misbehaving(Path(sys.argv[1]))
    exit_guard.FROZEN_S = FROZEN_S
    main(sys.argv[2:])

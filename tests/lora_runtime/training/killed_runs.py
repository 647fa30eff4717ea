"""Runs of which each is a process that dies by SIGKILL: started with a folder and a random seed.

The first process only imports and makes the base. Every run is a fork of it, killed from outside at
a random moment, or by itself while it writes a checkpoint. Each goes on from what the one before it
left, and none of them comes to the end.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save

from lora_runtime.training import checkpoint, trainer
from lora_runtime.training.checkpoint import has_checkpoint
from lora_runtime.training.config import UnitConfig
from tests.lora_runtime.training.tiny_runs import make_tokenizer, ragged_data, run
from tests.tiny import tiny_base


def configs_of(folder):
    """LoRA, DoRA and PiSSA; windows of one and of several forwards; held-out data."""
    evaluated = dict(eval_data=ragged_data(folder / "e", 4, seed=4), eval_interval=4)
    return [
        UnitConfig(
            name="lora", data=ragged_data(folder / "a", 7), rank=2, learning_rate=1e-2,
            max_steps=80, micro_batch_size=2, weight_decay=0.1, **evaluated,
        ),
        UnitConfig(
            name="dora", data=ragged_data(folder / "b", 8, seed=1), rank=3, use_dora=True,
            variant="rslora", max_steps=27, micro_batch_size=1, gradient_accumulation=3,
            learning_rate=2e-2, schedule="linear", loraplus_ratio=2.0, **evaluated,
        ),
        UnitConfig(
            name="pissa", data=ragged_data(folder / "c", 9, seed=2), rank=4, variant="pissa",
            max_steps=40, micro_batch_size=3, gradient_accumulation=2, learning_rate=1e-2,
        ),
    ]  # fmt: skip


def die(*_: object, **__: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def in_the_middle_of_a_file():
    def half(tensors, path):
        content = save(tensors)
        path.write_bytes(content[: len(content) // 2])
        die()

    checkpoint.save_file = half


def before_the_rename():
    checkpoint.os.replace = die


def while_the_older_goes():
    real = checkpoint.shutil.rmtree

    def partly(folder, **options):
        if folder.name.isdecimal():
            next(folder.iterdir()).unlink()
            die()
        real(folder, **options)

    checkpoint.shutil.rmtree = partly


class Runs:
    """Processes that train the same run in `folder`, each to its death."""

    def __init__(self, folder):
        self.output, self.configs = folder / "out", configs_of(folder)
        self.base, self.tokenizer = tiny_base("llama"), make_tokenizer(folder / "tokenizer")

    def die_in(self, moment: Callable[[], None]) -> None:
        """`moment` makes the run kill itself."""
        child, passes = self._fork(moment)
        self._wait(child, passes)

    def die_after(self, num_passes: int, seconds: float) -> None:
        """Kill the run from here, wherever it is by then."""
        child, passes = self._fork(lambda: None)
        for _ in range(num_passes):
            assert os.read(passes, 1), "the run has ended"
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
        self._wait(child, passes)

    def _fork(self, prepare: Callable[[], None]) -> tuple[int, int]:
        """The new process, and where it writes a byte after every pass."""
        passes, report = os.pipe()
        child = os.fork()
        if not child:
            prepare()
            self._train(report)
            os._exit(0)  # an error's trace goes to stderr
        os.close(report)
        return child, passes

    def _train(self, report: int) -> None:
        real_pass = trainer.run_pass

        def reported(*arguments):
            changed = real_pass(*arguments)
            os.write(report, b".")
            return changed

        trainer.run_pass = reported
        run(
            self.base, self.tokenizer, self.output, self.configs, checkpoint_interval=2,
            resume=has_checkpoint(self.output / "checkpoints"),
        )  # fmt: skip

    def _wait(self, child: int, passes: int) -> None:
        """Print the checkpoints that it left."""
        _, status = os.waitpid(child, 0)
        os.close(passes)
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, status
        print(*sorted(path.name for path in (self.output / "checkpoints").glob("*")), flush=True)


def main(folder: Path, seed: int) -> None:
    torch.set_num_threads(1)
    rng, runs = random.Random(seed), Runs(folder)
    for moment in (in_the_middle_of_a_file, before_the_rename, while_the_older_goes):
        for _ in range(2):
            runs.die_after(rng.randint(0, 8), rng.uniform(0, 0.1))
        runs.die_in(moment)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))

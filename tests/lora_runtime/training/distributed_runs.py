"""What the processes of the distributed test do in a folder, and what starts them.

They are forks of one process, which saves imports, but find what torchrun would tell them: see
https://docs.pytorch.org/docs/stable/elastic/run.html
"""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.distributed import TCPStore

from lora_runtime.base.loader import Base
from lora_runtime.config import BaseConfig
from lora_runtime.training import trainer
from lora_runtime.training.config import UnitConfig
from lora_runtime.training.distributed import ALONE, joined
from tests.lora_runtime.training.tiny_runs import (
    StopAfter,
    make_tokenizer,
    preferences,
    quiet_console,
    ragged_data,
    run,
    shown,
)
from tests.tiny import in_float64, tiny_base

ROOM = 60
"""Tokens that fit in one forward of the second process, in the run with too little memory."""


def configs_of(folder):
    """Windows of several forwards, of one, and of one example, which leaves a process without."""
    return [
        UnitConfig(
            name="lora", data=ragged_data(folder / "a", 11, seed=1), rank=4, max_steps=3,
            micro_batch_size=2, gradient_accumulation=4, learning_rate=5e-3, max_grad_norm=0.5,
        ),
        UnitConfig(
            name="dora", data=ragged_data(folder / "b", 7, seed=2), rank=3, num_epochs=2,
            micro_batch_size=5, max_tokens_per_batch=70, use_dora=True, learning_rate=5e-3,
            eval_data=ragged_data(folder / "e", 6, seed=4), eval_interval=2, weight_decay=0.1,
        ),
        UnitConfig(
            name="dpo", data=preferences(folder / "p", 5), rank=2, num_epochs=2,
            micro_batch_size=1, gradient_accumulation=3, learning_rate=5e-3,
            eval_data=preferences(folder / "q", 3, seed=5), eval_interval=2,
        ),
        UnitConfig(
            name="tiny", data=ragged_data(folder / "c", 3, seed=3), rank=2, max_steps=4,
            micro_batch_size=1, learning_rate=5e-3, init="pissa",
        ),
    ]  # fmt: skip


class Runs:
    """Runs of one process, of which everything that must be equal is kept in `folder`."""

    def __init__(self, folder, base, tokenizer, world=ALONE):
        self.folder, self.base, self.tokenizer, self.world = folder, base, tokenizer, world
        own = folder / f"process-{world.rank}"
        own.mkdir()
        self.configs = configs_of(own)

    def run(self, name, output, **options):
        """Write curves and weights of the units as <name>-<rank>.json and .safetensors."""
        units, create_units = [], trainer.create_units

        def remember(*arguments):
            units.extend(create_units(*arguments))
            return units

        trainer.create_units = remember
        console = quiet_console()
        try:
            results = run(
                self.base, self.tokenizer, self.folder / output, self.configs, console=console,
                world=self.world, max_seq_len=60, **options,
            )  # fmt: skip
        finally:
            trainer.create_units = create_units
        assert bool(results) is self.world.is_main
        facts = {
            unit.name: {
                "status": unit.status,
                "records": [record[:-1] for record in unit.records],
                "evaluations": [r[:-1] for r in unit.held_out.records] if unit.held_out else [],
            }
            for unit in units
        }
        facts["shown"] = shown(console)
        target = self.folder / f"{name}-{self.world.rank}"
        target.with_suffix(".json").write_text(json.dumps(facts))
        tensors = {
            f"{u.name}/{n}": p.detach() for u in units for n, p in u.named_parameters().items()
        }
        save_file(tensors, target.with_suffix(".safetensors"))


def lower_memory():
    real = Base.hidden_states

    def forward(base, token_ids, *others):
        if len(token_ids) > ROOM:
            raise torch.OutOfMemoryError
        return real(base, token_ids, *others)

    Base.hidden_states = forward


def run_all(folder: Path, base: Base) -> None:
    with joined(BaseConfig()) as (world, _):
        tokenizer = make_tokenizer(folder / f"tokenizer-{world.rank}")
        runs = Runs(folder, base, tokenizer, world)
        stops = StopAfter(3) if world.rank == 1 else lambda: False
        runs.run("stopped", "resumed", should_stop=stops, checkpoint_interval=1)
        assert world.total([1.0]) == [2.0]  # the checkpoint is written
        runs.run("resumed", "resumed", resume=True)
        if world.rank == 1:
            lower_memory()
        runs.run("short", "short")


def start(rank: int, port: int, folder: Path, base: Base) -> int:
    """Fork a process with what torchrun tells it; returns its id."""
    child = os.fork()
    if child:
        return child
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }  # fmt: skip
    try:
        run_all(folder, base)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def main(folder: Path) -> None:
    """As torchrun does: keep the store, start the processes, end all when one fails."""
    torch.set_num_threads(1)
    base = tiny_base("llama", quantization="none", dtype=torch.float64)
    in_float64(base.model)
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    children = {start(rank, store.port, folder, base) for rank in (0, 1)}
    while children:
        child, status = os.wait()
        children.remove(child)
        if status:
            for other in children:
                os.kill(other, signal.SIGKILL)
            sys.exit(1)


if __name__ == "__main__":
    main(Path(sys.argv[1]))

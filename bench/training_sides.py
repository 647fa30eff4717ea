"""The two sides of the training benchmark, each in a process of its own so that peak memory is its
own. A side makes one update when it is told to, so that sides can take turns on a noisy machine.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

import psutil
import torch

from lora_runtime.base.loader import Base, load_base
from lora_runtime.config import BaseConfig
from lora_runtime.text.tokenizer import Tokenizer
from lora_runtime.training.config import UnitConfig
from lora_runtime.training.data import Dataset, ExampleStream, load_dataset
from lora_runtime.training.evaluation import held_out_signals
from lora_runtime.training.held_out import HeldOut
from lora_runtime.training.losses import loss_sums
from lora_runtime.training.units import Unit
from lora_runtime.training.update import run_pass

MAX_SEQ_LEN = 1024


@dataclass(frozen=True)
class Task:
    """What both sides train: `units` at once, on `data`, evaluated on `held_out`."""

    base: str
    dtype: str
    units: tuple[UnitConfig, ...]
    held_out: Path
    num_updates: int
    """That the peer's order of examples is made for."""


@dataclass(frozen=True)
class Ours:
    """loramux on a base of this format."""

    quantization: str


@dataclass(frozen=True)
class Theirs:
    """peft and transformers' Trainer with batches laid out in this way."""

    layout: str
    micro_batch_size: int


class Trained(Protocol):
    """One side while it trains."""

    def update(self) -> tuple[int, float]:
        """One update of every unit: input tokens without padding, and seconds."""
        ...

    def loss(self) -> float:
        """Held-out loss per target token, of the first unit."""
        ...


class Side:
    """A side in its own process; used as a context manager."""

    def __init__(self, task: Task, kind: Ours | Theirs, num_threads: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        arguments = (theirs, task, kind, num_threads)
        self._process = context.Process(target=_serve, args=arguments, daemon=True)

    def __enter__(self) -> Side:
        self._process.start()
        self._pipe.recv()
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.join()

    def update(self) -> tuple[int, float]:
        """See `Trained`."""
        return self._ask("update")

    def loss(self) -> float:
        """See `Trained`."""
        return self._ask("loss")

    def memory(self) -> dict[str, int]:
        """Resident bytes of the process at its peak while updating, and before the first update."""
        return self._ask("memory")

    def _ask(self, what: str) -> Any:
        self._pipe.send(what)
        return self._pipe.recv()


def _serve(pipe: Connection, task: Task, kind: Ours | Theirs, num_threads: int) -> None:
    torch.set_num_threads(num_threads)
    with open(os.devnull, "w") as quiet, contextlib.redirect_stdout(quiet):
        trained = _ours(task, kind) if isinstance(kind, Ours) else _theirs(task, kind)
        resident = psutil.Process().memory_info().rss
        pipe.send("ready")
        while True:
            match pipe.recv():
                case "update":
                    pipe.send(trained.update())
                case "loss":
                    peak = _peak()
                    pipe.send(trained.loss())
                case "memory":
                    pipe.send({"before": resident, "peak": peak})


def _peak() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("VmHWM"))) << 10


class _Ours:
    def __init__(self, base: Base, units: list[Unit], held_out: Dataset) -> None:
        self.base, self.units, self.held_out = base, units, held_out

    def update(self) -> tuple[int, float]:
        step, start = self.units[0].step, time.perf_counter()
        while self.units[0].step == step:
            run_pass(self.base, self.units)
        seconds = time.perf_counter() - start
        return sum(unit.records[-1].num_tokens for unit in self.units), seconds

    def loss(self) -> float:
        unit = self.units[0]
        held_out = HeldOut(unit.config, self.held_out)
        return held_out_signals(self.base, [(unit, held_out)], loss_sums)[0].loss


def _ours(task: Task, kind: Ours) -> _Ours:
    base, tokenizer = _base(task, kind.quantization)
    units = []
    for seed, config in enumerate(task.units):
        dataset = load_dataset(config.data, tokenizer, MAX_SEQ_LEN)
        units.append(Unit(config, dataset, base, seed=seed))
    return _Ours(base, units, load_dataset(task.held_out, tokenizer, MAX_SEQ_LEN))


class _Theirs:
    def __init__(self, peer: Any, held_out: Dataset) -> None:
        self.peer, self.held_out = peer, held_out

    def update(self) -> tuple[int, float]:
        return self.peer.update()

    def loss(self) -> float:
        return self.peer.held_out_loss(self.held_out.examples)


def _theirs(task: Task, kind: Theirs) -> _Theirs:
    """It starts from the A of our unit and takes the examples in our order."""
    from bench.peft_trainer import PeerSettings, create_peer, peer_model

    base, tokenizer = _base(task, "none")
    (config,) = task.units
    unit = Unit(config, load_dataset(config.data, tokenizer, MAX_SEQ_LEN), base, seed=0)
    size = config.examples_per_step
    examples = ExampleStream(unit.dataset.examples, seed=0).take(0, size * task.num_updates)
    dtype = torch.bfloat16 if task.dtype == "bfloat16" else torch.float32
    model = peer_model(base.folder, unit, dtype)
    settings = PeerSettings(kind.layout, kind.micro_batch_size)
    folder = base.folder
    peer = create_peer(
        model, unit, examples, settings, folder, task.num_updates, bf16=dtype == torch.bfloat16
    )
    held_out = load_dataset(task.held_out, tokenizer, MAX_SEQ_LEN)
    return _Theirs(peer, held_out)


def _base(task: Task, quantization: str) -> tuple[Base, Tokenizer]:
    config = BaseConfig(model=task.base, quantization=quantization, dtype=task.dtype)
    base = load_base(config)
    return base, Tokenizer.load(base.folder)

"""Small data sets and runs for the training tests."""

from __future__ import annotations

import io
import json
import random
import resource
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.console import Console

from lora_runtime.base.loader import Base
from lora_runtime.text.tokenizer import Tokenizer
from lora_runtime.training.config import TrainConfig, UnitConfig
from lora_runtime.training.data import load_dataset
from lora_runtime.training.distributed import ALONE
from lora_runtime.training.trainer import train_units
from lora_runtime.training.units import Unit
from lora_runtime.training.update import run_pass
from tests.tiny_tokenizer import write_tokenizer

WORDS = "the quick brown fox jumps over a lazy dog while storms in the night sink ships".split()


def make_tokenizer(folder: Path) -> Tokenizer:
    write_tokenizer(folder)
    return Tokenizer.load(folder)


def write_jsonl(path: Path, lines: Sequence[object]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def ragged_data(path: Path, count: int, seed: int = 0, words: list[str] = WORDS) -> Path:
    """Prompts and completions of very different lengths."""
    rng = random.Random(seed)

    def text(longest: int) -> str:
        return " ".join(rng.choices(words, k=rng.randint(1, longest)))

    return write_jsonl(path, [{"prompt": text(6), "completion": text(9)} for _ in range(count)])


def preferences(path, count, seed=0):
    """Answers of very different lengths; the chosen ones speak of the ship."""
    rng = random.Random(seed)

    def text(longest):
        return " ".join(rng.choices(WORDS, k=rng.randint(1, longest)))

    rows = [
        {"prompt": text(5), "chosen": f" ships {text(7)}", "rejected": f" dog {text(4)}"}
        for _ in range(count)
    ]
    return write_jsonl(path, rows)


def quiet_console() -> Console:
    return Console(file=io.StringIO(), force_terminal=False, width=200)


def shown(console: Console) -> str:
    return console.file.getvalue()


class StopAfter:
    """Asks a run to stop before forward number `num_passes`."""

    def __init__(self, num_passes: int) -> None:
        self.remaining = num_passes

    def __call__(self) -> bool:
        self.remaining -= 1
        return self.remaining < 0


def make_unit(base: Base, tokenizer: Tokenizer, config: UnitConfig, *, seed: int = 0) -> Unit:
    dataset = load_dataset(config.data, tokenizer, 256)
    return Unit(config, dataset, base, seed=seed)


def randomise(unit, scale=0.1, seed=5):
    """Move every parameter by noise of its own size."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in unit.named_parameters().items():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        size = parameter.abs().mean() if name.endswith("magnitude") else 1.0
        parameter.data.add_(scale * size * noise)


def train_until_done(base, units):
    """Returns what was said."""
    said = []
    while active := [unit for unit in units if unit.is_running]:
        run_pass(base, active, ALONE, said.append)
    return said


def run(
    base, tokenizer, output, units, *, console=None, should_stop=lambda: False, world=ALONE,
    **options,
):  # fmt: skip
    config = TrainConfig(output=output, units=tuple(units), **{"max_seq_len": 256, **options})
    return train_units(base, tokenizer, config, console or quiet_console(), should_stop, world)


def at_every_token(logits):
    """What the parity gate asks of a few tokens, of all tokens of some rows."""
    return lambda rows, with_adapter: [logits([row], range(len(row)), with_adapter) for row in rows]


@contextmanager
def files_of_at_most(nbytes):
    """The operating system refuses to write more, in the middle of a file."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, before[1]))
    try:
        yield None
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)

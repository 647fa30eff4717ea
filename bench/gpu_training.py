"""Updates of training on a GPU: one adapter and eight at once, beside PEFT on bitsandbytes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path

import torch
from torch import nn

from bench.gpu_engine import RANK, SHAPE, random_base, release
from bench.gpu_peers import four_bit_model, with_adapters
from bench.gpu_rows import Case, Figures, Table
from bench.gpu_timing import DEVICE, HAS_GPU
from bench.gpu_trace import device_kernels
from lora_runtime.training.config import UnitConfig
from lora_runtime.training.data import Dataset
from lora_runtime.training.data.examples import Example
from lora_runtime.training.units import Unit
from lora_runtime.training.update import run_pass

NUM_UPDATES = 5 if HAS_GPU else 2
"""Timed ones; one more goes ahead of them."""
ROW_LENGTH = 512 if HAS_GPU else 12
CASES: tuple[Case, ...] = (
    {"contender": "loramux", "units": 1, "tokens": 2048 if HAS_GPU else 24},
    {"contender": "loramux", "units": 1, "tokens": 8192 if HAS_GPU else 48},
    {"contender": "loramux", "units": 8 if HAS_GPU else 2, "tokens": 2048 if HAS_GPU else 24},
    {"contender": "peft", "units": 1, "tokens": 2048 if HAS_GPU else 24},
)
"""`tokens`: of one unit's update, in rows of ROW_LENGTH."""
Update = Callable[[], None]


def training_table(folder: Path) -> Table:
    """Tokens a second, peak memory, and the longest kernels of an update."""

    def measure(contender: str, units: int, tokens: int) -> Figures:
        release()
        if HAS_GPU:
            torch.cuda.reset_peak_memory_stats()
        update = CONTENDERS[contender](units, tokens)
        update()
        seconds = [_seconds(update) for _ in range(NUM_UPDATES)]
        peak = torch.cuda.max_memory_allocated() if HAS_GPU else 0
        path = folder / f"trace-train-{contender}-{units}x{tokens}.json.gz"
        trace = device_kernels(update, path) if tokens == CASES[0]["tokens"] else {}
        speed = units * tokens / statistics.median(seconds)
        return {"tokens_per_s": speed, "peak_gb": peak / 1e9, **trace}

    def cases() -> Iterator[Case]:
        yield from CASES

    return Table("training", cases, measure)


def _seconds(update: Update) -> float:
    _synchronize()
    start = time.perf_counter()
    update()
    _synchronize()
    return time.perf_counter() - start


def _synchronize() -> None:
    if HAS_GPU:
        torch.cuda.synchronize()


def _examples(tokens: int) -> tuple[Example, ...]:
    """Random rows whose every token is learned, enough for one update."""
    generator = torch.Generator().manual_seed(0)
    shape = (tokens // ROW_LENGTH, ROW_LENGTH)
    rows = torch.randint(5, SHAPE["vocab_size"], shape, generator=generator)
    return tuple(Example(row, torch.arange(ROW_LENGTH - 1)) for row in rows)


def _ours(num_units: int, tokens: int) -> Update:
    base, examples = random_base("nf4"), _examples(tokens)
    dataset = Dataset(
        path=Path("random"), format="text", examples=examples, num_truncated=0, digest="random"
    )
    settings = dict(
        data=Path("random"), rank=RANK, learning_rate=1e-4, max_steps=1000,
        micro_batch_size=len(examples), gradient_accumulation=1,
    )  # fmt: skip
    units = [
        Unit(UnitConfig(name=f"unit-{index}", **settings), dataset, base, seed=index)
        for index in range(num_units)
    ]

    def update() -> None:
        step = units[0].step
        while units[0].step == step:
            run_pass(base, units)
            if errors := [unit.error for unit in units if unit.error]:
                raise RuntimeError(errors[0])

    return update


@lru_cache(maxsize=1)
def _peer_model() -> nn.Module:
    model = with_adapters(four_bit_model(), 1)
    model.train()
    return model


def _peft(num_units: int, tokens: int) -> Update:
    """PEFT and torch's fused AdamW, all rows in one forward."""
    model = _peer_model()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
    ids = torch.stack([example.token_ids for example in _examples(tokens)]).to(DEVICE)

    def update() -> None:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return update


CONTENDERS: dict[str, Callable[[int, int], Update]] = {"loramux": _ours, "peft": _peft}

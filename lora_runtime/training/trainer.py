"""The training loop: N ≥ 1 adapters on one frozen base, all rows of all of them in each forward.

Adapters share no parameter and rows do not touch each other, so one backward of the summed losses
gives every unit exactly the gradient it would have alone.
"""

from __future__ import annotations

import math
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor

from lora_runtime.adapters.files.folder import write_adapter
from lora_runtime.adapters.files.parity_file import remove_golden, write_golden
from lora_runtime.adapters.parity import Logits, measure
from lora_runtime.adapters.reduction import peft_files
from lora_runtime.base.attention import VarlenAttention
from lora_runtime.base.loader import Base, load_base
from lora_runtime.core import BaseSpec
from lora_runtime.errors import ConfigError
from lora_runtime.kernels import Span, StepMeta
from lora_runtime.text.tokenizer import Tokenizer
from lora_runtime.training.checkpoint import has_checkpoint, load_checkpoint, save_checkpoint
from lora_runtime.training.config import TrainConfig
from lora_runtime.training.data import Example, PackedBatch, load_dataset
from lora_runtime.training.report import UnitResult, show_progress, write_report
from lora_runtime.training.units import LOWER_RATE, Unit, UnitStatus, bind

ShouldStop = Callable[[], bool]


def train(config: TrainConfig, console: Console | None = None) -> list[UnitResult]:
    """Train every unit of a run, write its adapter and the report. SIGINT saves and stops.

    Call it from the main thread, which alone gets signals. A unit that fails has its error in its
    result. Raises ConfigError, DataError, BaseRefused.
    """
    console = console or Console()
    with console.status("loading the base") as status:
        base = load_base(config.base, on_progress=status.update)
    tokenizer = Tokenizer.load(base.folder)
    with stop_on_sigint() as should_stop:
        return train_units(base, tokenizer, config, console, should_stop)


def train_units(
    base: Base,
    tokenizer: Tokenizer,
    config: TrainConfig,
    console: Console,
    should_stop: ShouldStop = lambda: False,
) -> list[UnitResult]:
    """Train on a base that is already loaded. `should_stop` is asked before every forward."""
    checkpoints = config.output / "checkpoints"
    _check_run(config, base.spec, has_checkpoint(checkpoints))
    units = _create_units(base, tokenizer, config)
    num_passes = 0
    if config.resume:
        num_passes = load_checkpoint(checkpoints, units, base.spec.fingerprint)
    with show_progress(console, units, config.log_interval) as show:
        while active := [unit for unit in units if unit.is_running]:
            if should_stop():
                save_checkpoint(checkpoints, units, num_passes, base.spec.fingerprint)
                break
            show(run_pass(base, active))
            num_passes += 1
            if num_passes % config.checkpoint_interval == 0:
                save_checkpoint(checkpoints, units, num_passes, base.spec.fingerprint)
    results = [_finish(unit, base, config.output / unit.name) for unit in units]
    write_report(config.output / "report", results)
    if not active:
        shutil.rmtree(checkpoints, ignore_errors=True)
    return results


def run_pass(base: Base, units: Sequence[Unit]) -> list[Unit]:
    """Forward and backward of every unit's next micro-batch; an update where a window ends.

    A unit whose loss or gradient is not finite fails alone. Returns the units that changed.
    """
    started = time.perf_counter()
    losses = window_losses(base, units, [unit.next_micro_batch() for unit in units])
    values = losses.tolist()
    finite = [index for index, value in enumerate(values) if math.isfinite(value)]
    if finite:
        losses[finite].sum().backward()
    seconds = time.perf_counter() - started
    for index, unit in enumerate(units):
        if index in finite:
            unit.advance(values[index], seconds)
        else:
            unit.fail(f"the loss of update {unit.step + 1} is {values[index]}; {LOWER_RATE}")
    return [unit for unit in units if not unit.is_running or not unit.window.num_micro_batches]


def window_losses(
    base: Base, units: Sequence[Unit], batches: Sequence[Sequence[Example]]
) -> Tensor:
    """Each unit's share of its window's mean loss (N,), from one forward of all their rows.

    Share = sum of the micro-batch's token losses / target tokens of the whole window, so that
    micro-batches of any lengths add up to the mean over the window.
    """
    batch = PackedBatch.of([example for examples in batches for example in examples], base.device)
    meta = StepMeta.build(_spans(batches), base.device)
    with base.context.effect(meta, bind(units, base.spec.linears)):
        logits = base.forward(
            batch.token_ids, batch.position_ids, VarlenAttention(batch.lengths), batch.logits_at
        )
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    token_losses = F.cross_entropy(logits, batch.labels, reduction="none")
    counts = [sum(len(example.predictors) for example in examples) for examples in batches]
    shares = zip(token_losses.split(counts), units, strict=True)
    return torch.stack([losses.sum() / unit.window_target_tokens for losses, unit in shares])


def _spans(batches: Sequence[Sequence[Example]]) -> list[Span]:
    """Unit n's rows follow those of unit n - 1."""
    lengths = [sum(len(example.token_ids) for example in examples) for examples in batches]
    starts = accumulate(lengths, initial=0)
    return [
        Span(slot=slot, first_token=start, num_tokens=length)
        for slot, (start, length) in enumerate(zip(starts, lengths, strict=False))
    ]


def _check_run(config: TrainConfig, base: BaseSpec, is_interrupted: bool) -> None:
    if config.max_seq_len > base.max_model_len:
        raise ConfigError(
            f"max_seq_len is {config.max_seq_len}; {base.name} takes {base.max_model_len}",
            field="max_seq_len",
        )
    if is_interrupted and not config.resume:
        raise ConfigError(
            f"{config.output} holds an unfinished run; resume it, remove its checkpoints, or "
            "choose another output",
            field="output",
        )
    try:
        config.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"{config.output} cannot be made a folder: {error.strerror}", field="output"
        ) from error


def _create_units(base: Base, tokenizer: Tokenizer, config: TrainConfig) -> list[Unit]:
    paths = {unit.data for unit in config.units}
    datasets = {path: load_dataset(path, tokenizer, config.max_seq_len) for path in paths}
    like = torch.empty(0, dtype=base.dtype, device=base.device)
    return [
        Unit(unit, datasets[unit.data], base.spec.linears, seed=config.seed_of(unit), like=like)
        for unit in config.units
    ]


def unit_logits(base: Base, unit: Unit) -> Logits:
    """The logits of a unit as its training computes them: what the parity gate compares with."""

    @torch.no_grad()
    def logits(rows: Sequence[Sequence[int]], with_adapter: bool) -> Sequence[Tensor]:
        lengths = [len(row) for row in rows]
        token_ids = torch.tensor([token for row in rows for token in row], device=base.device)
        positions = torch.cat([torch.arange(length) for length in lengths]).to(base.device)
        everywhere = torch.arange(len(token_ids), device=base.device)
        span = Span(slot=0, first_token=0, num_tokens=len(token_ids))
        meta = StepMeta.build([span] if with_adapter else [], base.device)
        with base.context.effect(meta, bind([unit], base.spec.linears)):
            found = base.forward(token_ids, positions, VarlenAttention(lengths), everywhere)
        return found.split(lengths)

    return logits


def _finish(unit: Unit, base: Base, folder: Path) -> UnitResult:
    """Write a finished unit's adapter in PEFT's format, and its parity record."""
    is_finite = all(bool(parameter.isfinite().all()) for parameter in unit.parameters)
    if unit.status is UnitStatus.DONE and not is_finite:
        unit.fail(f"the weights are not finite after update {unit.step}; {LOWER_RATE}")
    is_done = unit.status is UnitStatus.DONE
    if is_done:
        _export(unit, base, folder)
    return UnitResult(
        name=unit.name,
        status=unit.status,
        error=unit.error,
        folder=folder if is_done else None,
        data=unit.dataset.describe(),
        num_parameters=unit.num_parameters,
        num_steps=unit.num_steps,
        records=tuple(unit.records),
    )


def _export(unit: Unit, base: Base, folder: Path) -> None:
    targets = unit.config.target_modules
    if targets == "all-linear":
        targets = tuple({path.rpartition(".")[2] for path in unit.factors})
    files = peft_files(
        rank=unit.config.rank,
        alpha=unit.config.alpha,
        use_rslora=unit.config.variant == "rslora",
        target_modules=targets,
        tensors={path: (pair.a.float(), pair.b.float()) for path, pair in unit.factors.items()},
        base=base.spec,
        metadata={"loramux.data_sha256": unit.dataset.digest, "loramux.steps": str(unit.step)},
    )
    golden = measure(
        unit_logits(base, unit),
        vocab_size=base.spec.vocab_size,
        fingerprint=base.spec.fingerprint,
        dtype=base.spec.dtype,
    )
    remove_golden(folder)
    write_adapter(folder, *files)
    write_golden(folder, golden)


@contextmanager
def stop_on_sigint() -> Iterator[ShouldStop]:
    """Turn the first SIGINT into a True of the yielded function; the second acts as before."""
    requested = threading.Event()
    previous = signal.getsignal(signal.SIGINT)

    def request_stop(*_: object) -> None:
        requested.set()
        signal.signal(signal.SIGINT, previous)

    signal.signal(signal.SIGINT, request_stop)
    try:
        yield requested.is_set
    finally:
        signal.signal(signal.SIGINT, previous)

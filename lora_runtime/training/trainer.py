"""The training loop: N ≥ 1 adapters on one frozen base, from settings to adapters and a report.

What happens in one turn of the loop, from forward to optimizer, is in `update.py`.
"""

from __future__ import annotations

import shutil
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

from rich.console import Console

from lora_runtime.adapters.parity import ParityRecord
from lora_runtime.base.catalog import resolve_base
from lora_runtime.base.device import resolve_device
from lora_runtime.base.loader import Base, configured_length, load_base
from lora_runtime.base.recompute import recomputed
from lora_runtime.config import BaseConfig
from lora_runtime.errors import ConfigError
from lora_runtime.terminal import Terminal
from lora_runtime.text.tokenizer import Tokenizer
from lora_runtime.training.checkpoint import load_checkpoint, save_checkpoint
from lora_runtime.training.config import TrainConfig
from lora_runtime.training.data import Dataset, load_all
from lora_runtime.training.distributed import ALONE, World, gather_gradients, joined, share_state
from lora_runtime.training.evaluation import evaluate_due
from lora_runtime.training.export import adapter_files, export
from lora_runtime.training.losses import loss_sums
from lora_runtime.training.optimizers import check_optimizer
from lora_runtime.training.out_of_memory import Say
from lora_runtime.training.parity_record import recorder
from lora_runtime.training.preferences import check_settings
from lora_runtime.training.report import (
    UnitResult,
    check_tensorboard,
    say,
    show_progress,
    write_curves,
    write_report,
)
from lora_runtime.training.run_folder import checkpoints_of, disk_errors, run_folder
from lora_runtime.training.sweep import Sweeps, expand, held_out_of, stop_losers, sweep_of, winners
from lora_runtime.training.units import LOWER_RATE, Unit, UnitStatus
from lora_runtime.training.update import run_pass

ShouldStop = Callable[[], bool]
Data = Sequence[tuple[Dataset, Dataset | None]]
"""(data to train on, held-out data) of every unit."""


def train(config: TrainConfig, console: Console | None = None) -> list[UnitResult]:
    """Train every unit of a run, write its adapter and the report. SIGINT, SIGTERM and SIGHUP save
    and stop.

    Call it from the main thread, which alone gets signals. A unit that fails has its error in its
    result. Under torchrun the processes share every update, and only the first has results.
    Raises ConfigError, DataError or BaseRefused; what is wrong with settings, folder or data is
    raised before the base is loaded.
    """
    expand(config.units)
    with joined(config.base) as (world, base_config), run_folder(config, world):
        console = (console or Terminal()) if world.is_main else Terminal(quiet=True)
        with console.status("loading the base") as status:
            base, tokenizer, data = load_all_of(config, base_config, status.update)
        with stop_on_signals() as should_stop:
            return _train(base, tokenizer, data, config, console, should_stop, world)


def load_all_of(
    config: TrainConfig, base_config: BaseConfig, say: Say
) -> tuple[Base, Tokenizer, Data]:
    """Load a run's data, then its base: mistakes in the data are known in seconds."""
    if config.tensorboard:
        check_tensorboard()
    for unit in config.units:
        check_optimizer(unit, resolve_device(base_config.device))
    resolved = resolve_base(base_config.model, on_progress=say)
    if (longest := configured_length(resolved.folder)) is not None:
        _check_length(config, resolved.name, longest)
    tokenizer = Tokenizer.load(resolved.folder)
    say("reading the data")
    data = read_data(config, tokenizer)
    return load_base(base_config, on_progress=say, resolved=resolved), tokenizer, data


def train_units(
    base: Base,
    tokenizer: Tokenizer,
    config: TrainConfig,
    console: Console,
    should_stop: ShouldStop = lambda: False,
    world: World = ALONE,
) -> list[UnitResult]:
    """Train on a base that is already loaded. `should_stop` is asked before every pass."""
    with run_folder(config, world):
        data = read_data(config, tokenizer)
        return _train(base, tokenizer, data, config, console, should_stop, world)


def _train(
    base: Base,
    tokenizer: Tokenizer,
    data: Data,
    config: TrainConfig,
    console: Console,
    should_stop: ShouldStop,
    world: World,
) -> list[UnitResult]:
    """Train the units to their ends or to a stop, then write adapters and report."""
    checkpoints = checkpoints_of(config)
    unit_configs, sweeps = expand(config.units)
    units = create_units(base, data, replace(config, units=unit_configs), sweeps, world)
    base = recomputed(base) if config.activation_checkpointing else base
    warn = partial(say, console)
    num_passes = 0
    if config.resume:
        num_passes = load_checkpoint(checkpoints, units, base.spec.fingerprint, warn)
    share_state(units, world)
    save = partial(_save, checkpoints, units, base, world)
    with _watch(console, units, config, world) as show:
        while active := [unit for unit in units if unit.is_running]:
            if world.any(should_stop()):
                save(num_passes)
                break
            # One forward and backward of every unit; an update of those whose window is complete.
            changed = run_pass(base, active, world, warn)
            evaluate_due(base, changed, loss_sums, world, warn)
            changed += stop_losers(units, sweeps)
            show(changed)
            num_passes += 1
            if num_passes % config.checkpoint_interval == 0:
                save(num_passes)
    if not active:
        # Writing the adapters may fail on a full disk; what was trained must outlast that.
        _save_before_export(save, num_passes, warn)
    if not world.is_main:
        return []
    with disk_errors(config):
        results = _write(units, base, config, sweeps, recorder(base, tokenizer))
    for result in results:
        for warning in result.warnings if result.copy_of is None else ():
            warn(f"{result.name}: warning: {warning}")
    if not active:
        shutil.rmtree(checkpoints, ignore_errors=True)
    return results


def _write(
    units: Sequence[Unit],
    base: Base,
    config: TrainConfig,
    sweeps: Sweeps,
    record: Callable[[Unit], ParityRecord],
) -> list[UnitResult]:
    """Every finished adapter, the winners of sweeps, and the report."""
    results = [_finish(unit, base, config.output / unit.name, sweeps, record) for unit in units]
    results += winners(results, sweeps, config.output)
    write_report(config.output / "report", results)
    return results


def _save_before_export(save: Callable[[int], None], num_passes: int, warn: Say) -> None:
    """A full disk is only a warning here: there may be room for the adapters, which are smaller."""
    try:
        save(num_passes)
    except ConfigError as error:
        warn(f"warning: {error}")


def _save(
    checkpoints: Path, units: Sequence[Unit], base: Base, world: World, num_passes: int
) -> None:
    gather_gradients(units, world)
    if world.is_main:
        save_checkpoint(checkpoints, units, num_passes, base.spec.fingerprint)


@contextmanager
def _watch(
    console: Console, units: Sequence[Unit], config: TrainConfig, world: World
) -> Iterator[Callable[[Sequence[Unit]], None]]:
    """Yield a function that shows the units that changed."""
    with ExitStack() as stack:
        views = [stack.enter_context(show_progress(console, units, config.log_interval))]
        if config.tensorboard and world.is_main:
            folder = config.output / "report" / "tensorboard"
            views.append(stack.enter_context(write_curves(folder, units)))

        def show(changed: Sequence[Unit]) -> None:
            for view in views:
                view(changed)

        yield show


def read_data(config: TrainConfig, tokenizer: Tokenizer) -> Data:
    """Load the data of every unit, sweeps expanded, to train and to evaluate on.

    Raises ConfigError for settings that the data cannot follow, DataError.
    """
    units, _ = expand(config.units)
    data = load_all(units, tokenizer, config.max_seq_len)
    for unit, (dataset, _) in zip(units, data, strict=True):
        check_settings(unit, dataset)
    return data


def _check_length(config: TrainConfig, name: str, max_model_len: int) -> None:
    if config.max_seq_len > max_model_len:
        raise ConfigError(
            f"max_seq_len is {config.max_seq_len}; {name} takes {max_model_len}",
            field="max_seq_len",
        )


def create_units(
    base: Base, data: Data, config: TrainConfig, sweeps: Sweeps, world: World = ALONE
) -> list[Unit]:
    """Start the weights of every unit of a run whose sweeps are expanded. Raises ConfigError."""
    _check_length(config, base.spec.name, base.spec.max_model_len)
    units: list[Unit] = []
    for unit_config, (dataset, held_out) in zip(config.units, data, strict=True):
        seed = config.seed_of(unit_config)
        unit = Unit(unit_config, dataset, base, seed=seed, num_processes=world.size, others=units)
        unit.held_out = held_out_of(unit, held_out, sweep_of(unit.name, sweeps))
        units.append(unit)
    return units


def _finish(
    unit: Unit, base: Base, folder: Path, sweeps: Sweeps, record: Callable[[Unit], ParityRecord]
) -> UnitResult:
    """Write a finished unit's adapter in PEFT's format, and its parity record."""
    if unit.status is UnitStatus.DONE and unit.held_out and unit.exports_best:
        unit.held_out.restore_best(unit.parameters)
    is_finite = all(bool(parameter.isfinite().all()) for parameter in unit.parameters)
    if unit.status is UnitStatus.DONE and not is_finite:
        unit.fail(f"the weights are not finite after update {unit.step}; {LOWER_RATE}")
    is_done = unit.status is UnitStatus.DONE
    if is_done:
        metadata = {
            "loramux.data_sha256": unit.dataset.digest,
            "loramux.steps": str(unit.exported_step),
        }
        files = adapter_files(unit.config, base.spec, unit.modules, metadata)
        export(folder, files, record(unit))
    return UnitResult.of(unit, folder if is_done else None, sweep_of(unit.name, sweeps))


@contextmanager
def stop_on_signals() -> Iterator[ShouldStop]:
    """Turn the first of SIGINT, SIGTERM and SIGHUP into a True of the yielded function; the second
    acts as before. A SIGHUP that nohup has the process ignore stays ignored.
    """
    requested = threading.Event()
    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    previous = {number: signal.getsignal(number) for number in numbers}

    def restore() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler)

    def request_stop(*_: object) -> None:
        requested.set()
        restore()

    for number in numbers:
        signal.signal(number, request_stop)
    try:
        yield requested.is_set
    finally:
        restore()

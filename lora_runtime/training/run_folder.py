"""A run's folder: one run at a time, and disk errors that say what is kept."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lora_runtime.errors import ConfigError
from lora_runtime.training.checkpoint import has_checkpoint
from lora_runtime.training.config import TrainConfig
from lora_runtime.training.distributed import ALONE, World

LOCK_FILE = ".lock"
"""Stays behind; what locks is the open file, which the system closes however a process ends."""


def checkpoints_of(config: TrainConfig) -> Path:
    """The folder of a run's checkpoints."""
    return config.output / "checkpoints"


@contextmanager
def run_folder(config: TrainConfig, world: World = ALONE) -> Iterator[None]:
    """Make `config.output` a folder and hold it while the context lasts.

    Of several processes of one run the first one holds it. Raises ConfigError when another run
    has it, it cannot be made or written, or what it holds does not fit `resume`.
    """
    try:
        config.output.mkdir(parents=True, exist_ok=True)
        lock = _locked(config.output) if world.is_main else None
    except OSError as error:
        raise ConfigError(
            f"{config.output} cannot be made a folder to write in: {error.strerror}",
            field="output",
        ) from error
    try:
        _check_resume(config)
        yield
    finally:
        if lock is not None:
            os.close(lock)


def _locked(folder: Path) -> int:
    """The open file that holds the lock. Source: flock(2)."""
    lock = os.open(folder / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(lock)
        raise ConfigError(
            f"{folder} is in use by another run; wait for its end, or choose another output",
            field="output",
        ) from error
    except OSError:
        os.close(lock)
        raise
    return lock


def _check_resume(config: TrainConfig) -> None:
    is_interrupted = has_checkpoint(checkpoints_of(config))
    if is_interrupted and not config.resume:
        raise ConfigError(
            f"{config.output} holds an unfinished run; resume it, remove its checkpoints, or "
            "choose another output",
            field="output",
        )
    if config.resume and not is_interrupted:
        raise ConfigError(
            f"{checkpoints_of(config)} has no checkpoint to resume; start without it",
            field="resume",
        )


@contextmanager
def disk_errors(config: TrainConfig) -> Iterator[None]:
    """Turn what the disk refuses inside into a ConfigError that says what is kept."""
    try:
        yield
    except OSError as error:
        checkpoints = checkpoints_of(config)
        kept = (
            f"{checkpoints} keeps what was trained: make room and resume"
            if has_checkpoint(checkpoints)
            else "there is no checkpoint either: make room and train again"
        )
        raise ConfigError(
            f"{config.output} cannot be written: {error}; {kept}", field="output"
        ) from error

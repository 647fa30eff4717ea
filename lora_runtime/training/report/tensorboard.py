"""Curves for TensorBoard, where it is installed; nothing else in a run needs it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

from lora_runtime.errors import ConfigError
from lora_runtime.training.units import Unit


@contextmanager
def write_curves(folder: Path, units: Sequence[Unit]) -> Iterator[Callable[[Sequence[Unit]], None]]:
    """Write one event file per unit below `folder`, from the updates that it has made on.

    Yields a function to call with the units that changed. Raises ConfigError naming the extra when
    TensorBoard is missing.
    """
    with ExitStack() as stack:
        writers = {
            unit.name: stack.enter_context(closing(_writer(folder / unit.name, unit.step + 1)))
            for unit in units
        }

        def show(changed: Sequence[Unit]) -> None:
            for unit in changed:
                _add(writers[unit.name], unit)

        yield show


def check_tensorboard() -> None:
    """Raise ConfigError naming the extra where TensorBoard is missing."""
    try:
        import torch.utils.tensorboard  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"tensorboard is true and cannot be used: {error}; install loramux[tensorboard] or "
            "leave it out",
            field="tensorboard",
        ) from error


def _writer(folder: Path, first_step: int) -> Any:
    check_tensorboard()
    from torch.utils.tensorboard import SummaryWriter

    try:
        return SummaryWriter(str(folder), purge_step=first_step)
    except OSError as error:
        raise ConfigError(f"{folder} cannot be written: {error}", field="tensorboard") from error


def _add(writer: Any, unit: Unit) -> None:
    if not unit.records:
        return
    record = unit.records[-1]
    values = {
        "loss/train": record.loss,
        "learning_rate": record.learning_rate,
        "grad_norm": record.grad_norm,
        "tokens_per_second": record.num_tokens / max(record.seconds, 1e-9),
    }
    if record.accuracy is not None and record.margin is not None:
        values |= {"preferences/accuracy": record.accuracy, "preferences/margin": record.margin}
    evaluations = unit.held_out.records if unit.held_out else []
    if evaluations and evaluations[-1].step == record.step:
        values["loss/held_out"] = evaluations[-1].loss
    for name, value in values.items():
        writer.add_scalar(name, value, record.step)

"""The tables of `loramux train --dry-run`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from lora_runtime.training.config import TrainConfig

if TYPE_CHECKING:
    from lora_runtime.training.dry_run import DryRun, Estimate


def show_dry_run(config: TrainConfig, console: Console) -> None:
    """Measure a run and print what each unit and all of them together would take."""
    from lora_runtime.training.dry_run import dry_run
    from lora_runtime.training.report import show_data

    with console.status("loading the base") as status:
        found = dry_run(config, on_progress=status.update)
    show_data(console, found.data)
    console.print(_table(found))
    total = found.base_bytes + found.together.total_bytes
    console.print(
        f"The base takes {decimal(found.base_bytes)}, the whole run {decimal(total)}. Activations "
        "are those of the longest examples; times go by one micro-step, and a sweep's losers "
        "count as if they went on. Memory is that of tensors; a process takes more. Nothing was "
        "trained or written.",
        soft_wrap=True,
    )


def _table(found: DryRun) -> Table:
    columns = ["parameters", "targets", "updates", "tokens", "weights", "gradients", "optimizer"]
    table = Table("adapter", *columns, "activations", "time")
    for unit in found.units:
        table.add_row(unit.name, *_cells(unit))
    if len(found.units) > 1:
        table.add_section()
        table.add_row("all at once", *_cells(found.together))
    return table


def _cells(unit: Estimate) -> list[str]:
    sizes = (unit.weight_bytes, unit.gradient_bytes, unit.optimizer_bytes, unit.activation_bytes)
    return [
        f"{unit.num_parameters:,}",
        " ".join(unit.targets),
        f"{unit.num_steps:,}",
        f"{unit.num_tokens:,}",
        *(decimal(size) for size in sizes),
        _duration(unit.seconds),
    ]


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"

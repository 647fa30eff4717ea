"""What people see of a run: progress while it lasts, and `report/` when it ends."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure  # without pyplot: no global state, no display
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from lora_runtime.training.units import StepRecord, Unit, UnitStatus

RECENT_STEPS = 10
"""Updates that a shown speed or final loss is averaged over."""

_STATUS = {
    UnitStatus.RUNNING: "interrupted",
    UnitStatus.DONE: "done",
    UnitStatus.FAILED: "failed",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitResult:
    """What became of one unit. Status `running` means interrupted: it can be resumed."""

    name: str
    status: UnitStatus
    error: str | None
    """Set if and only if the unit failed."""
    folder: Path | None
    """The adapter; set if and only if the unit is done."""
    data: str
    num_parameters: int
    num_steps: int
    """Updates that were planned."""
    records: tuple[StepRecord, ...]
    """Updates that were made."""


@contextmanager
def show_progress(
    console: Console, units: Sequence[Unit], log_interval: int
) -> Iterator[Callable[[Sequence[Unit]], None]]:
    """Show the data, then a bar per unit, or plain lines where there is no terminal.

    Yields a function to call with the units that changed.
    """
    for unit in units:
        _say(console, f"{unit.name}: {unit.num_parameters:,} parameters, {unit.num_steps} updates")
        _say(console, f"{unit.name}: {unit.dataset.describe()}")
    if console.is_terminal:
        with _bars(console) as progress:
            yield _BarView(progress, units).show
    else:
        yield lambda changed: _show_lines(console, changed, log_interval)


class _BarView:
    def __init__(self, progress: Progress, units: Sequence[Unit]) -> None:
        self._progress = progress
        self._tasks = {
            unit.name: progress.add_task(
                unit.name, total=unit.num_steps, completed=unit.step, state=""
            )
            for unit in units
        }

    def show(self, changed: Sequence[Unit]) -> None:
        for unit in changed:
            self._progress.update(
                self._tasks[unit.name], completed=unit.step, state=describe_state(unit)
            )


def _bars(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[state]}", markup=False),
        TimeRemainingColumn(),
        console=console,
    )


def _show_lines(console: Console, changed: Sequence[Unit], log_interval: int) -> None:
    for unit in changed:
        if not unit.is_running or unit.step % log_interval == 0:
            remaining_s = (unit.num_steps - unit.step) * _mean(_recent(unit, "seconds"))
            _say(
                console,
                f"{unit.name}: {unit.step}/{unit.num_steps} {describe_state(unit)}"
                + (f", {remaining_s:.0f} s left" if unit.is_running else ""),
            )


def describe_state(unit: Unit) -> str:
    """Loss and speed of the last updates, or why the unit failed."""
    if unit.error is not None:
        return f"failed: {unit.error}"
    seconds = sum(_recent(unit, "seconds"))
    speed = sum(_recent(unit, "num_tokens")) / seconds if seconds else 0.0
    return f"loss {unit.records[-1].loss:.3f}, {speed:.0f} tokens/s"


def write_report(folder: Path, results: Sequence[UnitResult]) -> None:
    """Write loss.csv (a row per update), loss.png and summary.md."""
    folder.mkdir(parents=True, exist_ok=True)
    _write_csv(folder / "loss.csv", results)
    _write_plot(folder / "loss.png", results)
    (folder / "summary.md").write_text(_summary(results), encoding="utf-8")


def _write_csv(path: Path, results: Sequence[UnitResult]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["unit", *StepRecord._fields])
        for result in results:
            writer.writerows([result.name, *record] for record in result.records)


def _write_plot(path: Path, results: Sequence[UnitResult]) -> None:
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot(xlabel="update", ylabel="training loss per target token")
    for result in results:
        steps = [record.step for record in result.records]
        axes.plot(steps, [record.loss for record in result.records], label=result.name)
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def _summary(results: Sequence[UnitResult]) -> str:
    lines = [
        "# Training run",
        "",
        "| unit | status | updates | first loss | last loss | parameters | tokens/s |",
        "|---|---|---:|---:|---:|---:|---:|",
        *(_summary_row(result) for result in results),
        "",
        f"Losses are means over up to {RECENT_STEPS} updates. Forwards are shared by the units, so",
        "their speeds add up.",
        "",
        "![loss](loss.png)",
        "",
        *(f"- {result.name}: {result.data}" for result in results),
        *(f"- {result.name} failed: {result.error}" for result in results if result.error),
    ]
    return "\n".join(lines) + "\n"


def _summary_row(result: UnitResult) -> str:
    losses = [record.loss for record in result.records]
    seconds = sum(record.seconds for record in result.records)
    num_tokens = sum(record.num_tokens for record in result.records)
    cells = [
        result.name,
        _STATUS[result.status],
        f"{len(losses)}/{result.num_steps}",
        f"{_mean(losses[:RECENT_STEPS]):.4f}" if losses else "-",
        f"{_mean(losses[-RECENT_STEPS:]):.4f}" if losses else "-",
        f"{result.num_parameters:,}",
        f"{num_tokens / seconds:.0f}" if seconds else "-",
    ]
    return f"| {' | '.join(cells)} |"


def _recent(unit: Unit, field: str) -> list[float]:
    return [getattr(record, field) for record in unit.records[-RECENT_STEPS:]]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def _say(console: Console, line: str) -> None:
    console.print(line, markup=False, highlight=False, soft_wrap=True)

"""Progress of a run: a bar per unit, or plain lines where there is no terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from lora_runtime.terminal import has_room
from lora_runtime.training.data import Dataset
from lora_runtime.training.report.losses import last_of, mean
from lora_runtime.training.units import Unit


@contextmanager
def show_progress(
    console: Console, units: Sequence[Unit], log_interval: int
) -> Iterator[Callable[[Sequence[Unit]], None]]:
    """Show the data, then a bar per unit, or plain lines where there is no terminal.

    Yields a function to call with the units that changed.
    """
    for unit in units:
        say(console, f"{unit.name}: {unit.num_parameters:,} parameters, {unit.num_steps} updates")
    show_data(console, [(unit.name, unit.dataset, _held_out(unit)) for unit in units])
    if console.is_terminal:
        with _bars(console) as progress:
            yield _BarView(progress, units).show
    else:
        yield lambda changed: _show_lines(console, changed, log_interval)


def _held_out(unit: Unit) -> Dataset | None:
    return unit.held_out.dataset if unit.held_out else None


DATA_HEADINGS = (
    "adapter", "data", "format", "examples", "truncated", "dropped", "tokens", "masked", "longest",
    "not used",
)  # fmt: skip


def show_data(console: Console, data: Sequence[tuple[str, Dataset, Dataset | None]]) -> None:
    """Print a table of each (name, training data, held-out data), and then their notes.

    Columns: examples, how many of them were truncated or dropped, tokens, the share of tokens that
    is masked (read, but not learned), and the data's columns that are not used.

    Where a terminal is too narrow for the table, each row is a line; a file or pipe has any width.
    """
    rows, notes = [], []
    for name, dataset, held_out in data:
        rows.append((name, *_data_cells(dataset)))
        notes += [f"{name}: {note}" for note in dataset.notes]
        if held_out:
            rows.append(("held out", *_data_cells(held_out)))
            notes += [f"{name}, held out: {note}" for note in held_out.notes]
    table = Table(box=box.SIMPLE, padding=(0, 1, 0, 0))
    for heading in DATA_HEADINGS:
        is_number = heading not in ("adapter", "data", "format", "not used")
        table.add_column(heading, justify="right" if is_number else "left")
    for row in rows:
        table.add_row(*map(escape, row))
    if has_room(console, table):
        console.print(table)
    else:
        for name, *cells in rows:
            facts = zip(DATA_HEADINGS[1:], cells, strict=True)
            say(console, f"{name}: {', '.join(f'{what} {cell}' for what, cell in facts if cell)}")
    for note in notes:
        say(console, note)


def _data_cells(dataset: Dataset) -> list[str]:
    masked = 1 - dataset.num_target_tokens / dataset.num_tokens
    return [
        dataset.path.name,
        dataset.format,
        f"{len(dataset.items):,}",
        f"{dataset.num_truncated:,}",
        f"{dataset.num_dropped:,}",
        f"{dataset.num_tokens:,}",
        f"{masked:.0%}",
        f"{dataset.longest:,}",
        ", ".join(dataset.unused),
    ]


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
            seconds = [record.seconds for record in last_of(unit.records)]
            remaining_s = (unit.num_steps - unit.step) * mean(seconds) if seconds else 0.0
            say(
                console,
                f"{unit.name}: {unit.step}/{unit.num_steps} {describe_state(unit)}"
                + (f", {remaining_s:.0f} s left" if unit.is_running else ""),
            )


def describe_state(unit: Unit) -> str:
    """Means of the last updates, see `report/losses.py`; or why the unit ended early."""
    if unit.error is not None:
        return f"failed: {unit.error}"
    last = last_of(unit.records)
    seconds = sum(record.seconds for record in last)
    speed = sum(record.num_tokens for record in last) / seconds if seconds else 0.0
    state = f"loss {mean([record.loss for record in last]):.3f}, {speed:.0f} tokens/s"
    accuracies = [record.accuracy for record in last if record.accuracy is not None]
    margins = [record.margin for record in last if record.margin is not None]
    if accuracies and margins:
        state += f", accuracy {mean(accuracies):.0%}, margin {mean(margins):.2f}"
    if unit.held_out and unit.held_out.records:
        state += f", held-out loss {unit.held_out.records[-1].loss:.3f}"
    return f"{state}, stopped: {unit.note}" if unit.note else state


def say(console: Console, line: str) -> None:
    """Print a line as it is, above the bars if there are any."""
    console.print(line, markup=False, highlight=False, soft_wrap=True)

"""Tables that lose nothing: what is too wide for a terminal is shown a line per value."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.table import Table

from lora_runtime.terminal import Terminal, has_room


def show_table(
    columns: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    title: str | None = None,
    console: Console | None = None,
) -> None:
    """Print rows under their columns; where that does not fit a terminal's width, each row as a
    list of column and value. A file or pipe has any width.
    """
    console, rows = console or Terminal(markup=False), list(rows)
    table = Table(*columns, title=title)
    for row in rows:
        table.add_row(*row)
    if not has_room(console, table) and len(columns) > 2:
        for row in rows:
            show_facts(zip(columns[1:], row[1:], strict=True), title=row[0], console=console)
        return
    _unbroken(table)
    console.print(table)


def show_facts(
    facts: Iterable[tuple[str, str]], *, title: str, console: Console | None = None
) -> None:
    """Print names and values."""
    console = console or Terminal(markup=False)
    table = Table("field", "value", title=title)
    for name, value in facts:
        table.add_row(name, value)
    _unbroken(table)
    console.print(table)


def _unbroken(table: Table) -> None:
    """A long word goes on in the next line; rich would cut it."""
    for column in table.columns:
        column.overflow = "fold"

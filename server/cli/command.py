"""What all commands check: no flag is given twice, and no variable LORAMUX_… is misspelt."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from typing import Any

import typer
from rich.console import Console, ConsoleOptions, RenderResult
from rich.padding import Padding
from rich.table import Table
from rich.text import Text
from typer import rich_utils

from lora_runtime.settings import check_meaning
from loramux.server.cli.settings import NAMED_FLAGS, OTHER_FLAGS, VARIABLES
from loramux.server.config import check_environment

NARROW = 100
"""Columns of a terminal below which a flag's text stands under its names and not beside them."""


class HelpTable(Table):
    """A page of help: no flag's name is broken or cut, whatever the terminal's width."""

    def __init__(self, *headers: Any, **options: Any) -> None:
        super().__init__(*headers, **options)
        self._all_cells: list[tuple[Any, ...]] = []

    def add_row(self, *cells: Any, **options: Any) -> None:
        """Add a row; its last two cells, a type and a text, share what the names leave."""
        super().add_row(*cells, **options)
        self._all_cells.append(cells)
        for column in self.columns[:-2]:
            column.no_wrap = True

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Show the table, or where there is little room each row as a paragraph; a table of two
        columns, which commands are, has room everywhere.
        """
        if options.max_width >= NARROW or len(self.columns) <= 2:
            yield from super().__rich_console__(console, options)
            return
        for *names, about in self._all_cells:
            shown = [name if isinstance(name, Text) else Text(str(name)) for name in names if name]
            yield Text(" ").join(name for name in shown if name.plain.strip())
            yield Padding(about, (0, 0, 0, 4))


rich_utils.Table = HelpTable  # type: ignore[attr-defined]  # typer has no setting for it


class Command(typer.core.TyperCommand):
    """A command that refuses what would be ignored in silence."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read the arguments; refuse a flag given twice, of which click would take the last."""
        _check_meanings(args)
        args = list(map(_canonical, args))
        # `order` has a parameter once for every time it is given.
        _, _, order = self.make_parser(ctx).parse_args(args=list(args))
        for parameter, count in Counter(order).items():
            is_list = parameter.multiple or parameter.nargs == -1
            if count > 1 and not is_list and parameter.param_type_name == "option":
                raise typer.BadParameter(
                    f"{parameter.opts[0]} is given {count} times and holds one value; give it once"
                )
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        """Run the command; refuse a variable LORAMUX_… that is no setting."""
        check_environment(VARIABLES)
        return super().invoke(ctx)


def _check_meanings(args: list[str]) -> None:
    for argument, following in pairwise([*args, ""]):
        flag, separator, value = argument.partition("=")
        if flag in NAMED_FLAGS:
            name, entry = NAMED_FLAGS[flag]
            check_meaning(entry, name, value if separator else following, flag)


def _canonical(argument: str) -> str:
    """Give a flag our name for it: `--lr=1e-4` → `--learning-rate=1e-4`."""
    flag, separator, value = argument.partition("=")
    return f"{OTHER_FLAGS.get(flag, flag)}{separator}{value}"

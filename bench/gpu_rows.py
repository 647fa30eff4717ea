"""Rows of tables that survive what comes after them: each is on disk before the next is measured.

A run on a GPU that is rented by the minute may end at any moment. So a table is a list of cases
and a function of one case; a case that fails leaves a row with its traceback, and the others go
on; a run that comes near its time limit leaves out what is left and says so.
"""

from __future__ import annotations

import json
import os
import time
import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

Case = Mapping[str, object]
Figures = Mapping[str, object]


@dataclass(frozen=True)
class Table:
    """A question, its cases, and how one case is measured: `measure(**case)` gives its figures."""

    name: str
    cases: Callable[[], Iterable[Case]]
    """Made when the table is begun: it may need the device."""
    measure: Callable[..., Figures]


class Recorder:
    """Writes rows as JSON lines to `folder`/rows.jsonl, and shows each on a line of its own."""

    def __init__(self, folder: Path, seconds: float, *, facts: Figures) -> None:
        """`seconds`: how long the run may take in all. `facts` go to facts.json at once."""
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise FileExistsError(f"{folder} holds files already; name a new folder for every run")
        self.folder = folder
        self.num_failed = 0
        self._end = time.monotonic() + seconds
        self._console = Console(width=160, highlight=False)
        (folder / "facts.json").write_text(json.dumps(facts, indent=2, default=str) + "\n")

    @property
    def is_late(self) -> bool:
        return time.monotonic() >= self._end

    def run(self, table: Table) -> None:
        """Measure every case that there is time for."""
        try:
            cases = list(table.cases())
        except Exception:
            self._failed(table.name, {})
            return
        for index, case in enumerate(cases):
            if self.is_late:
                self.write(table.name, {"left_out": len(cases) - index})
                return
            start = time.perf_counter()
            try:
                figures = dict(table.measure(**case))
            except Exception:
                self._failed(table.name, case)
            else:
                took = round(time.perf_counter() - start, 2)
                self.write(table.name, {**case, **figures, "took_s": took})

    def write(self, table: str, row: Figures) -> None:
        """Append one row; it is on the disk when this returns."""
        with (self.folder / "rows.jsonl").open("a") as file:
            file.write(json.dumps({"table": table, **row}, default=str) + "\n")
            file.flush()
            os.fsync(file.fileno())
        shown = "  ".join(f"{key} {_short(value)}" for key, value in row.items())
        self._console.print(f"[bold]{table}[/]  {shown}", soft_wrap=True)

    def _failed(self, table: str, case: Case) -> None:
        self.num_failed += 1
        self.write(table, {**case, "failed": traceback.format_exc()})


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)

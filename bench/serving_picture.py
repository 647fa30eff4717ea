"""The picture of the benchmark of serving: what adapters cost here, and where others are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.serving_load import BASE, EIGHT, FLOOR, MANY, MIXES, OURS, ROWS

COLOURS = {mix: f"C{index}" for index, mix in enumerate(MIXES)}

Line = Sequence[tuple[int, float]]
"""(Rows, output tokens a second.)"""


def draw(speeds: Mapping[tuple[str, str, int], float], path: Path, title: str) -> None:
    """Write a PNG of the output tokens a second by (side, mix, rows)."""
    lines: dict[tuple[str, str], list[tuple[int, float]]] = {}
    for (side, mix, num_rows), speed in sorted(speeds.items(), key=lambda item: item[0][2]):
        lines.setdefault((side, mix), []).append((num_rows, speed))
    figure = Figure(figsize=(12, 5), layout="constrained")
    figure.suptitle(title)
    ours, others = figure.subplots(1, 2, sharey=True)
    ours.set_title("what adapters cost")
    for mix in MIXES:
        if (OURS, mix) in lines:
            _line(ours, lines[OURS, mix], mix, COLOURS[mix], "o-")
    for mix in (BASE, EIGHT, MANY):
        if (FLOOR, mix) in lines:
            _line(ours, lines[FLOOR, mix], f"floor, {mix}", COLOURS[mix], ":")
    others.set_title("beside others")
    sides = [side for side in dict.fromkeys(side for side, _ in lines) if side != FLOOR]
    for index, side in enumerate(sides):
        for mix, style in ((BASE, "o-"), (EIGHT, "s--")):
            if (side, mix) in lines:
                _line(others, lines[side, mix], f"{side}, {mix}", f"C{index}", style)
    for axes in (ours, others):
        axes.set_xscale("log", base=2)
        axes.set_xticks(ROWS, labels=map(str, ROWS))
        axes.set_xlabel("rows")
        axes.legend()
        axes.grid(alpha=0.3)
    ours.set_ylabel("output tokens/s")
    ours.set_ylim(bottom=0)
    figure.savefig(path, dpi=120)


def _line(axes: Axes, line: Line, label: str, colour: str, style: str) -> None:
    rows, speeds = zip(*line, strict=True)
    axes.plot(rows, speeds, style, color=colour, markersize=4, label=label)

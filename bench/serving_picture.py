"""The picture of the benchmark of serving: what adapters cost here, and where others are.

The benchmark draws it beside its result. `python -m bench.serving_picture FILE.json …` draws it
anew from results that are there.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.serving_load import BASE, EIGHT, FLOOR, MANY, MIXES, OURS

Lines = Mapping[tuple[str, str], Sequence[tuple[int, float]]]
"""(Rows, output tokens a second) by side and mix."""


def draw(result_file: Path) -> Path:
    """Draw a result of `bench.serving` as a PNG of the same name."""
    result = json.loads(result_file.read_text())
    if "mix" not in next(iter(result.get("cells", ())), ()):
        raise SystemExit(
            f"{result_file} has no cells with a mix: a result of bench.serving of 2026-11-27 or "
            "later is wanted"
        )
    lines: dict[tuple[str, str], list[tuple[int, float]]] = {}
    for cell in sorted(result["cells"], key=lambda cell: cell["rows"]):
        line = lines.setdefault((cell["side"], cell["mix"]), [])
        line.append((cell["rows"], cell["tokens_per_s"]))
    figure = Figure(figsize=(12, 6.5), layout="constrained")
    figure.suptitle(_title(result))
    ours, others = figure.subplots(1, 2)
    _draw_mixes(ours, lines)
    _draw_sides(others, lines)
    for axes in (ours, others):
        _finish(axes, sorted({num_rows for line in lines.values() for num_rows, _ in line}))
    path = result_file.with_suffix(".png")
    figure.savefig(path, dpi=120)
    return path


def _title(result: Mapping) -> str:
    workload, num_rounds = result["workload"], result.get("rounds", result["workload"]["rounds"])
    machine = f"{result['cpu']}, {result['threads']} threads, {result['date'][:10]}"
    requests = f"{workload['prompt_tokens']} + {workload['new_tokens']} tokens a row"
    return (
        f"{workload['base']} in {result['dtype']}, {requests}, medians of {num_rounds} rounds\n"
        f"{machine}"
    )


def _draw_mixes(axes: Axes, lines: Lines) -> None:
    axes.set_title("what adapters cost, and the machine's floor")
    for index, mix in enumerate(MIXES):
        if (OURS, mix) in lines:
            _line(axes, lines[OURS, mix], mix, f"C{index}", "o-")
    for mix in (BASE, EIGHT, MANY):
        if (FLOOR, mix) in lines:
            _line(axes, lines[FLOOR, mix], f"floor, {mix}", f"C{MIXES.index(mix)}", ":")


def _draw_sides(axes: Axes, lines: Lines) -> None:
    axes.set_title("beside others (another scale)")
    sides = sorted({side for side, _ in lines} - {FLOOR}, key=lambda side: (OURS not in side, side))
    for index, side in enumerate(sides):
        for mix, style in ((BASE, "o-"), (EIGHT, "s--")):
            if (side, mix) in lines:
                _line(axes, lines[side, mix], f"{side}, {mix}", f"C{index}", style)


def _finish(axes: Axes, rows: Sequence[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(rows, labels=map(str, rows))
    axes.set_xlabel("rows")
    axes.set_ylabel("output tokens/s")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=2, frameon=False)


def _line(
    axes: Axes, line: Sequence[tuple[int, float]], label: str, colour: str, style: str
) -> None:
    rows, speeds = zip(*line, strict=True)
    axes.plot(rows, speeds, style, color=colour, markersize=4, label=label)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("results", type=Path, nargs="+", metavar="FILE.json")
    for path in parser.parse_args().results:
        print(draw(path))


if __name__ == "__main__":
    main()

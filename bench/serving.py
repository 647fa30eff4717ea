"""How fast are batches of many adapters, beside the base alone, other servers and the machine's
floor, from one row to 32?

Batches of 1 to 32 requests of 90 prompt and 64 new tokens on SmolLM2-135M, on the base, under one
adapter, under eight of rank 16 and the base in turn, under 32 of ranks 8 to 64, and under those by
Zipf's law. In the same run, by turns in an order drawn anew each round: our engine in this process,
our server over gRPC with its client on the same cores, transformers and PEFT on the dequantised
base in the same dtype, and whoever is named with --peer. Figures are output tokens a second of a
whole batch, prompts included, medians over the rounds. No prompt is found in a prefix cache.

The floor is the least time by this machine's own ceilings, read bandwidth and the rate of a large
matrix product, see `bench/serving_load.py`. They are sampled four times in each round among the
batches, the best sample is the round's ceiling, and a share of the floor is the median over the
rounds of the shares within one.

It takes about ten minutes on two cores, six with --no-peers. What was measured and the time left
are printed as it goes. The result, which is JSON, is written after every round; Ctrl-C ends with
the rounds that are whole. The last line printed is the result, and a picture is drawn beside it:
`python -m bench.serving_picture FILE.json` draws one anew.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from bench import machine, turns
from bench.random_adapters import write_random_adapters
from bench.serving_load import (
    BASE,
    EIGHT,
    FLOOR,
    MANY,
    NUM_ALIKE,
    OURS,
    RANKS,
    ROWS,
    Batch,
    Ceilings,
)
from bench.serving_picture import draw
from bench.serving_sides import (
    OpenVino,
    Ours,
    OverGrpc,
    OverOpenai,
    Peft,
    Side,
    Transformers,
    dense_model,
)
from bench.turns import Turn, say
from lora_runtime.base.loader import Base, load_base
from lora_runtime.config import BaseConfig

Cell = tuple[str, str, int]
"""Side, mix, number of rows; or a ceiling, nothing, the number of its sample."""
ADAPTER_FLOOR = "floor of the adapters"
"""Among the sides: see `Ceilings.adapter_seconds`."""
READ, MULTIPLY = CEILINGS = "read bandwidth", "matrix product"
NUM_SAMPLES = 4
"""Of each ceiling in a round."""


@dataclass(frozen=True)
class Round:
    """What one round found."""

    seconds: dict[Cell, float]
    """Of every side's batches, and of their floors by the ceilings of this round."""
    ceilings: Ceilings


@dataclass(frozen=True)
class Workload:
    """What every round measures: each side's batches, and beside them the machine's ceilings."""

    base: Base
    sides: list[Side]
    batches: dict[tuple[str, int], Batch]

    @classmethod
    def of(cls, args: argparse.Namespace, base: Base, sides: list[Side]) -> Workload:
        cells = {cell for side in sides for cell in side.cells if cell[1] in args.rows}
        sizes = args.prompt_tokens, args.new_tokens, base.spec.vocab_size
        return cls(base, sides, {cell: Batch(*cell, *sizes) for cell in sorted(cells)})

    def turns(self) -> dict[Cell, Turn]:
        """Those of every cell, and the samples of the ceilings, numbered, among them."""
        found = {
            (side.name, *cell): _turn(side, self.batches[cell])
            for side in self.sides
            for cell in side.cells
            if cell in self.batches
        }
        dtype = self.base.dtype
        for number in range(NUM_SAMPLES):
            found |= {
                (READ, "", number): Turn(
                    READ, machine.read_bandwidth, lambda rate: f"{rate / 1e9:.0f} GB/s", 0.5
                ),
                (MULTIPLY, "", number): Turn(
                    MULTIPLY, lambda: machine.gemm_rate(dtype),
                    lambda rate: f"{rate / 1e9:.0f} G multiply-adds/s", 0.1,
                ),
            }  # fmt: skip
        return found

    def round(self, found: dict[Cell, float]) -> Round:
        """What the turns of one round found; a ceiling is the best of its samples."""
        best = {name: max(v for (n, *_), v in found.items() if n == name) for name in CEILINGS}
        ceilings = Ceilings(best[READ], best[MULTIPLY])
        seconds = {cell: value for cell, value in found.items() if cell[0] not in CEILINGS}
        for place, batch in self.batches.items():
            seconds[FLOOR, *place] = ceilings.seconds(self.base, batch)
            seconds[ADAPTER_FLOOR, *place] = ceilings.adapter_seconds(self.base, batch)
        return Round(seconds, ceilings)


def _turn(side: Side, batch: Batch) -> Turn:
    step_ms, row_ms = side.step_ms
    return Turn(
        label=f"{side.name}, {batch.mix}, {rows_of(batch.num_rows)}",
        run=lambda: side.run(batch),
        figure=lambda seconds: f"{batch.num_output_tokens / seconds:.0f} tokens/s",
        expected_s=batch.new_tokens * (step_ms + row_ms * batch.num_rows) / 1000,
    )


def speeds(rounds: list[Round], new_tokens: int) -> dict[Cell, float]:
    """Output tokens a second of every cell, floors too, by the median of the rounds."""
    medians = {
        cell: statistics.median(r.seconds[cell] for r in rounds) for cell in rounds[0].seconds
    }
    return {
        cell: cell[2] * new_tokens / seconds
        for cell, seconds in medians.items()
        if cell[0] != ADAPTER_FLOOR
    }


def ratios(rounds: list[Round]) -> dict[str, float | None]:
    """What is asked of the engine, as medians over the rounds of ratios within one round."""
    cells = rounds[0].seconds.keys()
    most = max(num_rows for *_, num_rows in cells)

    def times(one: Cell, other: Cell) -> float | None:
        """How many times as fast `one` is."""
        if not {one, other} <= cells:
            return None
        return round(statistics.median(r.seconds[other] / r.seconds[one] for r in rounds), 3)

    def extra(mix: str) -> float | None:
        """The time that a mix takes beside the base alone, over the floor of its adapters."""
        mixed, base, floor = (OURS, mix, most), (OURS, BASE, most), (ADAPTER_FLOOR, mix, most)
        if mixed not in cells:
            return None
        each = ((r.seconds[mixed] - r.seconds[base]) / r.seconds[floor] for r in rounds)
        return round(statistics.median(each), 3)

    def of_floor(mix: str, num_rows: int) -> float | None:
        return times((OURS, mix, num_rows), (FLOOR, mix, num_rows))

    return {
        "8 adapters over base": times((OURS, EIGHT, most), (OURS, BASE, most)),
        "floor of that": times((FLOOR, EIGHT, most), (FLOOR, BASE, most)),
        "base over transformers": times((OURS, BASE, most), (Transformers.name, BASE, most)),
        "base over OpenVINO": times((OURS, BASE, most), (OpenVino.name, BASE, most)),
        "8 adapters over PEFT": times((OURS, EIGHT, most), (Peft.name, EIGHT, most)),
        "gRPC over in process, base": times((OverGrpc.name, BASE, most), (OURS, BASE, most)),
        "gRPC over in process, 8": times((OverGrpc.name, EIGHT, most), (OURS, EIGHT, most)),
        "extra time of 8 adapters over its floor": extra(EIGHT),
        "extra time of 32 adapters over its floor": extra(MANY),
        "share of the floor, base": of_floor(BASE, most),
        "share of the floor, 8 adapters": of_floor(EIGHT, most),
        "share of the floor, base, one row": of_floor(BASE, 1),
    }


def summary(rounds: list[Round], new_tokens: int) -> dict[str, object]:
    """Of the rounds so far: a cell's tokens a second and ratios are medians over them, and every
    list has one value of each round.
    """
    reads, multiplies = (
        [round(getattr(r.ceilings, name)) for r in rounds]
        for name in ("bytes_per_s", "multiply_adds_per_s")
    )
    return {
        "rounds": len(rounds),
        "read_bytes_per_s": round(statistics.median(reads)),
        "multiply_adds_per_s": round(statistics.median(multiplies)),
        "ceilings_by_round": {"read_bytes_per_s": reads, "multiply_adds_per_s": multiplies},
        "ratios": ratios(rounds),
        "cells": [
            {
                "side": side, "mix": mix, "rows": num_rows, "tokens_per_s": round(speed, 1),
                "seconds": [round(r.seconds[side, mix, num_rows], 3) for r in rounds],
            }
            for (side, mix, num_rows), speed in sorted(speeds(rounds, new_tokens).items())
        ],
    }  # fmt: skip


def show(result: dict, console: Console) -> None:
    """A row for every side and mix, a column for every number of rows; then the ratios."""
    rows = sorted({cell["rows"] for cell in result["cells"]})
    lines: dict[tuple[str, str], dict[int, float]] = {}
    for cell in result["cells"]:
        lines.setdefault((cell["side"], cell["mix"]), {})[cell["rows"]] = cell["tokens_per_s"]
    table = Table("", "adapters", *map(rows_of, rows))
    table.title = f"output tokens/s, medians of {_num_rounds(result['rounds'])}"
    for (side, mix), speed in lines.items():
        table.add_row(side, mix, *(f"{speed[n]:.0f}" if n in speed else "" for n in rows))
    console.print(table)
    say(console, f"at {rows_of(rows[-1])}, medians of ratios within one round:")
    for name, ratio in result["ratios"].items():
        if ratio is not None:
            say(console, f"{name}: {ratio}")


def rows_of(number: int) -> str:
    return f"{number} rows" if number > 1 else "1 row"


def _num_rounds(number: int) -> str:
    return f"{number} rounds" if number > 1 else "1 round"


@contextlib.contextmanager
def opened(
    args: argparse.Namespace, base: Base, folder: Path, console: Console
) -> Iterator[list[Side]]:
    """Every side, until the context ends."""
    say(console, f"making {len(RANKS)} adapters")
    folders = write_random_adapters(base, folder, RANKS)
    alike = folders[:NUM_ALIKE]
    say(console, "loading them into the engine")
    sides: list[Side] = [Ours(base, folders)]
    if args.peers:
        say(console, "loading transformers and PEFT")
        dense = dense_model(base)
        sides += [Transformers(dense), Peft(dense, alike)]
    for peer in args.peer:
        name, _, where = peer.partition("=")
        is_url = where.startswith(("http://", "https://"))
        sides.append(OverOpenai(name, where) if is_url else OpenVino(where))
    with contextlib.ExitStack() as stack:
        if args.grpc:
            say(console, "starting the server")
            sides.insert(1, stack.enter_context(OverGrpc.serving(args, folder, alike)))
        yield sides


def measure(
    workload: Workload, args: argparse.Namespace, facts: dict[str, object], path: Path,
    console: Console,
) -> None:  # fmt: skip
    """Write the result so far after every round."""
    found = []
    for each in turns.rounds(workload.turns(), args.rounds, console):
        found.append(workload.round(each))
        machine.keep({**facts, **summary(found, args.new_tokens)}, path)
        say(console, f"{_num_rounds(len(found))} in {path}")


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--base", default="smollm2-135m")
    parser.add_argument("--rows", type=int, nargs="+", choices=ROWS, default=ROWS)
    parser.add_argument("--prompt-tokens", type=int, default=90)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", default="auto", help="of the base; auto: the fastest here")
    parser.add_argument(
        "--dequantized-cache", action=argparse.BooleanOptionalAction, default=True,
        help="in float32: keep a dequantised copy of the base",
    )  # fmt: skip
    parser.add_argument("--grpc", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument(
        "--no-peers", dest="peers", action="store_false",
        help="loramux and the floor alone, without transformers and PEFT",
    )  # fmt: skip
    parser.add_argument(
        "--peer", action="append", default=[], metavar="NAME=WHERE",
        help="openvino=FILE.gguf (package openvino-genai), or NAME=URL of a server of OpenAI's\n"
        "API with the same model, as `llama-server -m FILE.gguf` or `vllm serve`",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, default=machine.RESULTS)
    args = parser.parse_args()
    if args.rounds < 1:
        parser.error(f"--rounds {args.rounds}: at least 1 is wanted")
    if args.peer and not args.peers:
        parser.error(f"--no-peers leaves out what --peer {args.peer[0]} adds: give one of them")
    return args


def described(args: argparse.Namespace, base: Base) -> dict[str, object]:
    """What a result says of the run before anything is measured; the date is of its start."""
    return {
        **machine.facts(),
        "question": "output tokens a second of a batch",
        "workload": {
            **{name: value for name, value in vars(args).items() if name != "out"},
            "peer": [peer.rpartition("/")[2] for peer in args.peer],  # no paths of this machine
        },
        "openvino-genai": machine.version_of("openvino-genai"),
        "dtype": base.spec.dtype,
    }


def main() -> None:
    args, console = parsed(), Console(stderr=True)
    base = load_base(
        BaseConfig(
            model=args.base, device="cpu", dtype=args.dtype,
            dequantized_cache=args.dequantized_cache,
        )
    )  # fmt: skip
    facts = described(args, base)
    path = machine.result_file("serving", facts["date"], args.out)
    with turns.kept(path, console), tempfile.TemporaryDirectory() as folder:
        with opened(args, base, Path(folder), console) as sides:
            measure(Workload.of(args, base, sides), args, facts, path, console)
    result = json.loads(path.read_text())
    show(result, console)
    say(console, f"picture: {draw(path)}")
    print(json.dumps(result))
    if result["rounds"] < args.rounds:
        raise SystemExit(turns.INTERRUPTED)


if __name__ == "__main__":
    main()

"""How fast are batches of many adapters, beside the base alone, other servers and the machine's
floor, from one row to 32?

Batches of 1 to 32 requests of 90 prompt and 64 new tokens on SmolLM2-135M, on the base, under one
adapter, under eight of rank 16 and the base in turn, under 32 of ranks 8 to 64, and under those by
Zipf's law. In the same run, by turns in an order drawn anew each round: our engine in this process,
our server over gRPC with its client on the same cores, transformers and PEFT on the dequantised
base in the same dtype, and whoever is named with --peer. Figures are output tokens a second of a
whole batch, prompts included, medians over the rounds. No prompt is found in a prefix cache.

The floor is the least time by this machine's own ceilings, read bandwidth and the rate of a large
matrix product, both measured in the same run: see `bench/serving_load.py`. Written are the result
as JSON, which is also the last line printed, and a picture of it.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import statistics
import tempfile
from pathlib import Path

from rich.console import Console
from rich.progress import track
from rich.table import Table

from bench import machine
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
from lora_runtime.base.loader import Base, load_base
from lora_runtime.config import BaseConfig

Cell = tuple[str, str, int]
"""Side, mix, number of rows."""


def measured(
    sides: list[Side], batches: dict[tuple[str, int], Batch], num_rounds: int, console: Console
) -> dict[Cell, list[float]]:
    """Seconds of every cell in each round; a round before, which is not counted, warms all up."""
    order = [(side, *cell) for side in sides for cell in side.cells if cell in batches]
    seconds: dict[Cell, list[float]] = {(side.name, *cell): [] for side, *cell in order}
    work = [number for number in range(num_rounds + 1) for _ in order]
    queue: list[tuple[Side, str, int]] = []
    for number in track(work, "batches", console=console):
        if not queue:
            queue = random.Random(number).sample(order, len(order))
        side, mix, num_rows = queue.pop()
        found = side.run(batches[mix, num_rows])
        if number:
            seconds[side.name, mix, num_rows].append(found)
    return seconds


def speeds(
    seconds: dict[Cell, list[float]], floors: dict[tuple[str, int], float], new_tokens: int
) -> dict[Cell, float]:
    """Output tokens a second of every cell by the median, and of the floors."""
    medians = {cell: statistics.median(values) for cell, values in seconds.items()}
    medians |= {(FLOOR, *place): value for place, value in floors.items()}
    return {cell: cell[2] * new_tokens / value for cell, value in medians.items()}


def ratios(
    seconds: dict[Cell, list[float]],
    floors: dict[tuple[str, int], float],
    adapter_floors: dict[tuple[str, int], float],
) -> dict:
    """What is asked of the engine, as medians over the rounds of ratios within one round."""
    most = max(num_rows for _, num_rows in floors)

    def times(one: Cell, other: Cell) -> float | None:
        """How many times as fast `one` is."""
        if one not in seconds or other not in seconds:
            return None
        pairs = zip(seconds[one], seconds[other], strict=True)
        return round(statistics.median(theirs / own for own, theirs in pairs), 3)

    def extra(mix: str) -> float | None:
        """The time that a mix takes beside the base alone, over the floor of its adapters."""
        if (OURS, mix, most) not in seconds:
            return None
        pairs = zip(seconds[OURS, mix, most], seconds[OURS, BASE, most], strict=True)
        beside = statistics.median(mixed - base for mixed, base in pairs)
        return round(beside / adapter_floors[mix, most], 3)

    def of_floor(mix: str, num_rows: int) -> float | None:
        if (OURS, mix, num_rows) not in seconds:
            return None
        return round(floors[mix, num_rows] / statistics.median(seconds[OURS, mix, num_rows]), 3)

    return {
        "8 adapters over base": times((OURS, EIGHT, most), (OURS, BASE, most)),
        "floor of that": round(floors[BASE, most] / floors[EIGHT, most], 3),
        "base over transformers": times((OURS, BASE, most), (Transformers.name, BASE, most)),
        "base over OpenVINO": times((OURS, BASE, most), (OpenVino.name, BASE, most)),
        "8 adapters over PEFT": times((OURS, EIGHT, most), (Peft.name, EIGHT, most)),
        "gRPC over in process, base": times((OverGrpc.name, BASE, most), (OURS, BASE, most)),
        "gRPC over in process, 8": times((OverGrpc.name, EIGHT, most), (OURS, EIGHT, most)),
        "extra time of 8 adapters over its floor": extra(EIGHT),
        "extra time of 32 adapters over its floor": extra(MANY),
        "share of the floor, base": of_floor(BASE, most),
        "share of the floor, 8 adapters": of_floor(EIGHT, most),
        "share of the floor, one row": of_floor(BASE, 1),
    }


def show(found: dict[Cell, float], console: Console) -> None:
    """A row for every side and mix, a column for every number of rows."""
    rows = sorted({num_rows for *_, num_rows in found})
    table = Table("", "adapters", *(f"{n} rows" if n > 1 else "1 row" for n in rows))
    table.title = "output tokens/s"
    for side, mix in dict.fromkeys(cell[:2] for cell in found):
        values = [found.get((side, mix, num_rows)) for num_rows in rows]
        table.add_row(side, mix, *("" if v is None else f"{v:.0f}" for v in values))
    console.print(table)


@contextlib.contextmanager
def opened(args: argparse.Namespace, base: Base, folder: Path):
    """Every side, until the context ends."""
    folders = write_random_adapters(base, folder, RANKS)
    dense = dense_model(base)
    alike = folders[:NUM_ALIKE]
    sides: list[Side] = [Ours(base, folders), Transformers(dense), Peft(dense, alike)]
    for peer in args.peer:
        name, _, where = peer.partition("=")
        is_url = where.startswith(("http://", "https://"))
        sides.append(OverOpenai(name, where) if is_url else OpenVino(where))
    with contextlib.ExitStack() as stack:
        if args.grpc:
            sides.insert(1, stack.enter_context(OverGrpc.serving(args, folder, alike)))
        yield sides


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
        "--peer", action="append", default=[], metavar="NAME=WHERE",
        help="openvino=FILE.gguf (package openvino-genai), or NAME=URL of a server of OpenAI's\n"
        "API with the same model, as `llama-server -m FILE.gguf` or `vllm serve`",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, default=machine.RESULTS)
    return parser.parse_args()


def main() -> None:
    args, console = parsed(), Console(stderr=True)
    base = load_base(
        BaseConfig(
            model=args.base, device="cpu", dtype=args.dtype,
            dequantized_cache=args.dequantized_cache,
        )
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder, opened(args, base, Path(folder)) as sides:
        cells = {cell for side in sides for cell in side.cells if cell[1] in args.rows}
        sizes = args.prompt_tokens, args.new_tokens, base.spec.vocab_size
        batches = {cell: Batch(*cell, *sizes) for cell in cells}
        seconds = measured(sides, batches, args.rounds, console)
    ceilings = Ceilings(machine.read_bandwidth(), machine.gemm_rate(base.dtype))
    floors = {cell: ceilings.seconds(base, batch) for cell, batch in batches.items()}
    adapter_floors = {cell: ceilings.adapter_seconds(base, b) for cell, b in batches.items()}
    found = speeds(seconds, floors, args.new_tokens)
    show(found, console)
    rows = [
        {
            "side": side, "mix": mix, "rows": num_rows, "tokens_per_s": round(speed, 1),
            "seconds": [round(each, 3) for each in seconds.get((side, mix, num_rows), ())],
        }
        for (side, mix, num_rows), speed in sorted(found.items())
    ]  # fmt: skip
    result = {
        **machine.facts(),
        "question": "output tokens a second of a batch",
        "workload": {
            **{name: value for name, value in vars(args).items() if name != "out"},
            "peer": [peer.rpartition("/")[2] for peer in args.peer],  # no paths of this machine
        },
        "openvino-genai": machine.version_of("openvino-genai"),
        "dtype": base.spec.dtype,
        "read_bytes_per_s": round(ceilings.bytes_per_s),
        "multiply_adds_per_s": round(ceilings.multiply_adds_per_s),
        "ratios": ratios(seconds, floors, adapter_floors),
        "cells": rows,
    }
    path = machine.save("serving", result, args.out)
    draw(found, path.with_suffix(".png"), f"{args.base}, {base.spec.dtype}, {result['cpu']}")


if __name__ == "__main__":
    main()

"""What do loads cost the streams that run: time between tokens with and without them, over gRPC.

One `loramux serve` in a process of its own; streams without end on the base and one adapter. Rounds
of quiet, loads of adapters without a parity record, quiet, and loads of adapters with one, as the
trainer writes it, which a load checks by forwards of base and adapter. Each adapter is unloaded
before the next is loaded. Milliseconds between two tokens are the client's. What is given is of
all rounds together, and of each the ratio of its p99 to that of the quiet just before. The last
line printed is the result as JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench import machine, streams
from bench.random_adapters import write_random_adapters, write_records
from bench.served import serving
from lora_runtime.base.loader import load_base
from lora_runtime.config import BaseConfig
from lora_runtime.kernels import torch_threads
from loramux.server.client import AsyncClient

KINDS = ("without a record", "with a record")


@dataclass(slots=True)
class Measured:
    """What was measured of one kind of adapters, in seconds; of gaps a list for each round."""

    load_s: list[float] = field(default_factory=list)
    quiet: list[list[float]] = field(default_factory=list)
    loading: list[list[float]] = field(default_factory=list)

    def figures(self) -> dict[str, Any]:
        pairs = zip(self.loading, self.quiet, strict=True)
        ratios = [p99(loading) / p99(quiet) for loading, quiet in pairs]
        return {
            "load_ms": {
                "median": _ms(statistics.median(self.load_s)),
                "p95": _ms(machine.percentile(self.load_s, 95)),
            },
            "quiet_ms": _gaps_ms(self.quiet),
            "loading_ms": _gaps_ms(self.loading),
            "p99_ratio": {
                "median": round(statistics.median(ratios), 3),
                "rounds": [round(ratio, 3) for ratio in ratios],
            },
        }


def p99(gaps: Sequence[float]) -> float:
    return machine.percentile(gaps, 99)


def _gaps_ms(rounds: Sequence[Sequence[float]]) -> dict[str, float]:
    gaps = [gap for one in rounds for gap in one]
    return {"p50": _ms(statistics.median(gaps)), "p99": _ms(p99(gaps)), "largest": _ms(max(gaps))}


def _ms(seconds: float) -> float:
    return round(1000 * seconds, 2)


async def measure(
    args: argparse.Namespace,
    address: str,
    folders: Mapping[str, Sequence[Path]],
    say: Callable[[str], None],
) -> dict[str, Measured]:
    """Measure all rounds; of each kind the first adapter is not loaded in them."""
    gaps: list[float] = []
    found = {kind: Measured() for kind in KINDS}
    async with AsyncClient(address) as client:
        await client.load_adapter("first", str(folders[KINDS[0]][0]))
        running = [
            streams.decode(
                client, gaps, token_ids=[5 + index, 9, 11], temperature=0.0,
                adapter="first" if index % 2 else None,
            )
            for index in range(args.streams)
        ]  # fmt: skip
        tasks = [asyncio.create_task(stream) for stream in running]
        await asyncio.sleep(args.settle_s)
        for index in range(args.rounds):
            for kind, one in found.items():
                gaps.clear()
                await asyncio.sleep(args.quiet_s)
                one.quiet.append(list(gaps))
                gaps.clear()
                one.load_s += await _loads(client, folders[kind][1:])
                one.loading.append(list(gaps))
                ratio = p99(one.loading[-1]) / p99(one.quiet[-1])
                say(f"round {index + 1} of {args.rounds}, {kind}: p99 × {ratio:.2f}")
        await streams.end(tasks)
    return found


async def _loads(client: AsyncClient, folders: Sequence[Path]) -> list[float]:
    """The seconds that each load took."""
    load_s = []
    for folder in folders:
        begun = time.perf_counter()
        await client.load_adapter(folder.name, str(folder))
        load_s.append(time.perf_counter() - begun)
        await client.unload_adapter(folder.name)
    return load_s


def write_adapters(args: argparse.Namespace, folder: Path) -> dict[str, list[Path]]:
    """For each kind one more than is loaded."""
    base = load_base(BaseConfig(model=args.base))
    count = args.loads + 1
    folders = write_random_adapters(base, folder, [args.rank] * (2 * count))
    plain, recorded = folders[:count], folders[count:]
    write_records(base, recorded)
    return dict(zip(KINDS, (plain, recorded), strict=True))


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--base", default="smollm2-135m", help="name or folder (%(default)s)")
    parser.add_argument(
        "--streams", type=int, default=8, help="that run all the time (%(default)s)"
    )
    parser.add_argument(
        "--loads", type=int, default=20, help="of each kind, in each round (%(default)s)"
    )
    parser.add_argument("--rank", type=int, default=16, help="of the adapters (%(default)s)")
    parser.add_argument(
        "--rounds", type=int, default=5, help="of quiet, loads without, quiet, loads with a record"
    )
    parser.add_argument(
        "--quiet-s", type=float, default=5.0, help="seconds of each quiet part (%(default)s)"
    )
    parser.add_argument(
        "--settle-s", type=float, default=3.0, help="seconds before the first one (%(default)s)"
    )
    parser.add_argument("--out", type=Path, default=machine.RESULTS, help="folder of the result")
    return parser.parse_args()


def show(found: Mapping[str, dict[str, Any]], console: Console) -> None:
    """A row for each kind of adapters, in milliseconds."""
    table = Table("", "a load, median", "p95", title="milliseconds")
    for when in ("quiet", "while loading"):
        table.add_column(f"between two tokens, {when}: p50, p99, largest")
    table.add_column("p99 beside quiet, median of rounds")
    for kind, figures in found.items():
        gaps = (figures[when] for when in ("quiet_ms", "loading_ms"))
        table.add_row(
            kind,
            *(f"{ms:.0f}" for ms in figures["load_ms"].values()),
            *(", ".join(f"{ms:.1f}" for ms in own.values()) for own in gaps),
            f"{figures['p99_ratio']['median']:.2f}",
        )
    console.print(table)


def main() -> None:
    args = parsed()

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    facts = machine.facts()
    torch_threads.compute_alone()  # this process writes adapters, and is the client
    with tempfile.TemporaryDirectory() as name:
        say(f"writing {args.loads} adapters of each kind")
        folders = write_adapters(args, Path(name))
        with serving(args.base, Path(name), args.streams) as served:
            found = asyncio.run(measure(args, served.grpc, folders, say))
    figures = {kind: one.figures() for kind, one in found.items()}
    result = {
        **facts,
        "question": "what loads cost running streams",
        "workload": machine.asked(args),
        **{kind.replace(" ", "_"): one for kind, one in figures.items()},
    }
    show(figures, Console(stderr=True))
    machine.save("loads", result, args.out)


if __name__ == "__main__":
    main()

"""What do loads cost the streams that run: time between tokens with and without them, over gRPC.

One `loramux serve` in a process of its own; streams without end on the base and one adapter.
A quiet phase, then one in which adapters are loaded and unloaded one after another. Milliseconds
between two tokens are the client's; the last line printed is the result as JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import tempfile
import time
from pathlib import Path

from bench import machine, streams
from bench.random_adapters import write_random_adapters
from bench.served import serving
from lora_runtime.base.loader import load_base
from lora_runtime.config import BaseConfig
from loramux.server.client import AsyncClient


async def measure(args: argparse.Namespace, address: str, folders: list[Path]) -> dict[str, object]:
    gaps: list[float] = []
    load_s: list[float] = []
    async with AsyncClient(address) as client:
        await client.load_adapter("first", str(folders[0]))
        running = [
            streams.decode(
                client, gaps, token_ids=[5 + index, 9, 11], temperature=0.0,
                adapter="first" if index % 2 else None,
            )
            for index in range(args.streams)
        ]  # fmt: skip
        tasks = [asyncio.create_task(stream) for stream in running]
        await asyncio.sleep(3)
        gaps.clear()
        await asyncio.sleep(args.quiet_s)
        quiet = list(gaps)
        gaps.clear()
        for folder in folders[1:]:
            begun = time.perf_counter()
            await client.load_adapter(folder.name, str(folder))
            load_s.append(time.perf_counter() - begun)
            await client.unload_adapter(folder.name)
        loaded = list(gaps)
        await streams.end(tasks)
    p99 = [1000 * machine.percentile(each, 99) for each in (quiet, loaded)]
    return {
        "load_ms_median": round(1000 * statistics.median(load_s), 1),
        "load_ms_largest": round(1000 * max(load_s), 1),
        "quiet_ms": {"p50": round(1000 * statistics.median(quiet), 2), "p99": round(p99[0], 2)},
        "loading_ms": {"p50": round(1000 * statistics.median(loaded), 2), "p99": round(p99[1], 2)},
        "p99_ratio": round(p99[1] / p99[0], 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--base", default="smollm2-135m")
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--loads", type=int, default=20)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--quiet-s", type=float, default=10.0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        base = load_base(BaseConfig(model=args.base))
        folders = write_random_adapters(base, Path(name), [args.rank] * (args.loads + 1))
        del base
        with serving(args.base, Path(name), args.streams) as served:
            found = asyncio.run(measure(args, served.grpc, folders))
    result = {
        **machine.facts(),
        "question": "what loads cost running streams",
        "workload": vars(args),
        **found,
    }
    machine.save("loads", result)


if __name__ == "__main__":
    main()

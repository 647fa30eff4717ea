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

from bench import machine
from bench.random_adapters import write_random_adapters
from bench.served import serving
from lora_runtime.base.loader import load_base
from lora_runtime.config import BaseConfig
from loramux.server.client import AsyncClient


async def listen(client: AsyncClient, index: int, gaps: list[float], stop: asyncio.Event) -> None:
    """Stream after stream, until told to stop; notes the seconds between two tokens."""
    adapter = "first" if index % 2 else None
    while not stop.is_set():
        last = None
        async for event in client.generate(
            token_ids=[5 + index, 9, 11], adapter=adapter, max_tokens=400, temperature=0.0,
            ignore_eos=True,
        ):  # fmt: skip
            now = time.perf_counter()
            if last is not None and event.delta.token_ids:
                gaps.append(now - last)
            last = now
            if stop.is_set():
                break


async def measure(args: argparse.Namespace, address: str, folders: list[Path]) -> dict[str, object]:
    gaps: list[float] = []
    load_s: list[float] = []
    async with AsyncClient(address) as client:
        await client.load_adapter("first", str(folders[0]))
        stop = asyncio.Event()
        streams = [asyncio.create_task(listen(client, i, gaps, stop)) for i in range(args.streams)]
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
        stop.set()
        for stream in streams:
            if stream.done():
                stream.result()  # the streams ended before the measurement did
            stream.cancel()
        await asyncio.gather(*streams, return_exceptions=True)
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

"""How long does a short prompt wait for its first token while long ones are computed, over gRPC?

One `loramux serve` in a process of its own. Streams of long prompts, one after another, keep every
step full; one more stream decodes, so that the time between two of its tokens is that of a step.
Meanwhile short prompts come, one at a time. Times are the client's; the last line printed is the
result as JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import random
import statistics
import tempfile
import time
from pathlib import Path

from bench import machine, streams
from bench.served import serving
from loramux.server.client import AsyncClient

VOCAB = range(5, 256)


def prompt(seed: int, num_tokens: int) -> list[int]:
    """Tokens that no other prompt begins with."""
    return random.Random(seed).choices(VOCAB, k=num_tokens)


async def first_token_s(client: AsyncClient, token_ids: list[int]) -> float:
    """Seconds until the only token of an answer."""
    begun = time.perf_counter()
    async for event in client.generate(token_ids=token_ids, max_tokens=1, ignore_eos=True):
        if event.delta.token_ids:
            return time.perf_counter() - begun
    raise RuntimeError("an answer without a token")


async def prefill(client: AsyncClient, seeds: itertools.count[int], num_tokens: int) -> None:
    """One long prompt after another, until cancelled."""
    while True:
        await first_token_s(client, prompt(next(seeds), num_tokens))


async def measure(args: argparse.Namespace, address: str) -> dict[str, object]:
    gaps: list[float] = []
    seeds, pauses = itertools.count(), random.Random(0)
    async with AsyncClient(address) as client:
        alone = [
            await first_token_s(client, prompt(next(seeds), args.short_tokens)) for _ in range(10)
        ]
        tasks = [asyncio.create_task(streams.decode(client, gaps, token_ids=[7]))]
        tasks += [
            asyncio.create_task(prefill(client, seeds, args.long_tokens))
            for _ in range(args.long_prompts)
        ]
        await asyncio.sleep(args.pause_s * 4)
        gaps.clear()
        waits = []
        for _ in range(args.short_prompts):
            await asyncio.sleep(pauses.uniform(0, 2 * args.pause_s))
            waits.append(await first_token_s(client, prompt(next(seeds), args.short_tokens)))
        await streams.end(tasks)
    step_s, p99_s = statistics.median(gaps), machine.percentile(waits, 99)
    return {
        "alone_ms": round(1000 * statistics.median(alone), 1),
        "step_ms": round(1000 * step_s, 1),
        "first_token_ms": {
            "p50": round(1000 * statistics.median(waits), 1),
            "p99": round(1000 * p99_s, 1),
        },
        "in_steps": {
            "p50": round(statistics.median(waits) / step_s, 2),
            "p99": round(p99_s / step_s, 2),
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--base", default="smollm2-135m")
    parser.add_argument("--long-prompts", type=int, default=4, help="at a time")
    parser.add_argument("--long-tokens", type=int, default=1500)
    parser.add_argument("--short-prompts", type=int, default=100, help="in all")
    parser.add_argument("--short-tokens", type=int, default=20)
    parser.add_argument(
        "--pause-s", type=float, default=0.5, help="between two short ones, the mean"
    )
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, serving(args.base, Path(name), 32) as served:
        found = asyncio.run(measure(args, served.grpc))
    question = {"question": "first tokens beside long prompts", "workload": vars(args)}
    machine.save("first_tokens", {**machine.facts(), **question, **found})


if __name__ == "__main__":
    main()

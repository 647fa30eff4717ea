"""What do clients that read slowly cost those that do not, over gRPC?

One `loramux serve` in a process of its own. A batch of streams is read as fast as it comes, in turn
alone and beside many whose answers are made but for the most part unread: their clients take one
message and pause. Output tokens a second of the batch, prompts included; the last line printed is
the result as JSON, with the seconds from the server's start until it was ready.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import statistics
import sys
import tempfile
import time
from pathlib import Path

import httpx
from prometheus_client.parser import text_string_to_metric_families

from bench import machine
from bench.first_tokens import prompt
from bench.served import Served, serving
from bench.streams import end
from loramux.server.client import AsyncClient


async def fast_batch(
    client: AsyncClient, seeds: itertools.count[int], args: argparse.Namespace
) -> float:
    """Output tokens a second."""

    async def read(token_ids: list[int]) -> None:
        async for _ in client.generate(
            token_ids=token_ids, max_tokens=args.new_tokens, ignore_eos=True
        ):
            pass

    begun = time.perf_counter()
    prompts = [prompt(next(seeds), args.prompt_tokens) for _ in range(args.streams)]
    await asyncio.gather(*map(read, prompts))
    return args.streams * args.new_tokens / (time.perf_counter() - begun)


async def read_slowly(client: AsyncClient, seed: int, args: argparse.Namespace) -> None:
    """Its answers one after another, so that it reads as long as it is not cancelled."""
    while True:
        async for _ in client.generate(
            token_ids=prompt(seed, 4), max_tokens=args.new_tokens, ignore_eos=True
        ):
            await asyncio.sleep(args.pause_s)


async def until_made(http: httpx.AsyncClient, limit_s: float) -> None:
    """Returns once the server computes nothing: answers are made, read or not. Raises TimeoutError
    where that takes longer than `limit_s`.
    """
    async with asyncio.timeout(limit_s):
        while await num_computed(http):
            await asyncio.sleep(1)


async def num_computed(http: httpx.AsyncClient) -> int:
    """Requests that run or wait."""
    text = (await http.get("/metrics")).raise_for_status().text
    values = {
        family.name: sum(sample.value for sample in family.samples)
        for family in text_string_to_metric_families(text)
    }
    return int(values["vllm:num_requests_running"] + values["vllm:num_requests_waiting"])


async def measure(args: argparse.Namespace, served: Served) -> dict[str, object]:
    seeds = itertools.count()
    alone, beside = [], []
    async with (
        AsyncClient(served.grpc) as client,
        AsyncClient(served.grpc) as other,
        httpx.AsyncClient(base_url=f"http://{served.http}") as http,
    ):
        await fast_batch(client, seeds, args)  # warms up
        for number in range(args.rounds):
            alone.append(await fast_batch(client, seeds, args))
            slow = [
                asyncio.create_task(read_slowly(other, next(seeds), args))
                for _ in range(args.slow_streams)
            ]
            await asyncio.sleep(1)  # so that all have begun
            await until_made(http, args.patience_s)
            beside.append(await fast_batch(client, seeds, args))
            await end(slow)
            print(f"round {number + 1} of {args.rounds}: {beside[-1] / alone[-1]:.2f}", flush=True)
    ratios = [with_slow / without for with_slow, without in zip(beside, alone, strict=True)]
    return {
        "alone_tokens_per_s": round(statistics.median(alone), 1),
        "beside_tokens_per_s": round(statistics.median(beside), 1),
        "ratio": {
            "median": round(statistics.median(ratios), 3),
            "rounds": [round(ratio, 3) for ratio in ratios],
        },
    }


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--base", default="smollm2-135m", help="name or folder (%(default)s)")
    parser.add_argument(
        "--streams", type=int, default=32, help="whose speed is measured (%(default)s)"
    )
    parser.add_argument("--prompt-tokens", type=int, default=90, help="of each (%(default)s)")
    parser.add_argument("--new-tokens", type=int, default=64, help="of each (%(default)s)")
    parser.add_argument(
        "--slow-streams", type=int, default=200, help="that read slowly beside them (%(default)s)"
    )
    parser.add_argument(
        "--pause-s", type=float, default=10.0, help="after each message that a slow client takes"
    )
    parser.add_argument(
        "--patience-s", type=float, default=300.0,
        help="how long the answers of slow clients may take to be made (%(default)s)",
    )  # fmt: skip
    parser.add_argument("--rounds", type=int, default=5, help="alone and beside (%(default)s)")
    parser.add_argument("--out", type=Path, default=machine.RESULTS, help="folder of the result")
    return parser.parse_args()


def main() -> None:
    args, facts = parsed(), machine.facts()
    with tempfile.TemporaryDirectory() as name:
        begun = time.monotonic()
        with serving(args.base, Path(name), 64) as served:
            ready_s = round(time.monotonic() - begun, 2)
            found = asyncio.run(measure(args, served))
    result = {
        **facts,
        "question": "what clients that read slowly cost others",
        "workload": machine.asked(args),
        "ready_s": ready_s,
        **found,
    }
    print(
        f"{found['alone_tokens_per_s']} tokens/s alone, {found['beside_tokens_per_s']} beside "
        f"{args.slow_streams} slow streams: {found['ratio']['median']}; ready in {ready_s} s",
        file=sys.stderr,
    )
    machine.save("slow_readers", result, args.out)


if __name__ == "__main__":
    main()

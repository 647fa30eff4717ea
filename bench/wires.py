"""What does a wire cost: gRPC, HTTP by a client in C and by OpenAI's, and the engine without any?

One `loramux serve` in a process of its own. A load is 32 streams at once, each of 90 prompt and 64
new tokens, in turn for the base and 4 adapters; then a few streams alone: each prompt goes over
every wire in turn, and no wire finds what another left in the prefix cache (`cache_salt`). Every
wire takes the same load in every round, beginning with another one each time, from this process,
which has a client for each. Tokens and tokens a second are those of whole loads; the time to the
first token is the client's, to the first event that has text (the engine's: to its first token).

Ratios are medians over the rounds of the ratio within one round; of streams alone, differences of
first texts are medians over all pairs of a stream and the same prompt's over gRPC. Seconds of
processor are per 1,000 tokens: of the server's process, of its event loop's thread, in which both
wires are written, and of this process. The last line printed is the result as JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import statistics
import tempfile
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypedDict

import aiohttp
import openai
import torch

from bench import machine
from bench.random_adapters import write_random_adapters
from bench.served import START_S, Served, serving
from lora_runtime.base.loader import load_base
from lora_runtime.config import BaseConfig, EngineConfig, SchedulerConfig
from lora_runtime.core import AdapterUse, Request, SamplingParams
from lora_runtime.engine.client import EngineClient
from lora_runtime.engine.loop import start_engine
from loramux.server.client import AsyncClient

WIRES = ["grpc", "http", "openai", "engine"]
PACKAGES = ("grpcio", "uvicorn", "h11", "aiohttp", "openai")


@dataclass(frozen=True, slots=True)
class Prompt:
    """One request: which model continues which tokens; None is the base. Nothing is found that the
    cache has of them under another salt.
    """

    adapter: str | None
    token_ids: list[int]
    salt: str


@dataclass(frozen=True, slots=True)
class Answer:
    """When its first text came (its end, if it has none), on time.perf_counter, and how many
    tokens it has.
    """

    first: float
    num_tokens: int


class Comparison(TypedDict):
    """A median, and what each round has given."""

    median: float
    rounds: list[float]


Wire = Callable[[Prompt, int], Awaitable[Answer]]
"""Streams one answer of so many tokens, greedily and past the tokens that end one."""


class OverGrpc:
    """This project's own client."""

    def __init__(self, client: AsyncClient) -> None:
        self._client = client

    async def __call__(self, prompt: Prompt, num_tokens: int) -> Answer:
        first, count = 0.0, 0
        async for event in self._client.generate(
            token_ids=prompt.token_ids, adapter=prompt.adapter, max_tokens=num_tokens,
            temperature=0.0, ignore_eos=True, cache_salt=prompt.salt,
        ):  # fmt: skip
            count += len(event.delta.token_ids)
            first = first or (time.perf_counter() if event.delta.text else 0.0)
        return Answer(first or time.perf_counter(), count)


class OverHttp:
    """A client that, like gRPC's, is written in C, and splits the events and reads their JSON."""

    def __init__(self, client: aiohttp.ClientSession, base: str) -> None:
        self._client = client
        self._base = base

    async def __call__(self, prompt: Prompt, num_tokens: int) -> Answer:
        body = {
            "model": prompt.adapter or self._base, "prompt": prompt.token_ids,
            "max_tokens": num_tokens, "temperature": 0.0, "ignore_eos": True, "stream": True,
            "stream_options": {"include_usage": True}, "cache_salt": prompt.salt,
        }  # fmt: skip
        first, count = 0.0, 0
        async with self._client.post("/v1/completions", json=body) as response:
            response.raise_for_status()
            async for event in events_of(response):
                if event["choices"]:
                    first = first or (time.perf_counter() if event["choices"][0]["text"] else 0.0)
                elif event["usage"]:
                    count = event["usage"]["completion_tokens"]
        return Answer(first or time.perf_counter(), count)


class OverOpenai:
    """OpenAI's own package."""

    def __init__(self, client: openai.AsyncOpenAI, base: str) -> None:
        self._client = client
        self._base = base

    async def __call__(self, prompt: Prompt, num_tokens: int) -> Answer:
        stream = await self._client.completions.create(
            model=prompt.adapter or self._base, prompt=prompt.token_ids, max_tokens=num_tokens,
            temperature=0.0, stream=True, stream_options={"include_usage": True},
            extra_body={"ignore_eos": True, "cache_salt": prompt.salt},
        )  # fmt: skip
        first, count = 0.0, 0
        async for chunk in stream:
            if chunk.choices:
                first = first or (time.perf_counter() if chunk.choices[0].text else 0.0)
            elif chunk.usage:
                count = chunk.usage.completion_tokens
        return Answer(first or time.perf_counter(), count)


class InProcess:
    """The engine, asked without text and without a wire."""

    def __init__(self, engine: EngineClient, digests: dict[str, str]) -> None:
        self._engine = engine
        self._digests = digests

    async def __call__(self, prompt: Prompt, num_tokens: int) -> Answer:
        request = Request(
            request_id=uuid.uuid4().hex,
            prompt_token_ids=tuple(prompt.token_ids),
            sampling=SamplingParams(max_tokens=num_tokens, temperature=0.0),
            adapters=(AdapterUse(digest=self._digests[prompt.adapter]),) if prompt.adapter else (),
            cache_salt=prompt.salt,
        )
        first, count = 0.0, 0
        async for output in self._engine.generate(request):
            count += len(output.token_ids)
            first = first or (time.perf_counter() if output.token_ids else 0.0)
        return Answer(first or time.perf_counter(), count)


async def events_of(response: aiohttp.ClientResponse) -> AsyncIterator[dict[str, Any]]:
    """The JSON values of a stream of server-sent events. Raises RuntimeError at an error."""
    rest = b""
    async for piece in response.content.iter_any():
        *whole, rest = (rest + piece).split(b"\n\n")
        for data in whole:
            if data == b"data: [DONE]":
                return
            event = json.loads(data.removeprefix(b"data: "))
            if "error" in event:
                raise RuntimeError(f"the server says: {event['error']}")
            yield event


@dataclass(slots=True)
class Figures:
    """What one wire has shown: lists have an item a round or, of first tokens, a stream."""

    full_tokens_per_s: list[float] = field(default_factory=list)
    full_first_ms: list[list[float]] = field(default_factory=list)
    alone_tokens_per_s: list[float] = field(default_factory=list)
    alone_first_ms: list[list[float]] = field(default_factory=list)
    num_tokens: int = 0
    server_cpu_s: float = 0.0
    loop_cpu_s: float = 0.0
    client_cpu_s: float = 0.0

    def summary(self) -> dict[str, float]:
        """Medians over the rounds, quantiles over all streams, and seconds per 1,000 tokens. The
        best are what the machine gives when nothing else wants its processors.
        """
        found = {}
        for name in ("full", "alone"):
            first = sorted(ms for each in getattr(self, f"{name}_first_ms") for ms in each)
            found[f"{name}_tokens_per_s"] = statistics.median(getattr(self, f"{name}_tokens_per_s"))
            found[f"{name}_best_tokens_per_s"] = max(getattr(self, f"{name}_tokens_per_s"))
            found[f"{name}_first_least_ms"] = first[0]
            found[f"{name}_first_p50_ms"] = statistics.median(first)
            found[f"{name}_first_p99_ms"] = machine.percentile(first, 99)
        for name in ("server", "loop", "client"):
            found[f"{name}_cpu_s"] = 1000 * getattr(self, f"{name}_cpu_s") / self.num_tokens
        return {name: round(value, 3) for name, value in found.items()}


class Rounds:
    """Runs the same loads over every wire, and keeps what each shows."""

    def __init__(
        self, args: argparse.Namespace, server: Served, wires: dict[str, Wire], vocab_size: int
    ) -> None:
        self._args, self._server, self._wires = args, server, wires
        self._vocab_size = vocab_size
        self._generator = torch.Generator().manual_seed(0)
        self._random = random.Random(0)
        self.figures = {name: Figures() for name in wires}

    async def run(self) -> None:
        """Warm up with one round, and measure the others."""
        names = list(self._wires)
        for number in range(self._args.rounds + 1):
            order = names[number % len(names) :] + names[: number % len(names)]
            figures = self.figures if number else {name: Figures() for name in names}
            for name in order:
                await self._all_at_once(name, figures[name])
            await self._one_by_one(figures)
            for name in order:
                rate, first = figures[name].full_tokens_per_s[-1], figures[name].alone_first_ms[-1]
                print(
                    f"round {number} {name}: {rate:.1f} tokens/s, first text of one alone "
                    f"{statistics.median(first):.1f} ms; load {os.getloadavg()[0]:.1f}",
                    flush=True,
                )

    async def _all_at_once(self, name: str, figures: Figures) -> None:
        """A whole load over one wire."""
        prompts = self._prompts(name)[: self._args.requests]
        before, client = self._server.cpu_s(), time.process_time()
        start = time.perf_counter()
        first = await asyncio.gather(*(self._first_ms(name, prompt) for prompt in prompts))
        num_tokens = self._args.requests * self._args.new_tokens
        figures.full_tokens_per_s.append(num_tokens / (time.perf_counter() - start))
        figures.full_first_ms.append(first)
        after = self._server.cpu_s()
        figures.client_cpu_s += time.process_time() - client
        figures.server_cpu_s += after[0] - before[0]
        figures.loop_cpu_s += after[1] - before[1]
        figures.num_tokens += num_tokens

    async def _one_by_one(self, figures: dict[str, Figures]) -> None:
        """Streams alone. The machine's speed changes within seconds, so that each prompt goes over
        all wires before the next one; in an order of its own, because whoever comes after the
        engine in this process finds the processor's caches full of it.
        """
        seconds = dict.fromkeys(figures, 0.0)
        first: dict[str, list[float]] = {name: [] for name in figures}
        for prompt in self._prompts("")[: self._args.alone]:
            for name in self._random.sample(list(figures), len(figures)):
                start = time.perf_counter()
                first[name].append(await self._first_ms(name, replace(prompt, salt=name)))
                seconds[name] += time.perf_counter() - start
        num_tokens = self._args.alone * self._args.new_tokens
        for name, figure in figures.items():
            figure.alone_tokens_per_s.append(num_tokens / seconds[name])
            figure.alone_first_ms.append(first[name])

    async def _first_ms(self, name: str, prompt: Prompt) -> float:
        """Milliseconds to the first text of a stream, which is read to its end."""
        start = time.perf_counter()
        answer = await self._wires[name](prompt, self._args.new_tokens)
        if answer.num_tokens != self._args.new_tokens:
            raise RuntimeError(f"{answer.num_tokens} tokens of {self._args.new_tokens} over {name}")
        return 1000 * (answer.first - start)

    def _prompts(self, salt: str) -> list[Prompt]:
        """New ones for every load: nothing of them is in the prefix cache."""
        shape = (max(self._args.requests, self._args.alone), self._args.prompt_tokens)
        token_ids = torch.randint(5, self._vocab_size, shape, generator=self._generator).tolist()
        names = [None, *adapter_names(self._args)]
        return [Prompt(names[i % len(names)], ids, salt) for i, ids in enumerate(token_ids)]


def adapter_names(args: argparse.Namespace) -> list[str]:
    return [f"adapter-{index}" for index in range(args.adapters)]


@contextlib.asynccontextmanager
async def open_wires(
    args: argparse.Namespace, server: Served, folder: Path
) -> AsyncIterator[dict[str, Wire]]:
    """A client for each wire, once the server has the adapters."""
    async with contextlib.AsyncExitStack() as stack:
        grpc = await stack.enter_async_context(AsyncClient(server.grpc))
        for name in adapter_names(args):
            await grpc.load_adapter(name, str(folder / name))
        base = (await grpc.server_info()).base.name
        url = f"http://{server.http}"
        http = aiohttp.ClientSession(
            url, connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(START_S)
        )
        openai_client = openai.AsyncOpenAI(
            base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=START_S
        )
        wires: dict[str, Wire] = {
            "grpc": OverGrpc(grpc),
            "http": OverHttp(await stack.enter_async_context(http), base),
            "openai": OverOpenai(await stack.enter_async_context(openai_client), base),
        }
        if "engine" in args.wires:
            config = EngineConfig(
                base=BaseConfig(model=args.base),
                scheduler=SchedulerConfig(max_num_seqs=args.requests),
            )
            engine = await asyncio.to_thread(start_engine, config)
            stack.push_async_callback(engine.close, drain_s=0)
            loaded = {n: await engine.load_adapter(folder / n) for n in adapter_names(args)}
            wires["engine"] = InProcess(engine, {n: a.digest for n, a in loaded.items()})
        yield {name: wire for name, wire in wires.items() if name in {"grpc", *args.wires}}


def against_grpc(figures: dict[str, Figures], name: str) -> dict[str, Comparison]:
    """A wire beside gRPC: ratios of tokens a second, differences of first texts."""
    own, grpc = figures[name], figures["grpc"]
    found: dict[str, list[float]] = {}
    for kind in ("full_tokens_per_s", "alone_tokens_per_s"):
        pairs = zip(getattr(own, kind), getattr(grpc, kind), strict=True)
        found[kind] = [a / b for a, b in pairs]
    rounds = zip(own.full_first_ms, grpc.full_first_ms, strict=True)
    found["full_first_ms"] = [statistics.median(a) - statistics.median(b) for a, b in rounds]
    rounds = zip(own.alone_first_ms, grpc.alone_first_ms, strict=True)
    apart = [[x - y for x, y in zip(a, b, strict=True)] for a, b in rounds]
    found["alone_first_ms"] = [statistics.median(each) for each in apart]
    medians = {kind: statistics.median(values) for kind, values in found.items()}
    medians["alone_first_ms"] = statistics.median(ms for each in apart for ms in each)
    return {
        kind: {"median": round(medians[kind], 3), "rounds": [round(value, 3) for value in values]}
        for kind, values in found.items()
    }


def print_table(
    summaries: dict[str, dict[str, float]], ratios: dict[str, dict[str, Comparison]]
) -> None:
    heads = list(next(iter(summaries.values())))
    print("| wire | " + " | ".join(heads) + " | × grpc, full | × grpc, alone |")
    print("|---" * (len(heads) + 3) + "|")
    for name, summary in summaries.items():
        ratio = [
            f"{ratios[name][f'{kind}_tokens_per_s']['median']:.3f}" for kind in ("full", "alone")
        ]
        print(f"| {name} | " + " | ".join([*(f"{summary[h]:.2f}" for h in heads), *ratio]) + " |")


async def measure(args: argparse.Namespace, folder: Path) -> dict[str, object]:
    base = load_base(BaseConfig(model=args.base, device="cpu"))
    write_random_adapters(base, folder, [args.rank] * args.adapters)
    vocab_size = base.spec.vocab_size
    del base
    with serving(args.base, folder, args.requests) as server:
        async with open_wires(args, server, folder) as wires:
            rounds = Rounds(args, server, wires, vocab_size)
            await rounds.run()
    summaries = {name: figures.summary() for name, figures in rounds.figures.items()}
    ratios = {name: against_grpc(rounds.figures, name) for name in rounds.figures}
    print_table(summaries, ratios)
    return {
        **machine.facts(),
        **{package: version(package) for package in PACKAGES},
        "question": "what a wire costs",
        "load_average": [round(value, 1) for value in os.getloadavg()],
        "workload": {name: value for name, value in vars(args).items() if name != "out"},
        "wires": summaries,
        "against_grpc": ratios,
        "full_tokens_per_s": {
            name: [round(value, 1) for value in figures.full_tokens_per_s]
            for name, figures in rounds.figures.items()
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--base", default="smollm2-135m")
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--prompt-tokens", type=int, default=90)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--adapters", type=int, default=4)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--alone", type=int, default=6, help="streams one after another a round")
    parser.add_argument(
        "--wires", nargs="+", choices=WIRES, default=WIRES,
        help="grpc is always there; engine: one in this process, which takes a base's memory again",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, default=machine.RESULTS)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = asyncio.run(measure(args, Path(folder)))
    machine.save("wires", result, args.out)


if __name__ == "__main__":
    main()

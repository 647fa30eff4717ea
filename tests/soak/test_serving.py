"""Attacks on a running server: many streams, endless loads, random operations, kills, overload."""

from __future__ import annotations

import asyncio
import json
import random
import shutil
import time
from contextlib import AsyncExitStack, suppress
from dataclasses import asdict

import grpc
import pytest

from lora_runtime.errors import LoramuxError, Overloaded, Unavailable
from protos.loramux.v1 import generation_pb2
from server.client import AsyncClient
from tests.peft_adapters import write_adapter
from tests.soak.served import served
from tests.tiny import tiny_checkpoint, tiny_model
from tests.tiny_tokenizer import write_tokenizer

NUM_ADAPTERS = 8
NAMES = [f"a{index}" for index in range(NUM_ADAPTERS)]
GREEDY = {"temperature": 0.0, "ignore_eos": True}

pytestmark = pytest.mark.timeout(400)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("soak")
    write_tokenizer(tiny_checkpoint(folder / "base"))
    model = tiny_model("llama")
    for index, name in enumerate(NAMES):
        write_adapter(model, folder / "adapters" / name, seed=index, r=2 + index)
    return folder


async def tokens_of(client, prompt: list[int], adapter: str | None, num_tokens: int) -> tuple:
    """One stream's tokens; it begins once, ends once, and is as long as it should be."""
    stream = client.generate(token_ids=prompt, adapter=adapter, max_tokens=num_tokens, **GREEDY)
    events = [event async for event in stream]
    kinds = [event.WhichOneof("event") for event in events]
    assert kinds[0] == "started" and kinds[-1] == "finished"
    assert kinds.count("started") == kinds.count("finished") == 1
    tokens = tuple(token for event in events for token in event.delta.token_ids)
    assert len(tokens) == num_tokens
    return tokens


async def test_streams(folder, size, figure) -> None:
    """Equal requests give equal tokens, whatever they share their steps with; nothing is left."""
    num_streams = size.of(500, 40)
    async with AsyncExitStack() as stack:
        server = await stack.enter_async_context(served(folder))
        clients = [await stack.enter_async_context(AsyncClient(server.target)) for _ in range(10)]
        for name in NAMES:
            await server.client.load_adapter(name, name)
        asks = [([5 + n % 2, 9, 3], (None, *NAMES)[n % 9]) for n in range(num_streams)]
        await tokens_of(server.client, *asks[0], 24)
        before, begun = await server.holdings(), time.monotonic()
        found = await asyncio.gather(
            *(tokens_of(clients[n % 10], *ask, 24) for n, ask in enumerate(asks))
        )
        seconds = time.monotonic() - begun
        outputs: dict[str, set] = {}
        for ask, tokens in zip(asks, found, strict=True):
            outputs.setdefault(str(ask), set()).add(tokens)
        assert all(len(group) == 1 for group in outputs.values())
        assert len(set.union(*outputs.values())) > 9, "the adapters change nothing"
        await server.assert_nothing_is_left()
        after = await server.holdings()
        figure(streams=len(found), groups=len(outputs), seconds=seconds, before=asdict(before),
               after=asdict(after))  # fmt: skip
        assert after.num_files <= before.num_files + 12 and after.rss_mb < before.rss_mb + 100


async def test_cycles(folder, size, figure) -> None:
    """Loading and unloading under ever new names leaves no memory, file, thread or series."""
    wanted, done = size.of(10_000, 60), 0
    async with served(folder) as server:
        for index in range(20):
            await server.client.load_adapter(f"warm{index}", NAMES[index % NUM_ADAPTERS])
            await server.client.unload_adapter(f"warm{index}", wait=True)
        before, begun = await server.holdings(), time.monotonic()
        while done < wanted and not size.is_over():
            name = f"n{done}"
            await server.client.load_adapter(name, NAMES[done % NUM_ADAPTERS])
            await server.client.unload_adapter(name, wait=True)
            done += 1
        seconds = time.monotonic() - begun
        after = await server.holdings()
        figure(cycles=done, of=wanted, ms_each=1000 * seconds / done, before=asdict(before),
               after=asdict(after))  # fmt: skip
        assert await server.client.list_adapters() == [] and not server.errors()
        assert after.num_series == before.num_series and after.num_files <= before.num_files + 2
        assert after.num_threads <= before.num_threads + 3 and after.rss_mb < before.rss_mb + 60


class Operations:
    """Random operations of one client; what is refused must be refused by name."""

    def __init__(self, client: AsyncClient, folder, rng: random.Random) -> None:
        self.client, self.folder, self.rng = client, folder, rng
        self.refused = 0

    async def run(self) -> None:
        kind = self.rng.choice(
            ["load", "replace", "rollback", "unload", "generate", "compose", "leave", "upload"]
        )
        try:
            await asyncio.wait_for(getattr(self, kind)(), 30)
        except LoramuxError as error:
            assert type(error) is not LoramuxError, f"untyped: {error}"
            self.refused += 1

    @property
    def name(self) -> str:
        return self.rng.choice(NAMES[:5])

    async def load(self) -> None:
        await self.client.load_adapter(self.name, self.rng.choice(NAMES))

    async def replace(self) -> None:
        await self.client.load_adapter(self.name, self.rng.choice(NAMES), replace=True)

    async def rollback(self) -> None:
        await self.client.rollback_adapter(self.name)

    async def unload(self) -> None:
        rng = self.rng
        cancel, wait = rng.random() < 0.3, rng.random() < 0.5
        await self.client.unload_adapter(self.name, cancel=cancel, wait=wait)

    async def generate(self) -> None:
        await self.client.generate(
            token_ids=[5, 9, 3], adapter=self.name, max_tokens=self.rng.randrange(1, 24), **GREEDY
        ).text()

    async def compose(self) -> None:
        adapters = {name: self.rng.uniform(-1, 1) for name in self.rng.sample(NAMES[:5], 2)}
        await self.client.generate(token_ids=[7], adapters=adapters, max_tokens=4, **GREEDY).text()

    async def leave(self) -> None:
        stream = self.client.generate(token_ids=[5], adapter=self.name, max_tokens=200, **GREEDY)
        with suppress(TimeoutError):
            async with asyncio.timeout(self.rng.uniform(0, 0.05)):
                await stream.text()

    async def upload(self) -> None:
        source = self.folder / "adapters" / self.rng.choice(NAMES)
        await self.client.upload_adapter(self.name, source, replace=self.rng.random() < 0.7)


async def test_random_operations(folder, size, figure) -> None:
    """Ten clients do whatever the API offers at once; the counts agree and all is free again."""
    wanted, done = size.of(8_890, 150), 0
    async with AsyncExitStack() as stack:
        server = await stack.enter_async_context(served(folder, "--adapter-pool-bytes", "200000"))
        clients = [await stack.enter_async_context(AsyncClient(server.target)) for _ in range(10)]
        users = [Operations(c, folder, random.Random(n)) for n, c in enumerate(clients)]

        async def work(user: Operations) -> None:
            nonlocal done
            while done < wanted and not size.is_over():
                done += 1
                await user.run()

        begun = time.monotonic()
        await asyncio.gather(*map(work, users))
        for record in await server.client.list_adapters():
            with suppress(LoramuxError):
                await server.client.unload_adapter(record.name, wait=True)
        await server.assert_nothing_is_left()
        found = await server.metrics()
        left = sum(v for n, v in found.items() if n.startswith("loramux:adapters_resident"))
        figure(operations=done, of=wanted, refused=sum(user.refused for user in users),
               seconds=time.monotonic() - begun, resident=left)  # fmt: skip
        assert left == 0 and not server.errors()


async def test_kills(folder, size, figure, tmp_path) -> None:
    """kill -9 in the middle of loads and uploads: each name is what it was told, or the next."""
    for part in ("base", "adapters"):
        shutil.copytree(folder / part, tmp_path / part)
    told: dict[str, set[str]] = {name: {""} for name in NAMES[:4]}
    """The digests that a name may hold: of the last answer, and of what was asked since."""
    rng, restored = random.Random(1), []
    digests: dict[str, str] = {}
    async with served(tmp_path, store=tmp_path / "store") as server:
        for name in NAMES:
            digests[name] = (await server.client.load_adapter("probe", name)).adapter.digest
            await server.client.unload_adapter("probe", wait=True)
    for _ in range(size.of(6, 2)):
        async with served(tmp_path, store=tmp_path / "store") as server:
            held = {a.name: a.digest for a in await server.client.list_adapters()}
            for name, allowed in told.items():
                assert held.get(name, "") in allowed, (name, held, allowed)
            restored.append(len(held))
            for name in told:
                told[name] = {held.get(name, "")}

            async def change(name: str, client: AsyncClient) -> None:
                while True:
                    source = rng.choice(NAMES)
                    told[name] |= {digests[source]}
                    if rng.random() < 0.5:
                        await client.load_adapter(name, source, replace=True)
                    else:
                        path = tmp_path / "adapters" / source
                        await client.upload_adapter(name, path, replace=True)
                    told[name] = {digests[source]}

            tasks = [asyncio.create_task(change(name, server.client)) for name in told]
            await asyncio.sleep(rng.uniform(0.5, 1.5))
            server.process.kill()
            for result in await asyncio.gather(*tasks, return_exceptions=True):
                assert isinstance(result, Unavailable | LoramuxError), result
    async with served(tmp_path, store=tmp_path / "store") as server:
        held = {a.name: a.digest for a in await server.client.list_adapters()}
        assert all(held.get(name, "") in allowed for name, allowed in told.items())
        stored = (await server.client.list_stored_adapters()).stored
        figure(kills=len(restored), names_restored=[*restored[1:], len(held)], stored=len(stored))
    assert all(restored[1:]) and held


async def goodput(client: AsyncClient, num_requests: int) -> tuple[float, int, list[float]]:
    """Tokens per second of what is answered, how many are, and the seconds to each reject."""
    rejects: list[float] = []

    async def ask(number: int) -> int:
        begun = time.monotonic()
        try:
            return len(await tokens_of(client, [5, 6 + number % 90], None, 40))
        except Overloaded:
            rejects.append(time.monotonic() - begun)
            return 0

    begun = time.monotonic()
    counts = await asyncio.gather(*map(ask, range(num_requests)))
    return sum(counts) / (time.monotonic() - begun), sum(map(bool, counts)), rejects


async def test_overload(folder, size, figure) -> None:
    """Ten times what fits: the tokens per second stay, and a reject comes at once."""
    flags = ("--max-num-seqs", "8", "--max-queued-requests", "40", "--max-num-batched-tokens", "64")
    async with served(folder, *flags) as server, AsyncClient(server.target) as other:
        await goodput(server.client, 16)
        peaks, overs, shares = [], [], []
        for _ in range(size.of(5, 2)):
            peaks.append((await goodput(server.client, 48))[0])
            rate, num_answered, _ = await goodput(server.client, 480)
            overs.append(rate)
            shares.append(num_answered / 480)
        waits = await single_rejects(server, other, size.of(500, 60))
        ratio = sorted(o / p for o, p in zip(overs, peaks, strict=True))[len(peaks) // 2]
        await server.assert_nothing_is_left()
        p50, p99 = (sorted(waits)[int(len(waits) * q)] for q in (0.5, 0.99))
        figure(goodput=ratio, peak_tokens_s=max(peaks), overloaded_tokens_s=max(overs),
               answered_share=max(shares), rejects=len(waits), p50_ms=1000 * p50,
               p99_ms=1000 * p99)  # fmt: skip
        assert min(shares) < 0.5, "it was no overload"
        if size.is_full:
            assert ratio >= 0.95 and p99 <= 0.020


async def single_rejects(server, other: AsyncClient, count: int) -> list[float]:
    """Seconds to each of some rejects, one at a time, while rows and queue are full."""
    is_over = False

    async def keep_full() -> None:
        while not is_over:
            with suppress(Overloaded):
                await tokens_of(server.client, [5, 6], None, 400)
            await asyncio.sleep(0.2)

    fillers = [asyncio.create_task(keep_full()) for _ in range(56)]
    waits: list[float] = []
    async with asyncio.timeout(150):
        while not any(v >= 40 for n, v in (await server.metrics()).items() if "waiting{" in n):
            await asyncio.sleep(0.05)
        while len(waits) < count:
            begun = time.monotonic()
            try:
                await other.generate(token_ids=[5], max_tokens=1).text()
            except Overloaded:
                waits.append(time.monotonic() - begun)
            await asyncio.sleep(0.01)
    is_over = True
    for filler in fillers:
        filler.cancel()
    await asyncio.gather(*fillers, return_exceptions=True)
    return waits


def mutated(rng: random.Random) -> bytes:
    """A request of random fields, then, half of the time, with random bytes in it."""
    extremes = [0, 1, 2, 5, 299, 300, 2**31 - 1, 2**31, 2**32 - 1]
    numbers = [0.0, -0.0, 1.0, -1.0, 1e300, float("nan"), float("inf"), 0.5]
    texts = ["", "a", "\x00\x1b", "é狐🦊", "../../etc/passwd", "x" * 3000, "a0", "{{ 7*7 }}"]
    request = generation_pb2.GenerateRequest()
    for field in rng.sample(
        ["adapters", "request_id", "cache_salt", "priority", "base_text"], rng.randrange(2)
    ):
        if field == "adapters":
            for _ in range(rng.choice([1, 1, 2, 9])):
                name = rng.choice([*texts, "a0", "a0"])
                request.adapters.add(name=name, weight=rng.choice(numbers))
        elif field == "base_text":
            request.base_text = True
        elif field == "priority":
            request.priority = rng.choice([0, 1, -(2**31)])
        else:
            setattr(request, field, rng.choice(texts))
    match rng.randrange(4):
        case 0:
            request.text = rng.choice(texts)
        case 1:
            request.token_ids.ids.extend(rng.choices(extremes, k=rng.randrange(6)))
        case 2:
            for _ in range(rng.randrange(4)):
                request.messages.messages.add(role=rng.choice([*texts, "user"]), content="hi")
    sampling = request.sampling
    sampling.max_tokens = rng.choice([1, 1, 2, 3, 0, 2**32 - 1])
    for field in rng.sample([f.name for f in sampling.DESCRIPTOR.fields], rng.randrange(3)):
        kind = sampling.DESCRIPTOR.fields_by_name[field]
        if field in ("stop", "stop_token_ids"):
            pool = texts if field == "stop" else extremes
            getattr(sampling, field).extend(rng.choices(pool, k=rng.randrange(20)))
        elif field == "logit_bias":
            sampling.logit_bias[5] = rng.choice(numbers)
        elif field == "ignore_eos":
            sampling.ignore_eos = True
        elif field != "max_tokens":
            is_number = kind.cpp_type == kind.CPPTYPE_DOUBLE
            setattr(sampling, field, rng.choice(numbers if is_number else extremes))
    data = bytearray(request.SerializeToString())
    if data and rng.random() < 0.3:
        for _ in range(rng.randrange(1, 4)):
            data[rng.randrange(len(data))] = rng.randrange(256)
    return bytes(data)


async def test_requests(folder, size, figure) -> None:
    """Random and broken requests over the wire: each is answered, or refused with details."""
    wanted, codes = size.of(60_000, 400), {}
    async with served(folder) as server:
        await server.client.load_adapter("a0", "a0")
        before, begun, done = await server.holdings(), time.monotonic(), 0
        async with grpc.aio.insecure_channel(server.target) as channel:
            call = channel.unary_stream("/loramux.v1.GenerationService/Generate")

            async def work(seed: int) -> None:
                nonlocal done
                rng = random.Random(seed)
                while done < wanted and not size.is_over():
                    done += 1
                    code, details = "OK", ""
                    try:
                        async for _ in call(mutated(rng), timeout=20):
                            pass
                    except grpc.aio.AioRpcError as error:
                        code, details = error.code().name, error.details() or ""
                    assert str(folder) not in details
                    codes[code] = codes.get(code, 0) + 1

            await asyncio.gather(*map(work, range(16)))
        await server.assert_nothing_is_left()
        after = await server.holdings()
        figure(requests=done, of=wanted, codes=json.dumps(codes), before=asdict(before),
               seconds=time.monotonic() - begun, after=asdict(after))  # fmt: skip
        assert not {"UNKNOWN", "INTERNAL", "DEADLINE_EXCEEDED"} & codes.keys()
        assert codes["OK"] and codes["INVALID_ARGUMENT"] and not server.errors()

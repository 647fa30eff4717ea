"""Two tenants of a real server's process over both wires: one loads far beyond its share."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

import pytest
from safetensors.numpy import load

from lora_runtime.errors import Overloaded
from loramux.server.client import AsyncClient
from tests.peft_adapters import write_adapter
from tests.server.access.keyring import ACME, OPERATOR, RIVAL, write_keys
from tests.server.access.test_tenants_adapters import keys
from tests.server.places import CONFIG, WEIGHTS, Place
from tests.server.test_process import Server, started
from tests.server.world import until
from tests.tiny import tiny_checkpoint, tiny_model
from tests.tiny_tokenizer import write_tokenizer

NUM_FLOODED = 12
ROOM = 4
"""Adapters that host memory has room for."""


@pytest.fixture
def base(tmp_path):
    folder = tiny_checkpoint(tmp_path / "base")
    write_tokenizer(folder)
    return folder


@pytest.fixture
def web(tmp_path, web):
    """Serves adapters of one size, and says who asked for what."""
    model = tiny_model("llama")
    names = ["rival-0", "rival-1", *(f"acme-{i}" for i in range(NUM_FLOODED + 8))]
    for seed, name in enumerate(names):
        folder = write_adapter(model, tmp_path / name, seed=seed, r=4)
        web.put(name, {file: (folder / file).read_bytes() for file in (CONFIG, WEIGHTS)})
    return web


Ask = Callable[[str, str], Awaitable[float]]
"""A key and an adapter → seconds to the first token."""


def wires(server: Server) -> list[Ask]:
    """Both wires, as functions that ask for one token."""

    async def by_grpc(key: str, name: str) -> float:
        async with AsyncClient(server.target, api_key=key) as client:
            begun = time.monotonic()
            await client.generate(token_ids=[5], adapter=name, max_tokens=1).text()
            return time.monotonic() - begun

    async def by_http(key: str, name: str) -> float:
        body = {"model": name, "prompt": [5], "max_tokens": 1}
        headers = {"authorization": f"Bearer {key}"}
        begun = time.monotonic()
        answer = await server.http.post("/v1/completions", json=body, headers=headers, timeout=10)
        assert answer.status_code == 200, answer.text
        return time.monotonic() - begun

    return [by_grpc, by_http]


async def names(server: Server) -> set[str]:
    async with AsyncClient(server.target, api_key=OPERATOR) as operator:
        return {info.name for info in await operator.list_adapters()}


def num_asked(web: Place, name: str) -> int:
    return sum(path.startswith(f"/{name}/") for _, path, _ in web.seen)


async def test_a_flood_of_loads_costs_the_other_tenant_nothing(base, web, tmp_path):
    tensors = load(web.files[f"/rival-0/{WEIGHTS}"])
    room = ROOM * sum(tensor.nbytes for tensor in tensors.values()) * 11 // 10
    flags = [
        "--keys", str(write_keys(tmp_path, keys(rivals="max_adapters: 1"))),
        "--adapter-on-demand", f"*={web.url}/{{name}}", "--host-adapter-bytes", str(room),
    ]  # fmt: skip
    async with started(base, tmp_path, *flags) as server:
        by_grpc, by_http = wires(server)
        cold = await by_grpc(RIVAL, "rival-0")
        before = [await ask(RIVAL, "rival-0") for ask in (by_grpc, by_http) * 5]
        num_fetched = num_asked(web, "rival-0")
        for index in range(NUM_FLOODED):
            await (by_grpc, by_http)[index % 2](ACME, f"acme-{index}")
            assert len(await names(server)) <= ROOM
        assert await names(server) == {"rival-0", *(f"acme-{NUM_FLOODED - i}" for i in (1, 2, 3))}
        after = [await ask(RIVAL, "rival-0") for ask in (by_grpc, by_http) * 5]
        assert num_asked(web, "rival-0") == num_fetched, "nothing was fetched again"
        print(f"seconds: cold {cold}, before {before}, after {after}")
        assert max(after[:2]) < max(max(before) * 2, cold / 2)
        await slow_fetches_hold_nobody_up(server, web, by_grpc, by_http)


async def slow_fetches_hold_nobody_up(server: Server, web: Place, by_grpc: Ask, by_http: Ask):
    """And rival, who may have one adapter, has the new one in place of the old one."""
    slow_names = [f"acme-{NUM_FLOODED + index}" for index in range(8)]
    web.bent |= {("GET", f"/{name}/{WEIGHTS}"): [web.hang()] for name in slow_names}
    slow = [asyncio.create_task(by_grpc(ACME, name)) for name in slow_names]
    hung = {("GET", f"/{name}/{WEIGHTS}") for name in slow_names}
    await until(lambda: hung <= {seen[:2] for seen in web.seen}, 10)
    print(f"seconds beside 8 slow fetches: {await by_http(RIVAL, 'rival-1')}")
    assert not any(task.done() for task in slow)
    assert {name for name in await names(server) if name.startswith("rival")} == {"rival-1"}
    for task in slow:
        task.cancel()
    await asyncio.gather(*slow, return_exceptions=True)
    with pytest.raises(Overloaded, match="holds 1 adapters and may hold 1"):
        async with AsyncClient(server.target, api_key=RIVAL) as rival:
            both = {"rival-0": 1.0, "rival-1": 1.0}
            await rival.generate(token_ids=[5], adapters=both, max_tokens=1).text()

"""Quotas against a simulated clock, and through the service."""

from __future__ import annotations

import asyncio
import random
from contextlib import ExitStack

import pytest

from lora_runtime.errors import Overloaded, QuotaUsed
from loramux.server.access.caller import Caller, Limits, Role
from loramux.server.access.quotas import Quotas
from loramux.server.client import AsyncClient
from tests.server.access.keyring import ACME, OPERATOR, RIVAL, gate_of, limited
from tests.server.http_api import serving_http
from tests.server.world import until


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def caller(tenant: str = "acme", **limits) -> Caller:
    return Caller(key_id=tenant, tenant=tenant, role=Role.OPERATOR, limits=Limits(**limits))


@pytest.mark.parametrize("seed", range(5))
def test_no_tenant_gets_more_than_its_rate_and_its_burst(seed):
    """However it asks; one that asks whenever it may gets all of it."""
    chance, clock = random.Random(seed), Clock()
    quotas, rate, burst = Quotas(clock), chance.uniform(5, 50), chance.uniform(20, 400)
    who, spent, begun = caller(tokens_per_s=rate, burst_tokens=burst), 0, clock.now
    largest = 60
    for _ in range(3000):
        try:
            with quotas.request(who) as spend:
                for _ in range(chance.randrange(1, 5)):
                    num_tokens = chance.randrange(largest // 4 + 1)
                    spend(num_tokens)
                    spent += num_tokens
                    clock.now += chance.uniform(0, 0.01)
        except Overloaded as error:
            clock.now += error.retry_after_s * (1 + 1e-9)
        assert spent <= burst + rate * (clock.now - begun) + largest
    assert spent >= rate * (clock.now - begun)


def test_the_time_that_is_told_is_the_time_it_takes():
    clock = Clock()
    quotas, who = Quotas(clock), caller(tokens_per_s=10, burst_tokens=100)
    with quotas.request(who) as spend:
        spend(150)
    with pytest.raises(Overloaded, match="10 tokens per second") as caught, quotas.request(who):
        pass
    assert caught.value.retry_after_s == pytest.approx(5)
    with quotas.request(caller("rival", tokens_per_s=10)):
        pass
    clock.now += 4.9
    with pytest.raises(Overloaded), quotas.request(who):
        pass
    clock.now += 0.2
    with quotas.request(who):
        pass


def test_requests_are_counted_while_they_run():
    quotas, who = Quotas(), caller(max_requests=2)
    with ExitStack() as running:
        running.enter_context(quotas.request(who))
        with pytest.raises(ZeroDivisionError), quotas.request(who):
            raise ZeroDivisionError
        running.enter_context(quotas.request(who))
        with pytest.raises(Overloaded, match="2 requests of tenant 'acme'"), quotas.request(who):
            pass
        with quotas.request(caller("rival", max_requests=1)):
            pass
    with quotas.request(who), quotas.request(who):
        pass


def test_names_that_are_being_loaded_count_among_those_that_are_held():
    quotas, who = Quotas(), caller(max_adapters=2)
    with quotas.adapter(who, "a", []), quotas.adapter(who, "b", []):
        for held in ([], ["a"], ["a", "b"]):
            with pytest.raises(Overloaded, match="may hold 2"), quotas.adapter(who, "c", held):
                pass
        with quotas.adapter(who, "b", ["a"]):
            pass
    with quotas.adapter(who, "c", ["a"]):
        pass
    with pytest.raises(Overloaded), quotas.adapter(who, "c", ["a", "b"]):
        pass


async def test_a_tenant_over_its_requests_disturbs_no_other(serve, tmp_path):
    gate = gate_of(tmp_path, limited("max_requests: 2"))
    async with (
        serve(gate=gate, api_key=OPERATOR) as world,
        AsyncClient(world.target, api_key=ACME) as acme,
        AsyncClient(world.target, api_key=RIVAL) as rival,
    ):
        both = acme, rival
        world.engine.gate.clear()
        streams = [asyncio.create_task(acme.generate("ab", max_tokens=2).text()) for _ in range(2)]
        await until(lambda: len(world.engine.running) == 2)
        with pytest.raises(Overloaded, match="2 requests of tenant 'acme'"):
            await acme.generate("ab").text()
        streams[0].cancel()
        await until(lambda: len(world.engine.running) == 1)
        streams += [asyncio.create_task(c.generate("ab", max_tokens=2).text()) for c in both]
        await until(lambda: len(world.engine.running) == 3)
        world.engine.gate.set()
        assert await asyncio.gather(*streams[1:]) == ["ab"] * 3


async def test_a_prompt_counts_though_its_caller_leaves(serve, tmp_path):
    gate = gate_of(tmp_path, limited("tokens_per_s: 0.001, burst_tokens: 40"))
    async with (
        serve(gate=gate, api_key=OPERATOR) as world,
        AsyncClient(world.target, api_key=ACME) as acme,
        serving_http(world.service, gate=gate) as api,
    ):
        world.engine.gate.clear()
        for _ in range(3):
            task = asyncio.create_task(acme.generate("x" * 15, max_tokens=1).text())
            await until(lambda: len(world.engine.running) == 1)
            task.cancel()
            await until(lambda: not world.engine.running)
        with pytest.raises(QuotaUsed, match="has used its") as told:
            await acme.generate("x", timeout_s=5).text()
        assert f"try again in {told.value.retry_after_s:.1f} s" in told.value.message
        key = {"authorization": f"Bearer {ACME}"}
        body = {"model": "tiny", "prompt": "x"}
        answer = await api.http.post("/v1/completions", json=body, headers=key)
        assert answer.status_code == 429
        assert answer.json()["error"]["code"] == "rate_limit_exceeded"


async def test_outputs_of_one_prompt_count_as_so_many_prompts(serve, tmp_path):
    gate = gate_of(tmp_path, limited("tokens_per_s: 0.001, burst_tokens: 40"))
    async with (
        serve(gate=gate, api_key=OPERATOR) as world,
        AsyncClient(world.target, api_key=ACME) as acme,
    ):
        await acme.generate("x" * 15, max_tokens=1, n=3).text()
        with pytest.raises(Overloaded, match="has used its"):
            await acme.generate("x").text()


async def test_more_prompts_than_a_tenant_may_ever_have_are_no_matter_of_time(serve, tmp_path):
    gate = gate_of(tmp_path, limited("max_requests: 2"))
    async with serve(gate=gate) as world, serving_http(world.service, gate=gate) as api:
        key = {"authorization": f"Bearer {ACME}"}
        for prompt, n, status in [(["a", "b"], 1, 200), (["a", "b"], 2, 400), (["a"] * 3, 1, 400)]:
            body = {"model": "tiny", "prompt": prompt, "n": n, "max_tokens": 1}
            answer = await api.http.post("/v1/completions", json=body, headers=key)
            assert answer.status_code == status, answer.text


async def test_a_tenant_holds_so_many_adapters(serve, tmp_path):
    gate = gate_of(tmp_path, limited("max_adapters: 2"))
    async with (
        serve(gate=gate, api_key=OPERATOR) as world,
        AsyncClient(world.target, api_key="key-acme-op") as acme,
    ):
        for name in ("one", "two", "bad"):
            world.write_adapter(name, {"bad": "!AdapterRefused"}.get(name, name))
        await world.client.load_adapter("rival-a", "one")
        world.engine.load_gate.clear()
        loads = [
            asyncio.create_task(acme.load_adapter(name, "one"))
            for name in ("acme-a", "acme-b", "acme-c")
        ]
        await asyncio.wait(loads, return_when=asyncio.FIRST_COMPLETED)
        world.engine.load_gate.set()
        ended = await asyncio.gather(*loads, return_exceptions=True)
        assert [type(each) for each in ended].count(QuotaUsed) == 1
        with pytest.raises(Overloaded, match="holds 2 adapters and may hold 2") as caught:
            await acme.upload_adapter("acme-d", world.root / "one")
        assert caught.value.field == "name"
        held = [info.name for info in await acme.list_adapters()]
        await acme.load_adapter(held[0], "two", replace=True)
        await acme.unload_adapter(held[0])
        await acme.upload_adapter("acme-d", world.root / "one")
        await world.client.load_adapter("rival-b", "two")

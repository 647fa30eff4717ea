"""Places that tenants share, against a model of who may have one."""

from __future__ import annotations

import asyncio
import random
from contextlib import AsyncExitStack, ExitStack

import pytest

from lora_runtime.errors import Overloaded
from loramux.server.access.places import TenantPlaces


def places(total: int = 8, **options) -> TenantPlaces:
    return TenantPlaces("things", "are being done", total, **options)


async def settled() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def test_a_tenant_gets_its_part_at_once_whatever_others_hold():
    some, held = places(), ExitStack()
    with held:
        for _ in range(8):
            held.enter_context(some.taken("greedy"))
        with pytest.raises(Overloaded, match="8 things of tenant 'greedy' are being done"):
            held.enter_context(some.taken("greedy"))
        for _ in range(4):
            held.enter_context(some.taken("modest"))
        with pytest.raises(Overloaded, match="4 things of tenant 'modest'") as refused:
            held.enter_context(some.taken("modest", field="name"))
        assert refused.value.field == "name"
        for index in range(20):
            held.enter_context(some.taken(f"tenant {index}"))
    assert some.num_held == 0
    with some.taken("greedy"):
        pass


def test_without_tenants_there_are_so_many_places():
    some, held = places(2), ExitStack()
    with held:
        for _ in range(2):
            held.enter_context(some.taken(""))
        with pytest.raises(Overloaded, match="^2 things are being done; try again later"):
            held.enter_context(some.taken(""))


@pytest.mark.parametrize("seed", range(20))
async def test_places_come_to_whoever_holds_least_and_none_is_lost(seed):
    chance = random.Random(seed)
    total, names = chance.randrange(1, 10), "abcd"[: chance.randrange(1, 5)]
    some, held, waiting = places(total, max_waiting=1000), [], {}

    async def hold(name: str, stack: AsyncExitStack) -> None:
        await stack.enter_async_context(some.waited_for(name))

    for _ in range(300):
        choice = chance.random()
        if choice < 0.5:
            stack, name = AsyncExitStack(), chance.choice(names)
            waiting[asyncio.create_task(hold(name, stack))] = name, stack
        elif choice < 0.6 and waiting:
            chance.choice(list(waiting)).cancel()
        elif held:
            _, stack = held.pop(chance.randrange(len(held)))
            await stack.aclose()
        await settled()
        for task in [task for task in waiting if task.done()]:
            entry = waiting.pop(task)
            if not task.cancelled():
                held.append(entry)
        counts = {name: sum(n == name for n, _ in held) for name in names}
        assert some.num_held == len(held)
        if waiting:
            present = {name for name, n in counts.items() if n} | {n for n, _ in waiting.values()}
            part = max(1, total // len(present))
            assert len(held) >= total, "nobody waits while a place is free"
            assert all(counts[name] >= part for name, _ in waiting.values())
    for task in waiting:
        task.cancel()
    for _, stack in held:
        await stack.aclose()
    await settled()
    for task in [t for t in waiting if not t.cancelled()]:
        await waiting[task][1].aclose()
    assert some.num_held == 0 and not some._waiting


async def test_too_many_of_one_tenant_do_not_wait():
    some, held = places(1, max_waiting=2), ExitStack()

    async def hold(name: str) -> None:
        async with some.waited_for(name):
            await asyncio.sleep(0)

    with held:
        held.enter_context(some.taken("one"))
        tasks = [asyncio.create_task(hold("one")) for _ in range(2)]
        await settled()
        with pytest.raises(Overloaded, match="3 things of tenant 'one'"):
            await hold("one")
        await asyncio.wait_for(hold("two"), 1)
        assert not any(task.done() for task in tasks)
    await asyncio.wait_for(asyncio.gather(*tasks), 1)
    assert some.num_held == 0

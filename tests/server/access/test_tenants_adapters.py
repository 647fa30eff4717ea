"""What one tenant's adapters on demand do to another's: places, fetches, memory and quotas."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, replace

import pytest

from lora_runtime.adapters.host_cache import HostMemoryFull
from lora_runtime.errors import Overloaded
from loramux.server.adapters.shares import givers
from loramux.server.calls import AdapterRecord, AdapterState
from loramux.server.client import AsyncClient
from tests.fakes import PLAIN
from tests.server.access.keyring import ACME, OPERATOR, RIVAL, limited, write_keys
from tests.server.places import WEIGHTS, adapter
from tests.server.test_restart import Host, LocalEngine, ask
from tests.server.world import until

MANY = 24


def keys(limits: str = "", rivals: str = "") -> str:
    """Acme's and rival's users may use `shared-*` too; `limits` are acme's, `rivals` rival's."""
    text = limited(limits).replace("rival: {}", f"rival: {{{rivals}}}")
    for tenant in ("acme", "rival"):
        text = text.replace(f'role: user, adapters: ["{tenant}-*"]',
                            f'role: user, adapters: ["{tenant}-*", "shared-*"]')  # fmt: skip
    return text


@dataclass
class Served:
    """A server with two tenants."""

    acme: AsyncClient
    rival: AsyncClient
    operator: AsyncClient
    acme_operator: AsyncClient

    async def names(self) -> set[str]:
        return {info.name for info in await self.operator.list_adapters()}


@contextlib.asynccontextmanager
async def served(
    host: Host, engine: LocalEngine | None = None, text: str | None = None, **flags
) -> AsyncIterator[Served]:
    flags = {"adapter_on_demand": ["*={name}"], **flags}
    file = write_keys(host.folder, keys() if text is None else text)
    async with (
        host.serving(engine, keys=file, **flags) as anyone,
        AsyncClient(anyone.target, api_key=ACME) as acme,
        AsyncClient(anyone.target, api_key=RIVAL) as rival,
        AsyncClient(anyone.target, api_key=OPERATOR) as operator,
        AsyncClient(anyone.target, api_key="key-acme-op") as acme_operator,
    ):
        yield Served(acme, rival, operator, acme_operator)


@pytest.fixture
def host(tmp_path):
    host = Host(tmp_path)
    for tenant in ("acme", "rival", "shared"):
        for index in range(MANY):
            host.write(f"{tenant}-{index}", f"{tenant[0]}{tenant} {index}")
    return host


def small(num_adapters: int) -> LocalEngine:
    engine = LocalEngine()
    engine.max_loaded = num_adapters
    return engine


# Host memory.


async def test_a_tenant_s_own_adapters_make_room_for_its_loads(host):
    engine = small(6)
    async with served(host, engine) as world:
        await ask(world.rival, "rival-0")
        digest = (await world.operator.get_adapter("rival-0")).digest
        for index in range(MANY):
            await ask(world.acme, f"acme-{index}")
        names = await world.names()
        assert names == {"rival-0", *(f"acme-{i}" for i in range(MANY - 5, MANY))}, "least used go"
        await ask(world.rival, "rival-0")
        assert engine.num_loads[digest] == 1, "it was not loaded again"
        for _ in range(6):  # what comes and goes at once makes nobody's share smaller
            many = [ask(world.acme, f"acme-{i}") for i in range(MANY)]
            await asyncio.gather(*many, return_exceptions=True)
            assert "rival-0" in await world.names()


async def test_a_tenant_takes_its_share_of_what_another_had_while_it_was_free(host):
    async with served(host, small(6)) as world:
        for index in range(6):
            await ask(world.acme, f"acme-{index}")
        for index in range(3):
            await ask(world.rival, f"rival-{index}")
        half = {f"acme-{i}" for i in (3, 4, 5)}
        assert await world.names() == half | {f"rival-{i}" for i in range(3)}
        await ask(world.rival, "rival-3")
        assert await world.names() == half | {f"rival-{i}" for i in (1, 2, 3)}
        await ask(world.acme, "acme-6")
        assert await world.names() == {
            "acme-4", "acme-5", "acme-6", "rival-1", "rival-2", "rival-3"
        }  # fmt: skip


async def test_weights_are_shares_of_memory_too(host):
    async with served(host, small(6), keys("weight: 2")) as world:
        for index in range(6):
            await ask(world.rival, f"rival-{index}")
        for index in range(9):
            await ask(world.acme, f"acme-{index}")
        names = await world.names()
        assert names == {"rival-4", "rival-5", *(f"acme-{i}" for i in range(5, 9))}
        for index in range(9):
            await ask(world.rival, f"rival-{index}")
        assert {f"acme-{i}" for i in range(5, 9)} < await world.names()


async def test_in_use_within_shares_is_a_refusal_and_nobody_s_loss(host):
    engine = small(2)
    async with served(host, engine) as world:
        await ask(world.rival, "rival-0")
        engine.gate.clear()
        held = asyncio.create_task(ask(world.acme, "acme-0"))
        await until(lambda: bool(engine.running))
        with pytest.raises(Overloaded, match="tenant 'acme' has none that is unused") as refused:
            await ask(world.acme, "acme-1")
        assert refused.value.field == "adapters[0].name"
        assert await world.names() == {"acme-0", "rival-0"}
        engine.gate.set()
        await held
        await ask(world.acme, "acme-1")
        assert await world.names() == {"acme-1", "rival-0"}


async def test_what_two_tenants_use_goes_when_both_have_given_it_up(host):
    async with served(host, small(4)) as world:
        await ask(world.acme, "shared-0")
        await ask(world.rival, "shared-0")
        for index in range(8):
            await ask(world.acme, f"acme-{index}")
        assert await world.names() == {"shared-0", "acme-5", "acme-6", "acme-7"}
        for index in range(8):
            await ask(world.rival, f"rival-{index}")
        assert await world.names() == {"acme-6", "acme-7", "rival-6", "rival-7"}


async def test_operators_of_a_tenant_take_from_nobody_s_share(host):
    """And those of the whole server from everybody's."""
    async with served(host, small(4)) as world:
        for index in range(2):
            await ask(world.rival, f"rival-{index}")
        for index in range(2):
            await world.acme_operator.load_adapter(f"acme-{index}", f"acme-{index}")
        with pytest.raises(Overloaded, match="within their shares"):
            await world.acme_operator.load_adapter("acme-2", "acme-2")
        assert {"rival-0", "rival-1"} < await world.names()
        await world.operator.load_adapter("acme-3", "acme-3")
        assert await world.names() == {"acme-0", "acme-1", "acme-2", "acme-3", "rival-1"}


@pytest.mark.parametrize("seed", range(30))
def test_nobody_within_its_share_makes_room_for_another(seed):
    """Against shares that are computed here, one tenant after the other."""
    chance = random.Random(seed)
    tenants = "abcde"[: chance.randrange(1, 6)]
    weights = {tenant: chance.choice([0.5, 1.0, 3.0]) for tenant in tenants}
    records, sizes, owners = [], {}, {}
    for index in range(chance.randrange(1, 30)):
        digest = f"{index % 20}"
        size = sizes.setdefault(digest, chance.randrange(1, 100))
        owned = dict.fromkeys(chance.sample(tenants, chance.randrange(len(tenants) + 1)), 0.0)
        loaded = replace(PLAIN, facts=replace(PLAIN.facts, digest=digest), nbytes=size)
        record = AdapterRecord(name=f"n{index}", source="s", state=AdapterState.LOADED)
        record.loaded, record.tenants = loaded, owned
        facts = replace(PLAIN.facts, digest=f"leaving {index}")
        leaving = AdapterRecord(name=f"l{index}", source="s", state=AdapterState.DRAINING)
        leaving.loaded, leaving.is_on_demand = replace(PLAIN, facts=facts, nbytes=10**6), True
        records += [record, leaving]
        owners.setdefault(digest, set()).update(owned)
    held = sum(sizes.values())
    full = HostMemoryFull(chance.randrange(1, 100), held, held + chance.randrange(50))
    loader = chance.choice(tenants)
    found = givers(records, full, loader, weights)
    room = full.max_bytes - sum(sizes[d] for d, of in owners.items() if not of)
    charged = {t: sum(sizes[d] for d, of in owners.items() if t in of) for t in tenants}
    sharing = [t for t in tenants if t == loader or any(t in r.tenants for r in records)]
    over = excess(charged, room, weights, sharing)
    others = [t for t in found if t != loader]
    assert set(others) == {t for t in sharing if t != loader and over[t] > 1e-9}
    assert [over[t] for t in others] == sorted((over[t] for t in others), reverse=True)
    assert found.index(loader) == (0 if over[loader] + full.num_bytes > 0 else len(others))
    assert set(givers(records, full, None, weights)) == set(sharing) - (
        set() if any(loader in r.tenants for r in records) else {loader}
    )


def excess(
    charged: Mapping[str, int], room: int, weights: Mapping[str, float], sharing: list[str]
) -> dict[str, float]:
    total = sum(weights[t] for t in sharing)
    return {t: charged[t] - room * weights[t] / total for t in sharing}


async def test_what_is_kept_for_a_rollback_is_charged_to_who_replaced_it(host):
    async with served(host, small(4)) as world:
        await ask(world.acme, "acme-0")
        await world.acme_operator.load_adapter("acme-0", "acme-1", replace=True)
        for index in range(2):
            await ask(world.rival, f"rival-{index}")
        with pytest.raises(Overloaded, match="within their shares"):
            await ask(world.acme, "acme-2")
        assert await world.names() == {"acme-0", "rival-0", "rival-1"}
        await world.acme_operator.rollback_adapter("acme-0")
        assert await ask(world.acme, "acme-0") == [ord("a")] * 2


# Quotas of names.


async def test_loads_on_demand_count_among_a_tenant_s_adapters(host):
    engine = LocalEngine()
    async with served(host, engine, keys("max_adapters: 2")) as world:
        await world.operator.load_adapter("house", "shared-9")
        for index in range(5):
            await ask(world.acme, f"acme-{index}")
            await ask(world.rival, f"rival-{index}")
        own = {info.name for info in await world.acme.list_adapters()}
        assert own == {"acme-3", "acme-4"}, "those it has not used for longest made place"
        assert {f"rival-{i}" for i in range(5)} < await world.names(), "rival has no quota"
        engine.gate.clear()
        held = [asyncio.create_task(ask(world.acme, f"acme-{i}")) for i in (3, 4)]
        await until(lambda: len(engine.running) == 2)
        with pytest.raises(Overloaded, match=r"holds 2 adapters and may hold 2 \(max_adapters\)"):
            await ask(world.acme, "acme-5")
        engine.gate.set()
        await asyncio.gather(*held)
        await world.acme_operator.load_adapter("acme-6", "acme-6")
        await world.acme_operator.load_adapter("acme-7", "acme-7")
        with pytest.raises(Overloaded, match="holds 2 adapters and may hold 2") as refused:
            await ask(world.acme, "acme-5")
        assert refused.value.field == "adapters[0].name"
        assert {info.name for info in await world.acme.list_adapters()} == {"acme-6", "acme-7"}


async def test_at_once_no_more_than_the_quota_are_loaded(host):
    engine = LocalEngine()
    engine.gate.clear()
    async with served(host, engine, keys("max_adapters: 3")) as world:
        tasks = [asyncio.create_task(ask(world.acme, f"acme-{i}")) for i in range(8)]
        await until(lambda: sum(task.done() for task in tasks) == 5)
        async with asyncio.timeout(30):
            while len(await world.names()) < 3:  # those within their quota may still be read
                await asyncio.sleep(0.01)
        assert len(await world.names()) == 3
        engine.gate.set()
        ended = await asyncio.gather(*tasks, return_exceptions=True)
        assert sum(isinstance(each, Overloaded) for each in ended) == 5


async def test_the_use_of_what_another_tenant_brought_counts_too(host):
    async with served(host, text=keys("max_adapters: 2")) as world:
        for index in range(4):
            await ask(world.rival, f"shared-{index}")
        await ask(world.acme, "acme-0")
        for index in range(4):
            await ask(world.acme, f"shared-{index}")
        assert await world.names() == {f"shared-{i}" for i in range(4)}, "acme gave its own up"
        await world.acme_operator.load_adapter("acme-1", "acme-1")
        await world.acme_operator.load_adapter("acme-2", "acme-2")
        with pytest.raises(Overloaded, match="may hold 2"):
            await ask(world.acme, "shared-0")
        assert await ask(world.rival, "shared-0")


async def test_a_name_without_an_adapter_takes_no_other_s_place(host):
    async with served(host, text=keys("max_adapters: 1")) as world:
        await ask(world.acme, "acme-0")
        with pytest.raises(Exception, match="does not exist"):
            await ask(world.acme, "acme-none")
        assert await world.names() == {"acme-0"}


async def test_what_a_key_does_not_see_it_cannot_keep_in_memory(host, web):
    """While its request, which names another tenant's adapter too, waits for its own."""
    web.put("acme-x", adapter("a"))
    web.bent[("GET", f"/acme-x/{WEIGHTS}")] = [web.hang()]
    flags = {"adapter_on_demand": [f"acme-*={web.url}/{{name}}", "*={name}"]}
    async with served(host, small(2), **flags) as world:
        for index in range(2):
            await ask(world.rival, f"rival-{index}")
        both = {"acme-x": 1.0, "rival-0": 1.0}
        waiting = asyncio.create_task(
            world.acme.generate(token_ids=[5], adapters=both, max_tokens=1).text()
        )
        await until(lambda: ("GET", f"/acme-x/{WEIGHTS}") in [seen[:2] for seen in web.seen])
        await ask(world.rival, "rival-2")
        assert await world.names() == {"acme-x", "rival-1", "rival-2"}
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)


# Fetches.


async def test_slow_fetches_of_one_tenant_do_not_keep_another_waiting(host, web):
    for index in range(40):
        web.put(f"acme-{index}", adapter("a"))
        web.bent[("GET", f"/acme-{index}/{WEIGHTS}")] = [web.hang()]
    web.put("rival-0", adapter("r"))
    web.put("shared-0", adapter("s"))
    web.bent[("GET", f"/shared-0/{WEIGHTS}")] = [web.hang()]
    flags = {"adapter_on_demand": [f"*={web.url}/{{name}}"], "adapter_fetch_idle_s": 30}
    async with served(host, **flags) as world:

        def num_slow() -> int:
            return sum(method == "GET" and path.endswith(WEIGHTS) for method, path, _ in web.seen)

        slow = [asyncio.create_task(ask(world.acme, "shared-0"))]
        await until(lambda: num_slow() == 1)
        slow += [asyncio.create_task(ask(world.acme, f"acme-{i}")) for i in range(31)]
        await until(lambda: num_slow() == 8)
        await asyncio.sleep(0.1)
        with pytest.raises(Overloaded, match="32 adapters of tenant 'acme' are being loaded"):
            await ask(world.acme, "acme-31")
        for name in ("rival-0", "shared-0"):
            assert await asyncio.wait_for(ask(world.rival, name), 3)
        assert not any(task.done() for task in slow)
        web.held.set()
        assert await asyncio.wait_for(slow[0], 5)
        for task in slow:
            task.cancel()
        await asyncio.gather(*slow, return_exceptions=True)

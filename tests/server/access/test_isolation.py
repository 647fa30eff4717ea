"""Tenants on one real engine: cached prefixes are a tenant's own, and so is its share."""

from __future__ import annotations

import pytest

from loramux.server.access.gate import OPEN_GATE
from loramux.server.client import AsyncClient
from tests.server.access.keyring import ACME, OPERATOR, RIVAL, gate_of
from tests.server.tiny_server import running, write_folder

PROMPT = [3 + i * 7 % 50 for i in range(200)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("served"))


async def hits(engine, client: AsyncClient, **options) -> int:
    """Prompt tokens that a request found in the cache."""
    before = engine.stats().num_prefix_hits
    events = [event async for event in client.generate(token_ids=PROMPT, max_tokens=1, **options)]
    found = engine.stats().num_prefix_hits - before
    assert events[-1].finished.usage.cached_tokens == found, "what the caller is told"
    return found


async def test_a_tenant_finds_its_own_prefixes_and_no_others(folder, tmp_path):
    async with running(folder, gate_of(tmp_path), OPERATOR) as (operator, engine):
        acme, rival = (AsyncClient(operator.target, api_key=key) for key in (ACME, RIVAL))
        async with acme, rival:
            await operator.load_adapter("acme-a", "a0")
            for adapter in ({}, {"adapter": "acme-a"}):
                assert await hits(engine, acme, **adapter) == 0
                own = await hits(engine, acme, **adapter)
                assert own >= len(PROMPT) - 16
            assert await hits(engine, rival) == 0
            assert await hits(engine, rival) == own
            assert await hits(engine, operator, adapter="acme-a") == 0
            for salt in ("", "acme", "acme/", "/acme", "rival", "rival/"):
                found = await hits(engine, rival, cache_salt=f"{salt}x")
                assert found == 0, "no salt of one tenant is another's"
            assert await hits(engine, acme, cache_salt="s") == 0
            assert await hits(engine, acme, cache_salt="s") == own


async def test_a_tenant_s_many_prompts_do_not_evict_another_s_prefixes(folder, tmp_path):
    async with running(folder, gate_of(tmp_path), OPERATOR) as (operator, engine):
        acme, rival = (AsyncClient(operator.target, api_key=key) for key in (ACME, RIVAL))
        async with acme, rival:
            await hits(engine, rival)
            size, total = engine.info.block_size, engine.stats().kv_blocks_total
            num_prompts = 2 * total * size // len(PROMPT)
            for index in range(num_prompts):
                prompt = [3 + index % 50, 3 + index // 50, *PROMPT[2:]]
                await acme.generate(token_ids=prompt, max_tokens=1).text()
            assert await hits(engine, rival) >= len(PROMPT) - size
            assert await hits(engine, acme) == 0


async def test_without_keys_prefixes_are_shared_as_ever(folder):
    async with running(folder, OPEN_GATE) as (anyone, engine):
        assert await hits(engine, anyone, tenant="one") == 0
        assert await hits(engine, anyone, tenant="two") > 0

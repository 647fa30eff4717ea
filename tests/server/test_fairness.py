"""Over gRPC: a client's short request beside 200 long ones of another."""

from __future__ import annotations

import asyncio
import time

import pytest

from tests.server.tiny_server import running, write_folder

PROMPT = [5, 6, 7, 8]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("served"))


class StepCounter:
    """Counts the engine's steps from a request's arrival to its first token, by client.

    While `is_held`, the engine takes requests and does no step; each step takes some milliseconds,
    so that the event loop keeps up. How fast the engine is decides nothing.
    """

    def __init__(self, engine) -> None:
        self.steps: dict[str, list[int]] = {}
        self.is_held = False
        self._num_steps = 0
        self._arrived: dict[str, tuple[str, int]] = {}
        self._add, self._step = engine.add_request, engine.step
        engine.add_request, engine.step = self.add, self.step

    def add(self, request) -> None:
        self._add(request)
        self._arrived[request.request_id] = request.client, self._num_steps

    def step(self):
        time.sleep(0.003)
        if self.is_held:
            return []
        outputs = self._step()
        self._num_steps += 1
        for output in outputs:
            if output.token_ids and output.request_id in self._arrived:
                client, arrived = self._arrived.pop(output.request_id)
                self.steps.setdefault(client, []).append(self._num_steps - arrived)
        return outputs


async def drain(stream) -> None:
    async for _ in stream:
        pass


@pytest.mark.parametrize("is_named", [True, False], ids=["tenants", "a tenant and an address"])
async def test_a_short_request_does_not_wait_for_200_long_ones(folder, is_named) -> None:
    async with running(folder) as (client, engine):
        counter = StepCounter(engine._engine)
        modest = {"max_tokens": 4, "ignore_eos": True} | ({"tenant": "modest"} if is_named else {})
        await drain(client.generate(token_ids=PROMPT, **modest))
        ((name, (alone,)),) = counter.steps.items()
        assert name == "tenant:modest" if is_named else name.startswith("ipv4:127.0.0.1:")
        long = {"max_tokens": 200, "ignore_eos": True, "tenant": "greedy"}
        counter.is_held = True
        streams = [
            asyncio.create_task(drain(client.generate(token_ids=[*PROMPT, i % 50 + 3], **long)))
            for i in range(200)
        ]
        while engine.stats().num_waiting < 200:
            await asyncio.sleep(0.005)
        counter.is_held = False
        while engine.stats().num_running == 0:
            await asyncio.sleep(0.001)
        for _ in range(3):
            await drain(client.generate(token_ids=PROMPT, **modest))
        assert engine.stats().num_waiting > 0, "the long ones must outlast it"
        assert max(counter.steps[name]) <= 3 * alone + 1
        for stream in streams:
            stream.cancel()
        await asyncio.gather(*streams, return_exceptions=True)
        while engine.stats().num_running + engine.stats().num_waiting:
            await asyncio.sleep(0.005)


async def test_priorities_arrive(folder) -> None:
    async with running(folder) as (client, engine):
        seen = []
        add = engine._engine.add_request
        engine._engine.add_request = lambda request: seen.append(request.priority) or add(request)
        for priority in (-(2**31), 7):
            await drain(client.generate(token_ids=PROMPT, max_tokens=1, priority=priority))
        await drain(client.generate(token_ids=PROMPT, max_tokens=1))
        assert seen == [-(2**31), 7, 0]

"""n > 1: several outputs of one prompt in one stream, and nothing left behind by any of them."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from contextlib import aclosing, suppress
from dataclasses import replace

import pytest

from lora_runtime.core import AdapterChoice, FinishReason, StepOutput
from lora_runtime.errors import AdapterFailed, InvalidRequest, Overloaded
from loramux.server.access.caller import ANONYMOUS, Limits
from loramux.server.calls import Delta, Finished, Started
from loramux.v1 import types_pb2
from tests.server.test_service import call, events_of
from tests.server.world import stubs_of, until


def several(num_outputs, text="abc", *, adapter=None, **options):
    adapters = () if adapter is None else (AdapterChoice(adapter),)
    return replace(call(text, **options), num_outputs=num_outputs, adapters=adapters)


def texts(events):
    found = Counter()
    for event in events:
        if isinstance(event, Delta):
            found[event.index] = (found[event.index] or "") + event.text
    return dict(found)


def is_clean(world):
    """No row, no place, no use of an adapter, and every start has its end."""
    starts, ends = world.observer.of("on_started"), world.observer.of("on_finished")
    records = world.registry.records()
    return (
        world.engine.running == {}
        and not world.service.generation._preparing
        and all(record.num_in_flight == 0 for record in records)
        and len(starts) == len(ends)
    )


async def test_each_output_has_its_deltas_and_its_end(serve) -> None:
    async with serve() as world:
        events = await events_of(world.service, several(3, max_tokens=5, seed=4))
        assert [type(event) for event in events].count(Started) == 1
        assert isinstance(events[0], Started)
        assert texts(events) == {0: "abcab", 1: "abcab", 2: "abcab"}
        ends = [event for event in events if isinstance(event, Finished)]
        assert sorted(end.index for end in ends) == [0, 1, 2]
        assert all((end.num_prompt_tokens, end.num_output_tokens) == (3, 5) for end in ends)
        requests = world.engine.seen
        assert len({request.request_id for request in requests}) == 3
        assert requests[0].sampling.seed == 4
        assert len({request.sampling.seed for request in requests}) == 3
        assert is_clean(world) and len(world.observer.of("on_finished")) == 3


async def test_over_the_wire_and_back(serve) -> None:
    async with serve() as world, stubs_of(world):
        stream = world.client.generate("ab", n=16, max_tokens=3)
        assert await stream.texts() == ["aba"] * 16
        assert await world.client.generate("ab", n=2, max_tokens=3).text() == "aba"
        ends = [
            event.finished
            async for event in world.client.generate("ab", n=4, max_tokens=3)
            if event.HasField("finished")
        ]
        assert sorted(end.index for end in ends) == [0, 1, 2, 3]
        assert {end.finish_reason for end in ends} == {types_pb2.FINISH_REASON_LENGTH}
        assert is_clean(world)


@pytest.mark.parametrize("num_outputs", [1, 5])
async def test_the_prompts_log_probabilities_come_once_before_every_delta(
    serve, num_outputs, monkeypatch
) -> None:
    async with serve() as world:
        generate = world.engine.generate

        async def late(request):
            """The output that brings them begins after the others."""
            if request.sampling.num_prompt_logprobs is not None:
                for _ in range(20):
                    await asyncio.sleep(0)
            async for output in generate(request):
                yield output

        monkeypatch.setattr(world.engine, "generate", late)
        stream = world.client.generate("abc", n=num_outputs, max_tokens=3, prompt_logprobs=2)
        events = [event async for event in stream]
        kinds = [event.WhichOneof("event") for event in events]
        assert kinds[:2] == ["started", "prompt_logprobs"]
        assert kinds.count("prompt_logprobs") == 1 and kinds.count("finished") == num_outputs
        entries = events[1].prompt_logprobs.logprobs
        assert [entry.logprob for entry in entries] == [-98, -99]
        assert [[top.token_id for top in entry.top] for entry in entries] == [[98] * 2, [99] * 2]
        (one,) = [e async for e in world.client.generate("a", max_tokens=1, prompt_logprobs=0)
                  if e.HasField("prompt_logprobs")]  # fmt: skip
        assert len(one.prompt_logprobs.logprobs) == 0


async def test_an_output_that_ends_before_its_prompt_is_scored_holds_back_nothing(
    serve, monkeypatch
) -> None:
    async with serve() as world:
        step = world.engine._step

        def cancelled(request, index):
            if request.sampling.num_prompt_logprobs is None:
                return step(request, index)
            reason = FinishReason.CANCELLED
            return StepOutput(request_id=request.request_id, finish_reason=reason)

        monkeypatch.setattr(world.engine, "_step", cancelled)
        events = await events_of(world.service, several(3, max_tokens=2, num_prompt_logprobs=1))
        assert texts(events) == {1: "ab", 2: "ab"}
        assert sum(isinstance(event, Finished) for event in events) == 3 and is_clean(world)


@pytest.mark.parametrize("num_outputs", [0, 129, 2**31])
async def test_a_number_of_outputs_out_of_range_is_refused(serve, num_outputs) -> None:
    async with serve() as world:
        with pytest.raises(InvalidRequest) as caught:
            await events_of(world.service, several(num_outputs))
        assert caught.value.field == "sampling.n" and world.engine.seen == []


async def test_each_output_takes_a_place(serve) -> None:
    """Of 20 places 15 may be one client's."""
    async with serve(max_queued=20) as world:
        with pytest.raises(InvalidRequest, match="15") as caught:
            await events_of(world.service, several(16, max_tokens=1))
        assert caught.value.field == "sampling.n"
        world.engine.num_waiting = 6
        with pytest.raises(Overloaded):
            await events_of(world.service, several(15, max_tokens=1))
        assert world.engine.seen == []
        world.engine.num_waiting = 5
        await events_of(world.service, several(15, max_tokens=1))
        assert len(world.engine.seen) == 15 and is_clean(world)


async def test_each_output_counts_as_a_request_of_its_tenant(serve) -> None:
    caller = replace(ANONYMOUS, limits=Limits(max_requests=6))
    async with serve() as world:
        with pytest.raises(InvalidRequest) as caught:
            await events_of(world.service, replace(several(7), caller=caller))
        assert caught.value.field == "sampling.n"
        world.engine.gate.clear()
        four = replace(several(4, max_tokens=1), caller=caller)
        running = asyncio.create_task(events_of(world.service, four))
        await until(lambda: len(world.engine.running) == 4)
        with pytest.raises(Overloaded, match="may have 6"):
            await events_of(world.service, replace(four, num_outputs=3))
        world.engine.gate.set()
        await running
        await events_of(world.service, replace(four, num_outputs=6))
        assert is_clean(world)


@pytest.mark.parametrize("num_events", [1, 2, 20])
async def test_who_leaves_ends_all_outputs(serve, num_events) -> None:
    async with serve() as world:
        await world.load("x", "a")
        async with aclosing(world.service.generation.generate(several(16, adapter="x"))) as events:
            for _ in range(num_events):
                await anext(events)
            assert len(world.engine.running) == 16
        assert is_clean(world) and len(world.engine.aborted) == 16
        assert {args[1] for args in world.observer.of("on_finished")} == {"cancelled"}


@pytest.mark.parametrize("victim", [0, 7, 15])
async def test_one_that_fails_ends_all_with_one_error(serve, victim, monkeypatch) -> None:
    async with serve() as world:
        await world.load("x", "a")
        step = world.engine._step

        def failing(request, index):
            if index == 2 and world.engine.seen.index(request) == victim:
                return StepOutput(
                    request_id=request.request_id,
                    finish_reason=FinishReason.ERROR,
                    error=AdapterFailed("NaN"),
                )
            return step(request, index)

        monkeypatch.setattr(world.engine, "_step", failing)
        seen = []
        with pytest.raises(AdapterFailed):
            async for event in world.service.generation.generate(several(16, adapter="x")):
                seen.append(event)
        assert not any(isinstance(event, Finished) for event in seen)
        reasons = Counter(args[1] for args in world.observer.of("on_finished"))
        assert is_clean(world) and reasons == {"error": 1, "cancelled": 15}


async def test_an_engine_that_refuses_one_refuses_the_call(serve, monkeypatch) -> None:
    async with serve() as world:
        admit = world.engine._admit

        def admits_five(request):
            admit(request)
            if len(world.engine.seen) == 6:
                raise Overloaded("full")

        monkeypatch.setattr(world.engine, "_admit", admits_five)
        with pytest.raises(Overloaded):
            await events_of(world.service, several(16))
        assert is_clean(world)


@pytest.mark.parametrize("cancel", [False, True])
async def test_an_unload_waits_for_all_outputs_or_ends_them(serve, cancel) -> None:
    async with serve() as world:
        await world.load("x", "a")
        world.engine.gate.clear()
        running = asyncio.create_task(
            events_of(world.service, several(16, adapter="x", max_tokens=4))
        )
        await until(lambda: len(world.engine.running) == 16)
        (record,) = world.registry.records()
        assert record.num_in_flight == 1
        unload = asyncio.create_task(
            world.service.adapters.unload(ANONYMOUS, "x", cancel=cancel, wait=True)
        )
        await asyncio.sleep(0.01)
        assert not unload.done()
        world.engine.gate.set()
        await asyncio.wait_for(unload, 5)
        ends = [event for event in await running if isinstance(event, Finished)]
        wanted = FinishReason.CANCELLED if cancel else FinishReason.LENGTH
        assert [end.finish_reason for end in ends] == [wanted] * 16
        assert record.num_in_flight == 0 and world.registry.records() == []
        assert world.engine.references == {} and is_clean(world)


async def test_a_swap_at_any_moment_leaves_a_call_wholly_old_or_wholly_new(serve) -> None:
    async with serve() as world:
        await world.load("x", "a")
        for round_ in range(40):
            running = asyncio.create_task(
                events_of(world.service, several(4, adapter="x", max_tokens=3))
            )
            for _ in range(round_ % 8):
                await asyncio.sleep(0)
            letter = "ba"[round_ % 2]
            source = world.write_adapter(letter, letter)
            swap = world.service.adapters.load(ANONYMOUS, "x", source, replace=True)
            (_, events) = await asyncio.gather(swap, running)
            assert set(texts(events).values()) in ({"aaa"}, {"bbb"})
        assert is_clean(world)


async def test_nothing_leaks_from_calls_that_end_in_every_way(serve) -> None:
    rng = random.Random(0)
    async with serve() as world:
        await world.load("x", "a")

        async def one() -> None:
            request = several(rng.choice([1, 2, 16]), adapter="x", max_tokens=rng.randint(1, 9))
            with suppress(asyncio.TimeoutError):
                async with asyncio.timeout(rng.choice([0, 0.001, 0.01, 5])):
                    await events_of(world.service, request)

        await asyncio.gather(*(one() for _ in range(60)))
        assert is_clean(world)
        await asyncio.wait_for(world.service.adapters.unload(ANONYMOUS, "x", wait=True), 5)

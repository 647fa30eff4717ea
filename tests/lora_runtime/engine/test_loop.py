"""The engine's thread hangs, dies or fails every request: callers hear of it, and nothing waits."""

from __future__ import annotations

import asyncio
import queue
import random
import threading
import time
from collections import Counter
from dataclasses import MISSING, fields, replace
from types import SimpleNamespace

import pytest
import torch

from lora_runtime.core import FinishReason, StepOutput
from lora_runtime.engine.client import EngineStats
from lora_runtime.engine.failure_streak import FailureStreak
from lora_runtime.engine.loop import InThreadEngine
from lora_runtime.errors import InvalidRequest, Overloaded, RequestFailed, Unavailable
from lora_runtime.kernels import most_likely
from lora_runtime.kernels.cpu_library import library
from tests.driver import greedy


class ScriptedSteps:
    """What the loop needs of an engine: a step does `on_step` and gives every request a token."""

    def __init__(self) -> None:
        self.base = SimpleNamespace(
            folder=None, device=SimpleNamespace(type="cpu"), context=SimpleNamespace(num_calls=0)
        )
        self.info = SimpleNamespace(max_queued_requests=4)
        self.host = ()
        self.live: dict[str, str] = {}
        """Client of every request."""
        self.on_step = lambda: time.sleep(0.001)

    @property
    def is_idle(self) -> bool:
        return not self.live

    def stats(self):
        names = {field.name for field in fields(EngineStats) if field.default is MISSING}
        names.remove("waiting_by_client")
        lists = {"running_adapters", "waiting_adapters", "resident_adapters"}
        facts = {name: () if name in lists else 0 for name in names}
        facts["num_waiting"] = len(self.live)
        return EngineStats(**facts, waiting_by_client=Counter(self.live.values()))

    def add_request(self, request) -> None:
        self.live[request.request_id] = request.client

    def abort(self, request_id: str) -> list:
        self.live.pop(request_id, None)
        return []

    def abort_all(self, error) -> list:
        raise ZeroDivisionError("bookkeeping is broken too")

    def step(self) -> list[StepOutput]:
        self.on_step()
        return [StepOutput(request_id=name, token_ids=(1,)) for name in self.live]

    def take_outputs(self) -> list:
        return []

    def collect(self) -> list:
        return []


async def until(condition, timeout_s: float = 5.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.002)


async def consume(engine, name: str, client: str = "") -> StepOutput:
    request = replace(greedy(name, [1], None, 10_000), client=client)
    return [output async for output in engine.generate(request)][-1]


def hanging(steps: ScriptedSteps) -> threading.Event:
    """From now on a step ends only when the event is set."""
    release = threading.Event()
    steps.on_step = release.wait
    return release


@pytest.mark.parametrize("calls_library", [True, False])
def test_a_step_s_tokens_come_when_the_next_one_computes(calls_library):
    is_told = calls_library and library() is not None

    async def run() -> None:
        steps, tokens = ScriptedSteps(), []
        has_planned, may_compute, has_computed, may_end = (threading.Event() for _ in range(4))

        def step() -> None:
            if steps.num_steps > 0:
                has_planned.set()
                may_compute.wait()
            if calls_library:
                most_likely(torch.zeros(1, 4))
            if steps.num_steps > 0:
                has_computed.set()
                may_end.wait()
            steps.num_steps += 1

        steps.num_steps, steps.on_step = 0, step
        engine = InThreadEngine(steps)

        async def collect() -> None:
            async for output in engine.generate(greedy("a", [1], None, 10_000)):
                tokens.append(output)

        stream = asyncio.create_task(collect())
        await until(has_planned.is_set)
        await asyncio.sleep(0.02)
        assert len(tokens) == (0 if is_told else 1)
        may_compute.set()
        await until(lambda: has_computed.is_set() and len(tokens) == 1)
        may_end.set()
        await engine.close(drain_s=0)
        await asyncio.wait([stream])

    asyncio.run(run())


def ending_a_stream(steps: ScriptedSteps, when: threading.Event) -> threading.Event:
    """Every step calls the library; one that finds `when` set gives "a" its last token and frees
    all adapters. The next one waits, before it computes, for the event that is returned.
    """
    release = threading.Event()

    def step() -> list[StepOutput]:
        if "a" not in steps.live and steps.live:
            release.wait()
        most_likely(torch.zeros(1, 4))
        if not when.is_set() or steps.live.pop("a", None) is None:
            return []
        steps.host = ()
        return [StepOutput(request_id="a", token_ids=(7,), finish_reason=FinishReason.LENGTH)]

    steps.step = step
    return release


async def two_streams(engine, steps: ScriptedSteps) -> list[asyncio.Task]:
    streams = []
    for name in "ab":
        streams.append(asyncio.create_task(consume(engine, name)))
        await until(lambda name=name: name in steps.live)
    return streams


def test_tokens_that_are_held_when_an_engine_is_abandoned_are_not_lost():
    async def run() -> None:
        steps, when = ScriptedSteps(), threading.Event()
        release = ending_a_stream(steps, when)
        engine = InThreadEngine(steps)
        streams = await two_streams(engine, steps)
        when.set()
        await until(lambda: list(steps.live) == ["b"])
        await asyncio.sleep(0.02)
        engine.abandon(Unavailable("it hangs"))
        last, failed = await asyncio.wait_for(asyncio.gather(*streams), 1)
        assert (last.finish_reason, last.token_ids) == (FinishReason.LENGTH, (7,))
        assert (failed.finish_reason, str(failed.error)) == (FinishReason.ERROR, "it hangs")
        release.set()

    asyncio.run(run())


def test_who_unloads_an_adapter_finds_its_streams_at_their_ends():
    class Host(tuple):
        def is_referenced(self, digest: str) -> bool:
            return False

    async def run() -> None:
        steps, when = ScriptedSteps(), threading.Event()
        steps.host, steps.drop_adapter = Host("x"), lambda digest, ending: []
        release = ending_a_stream(steps, when)
        engine = InThreadEngine(steps)
        streams = await two_streams(engine, steps)
        unload = asyncio.create_task(engine.unload_adapter("x"))
        await until(lambda: "x" in engine._unloading)
        when.set()
        await asyncio.wait_for(unload, 1)
        last = await asyncio.wait_for(streams[0], 1)  # while the next step waits
        assert last.token_ids == (7,) and not release.is_set()
        release.set()
        await engine.close(drain_s=0)
        await asyncio.wait(streams)

    asyncio.run(run())


def test_a_stuck_engine_stands_still_and_can_be_abandoned():
    async def run() -> None:
        steps = ScriptedSteps()
        engine = InThreadEngine(steps)
        assert not engine.stats().is_busy
        streams = [asyncio.create_task(consume(engine, name)) for name in "ab"]
        await until(lambda: engine.stats().num_beats > 20)
        release = hanging(steps)
        await asyncio.sleep(0.05)
        before = engine.stats()
        await asyncio.sleep(0.05)
        assert engine.stats().num_beats == before.num_beats and before.is_busy
        waiting = asyncio.create_task(engine.unload_adapter("x"))
        await asyncio.sleep(0.01)
        engine.abandon(Unavailable("it hangs"))
        ends = await asyncio.wait_for(asyncio.gather(*streams), 1)
        assert [(end.finish_reason, str(end.error)) for end in ends] == 2 * [
            (FinishReason.ERROR, "it hangs")
        ]
        with pytest.raises(Unavailable, match="it hangs"):
            await asyncio.wait_for(waiting, 1)
        with pytest.raises(Unavailable, match="it hangs"):
            await consume(engine, "late")
        begun = time.monotonic()
        await engine.close(drain_s=0)
        assert time.monotonic() - begun < 3 and not engine.stats().is_alive
        release.set()

    asyncio.run(run())


def test_an_engine_that_is_closed_has_not_died(caplog):
    async def run() -> None:
        steps = ScriptedSteps()
        steps.abort_all = lambda error: []
        engine = InThreadEngine(steps)
        stream = asyncio.create_task(consume(engine, "a"))
        await until(lambda: engine.stats().num_beats > 5)
        await engine.close(drain_s=0)
        assert isinstance((await asyncio.wait_for(stream, 1)).error, Unavailable)

    asyncio.run(run())
    assert caplog.records == []


def test_closing_leaves_a_stuck_engine_behind():
    async def run() -> None:
        steps = ScriptedSteps()
        engine = InThreadEngine(steps)
        stream = asyncio.create_task(consume(engine, "a"))
        await until(lambda: engine.stats().num_beats > 5)
        release = hanging(steps)
        await asyncio.wait_for(engine.close(drain_s=0.1), 5)
        assert isinstance((await asyncio.wait_for(stream, 1)).error, Unavailable)
        release.set()

    asyncio.run(run())


@pytest.mark.parametrize("kind", [RuntimeError, SystemExit, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["step", "command"])
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_whatever_ends_the_thread_ends_the_engine_and_all_who_wait(kind, where):
    async def run() -> None:
        steps = ScriptedSteps()
        engine = InThreadEngine(steps)
        stream = asyncio.create_task(consume(engine, "a"))
        await until(lambda: engine.stats().num_beats > 5)

        def end() -> None:
            raise kind("from some library")

        if where == "step":
            steps.on_step = end
        else:
            command = engine._call(end)
            with pytest.raises(kind if kind is RuntimeError else Unavailable):
                await asyncio.wait_for(command, 2)
            if kind is RuntimeError:
                assert engine.stats().is_alive  # a failed command is its caller's affair
                await engine.close(drain_s=0)
        assert isinstance((await asyncio.wait_for(stream, 2)).error, Unavailable)
        await until(lambda: not engine.stats().is_alive)

    asyncio.run(run())


def test_a_full_queue_refuses_without_asking_the_engine():
    async def run() -> None:
        steps = ScriptedSteps()
        engine = InThreadEngine(steps)
        streams = [asyncio.create_task(consume(engine, name)) for name in "abc"]
        await until(lambda: engine.stats().num_waiting == 3)
        release = hanging(steps)
        await asyncio.sleep(0.02)
        with pytest.raises(Overloaded, match="3 requests of this client"):
            await consume(engine, "d")
        streams.append(asyncio.create_task(consume(engine, "d", "other")))
        await until(lambda: engine.stats().num_waiting == 4)
        assert engine.stats().waiting_by_client == {"": 3, "other": 1}
        async with asyncio.timeout(1):  # its step never ends
            with pytest.raises(Overloaded, match="4 requests"):
                await consume(engine, "late", "third")
        engine.abandon(Unavailable("over"))
        release.set()
        await asyncio.gather(*streams, return_exceptions=True)

    asyncio.run(run())


def test_a_request_is_counted_once_while_its_caller_is_not_told_yet():
    async def run() -> None:
        steps, num_steps = ScriptedSteps(), Counter()
        steps.on_step = lambda: num_steps.update(["any"])
        engine = InThreadEngine(steps)
        stream = asyncio.create_task(consume(engine, "a", "client"))
        await asyncio.sleep(0)  # it posts its request, and its event loop stands still from here
        while num_steps["any"] < 2:
            time.sleep(0.001)
        assert engine.stats().waiting_by_client == {"client": 1}
        assert engine.stats().num_waiting == 1
        stream.cancel()
        await until(lambda: engine.stats().num_waiting == 0)
        engine.abandon(Unavailable("over"))

    asyncio.run(run())


def test_a_request_refused_by_the_engine_is_no_longer_counted():
    def refuse(request) -> None:
        raise InvalidRequest("no")

    async def run() -> None:
        steps = ScriptedSteps()
        steps.add_request = refuse
        engine = InThreadEngine(steps)
        for _ in range(2 * steps.info.max_queued_requests):
            with pytest.raises(InvalidRequest, match="no"):
                await consume(engine, "a")
        assert engine.stats().num_waiting == 0
        engine.abandon(Unavailable("over"))

    asyncio.run(run())


@pytest.mark.parametrize("hangs", ["nothing", "on_step", "add_request"])
def test_a_request_that_the_thread_has_just_taken_ends_with_an_abandoned_engine(monkeypatch, hangs):
    has_taken, may_go_on = threading.Event(), threading.Event()

    class Inbox(queue.SimpleQueue):
        def get(self):
            command = super().get()
            has_taken.set()
            may_go_on.wait()
            return command

    monkeypatch.setattr(queue, "SimpleQueue", Inbox)

    async def run() -> None:
        steps = ScriptedSteps()
        if hangs != "nothing":
            setattr(steps, hangs, lambda *_: threading.Event().wait())
        engine = InThreadEngine(steps)
        stream = asyncio.create_task(consume(engine, "a"))
        await until(has_taken.is_set)
        engine.abandon(Unavailable("over"))
        may_go_on.set()
        with pytest.raises(Unavailable, match="over"):
            async with asyncio.timeout(5):
                await stream
        assert engine.stats().num_waiting == 0

    asyncio.run(run())


def test_a_request_of_a_step_that_hangs_is_not_counted_once_it_is_abandoned():
    async def run() -> None:
        steps = ScriptedSteps()
        release = hanging(steps)
        engine = InThreadEngine(steps)
        stream = asyncio.create_task(consume(engine, "a"))
        await until(lambda: "a" in steps.live)
        assert engine.stats().num_waiting == 1
        engine.abandon(Unavailable("over"))
        async with asyncio.timeout(5):
            assert str((await stream).error) == "over"
        assert engine.stats().num_waiting == 0
        release.set()

    asyncio.run(run())


def test_an_idle_engine_s_thread_ends_when_it_is_abandoned():
    async def run() -> None:
        before = set(threading.enumerate())
        engine = InThreadEngine(ScriptedSteps())
        (thread,) = set(threading.enumerate()) - before
        engine.abandon(Unavailable("over"))
        thread.join(timeout=5)
        assert not thread.is_alive()

    asyncio.run(run())


def failed(name: str) -> StepOutput:
    error = RequestFailed("unforeseen")
    return StepOutput(request_id=name, finish_reason=FinishReason.ERROR, error=error)


def token(name: str, reason: FinishReason | None = None) -> StepOutput:
    return StepOutput(request_id=name, token_ids=(1,), finish_reason=reason)


def test_a_streak_of_failures_ends_with_one_answer():
    streak = FailureStreak()
    streak.note([failed("a"), failed("b")])
    streak.note([failed("c")])
    assert streak.length == 3
    streak.note([token("d", FinishReason.STOP)])
    assert streak.length == 0


def test_first_tokens_do_not_hide_that_every_request_fails_at_its_second():
    streak, rng = FailureStreak(), random.Random(1)
    alive: list[str] = []
    for step in range(50):
        outputs = [failed(name) for name in alive]
        alive = [f"{step}-{index}" for index in range(rng.randint(1, 3))]
        streak.note([*outputs, *map(token, alive)])
    assert streak.length > 50


def test_a_long_stream_shows_that_only_the_others_fail():
    streak = FailureStreak()
    streak.note([token("long")])
    for index in range(20):
        streak.note([failed(str(index)), token("long")])
        assert streak.length <= 1

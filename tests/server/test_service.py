"""Use cases without a wire: text, limits, and exactly one end for every request."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from dataclasses import replace

import pytest

from lora_runtime.core import FinishReason, SamplingParams
from lora_runtime.errors import AdapterFailed, InvalidRequest, Unavailable
from server.calls import ChatPrompt, Delta, Finished, GenerateCall, Started, TextPrompt, TokenPrompt
from tests.fakes import EOS_ID


def call(text: str = "abc", *, stop: tuple[str, ...] = (), **sampling: object) -> GenerateCall:
    return GenerateCall(
        prompt=TextPrompt(text),
        sampling=SamplingParams(**sampling),
        has_max_tokens="max_tokens" in sampling,
        stop=stop,
    )


async def events_of(service, request: GenerateCall) -> list:
    return [event async for event in service.generate(request)]


def text_of(events: list) -> str:
    return "".join(event.text for event in events if isinstance(event, Delta))


async def test_a_request_is_started_deltas_finished(serve) -> None:
    async with serve() as world:
        events = await events_of(world.service, call(max_tokens=5))
    assert isinstance(events[0], Started) and events[0].num_prompt_tokens == 3
    assert all(isinstance(event, Delta) for event in events[1:-1])
    end = events[-1]
    assert isinstance(end, Finished) and end.finish_reason is FinishReason.LENGTH
    assert (end.num_prompt_tokens, end.num_output_tokens) == (3, 5)
    assert end.timing is not None
    assert text_of(events) == "abcab"


async def test_a_stop_string_across_tokens_cuts_the_text_and_frees_the_row(serve) -> None:
    async with serve() as world:
        events = await events_of(world.service, call("hello world", stop=("lo w", "zzz")))
        assert text_of(events) == "hel"
        assert events[-1].finish_reason is FinishReason.STOP
        assert world.engine.running == {}
        assert len(world.engine.aborted) == 1


async def test_a_stop_string_that_only_begins_is_given_out_at_the_end(serve) -> None:
    async with serve() as world:
        events = await events_of(world.service, call("ab", stop=("bx",), max_tokens=4))
    assert text_of(events) == "abab"
    assert events[-1].finish_reason is FinishReason.LENGTH


@pytest.mark.parametrize("ignore_eos", [False, True])
async def test_end_tokens_end_unless_ignored_and_stop_tokens_are_not_shown(
    serve, ignore_eos: bool
) -> None:
    prompt = TokenPrompt((*b"ab", EOS_ID, *b"cd!"))
    sampling = SamplingParams(stop_token_ids=frozenset(b"!"))
    request = GenerateCall(prompt=prompt, sampling=sampling, ignore_eos=ignore_eos)
    async with serve() as world:
        events = await events_of(world.service, replace(request, has_max_tokens=False))
    assert text_of(events) == ("abcd" if ignore_eos else "ab")
    assert events[-1].finish_reason is FinishReason.STOP
    assert events[-1].num_output_tokens == (6 if ignore_eos else 3)


async def test_characters_of_several_tokens_are_never_torn(serve) -> None:
    text = "\N{SNOWMAN}é\N{GRINNING FACE}"
    async with serve() as world:
        events = await events_of(world.service, call(text, max_tokens=len(text.encode())))
    assert text_of(events) == text
    assert all("\N{REPLACEMENT CHARACTER}" not in e.text for e in events if isinstance(e, Delta))


async def test_default_max_tokens_is_256_or_what_fits(serve) -> None:
    async with serve(max_model_len=300) as world:
        assert (await events_of(world.service, call("a" * 10)))[-1].num_output_tokens == 256
        assert (await events_of(world.service, call("a" * 290)))[-1].num_output_tokens == 10
        full = await events_of(world.service, call("a" * 290, max_tokens=10))
        assert full[-1].num_output_tokens == 10


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (call(""), "text"),
        (call("a" * 300), "text"),
        (call("a" * 290, max_tokens=11), "sampling.max_tokens"),
        (call("a" * 290, min_tokens=11), "sampling.min_tokens"),
        (replace(call(), prompt=TokenPrompt(())), "token_ids"),
        (replace(call(), prompt=TokenPrompt((1, 257))), "token_ids"),
        (replace(call(), prompt=ChatPrompt(())), "messages"),
        (replace(call(), prompt=ChatPrompt(({"role": "x", "content": ""},))), "messages"),
    ],
    ids=str,
)
async def test_what_does_not_fit_is_refused_before_the_engine(serve, request_, field) -> None:
    async with serve(max_model_len=300) as world:
        with pytest.raises(InvalidRequest) as caught:
            await events_of(world.service, request_)
        assert caught.value.field == field
        assert world.engine.seen == []
        assert world.observer.of("on_started") == []


async def test_a_prompt_deeper_than_the_kv_cache_is_refused(serve) -> None:
    async with serve(max_model_len=100_000) as world:
        with pytest.raises(InvalidRequest) as caught:
            await events_of(world.service, call("a" * 16_000))
    assert caught.value.field == "text"


@pytest.mark.parametrize("failure", [AdapterFailed("NaN"), RuntimeError("a bug")], ids=repr)
async def test_a_failure_comes_once_in_place_of_the_end(serve, failure: Exception) -> None:
    async with serve() as world:
        world.engine.failure = failure
        seen = []
        with pytest.raises(type(failure)):
            async for event in world.service.generate(call()):
                seen.append(event)
        assert not any(isinstance(event, Finished) for event in seen)
        assert world.engine.running == {}
        assert [args[1] for args in world.observer.of("on_finished")] == ["error"]


async def test_an_engine_that_vanishes_is_an_error_not_an_end(serve) -> None:
    async with serve() as world:
        world.engine.vanishes = True
        with pytest.raises(Unavailable):
            await events_of(world.service, call())


@pytest.mark.parametrize("num_events", [1, 2, 3])
async def test_closing_a_stream_frees_its_row_and_is_counted(serve, num_events: int) -> None:
    async with serve() as world:
        async with aclosing(world.service.generate(call())) as events:
            for _ in range(num_events):
                await anext(events)
        assert world.engine.running == {} and len(world.engine.aborted) == 1
        (finished,) = world.observer.of("on_finished")
        assert finished[1] == "cancelled"


async def test_cancelling_a_task_that_waits_frees_the_row(serve) -> None:
    async with serve() as world:
        world.engine.gate.clear()
        task = asyncio.create_task(events_of(world.service, call()))
        await asyncio.sleep(0.01)
        assert len(world.engine.running) == 1
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert world.engine.running == {}


async def test_the_observer_hears_one_course_per_request(serve) -> None:
    async with serve() as world:
        await world.load("x", "a")
        await events_of(world.service, replace(call(max_tokens=3), adapter="x"))
    calls = [(name, args) for name, args in world.observer.calls if "adapter" not in name]
    names = [name for name, _ in calls]
    assert names == ["on_started", "on_first_token", *["on_tokens"] * 3, "on_finished"]
    assert all(args[0] == "x" for _, args in calls)
    gaps = [args[2] for args in world.observer.of("on_tokens")]
    assert gaps[0] is None and all(gap >= 0 for gap in gaps[1:])
    _, reason, num_prompt, num_output, e2e_s, timing = world.observer.of("on_finished")[0]
    assert (reason, num_prompt, num_output) == ("length", 3, 3)
    assert e2e_s > 0 and timing is not None
    assert [args[0] for args in world.observer.of("on_adapter_loaded")] == ["x"]


async def test_tokenizing_a_long_text_leaves_the_event_loop_free(serve) -> None:
    async with serve() as world:
        tokenizer, ticks, main = world.service._tokenizer, [], asyncio.get_running_loop()
        original = tokenizer.encode

        def slow(text: str) -> list[int]:
            asyncio.run_coroutine_threadsafe(asyncio.sleep(0), main).result(timeout=5)
            ticks.append(text)
            return original(text)

        tokenizer.encode = slow
        assert len(await world.service.tokenize(TextPrompt("a" * 5000))) == 5000
        assert len(ticks) == 1


async def test_the_deadline_reaches_the_engine(serve) -> None:
    async with serve() as world:
        await events_of(world.service, replace(call(max_tokens=1), timeout_s=30.0))
        await events_of(world.service, call(max_tokens=1))
        with_deadline, without = world.engine.seen
    assert 25 < with_deadline.deadline - with_deadline.arrival <= 30
    assert without.deadline is None

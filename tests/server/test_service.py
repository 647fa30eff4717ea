"""Use cases without a wire: text, limits, and exactly one end for every request."""

from __future__ import annotations

import asyncio
import json
from contextlib import aclosing
from dataclasses import replace

import pytest

from lora_runtime.core import AdapterChoice, FinishReason, SamplingParams
from lora_runtime.errors import (
    AdapterFailed,
    AdapterNotFound,
    AdapterRefused,
    InvalidRequest,
    LoramuxError,
    Unavailable,
)
from lora_runtime.text.chat_prompt import ChatPrompt
from loramux.server.access.caller import ANONYMOUS
from loramux.server.calls import (
    AdapterState,
    Delta,
    Finished,
    GenerateCall,
    Started,
    TextPrompt,
    TokenPrompt,
)
from tests.fakes import EOS_ID


def call(text: str = "abc", *, stop: tuple[str, ...] = (), **sampling: object) -> GenerateCall:
    return GenerateCall(
        caller=ANONYMOUS,
        prompt=TextPrompt(text),
        sampling=SamplingParams(**sampling),
        has_max_tokens="max_tokens" in sampling,
        stop=stop,
    )


async def events_of(service, request: GenerateCall) -> list:
    return [event async for event in service.generation.generate(request)]


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
    request = GenerateCall(
        caller=ANONYMOUS, prompt=prompt, sampling=sampling, ignore_eos=ignore_eos
    )
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


async def test_a_deeper_row_has_room_for_fewer_tokens(serve) -> None:
    """100 layers over a base of 2: 1000 blocks of 16 tokens hold 20 x 16 tokens of such a row."""
    async with serve() as world:
        await world.load("deep", "a", num_layers=100)
        deep = replace(call("a" * 100), adapters=(AdapterChoice("deep"),))
        assert (await events_of(world.service, deep))[-1].num_output_tokens == 220
        assert (await events_of(world.service, call("a" * 100)))[-1].num_output_tokens == 256
        too_long = replace(call("a" * 100, max_tokens=221), adapters=deep.adapters)
        with pytest.raises(InvalidRequest) as caught:
            await events_of(world.service, too_long)
        assert caught.value.field == "sampling.max_tokens"
        with pytest.raises(InvalidRequest) as caught:
            await events_of(world.service, replace(call("a" * 320), adapters=deep.adapters))
        assert caught.value.field == "text"


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
            async for event in world.service.generation.generate(call()):
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
        async with aclosing(world.service.generation.generate(call())) as events:
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
        await events_of(world.service, replace(call(max_tokens=3), adapters=(AdapterChoice("x"),)))
    calls = [(name, args) for name, args in world.observer.calls if "adapter" not in name]
    names = [name for name, _ in calls]
    assert names == ["on_started", "on_first_token", *["on_tokens"] * 3, "on_finished"]
    assert all(args[0] == ("x",) for _, args in calls)
    gaps = [args[2] for args in world.observer.of("on_tokens")]
    assert gaps[0] is None and all(gap >= 0 for gap in gaps[1:])
    _, reason, num_prompt, num_output, e2e_s, timing = world.observer.of("on_finished")[0]
    assert (reason, num_prompt, num_output) == ("length", 3, 3)
    assert e2e_s > 0 and timing is not None
    assert [args[0] for args in world.observer.of("on_adapter_loaded")] == ["x"]


async def test_tokenizing_a_long_text_leaves_the_event_loop_free(serve) -> None:
    async with serve() as world:
        tokenizer, ticks, main = world.service.prompts._tokenizer, [], asyncio.get_running_loop()
        original = tokenizer.encode

        def slow(text: str) -> list[int]:
            asyncio.run_coroutine_threadsafe(asyncio.sleep(0), main).result(timeout=5)
            ticks.append(text)
            return original(text)

        tokenizer.encode = slow
        assert len(await world.service.prompts.tokenize(TextPrompt("a" * 5000))) == 5000
        assert len(ticks) == 1


async def test_the_deadline_reaches_the_engine(serve) -> None:
    async with serve() as world:
        await events_of(world.service, replace(call(max_tokens=1), timeout_s=30.0))
        await events_of(world.service, call(max_tokens=1))
        with_deadline, without = world.engine.seen
    assert 25 < with_deadline.deadline - with_deadline.arrival <= 30
    assert without.deadline is None


def chat(*names: str, content: str = "hi") -> GenerateCall:
    return replace(
        call(max_tokens=1),
        prompt=ChatPrompt(({"role": "user", "content": content},)),
        adapters=tuple(AdapterChoice(name) for name in names),
    )


async def prompt_of(world, request: GenerateCall) -> str:
    await events_of(world.service, request)
    return bytes(world.engine.seen[-1].prompt_token_ids).decode()


async def notes_of(world, request: GenerateCall) -> tuple[str, ...]:
    return (await events_of(world.service, request))[0].notes


async def test_a_conversation_takes_its_adapters_template_where_they_agree(serve) -> None:
    async with serve() as world:
        await world.load("plain", "a")
        for name, template in (
            ("own", "[{content}]"),
            ("same", "[{content}]"),
            ("other", "{role}"),
        ):
            await world.load(name, name, chat_template=template)
        assert await prompt_of(world, chat()) == "<user>hi"
        assert await prompt_of(world, chat("plain")) == "<user>hi"
        assert await prompt_of(world, chat("own")) == "[hi]"
        assert await prompt_of(world, chat("own", "same")) == "[hi]"
        for names in (("own", "other"), ("own", "plain"), ("plain", "other", "own")):
            for prompt in (chat().prompt, TextPrompt("hi"), TokenPrompt((1, 2))):
                with pytest.raises(InvalidRequest, match="base_text") as caught:
                    await events_of(world.service, replace(chat(*names), prompt=prompt))
                assert caught.value.field == "adapters"
            by_choice = replace(chat(*names), uses_base_text=True)
            assert await prompt_of(world, by_choice) == "<user>hi"
        assert await prompt_of(world, replace(chat("own"), uses_base_text=True)) == "<user>hi"


async def test_an_adapters_own_end_tokens_end_its_outputs(serve) -> None:
    async with serve() as world:
        ends = json.dumps({"eos_token_id": ord("!")})
        await world.load("own", "o", generation=ends)
        await world.load("twin", "o2", generation=ends)

        async def stops(*names: str, **changes: object) -> frozenset[int]:
            await events_of(world.service, replace(chat(*names), **changes))
            return world.engine.seen[-1].sampling.stop_token_ids

        assert await stops() == await stops("own", uses_base_text=True) == {EOS_ID}
        assert await stops("own") == await stops("own", "twin") == {ord("!")}
        assert await stops("own", ignore_eos=True) == set()


@pytest.mark.parametrize(
    "error", [AdapterRefused("no", field="tokenizer.json"), TypeError("a bug")]
)
@pytest.mark.parametrize("replaces", [False, True])
async def test_what_a_review_raises_leaves_nothing_behind(serve, error, replaces) -> None:
    """No reference in the engine, no record that waits for ever, and the old content stays."""
    async with serve() as world:
        if replaces:
            await world.load("x", "old")
        world.service.prompts._own_text.error = error
        for content in ("a", "b", "c"):
            with pytest.raises(
                AdapterRefused if isinstance(error, AdapterRefused) else LoramuxError
            ):
                await world.load("x", content, replace=True, chat_template="t")
        states = [record.state for record in world.service.adapters.records(ANONYMOUS)]
        assert states == [AdapterState.LOADED if replaces else AdapterState.FAILED]
        assert sum(world.engine.references.values()) == replaces
        world.service.prompts._own_text.error = None
        assert (await world.load("x", "d", replace=True, chat_template="t")).adapter.digest[
            0
        ] == "d"


async def test_a_template_that_fails_is_noted_at_load_and_refused_at_use(serve) -> None:
    async with serve() as world:
        loaded = await world.load("x", "a", chat_template="{nobody}", notes=["first"])
        first, second = loaded.adapter.notes
        assert first == "first" and "template" in second and "nobody" in second
        with pytest.raises(InvalidRequest) as caught:
            await events_of(world.service, chat("x"))
        assert caught.value.field == "messages" and world.engine.seen == []
        assert await prompt_of(world, replace(chat("x"), prompt=TextPrompt("hi"))) == "hi"
        assert list((await world.load("y", "b", chat_template="{content}")).adapter.notes) == []


class HeldText:
    """Lets a test act while the first conversation is rendered: `meanwhile` runs before it is."""

    def __init__(self, inner, meanwhile) -> None:
        self._inner, self._meanwhile = inner, [meanwhile]

    def __getattr__(self, name: str):
        return getattr(self._inner, name)

    async def render(self, side, messages, *others) -> str:
        text = await self._inner.render(side, messages, *others)
        if messages[0]["content"] == "hi" and self._meanwhile:
            await self._meanwhile.pop()()
        return text


@pytest.mark.parametrize("template", ["({content})", "[{content}]", None])
async def test_an_adapter_swapped_while_its_prompt_is_made_is_never_mixed(serve, template) -> None:
    """Content and template of a request belong together, whatever happens in between."""
    async with serve() as world:
        await world.load("x", "a", chat_template="[{content}]")
        facts = {} if template is None else {"chat_template": template}
        world.service.prompts._own_text = HeldText(
            world.service.prompts._own_text, lambda: world.load("x", "b", replace=True, **facts)
        )
        events = await events_of(world.service, chat("x"))
        (request,) = world.engine.seen
    assert text_of(events) == "b" and request.adapters[0].digest.startswith("b")
    expected = "<user>hi" if template is None else template.format(content="hi")
    assert bytes(request.prompt_token_ids).decode() == expected


async def test_an_adapter_unloaded_while_its_prompt_is_made_is_gone(serve) -> None:
    async with serve() as world:
        await world.load("x", "a", chat_template="[{content}]")
        world.service.prompts._own_text = HeldText(
            world.service.prompts._own_text, lambda: world.client.unload_adapter("x")
        )
        with pytest.raises(AdapterNotFound) as caught:
            await events_of(world.service, chat("x"))
    assert caught.value.field == "adapters[0].name" and world.engine.seen == []


async def test_a_note_says_which_adapters_were_not_invoked(serve) -> None:
    async with serve() as world:
        await world.load("x", "a", invocation_tokens=list(b"<go>"))
        await world.load("y", "b", invocation_tokens=list(b"run"))
        await world.load("z", "c")

        async def notes(text: str, *names: str) -> tuple[str, ...]:
            choices = tuple(AdapterChoice(name) for name in names)
            return await notes_of(world, replace(call(text, max_tokens=1), adapters=choices))

        assert await notes("<go>", "x") == await notes("a <go> b <go>", "x") == ()
        assert await notes("<go", "z") == await notes("<go") == ()
        (alone,) = await notes("<g o>", "x")
        assert alone == (
            "adapter 'x' was not invoked: its invocation tokens are not in the prompt; "
            "the base answers"
        )
        (mixed,) = await notes("run away", "z", "y", "x")
        assert "'x'" in mixed and "does not act" in mixed
        assert len(await notes("a", "x", "y")) == 2
        assert all(use.start_position == 0 for seen in world.engine.seen for use in seen.adapters)


async def test_two_names_of_one_content_act_as_one_with_the_sum_of_their_weights(serve) -> None:
    async with serve() as world:
        for name, content in (("x", "a"), ("y", "b"), ("z", "a")):
            await world.load(name, content)
        for order in (("x", "y", "z"), ("y", "z", "x")):
            weights = {"x": 0.5, "y": 2.0, "z": -0.25}
            choices = tuple(AdapterChoice(name, weights[name]) for name in order)
            await events_of(world.service, replace(call(max_tokens=1), adapters=choices))
        first, second = world.engine.seen
    assert [(use.digest[0], use.weight) for use in first.adapters] == [("a", 0.25), ("b", 2.0)]
    assert first.adapters == second.adapters


async def test_an_engines_refusal_of_a_composition_comes_before_anything_else(serve) -> None:
    async with serve() as world:
        await world.load("x", "a", num_layers=3)
        await world.load("y", "b", num_layers=4)
        choices = (AdapterChoice("x"), AdapterChoice("y"))
        with pytest.raises(InvalidRequest) as caught:
            await events_of(world.service, replace(call(), adapters=choices))
        assert caught.value.field == "adapters"
        records = world.service.adapters.records(ANONYMOUS)
        assert [record.num_in_flight for record in records] == [0, 0]

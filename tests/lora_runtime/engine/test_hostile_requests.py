"""No request ends the engine, and none changes a token of the rows beside it.

Every field of a request at its extremes, with neighbours in the batch whose tokens are known; and
faults put into planning, copying, the forward, sampling and recording of one row.
"""

from __future__ import annotations

import asyncio
import math
import random
import sys
import time
from dataclasses import replace

import pytest

from lora_runtime.core import AdapterUse, FinishReason, Request, SamplingParams
from lora_runtime.engine import engine as engine_module
from lora_runtime.engine import model_runner
from lora_runtime.engine.loop import InThreadEngine
from lora_runtime.errors import LoramuxError, RequestFailed, Unavailable
from tests.driver import Trace, greedy, run
from tests.lora_runtime.engine.mixed_batch import mixed_requests, prompt, with_adapters
from tests.tiny import VOCAB_SIZE

HUGE = 10**30
EXTREMES = {
    "prompt_token_ids": [
        (), (0,), (VOCAB_SIZE - 1,) * 9, (-1,), (VOCAB_SIZE,), (HUGE,), (3,) * 511, (3,) * 600,
    ],
    "cache_salt": ["", "\ud800", "\0" * 999, "💥"],
    "deadline": [None, -math.inf, math.inf, math.nan, 0.0, 1e300],
}  # fmt: skip
SAMPLING_EXTREMES = {
    "max_tokens": [-1, 0, 1, 2, 511, HUGE],
    "min_tokens": [-1, 0, 1, 2, HUGE],
    "temperature": [0.0, 5e-324, 1e-38, 1e-3, 1.0, 100.0, 101.0, -1.0, math.inf, math.nan],
    "top_k": [0, 1, VOCAB_SIZE, 2**31 - 1, 2**31, HUGE, -1],
    "top_p": [1.0, 5e-324, 1e-9, 0.0, -1.0, math.nan, math.inf],
    "min_p": [0.0, 1.0, 5e-324, math.nan, 2.0],
    "seed": [None, 0, 2**63 - 1, 2**63, -1, HUGE],
    "stop_token_ids": [
        frozenset(), frozenset([0]), frozenset(range(VOCAB_SIZE)), frozenset([-1]),
        frozenset([VOCAB_SIZE]), frozenset([10**6]), frozenset([HUGE]), frozenset(range(5000)),
    ],
    "num_logprobs": [None, 0, 1, 20, 21, -1, HUGE],
    "num_prompt_logprobs": [None, 0, 1, 20, 21, -1, HUGE],
    "presence_penalty": [0.0, 2.0, -2.0, 5e-324, 2.1, math.nan, math.inf],
    "frequency_penalty": [0.0, 2, -2.0, 5e-324, -2.1, math.nan, HUGE],
    "repetition_penalty": [1.0, 100.0, 0.01, 1 + 1e-9, 0.0, 5e-324, -1.0, math.nan, math.inf, HUGE],
    "logit_bias": [
        (), ((0, 100.0),), ((VOCAB_SIZE - 1, -100.0),), tuple((i, -100) for i in range(VOCAB_SIZE)),
        ((-1, 1.0),), ((VOCAB_SIZE, 1.0),), ((HUGE, 1.0),), ((3, math.nan),), ((3, math.inf),),
        ((3, HUGE),), ((3, 1.0), (3, 2.0)), tuple((i, 1.0) for i in range(5000)), None, ((1,),),
    ],
}  # fmt: skip
WEIGHTS = [1.0, 0.0, -0.0, 5e-324, 1e-30, -100.0, 1e30, sys.float_info.max, math.inf, math.nan]


def hostile(rng: random.Random, request_id: str, digests: list[str]) -> Request:
    """A request with some fields at an extreme. Raises InvalidRequest where it is none."""

    def some(table, share):
        return {name: rng.choice(values) for name, values in table.items() if rng.random() < share}

    uses = tuple(
        AdapterUse(
            digest=rng.choice([*digests, "0" * 64]) if rng.random() < 0.2 else digest,
            weight=rng.choice(WEIGHTS),
            start_position=rng.choice([0, 0, 1, 10**9, -1]),
        )
        for digest in rng.sample(digests, rng.choice([0, 0, 1, 2, len(digests)]))
    )
    sampling = {"max_tokens": 4, **some(SAMPLING_EXTREMES, 0.15)}
    fields = {"prompt_token_ids": tuple(prompt(rng.randint(1, 40))), **some(EXTREMES, 0.25)}
    return Request(
        request_id=request_id, sampling=SamplingParams(**sampling), adapters=uses, **fields
    )


@pytest.fixture(scope="module")
def alone(base, forms):
    result = {}
    for request in mixed_requests(forms):
        result |= run(with_adapters(base, forms), [request])
    return {request_id: trace.token_ids for request_id, trace in result.items()}


def drive(engine, arriving):
    """Step to the end, a few of `arriving` requests each step; each live one ends exactly once."""
    traces, waiting = {}, list(arriving)
    while waiting or not engine.is_idle:
        for request in waiting[:3]:
            try:
                engine.add_request(request())
            except LoramuxError as error:
                assert error.field is not None or "digest" in error.message, error
        del waiting[:3]
        for output in engine.step():
            trace = traces.setdefault(output.request_id, Trace())
            trace.token_ids += output.token_ids
            if output.finish_reason is not None:
                trace.num_terminals += 1
                trace.finish_reason, trace.error = output.finish_reason, output.error
        engine.check_integrity()
    assert all(trace.num_terminals == 1 for trace in traces.values())
    return traces


@pytest.mark.parametrize("steps_ahead", [0, 1])
@pytest.mark.parametrize("seed", range(3))
def test_every_field_at_its_extremes_beside_sound_rows(base, forms, alone, seed, steps_ahead):
    rng = random.Random(seed)
    engine = with_adapters(base, forms, steps_ahead=steps_ahead, num_blocks=300)
    digests = [form.digest for form in forms]
    arriving = [lambda i=i: hostile(rng, f"hostile {i}", digests) for i in range(250)]
    for index, request in enumerate(mixed_requests(forms)):
        arriving.insert(20 * index, lambda request=request: request)
    traces = drive(engine, arriving)
    assert {key: traces[key].token_ids for key in alone} == alone
    served = [t for key, t in traces.items() if key not in alone and t.error is None]
    assert len(served) > 30, "nearly all hostile requests were refused: the test shows little"
    assert not any(isinstance(t.error, RequestFailed) for t in traces.values()), (
        "no field may do so"
    )


VICTIM = "3"


def is_victim(row):
    return row.request.request_id == VICTIM


def break_planning(engine, monkeypatch, forms):
    def find(row):
        if is_victim(row):
            raise RuntimeError("planning")
        return type(engine.blocks).find(engine.blocks, row)

    monkeypatch.setattr(engine.blocks, "find", find)


def break_forward(engine, monkeypatch, forms):
    def build(plan, *args):
        if any(is_victim(scheduled.row) for scheduled in plan.rows):
            raise MemoryError("forward")
        return build_batch(plan, *args)

    build_batch = model_runner.build_batch
    monkeypatch.setattr(model_runner, "build_batch", build)


def break_sampling(engine, monkeypatch, forms):
    """In its third token, when others have been drawn in the same step."""

    def broken(logits, rows, *best):
        if any(is_victim(s) and s.num_output_tokens >= 2 for s in rows):
            raise IndexError("sampling")
        return draw(logits, rows, *best)

    draw = model_runner.draw
    monkeypatch.setattr(model_runner, "draw", broken)


def break_recording(engine, monkeypatch, forms):
    def publish(row, num_tokens):
        if is_victim(row):
            raise KeyError("recording")
        return type(engine.blocks).publish(engine.blocks, row, num_tokens)

    monkeypatch.setattr(engine.blocks, "publish", publish)


FAULTS = [break_planning, break_forward, break_sampling, break_recording]


@pytest.mark.parametrize("steps_ahead", [0, 1])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_ends_its_own_row_only(base, forms, alone, fault, steps_ahead, monkeypatch):
    engine = with_adapters(base, forms, steps_ahead=steps_ahead, max_num_batched_tokens=200)
    fault(engine, monkeypatch, forms)
    traces = drive(engine, [lambda r=r: r for r in mixed_requests(forms)])
    failed = traces.pop(VICTIM)
    assert isinstance(failed.error, RequestFailed) and failed.finish_reason == FinishReason.ERROR
    assert failed.token_ids == alone[VICTIM][: len(failed.token_ids)]
    assert {key: trace.token_ids for key, trace in traces.items()} == {
        key: tokens for key, tokens in alone.items() if key != VICTIM
    }
    assert engine.blocks.num_used == 0 and not engine.slots._pins
    monkeypatch.undo()
    request = next(r for r in mixed_requests(forms) if r.request_id == VICTIM)
    assert drive(engine, [lambda: request])[VICTIM].token_ids == alone[VICTIM]


def test_an_adapter_that_cannot_be_copied_ends_its_own_rows(base, forms, alone, monkeypatch):
    engine = with_adapters(base, forms)
    broken = forms[2].digest

    def start(placement, adapter):
        if placement.digest == broken:
            raise MemoryError("copy")
        return type(loads).start(loads, placement, adapter)

    loads = engine.runner.loads
    monkeypatch.setattr(loads, "start", start)
    traces = drive(engine, [lambda r=r: r for r in mixed_requests(forms)])
    for request in mixed_requests(forms):
        trace = traces[request.request_id]
        if request.adapters and request.adapters[0].digest == broken:
            assert isinstance(trace.error, RequestFailed)
        else:
            assert trace.token_ids == alone[request.request_id]
    assert broken not in engine.slots.resident
    monkeypatch.undo()
    traces = drive(engine, [lambda r=r: r for r in mixed_requests(forms)])
    assert {key: trace.token_ids for key, trace in traces.items()} == alone


def test_an_engine_on_which_nothing_runs_any_more_says_so(base, forms, monkeypatch):
    """As after an error that took the device away: not even the base runs."""
    engine = with_adapters(base, forms)

    def lost(*args, **kwargs):
        raise RuntimeError("the device is lost")

    monkeypatch.setattr(type(base), "forward", lost)
    engine.add_request(greedy("r", [5, 6], None, 4))
    with pytest.raises(RuntimeError, match="the device is lost"):
        engine.step()


def test_results_that_cannot_be_read_end_the_rows_of_their_step(base, forms, alone, monkeypatch):
    engine = with_adapters(base, forms, steps_ahead=1)
    result, calls = engine_module.Draw.result, []

    def broken(self):
        calls.append(1)
        if len(calls) == 2:
            raise MemoryError("reading")
        return result(self)

    monkeypatch.setattr(engine_module.Draw, "result", broken)
    traces = drive(engine, [lambda r=r: r for r in mixed_requests(forms)])
    failed = {key for key, trace in traces.items() if trace.error is not None}
    assert 0 < len(failed) < len(traces)
    for key in traces.keys() - failed:
        assert traces[key].token_ids == alone[key]


@pytest.mark.parametrize("steps_ahead", [0, 1])
def test_streams_of_a_dying_engine_get_their_one_end(base, forms, monkeypatch, steps_ahead):
    """Also those that the dying step had ended already: by a deadline, or as failed rows."""
    asyncio.run(die_with_streams(base, forms, monkeypatch, steps_ahead))


async def die_with_streams(base, forms, monkeypatch, steps_ahead):
    engine = with_adapters(base, forms, steps_ahead=steps_ahead)
    client = InThreadEngine(engine)

    async def ends_of(request):
        return [o async for o in client.generate(request) if o.finish_reason is not None]

    requests = [greedy(str(i), prompt(6), None, 400) for i in range(3)]
    deadline = time.monotonic() + 0.5
    requests.append(replace(requests[0], request_id="late", deadline=deadline))
    streams = [asyncio.create_task(ends_of(request)) for request in requests]
    while engine.stats().num_running < 4:
        await asyncio.sleep(0.01)

    def lost(*args, **kwargs):
        time.sleep(max(0.0, deadline + 0.05 - time.monotonic()))  # it passes meanwhile
        raise RuntimeError("the device is lost")

    monkeypatch.setattr(type(base), "forward", lost)
    monkeypatch.setattr(engine.runner, "logits", lost)  # of steps that are played from a tape
    for stream in asyncio.as_completed(streams, timeout=30):
        (end,) = await stream
        is_cancelled = end.finish_reason is FinishReason.CANCELLED
        assert is_cancelled or isinstance(end.error, RequestFailed | Unavailable)
    assert not client.stats().is_alive
    monkeypatch.undo()
    await client.close(drain_s=0)


def test_rows_cancelled_by_an_unload_that_fails_get_their_end(base, forms, monkeypatch):
    asyncio.run(unload_with_a_fault(base, forms, monkeypatch))


async def unload_with_a_fault(base, forms, monkeypatch):
    engine = with_adapters(base, forms)
    client, digest = InThreadEngine(engine), forms[0].digest
    stream = client.generate(greedy("r", prompt(6), digest, 400))
    await anext(stream)
    clear, calls = engine.pool.clear, []

    def broken(slot):
        calls.append(slot)
        if len(calls) == 1:
            raise MemoryError("clear")
        return clear(slot)

    monkeypatch.setattr(engine.pool, "clear", broken)
    await asyncio.wait_for(client.unload_adapter(digest, ending=["r"]), 20)
    outputs = [output async for output in stream]
    assert outputs[-1].finish_reason == FinishReason.CANCELLED
    base_row = [o async for o in client.generate(greedy("base", [5, 6], None, 2))]
    assert base_row[-1].finish_reason == FinishReason.LENGTH
    assert len(calls) > 1, "the slot is emptied later"
    await client.close(drain_s=0)


def test_a_fault_while_slots_are_taken_leaves_no_pin(base, forms, alone, monkeypatch):
    """Else an adapter would count as resident that was never copied, and serve the base."""
    engine = with_adapters(base, forms)
    acquire, calls = engine.slots._acquire, []

    def broken(digest):
        calls.append(digest)
        if len(calls) == 2:
            raise MemoryError("acquire")
        return acquire(digest)

    monkeypatch.setattr(engine.slots, "_acquire", broken)
    uses = tuple(AdapterUse(digest=form.digest) for form in forms[:2])
    both = replace(greedy("both", prompt(9), None, 4), adapters=uses)
    assert isinstance(drive(engine, [lambda: both])["both"].error, RequestFailed)
    traces = drive(engine, [lambda r=r: r for r in mixed_requests(forms)])
    assert {key: trace.token_ids for key, trace in traces.items()} == alone

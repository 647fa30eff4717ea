"""Steps that are started before the last one is recorded, as on a GPU: the same tokens, and nothing
waits for the step that has just been started.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from lora_runtime.core import FinishReason, SamplingParams
from lora_runtime.engine.sampler import Draw
from tests.driver import greedy, run, tiny_engine
from tests.lora_runtime.engine.mixed_batch import mixed_requests, prompt, tokens, with_adapters


def sampled_with(request, **options):
    sampling = SamplingParams(max_tokens=request.sampling.max_tokens, **options)
    return replace(request, sampling=sampling)


def finish(engine):
    """Request id → outputs, checked after every step."""
    outputs = {}
    while not engine.is_idle:
        for output in engine.step():
            outputs.setdefault(output.request_id, []).append(output)
        engine.check_integrity()
    assert engine.blocks.num_used == 0
    return outputs


@pytest.mark.parametrize(
    "options",
    [{}, dict(num_blocks=48), dict(max_slots=2), dict(max_num_batched_tokens=200, max_num_seqs=3)],
)
def test_tokens_are_those_of_plain_steps(base, forms, alone, options):
    engine = with_adapters(base, forms, steps_ahead=1, **options)
    traces = run(engine, mixed_requests(forms), arrivals={str(i): i % 5 for i in range(10)})
    assert tokens(traces) == alone
    assert all(trace.num_terminals == 1 for trace in traces.values())
    assert (engine.scheduler.num_preemptions > 0) == ("num_blocks" in options)


def test_draws_and_log_probabilities_are_those_of_plain_steps(base, forms):
    requests = [
        sampled_with(request, seed=i, temperature=0.8, top_k=5 * (i % 3), num_logprobs=i % 4)
        for i, request in enumerate(mixed_requests(forms, max_tokens=8))
    ]
    found = []
    for steps_ahead in (0, 1):
        engine = with_adapters(base, forms, steps_ahead=steps_ahead)
        for request in requests:
            engine.add_request(request)
        found.append(finish(engine))
    for request_id, plain in found[0].items():
        ahead = found[1][request_id]
        assert [output.token_ids for output in ahead] == [output.token_ids for output in plain]
        for one, other in zip(ahead, plain, strict=True):
            assert one.logprobs[0].logprob == pytest.approx(other.logprobs[0].logprob, abs=1e-4)


def test_a_row_that_stops_runs_once_in_vain_and_others_go_on(base, alone):
    stop = alone["0"][5]
    expected = alone["0"][: alone["0"].index(stop) + 1]
    engine = tiny_engine(base, steps_ahead=1)
    stopping = sampled_with(
        greedy("0", prompt(4, seed=0), None, 24), temperature=0.0, stop_token_ids=frozenset([stop])
    )
    counts = Counter()
    forward = engine.runner.logits
    engine.runner.logits = lambda plan: (
        counts.update(scheduled.row.request.request_id for scheduled in plan.rows) or forward(plan)
    )
    engine.add_request(stopping)
    engine.add_request(greedy("5", prompt(5, seed=5), None, 24))
    outputs = finish(engine)
    assert [t for o in outputs["0"] for t in o.token_ids] == expected
    assert outputs["0"][-1].finish_reason is FinishReason.STOP
    assert [t for o in outputs["5"] for t in o.token_ids] == alone["5"]
    assert counts == {"0": len(expected) + 1, "5": 24}, "the length is known before"


@pytest.mark.parametrize("is_stopped", [False, True])
def test_nothing_waits_for_the_step_just_started(base, alone, monkeypatch, is_stopped):
    """Every one is waited for in the end, that of a row that was over by then too."""
    engine, calls = tiny_engine(base, steps_ahead=1), []
    start, result = engine.runner.start, Draw.result
    engine.runner.start = lambda *given: calls.append("start") or start(*given)
    monkeypatch.setattr(Draw, "result", lambda draw: calls.append("result") or result(draw))
    request, num_tokens = greedy("r", prompt(4), None, 4), 4
    if is_stopped:
        stop = alone["0"][1]
        request = sampled_with(request, temperature=0.0, stop_token_ids=frozenset([stop]))
        num_tokens = alone["0"].index(stop) + 2
    engine.add_request(request)
    assert engine.step() == [] and calls == ["start"]
    finish(engine)
    assert calls == ["start", *["start", "result"] * (num_tokens - 1), "result"]


def test_requests_that_end_while_their_step_runs(base, forms, alone):
    """Cancelled, unloaded with its adapter, and its id used again at once."""
    engine = with_adapters(base, forms, steps_ahead=1)
    for request in mixed_requests(forms):
        engine.add_request(request)
    seen = {}
    for _ in range(3):
        for output in engine.step():
            seen.setdefault(output.request_id, []).append(output)
    ended = engine.abort("0") + engine.drop_adapter(forms[1].digest, ending=["2", "7"])
    assert {output.request_id for output in ended} == {"0", "2", "7"}
    assert forms[1].digest not in engine.host
    engine.add_request(greedy("0", prompt(9, seed=1), forms[0].digest, 24))
    outputs = finish(engine)
    assert not {"2", "7"} & outputs.keys()
    assert [t for o in outputs["0"] for t in o.token_ids] == alone["1"]
    for request_id in ("1", "3", "4", "5", "6", "8", "9"):
        every = seen.get(request_id, []) + outputs[request_id]
        assert [t for o in every for t in o.token_ids] == alone[request_id]
        assert sum(o.finish_reason is not None for o in every) == 1

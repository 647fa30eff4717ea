"""What the engine promises beside numbers: chunking, preemption, swapping, one terminal each."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
import torch

from lora_runtime.adapters.reduction import load_adapter
from lora_runtime.core import AdapterUse, FinishReason, Row, SamplingParams
from lora_runtime.errors import AdapterFailed, AdapterNotFound, AdapterTooLarge, InvalidRequest
from lora_runtime.kernels import NO_EXTENT
from tests.driver import greedy, run, tiny_engine
from tests.lora_runtime.engine.mixed_batch import mixed_requests, prompt, tokens, with_adapters
from tests.peft_adapters import write_adapter
from tests.tiny import VOCAB_SIZE, dense_twin


@pytest.mark.parametrize("order", [1, -1])
def test_rows_mixed_and_reordered_give_the_tokens_they_give_alone(base, forms, alone, order):
    requests = mixed_requests(forms)[::order]
    assert tokens(run(with_adapters(base, forms), requests)) == alone


@pytest.mark.parametrize("max_num_batched_tokens", [16, 200])
def test_chunk_size_does_not_change_tokens(base, forms, alone, max_num_batched_tokens):
    engine = with_adapters(base, forms, max_num_batched_tokens=max_num_batched_tokens)
    assert tokens(run(engine, mixed_requests(forms))) == alone


def test_preempted_rows_resume_with_the_same_tokens(base, forms, alone):
    engine = with_adapters(base, forms, num_blocks=48)
    traces = run(engine, mixed_requests(forms))
    assert engine.scheduler.num_preemptions > 0, "the cache was not small enough to preempt"
    assert tokens(traces) == alone
    assert engine.blocks.num_used == 0


def test_each_request_is_told_what_it_found_in_the_cache_when_it_began(base):
    prompts = [prompt(4 + index, seed=index) for index in range(6)]
    requests = [greedy(str(index), ids, None, 24) for index, ids in enumerate(prompts)]
    again = [greedy(f"{index} again", ids, None, 1) for index, ids in enumerate(prompts)]
    engine = tiny_engine(base, num_blocks=30, block_size=2)
    traces = run(engine, requests)
    assert engine.scheduler.num_preemptions > 0, "the cache was not small enough to preempt"
    assert all(trace.num_cached_tokens == 0 for trace in traces.values()), "not their own tokens"
    run(engine, again)
    for index, (name, trace) in enumerate(run(engine, again).items()):
        # whole blocks, and never the last token
        assert trace.num_cached_tokens == (len(prompts[index]) - 1) // 2 * 2, name


def test_more_adapters_than_slots_take_turns(base, forms, alone):
    engine = with_adapters(base, forms, max_slots=2)
    assert tokens(run(engine, mixed_requests(forms))) == alone
    assert len(engine.slots.resident) == 2


def test_every_request_ends_exactly_once(base, forms):
    traces = run(with_adapters(base, forms), mixed_requests(forms, max_tokens=3))
    assert all(t.num_terminals == 1 and t.finish_reason == "length" for t in traces.values())
    assert all(len(t.token_ids) == 3 for t in traces.values())


def test_stop_token_ends_a_row_and_is_its_last_token(base, alone):
    request = greedy("0", prompt(4, seed=0), None, 24)
    stop = alone["0"][5]
    sampling = replace(request.sampling, stop_token_ids=frozenset([stop]))
    trace = run(tiny_engine(base), [replace(request, sampling=sampling)])["0"]
    assert trace.finish_reason == FinishReason.STOP
    assert trace.token_ids == alone["0"][: alone["0"].index(stop) + 1]


def test_cancel_frees_the_row_within_one_step(base, forms):
    engine = with_adapters(base, forms)
    for request in mixed_requests(forms):
        engine.add_request(request)
    engine.step()
    used = engine.blocks.num_used
    assert engine.abort("1")[0].finish_reason == FinishReason.CANCELLED
    assert engine.abort("1") == [], "one terminal only"
    assert engine.blocks.num_used < used
    engine.check_integrity()
    for request_id in map(str, range(10)):
        engine.abort(request_id)
    assert engine.is_idle and engine.blocks.num_used == 0
    assert not any(engine.slots.is_pinned(form.digest) for form in forms)


def test_a_deadline_cancels(base):
    engine = tiny_engine(base)
    request = replace(greedy("late", prompt(4)), deadline=time.monotonic() - 1)
    trace = run(engine, [request])["late"]
    assert trace.finish_reason == FinishReason.CANCELLED and trace.token_ids == []


def test_load_and_unload_while_rows_run_disturb_none(base, forms, alone):
    engine = with_adapters(base, forms[:2], max_slots=3)
    requests = [
        r for r in mixed_requests(forms) if not r.adapters or _first(r) in _digests(forms[:2])
    ]
    for request in requests:
        engine.add_request(request)
    outputs = {request.request_id: [] for request in requests}
    late = greedy("late", prompt(9, seed=1), forms[2].digest, 6)
    step = 0
    while not engine.is_idle:
        if step == 3:
            engine.add_adapter(forms[2])
            engine.add_request(late)
            outputs["late"] = []
        if step == 5:
            engine.drop_adapter(forms[0].digest)
            with pytest.raises(AdapterNotFound):
                engine.add_request(greedy("too late", prompt(3), forms[0].digest))
        for output in engine.step():
            outputs[output.request_id] += output.token_ids
        engine.collect()
        engine.check_integrity()
        step += 1
    assert len(outputs.pop("late")) == 6
    assert outputs == {request_id: alone[request_id] for request_id in outputs}
    assert forms[0].digest not in engine.host and forms[0].digest not in engine.slots.resident


def _first(request):
    return request.adapters[0].digest


def _digests(forms):
    return {form.digest for form in forms}


def test_an_adapter_is_its_content(base, forms):
    engine = with_adapters(base, [forms[0], forms[0]])
    engine.drop_adapter(forms[0].digest)
    run(engine, [greedy("still here", prompt(3), forms[0].digest, 2)])
    engine.drop_adapter(forms[0].digest)
    assert forms[0].digest not in engine.host
    with pytest.raises(AdapterNotFound):
        engine.drop_adapter(forms[0].digest)


def test_an_unloaded_adapter_leaves_nothing_behind(base, forms):
    """Neither runs that a later step could read, nor cached blocks; the others keep theirs."""
    engine = with_adapters(base, forms)
    requests = mixed_requests(forms, max_tokens=2)
    run(engine, requests)
    slots = {digest: engine.slots._resident[digest].slot for digest in engine.slots.resident}
    for form in forms:
        own = [r for r in requests if r.adapters and r.adapters[0].digest == form.digest]
        others = [r for r in requests if r not in own]
        found = lambda rows: [len(engine.blocks.find(Row.of(r))) for r in rows]  # noqa: E731
        before = found(others)
        assert sum(found(own)) > 0 or len(own[1].prompt_token_ids) < 5
        engine.drop_adapter(form.digest)
        assert (engine.pool.extents[:, slots[form.digest]] == torch.tensor(NO_EXTENT)).all()
        assert found(own) == [0, 0] and found(others) == before
        engine.check_integrity()
        requests = others
    assert not engine.pool.bindings and engine.slots.num_bytes_used == 0
    assert any(found(requests)), "the base's blocks stay"


def test_evicted_adapters_leave_no_runs(base, forms):
    engine = with_adapters(base, forms, max_slots=4)
    run(engine, mixed_requests(forms, max_tokens=2))
    for form in forms[:2]:
        engine.slots.evict(form.digest)
    run(engine, [greedy("base", [5, 6], None, 1)])
    resident = {engine.slots._resident[form.digest].slot for form in forms[2:]}
    for slot in range(4):
        is_empty = bool((engine.pool.extents[:, slot] == torch.tensor(NO_EXTENT)).all())
        assert is_empty == (slot not in resident)


def test_unload_with_cancel_ends_its_rows_only(base, forms):
    engine = with_adapters(base, forms)
    for request in mixed_requests(forms):
        engine.add_request(request)
    engine.step()
    ended = engine.drop_adapter(forms[1].digest, ending=["2", "7"])
    assert {output.request_id for output in ended} == {"2", "7"}
    assert forms[1].digest not in engine.host
    engine.check_integrity()


@pytest.mark.parametrize("steps_ahead", [0, 1])
def test_overflowing_weights_fail_their_rows_only(base, forms, alone, tmp_path, steps_ahead):
    folder = write_adapter(dense_twin(base, "llama"), tmp_path / "huge", seed=9, scale=1e30)
    huge = load_adapter(folder, base.spec, base.weights)
    engine = with_adapters(base, [*forms, huge], steps_ahead=steps_ahead)
    requests = mixed_requests(forms)
    bad = [greedy("bad", prompt(6), huge.digest), greedy("bad too", prompt(40), huge.digest)]
    traces = run(engine, [requests[0], bad[0], *requests[1:], bad[1]])
    for request in bad:
        trace = traces.pop(request.request_id)
        assert trace.finish_reason == FinishReason.ERROR and isinstance(trace.error, AdapterFailed)
    assert tokens(traces) == alone


def test_a_composition_adds_weighted_effects(base, forms):
    """One adapter twice at weight 0.5 is the adapter; at weight 0 it is the base."""
    engine = with_adapters(base, forms)
    plain = greedy("plain", prompt(9), forms[2].digest, 12)
    halves = replace(
        plain, request_id="halves", adapters=(AdapterUse(digest=forms[2].digest, weight=0.5),) * 2
    )
    nothing = replace(
        plain, request_id="nothing", adapters=(AdapterUse(digest=forms[2].digest, weight=0.0),)
    )
    traces = run(engine, [plain, halves, nothing, greedy("base", prompt(9), None, 12)])
    assert traces["plain"].token_ids == traces["halves"].token_ids != traces["base"].token_ids
    assert traces["nothing"].token_ids == traces["base"].token_ids


def test_a_start_position_leaves_earlier_tokens_to_the_base(base, forms):
    """An adapter that starts after the prompt changes nothing until the prompt's end."""
    engine = with_adapters(base, forms)
    late = replace(
        greedy("late", prompt(9), None, 4),
        adapters=(AdapterUse(digest=forms[3].digest, start_position=9),),
    )
    traces = run(engine, [late, greedy("base", prompt(9), None, 4)])
    first = [traces[name].logits[0] for name in ("late", "base")]
    torch.testing.assert_close(*first, rtol=1e-5, atol=1e-5)
    assert (traces["late"].logits[1] - traces["base"].logits[1]).abs().max() > 0.1


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (greedy("r", []), "prompt"),
        (greedy("r", [5] * 512), "prompt"),
        (greedy("r", [5] * 500), "sampling.max_tokens"),
        (greedy("r", [5, VOCAB_SIZE]), "prompt"),
        (greedy("r", [5, -1]), "prompt"),
    ],
)
def test_unusable_requests_are_refused_by_field(base, request_, field):
    engine = tiny_engine(base)
    with pytest.raises(InvalidRequest) as caught:
        engine.add_request(request_)
    assert caught.value.field == field and engine.is_idle


def test_a_request_id_in_use_is_refused(base):
    engine = tiny_engine(base)
    engine.add_request(greedy("twice", prompt(3)))
    with pytest.raises(InvalidRequest, match="twice"):
        engine.add_request(greedy("twice", prompt(3)))


def test_an_adapter_larger_than_the_pool_is_refused_and_leaves_no_trace(base, forms):
    engine = tiny_engine(base, pool_bytes=300 << 10)
    with pytest.raises(AdapterTooLarge):
        engine.add_adapter(forms[3])
    assert forms[3].digest not in engine.host
    engine.add_adapter(forms[0])


def test_sampling_is_by_seed_not_by_neighbour(base):
    seeded = replace(greedy("a", prompt(5)), sampling=SamplingParams(max_tokens=8, seed=11))
    alone = run(tiny_engine(base), [seeded])["a"].token_ids
    others = [greedy(f"o{i}", prompt(7, seed=i), None, 5) for i in range(3)]
    assert run(tiny_engine(base), [*others, seeded])["a"].token_ids == alone

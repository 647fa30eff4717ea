"""Adapters that arrive late: rows wait for their own copy, all others go on."""

from __future__ import annotations

from collections import deque
from contextlib import contextmanager

import pytest
import torch

from lora_runtime.adapters.reduction import load_adapter
from lora_runtime.core import FinishReason
from lora_runtime.engine.adapter_loads import AdapterLoads, CopyStream
from lora_runtime.errors import AdapterNotFound, AdapterTooLarge
from tests.driver import greedy, run, tiny_engine
from tests.variants import write_variants

PROMPT = [5, 9, 3, 77, 12]


class LateStream:
    """A stream whose copies happen late, in order: each when it was looked at often enough."""

    def __init__(self, num_looks):
        self.num_looks, self.waiting, self.num_waits = num_looks, deque(), 0

    def __call__(self, copy):
        event = LateEvent(self, copy)
        self.waiting.append(event)
        return event


class LateEvent:
    def __init__(self, stream, copy):
        self.stream, self.copy, self.num_looks = stream, copy, stream.num_looks

    def query(self):
        self.num_looks -= 1
        if self.num_looks <= 0:
            self.finish()
        return self not in self.stream.waiting

    def synchronize(self):
        self.stream.num_waits += 1
        self.finish()

    @torch.inference_mode()
    def finish(self):
        while self in self.stream.waiting:
            self.stream.waiting.popleft().copy()


@pytest.fixture(scope="module")
def alone(base, forms):
    """Each adapter's tokens, and the base's under None, with loads that are done at once."""
    engine, tokens = tiny_engine(base), {}
    for form in forms:
        engine.add_adapter(form)
    for digest in (None, *(form.digest for form in forms)):
        tokens[digest] = run(engine, [greedy("r", PROMPT, digest, 12)])["r"].token_ids
    assert len({tuple(t) for t in tokens.values()}) == 5, "the adapters change nothing"
    return tokens


def late_engine(base, forms, num_looks, **options):
    engine, stream = tiny_engine(base, **options), LateStream(num_looks)
    engine.runner.loads = AdapterLoads(engine.pool, stream)
    for form in forms:
        engine.add_adapter(form)
    return engine, stream


def step(engine):
    """The tokens of one step by request."""
    outputs = engine.step()
    engine.check_integrity()
    return {output.request_id: list(output.token_ids) for output in outputs}


@pytest.mark.parametrize("num_looks", [1, 2, 7])
@pytest.mark.parametrize("max_slots", [1, 2, 8])
def test_late_copies_change_no_tokens(base, forms, alone, num_looks, max_slots):
    engine, _ = late_engine(base, forms, num_looks, max_slots=max_slots)
    digests = [None, *(form.digest for form in forms)] * 2
    requests = [greedy(str(i), PROMPT, digest, 12) for i, digest in enumerate(digests)]
    traces = run(engine, requests, arrivals={str(i): i for i in range(10)})
    assert [traces[str(i)].token_ids for i in range(10)] == [alone[digest] for digest in digests]
    assert all(trace.num_terminals == 1 for trace in traces.values())


def test_other_rows_get_their_tokens_while_an_adapter_is_copied(base, forms, alone):
    engine, stream = late_engine(base, forms, 6)
    stream.num_looks = 1
    first = greedy("first", PROMPT, forms[0].digest, 12)
    engine.add_request(first)
    assert step(engine) == {}, "its adapter is not there yet"
    tokens = step(engine)["first"]
    stream.num_looks = 6
    engine.add_request(greedy("late", PROMPT, forms[1].digest, 12))
    engine.add_request(greedy("late too", PROMPT, forms[1].digest, 12))
    for _ in range(6):
        found = step(engine)
        assert found.keys() == {"first"}
        tokens += found["first"]
    assert len(stream.waiting) == 1 and stream.num_waits == 1
    found = step(engine)
    assert found.keys() == {"first", "late", "late too"}
    assert tokens + found["first"] == alone[forms[0].digest][:8]
    assert found["late"] == found["late too"] == alone[forms[1].digest][:1]


def test_with_nothing_else_to_do_the_engine_waits_instead_of_spinning(base, forms, alone):
    engine, stream = late_engine(base, forms, 1_000_000)
    trace = run(engine, [greedy("only", PROMPT, forms[3].digest, 12)])["only"]
    assert trace.token_ids == alone[forms[3].digest]
    assert stream.num_waits == 1 and engine.stats().num_steps == 13


@pytest.mark.parametrize("is_unloaded", [False, True])
def test_a_row_that_ends_before_its_adapter_came_leaves_the_place_to_the_next(
    base, forms, alone, is_unloaded
):
    """The second copy goes to the bytes that the first is still to fill, into the same slot."""
    size = max(form.nbytes for form in forms)
    engine, stream = late_engine(base, forms, 4, pool_bytes=size, max_slots=1)
    engine.add_request(greedy("base", PROMPT, None, 12))
    engine.add_request(greedy("early", PROMPT, forms[3].digest, 12))
    tokens = step(engine)["base"]
    ended = (
        engine.drop_adapter(forms[3].digest, ending=["early"])
        if is_unloaded
        else engine.abort("early")
    )
    assert [output.finish_reason for output in ended] == [FinishReason.CANCELLED]
    assert (forms[3].digest in engine.host) != is_unloaded
    engine.add_request(greedy("next", PROMPT, forms[1].digest, 12))
    found = step(engine)
    assert found.keys() == {"base"} and engine.slots.resident == (forms[1].digest,)
    assert len(stream.waiting) == 2 + is_unloaded, "the first copy is over already"
    tokens += found["base"]
    next_tokens = []
    while not engine.is_idle:
        found = step(engine)
        tokens += found.get("base", [])
        next_tokens += found.get("next", [])
    assert tokens == alone[None] and next_tokens == alone[forms[1].digest]


def test_an_adapter_evicted_and_wanted_again_waits_for_its_last_copy(base, forms, alone):
    size = max(form.nbytes for form in forms)
    engine, stream = late_engine(base, forms, 50, pool_bytes=size, max_slots=1)
    engine.add_request(greedy("base", PROMPT, None, 3))
    for name, form in (("one", forms[0]), ("two", forms[1]), ("three", forms[0])):
        engine.add_request(greedy(name, PROMPT, form.digest, 12))
        step(engine)
        if name != "three":
            engine.abort(name)
    assert len(stream.waiting) == 3
    stream.waiting[0].finish()
    assert engine.runner.loads.in_progress() == {forms[0].digest, forms[1].digest}
    trace = []
    while not engine.is_idle:
        trace += step(engine).get("three", [])
    assert trace == alone[forms[0].digest]


def test_run_tables_move_only_when_no_copy_writes_to_them(base, forms, alone, tmp_path):
    (variant,) = write_variants(base, "llama", tmp_path, ["replication"])
    replicated = load_adapter(variant.folder, base.spec, base.weights)
    quick = tiny_engine(base)
    quick.add_adapter(replicated)
    expected = run(quick, [greedy("r", PROMPT, replicated.digest, 6)])["r"].token_ids
    engine, stream = late_engine(base, [*forms, replicated], 5)
    engine.add_request(greedy("base", PROMPT, None, 12))
    engine.add_request(greedy("plain", PROMPT, forms[2].digest, 12))
    step(engine)
    before, tables = len(stream.waiting), engine.pool.extents
    engine.add_request(greedy("deep", PROMPT, replicated.digest, 6))
    tokens = {"plain": [], "deep": [], "base": []}
    for name, found in step(engine).items():
        tokens[name] += found
    assert (before, len(stream.waiting)) == (1, 1) and engine.pool.extents is not tables
    while not engine.is_idle:
        for name, found in step(engine).items():
            tokens[name] += found
    assert tokens["deep"] == expected and tokens["plain"] == alone[forms[2].digest]


def test_a_copy_goes_behind_the_steps_on_a_stream_of_its_own(monkeypatch):
    """The calls that torch.cuda gets, in order."""
    calls, device = [], torch.device("cuda:1")

    class Stream:
        def __init__(self, device):
            self.device = device

        def wait_stream(self, other):
            calls.append(("wait", other))

        def record_event(self):
            calls.append("record")
            return "event"

    @contextmanager
    def on(stream):
        calls.append(("on", stream.device))
        yield
        calls.append("off")

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda d: f"steps on {d}")
    assert CopyStream(device)(lambda: calls.append("copy")) == "event"
    assert calls == [("wait", "steps on cuda:1"), ("on", device), "copy", "record", "off"]


@pytest.mark.parametrize("num_looks", [None, 1, 3])
def test_a_pinned_adapter_stays_and_others_come_and_go_around_it(base, forms, alone, num_looks):
    """In a pool with room for two: it is copied once, and every answer is what it is alone."""
    size = sum(sorted(form.nbytes for form in forms)[-2:])
    engine, _ = late_engine(base, forms, num_looks or 0, pool_bytes=size, max_slots=2)
    if num_looks is None:
        engine.runner.loads = AdapterLoads(engine.pool, None)
    kept = forms[1].digest
    copied = []
    load = engine.runner.load
    engine.runner.load = lambda placement: (copied.append(placement.digest), load(placement))
    run(engine, [greedy("before", PROMPT, forms[0].digest, 2)])
    engine.pin_adapter(kept)
    engine.pin_adapter(kept)
    engine.check_integrity()
    for turn in range(2):
        for form in forms:
            requests = [
                greedy(f"{turn} kept", PROMPT, kept, 12),
                greedy(f"{turn} other", PROMPT, form.digest, 12),
            ]
            traces = run(engine, requests)
            assert traces[f"{turn} kept"].token_ids == alone[kept]
            assert traces[f"{turn} other"].token_ids == alone[form.digest]
            assert kept in engine.slots.resident
    assert copied.count(kept) == 1
    with pytest.raises(AdapterTooLarge, match="2 would be pinned"):
        engine.pin_adapter(forms[0].digest)
    engine.drop_adapter(kept)
    engine.pin_adapter(forms[0].digest)
    engine.pin_adapter(forms[0].digest, is_pinned=False)
    with pytest.raises(AdapterNotFound):
        engine.pin_adapter(kept)
    engine.check_integrity()

from __future__ import annotations

import random

import numpy as np
import pytest

from loramux.server.generation.output import RequestMeter
from loramux.server.observability.observers import Observers
from loramux.server.page.history import NUM_SAMPLES, Durations, History
from tests.fakes import ScriptedEngine
from tests.server.world import RecordingObserver


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize("seed", range(5))
def test_percentiles_are_numpys_within_a_bucket(seed):
    rng = np.random.default_rng(seed)
    seconds = rng.lognormal(rng.uniform(-7, 2), rng.uniform(0.1, 2), size=rng.integers(1, 3000))
    durations = Durations()
    for value in seconds:
        durations.add(value)
    for share in (0.5, 0.95):
        exact = np.quantile(seconds, share, method="inverted_cdf")
        assert abs(durations.percentile(share) - exact) <= 0.026 * (exact + 1e-6)


def test_nothing_has_no_percentile():
    durations = Durations()
    assert durations.percentile(0.5) is None
    durations.add(1e9)
    durations.add(0.0, 2)
    assert durations.percentile(0.5) < 1e-6 and durations.percentile(0.95) > 50_000


def test_samples_say_what_their_interval_brought_and_the_oldest_go():
    clock, engine = Clock(), ScriptedEngine()
    history = History(engine, clock=clock)
    history.on_first_token(request := history.on_started(()), 0.25)
    history.on_tokens(request, 3, None)
    history.on_tokens(request, 4, 0.4)
    engine.num_waiting = 9
    clock.now = 2.0
    history.sample()
    number, (sample,) = history.since(0)
    assert number == 1 and sample.output_tokens_per_s == 3.5 and sample.num_waiting == 9
    assert sample.ttft_p50_s == sample.ttft_p95_s == pytest.approx(0.25, rel=0.026)
    assert sample.inter_token_p50_s == pytest.approx(0.1, rel=0.026)
    for _ in range(NUM_SAMPLES + 5):
        clock.now += 1
        history.sample()
    number, samples = history.since(0)
    assert number == NUM_SAMPLES + 6 and len(samples) == NUM_SAMPLES
    assert samples[-1].output_tokens_per_s == 0 and samples[-1].ttft_p50_s is None
    assert history.since(number) == (number, [])
    assert history.since(number - 2)[1] == samples[-2:]
    assert history.since(number + 1)[1] == samples, "a former server's count"


def test_traffic_counts_under_each_adapter_until_it_is_unloaded():
    history = History(ScriptedEngine())
    requests = [history.on_started(names) for names in ((), ("a",), ("a", "b"))]
    for request in requests:
        history.on_tokens(request, random.randint(1, 9), None)
    a, b = history.traffic("a"), history.traffic("b")
    assert (a.num_requests, b.num_requests, history.traffic().num_requests) == (2, 1, 1)
    assert a.num_output_tokens > b.num_output_tokens > 0
    history.on_adapter_unloaded("a")
    history.on_tokens(requests[1], 5, 0.1)
    assert history.traffic("a").num_requests == history.traffic("a").num_output_tokens == 0


def test_several_observers_hear_the_same_each_by_its_own_name_for_a_request():
    first, second = RecordingObserver(), RecordingObserver()
    observers = Observers(first, second, history := History(ScriptedEngine()))
    with RequestMeter(observers, ("a",), 3) as meter:
        meter.tokens(2)
        meter.tokens(1)
    observers.on_adapter_loaded("a", "digest", 5, 0.5)
    observers.on_adapter_unloaded("b")
    assert first.calls == second.calls
    names = [name for name, _ in first.calls]
    assert names == ["on_started", "on_first_token", "on_tokens", "on_tokens", "on_finished",
                     "on_adapter_loaded", "on_adapter_unloaded"]  # fmt: skip
    assert first.of("on_tokens")[0][0] == ("a",)
    assert history.traffic("a").num_output_tokens == 3

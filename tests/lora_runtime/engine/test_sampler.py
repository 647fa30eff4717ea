"""The sampler against transformers' own logits processors and plain probability."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from lora_runtime.core import Request, Row, SamplingParams
from lora_runtime.engine import sampler
from lora_runtime.engine.sampler import choose, draw, uniform
from lora_runtime.kernels import cpu, most_likely

VOCAB_SIZE = 50


def sample(logits, rows):
    return draw(logits, rows).result()


def row(**sampling) -> Row:
    return Row.of(
        Request(request_id="r", prompt_token_ids=(1, 2), sampling=SamplingParams(**sampling))
    )


def random_logits(num_rows, seed=0):
    return 2 * torch.randn(num_rows, VOCAB_SIZE, generator=torch.Generator().manual_seed(seed))


def test_temperature_zero_is_argmax_and_rows_do_not_see_each_other():
    logits = random_logits(3)
    greedy, random_row = row(temperature=0.0), row(temperature=1.0, seed=5)
    together = sample(logits, [greedy, random_row, greedy])
    assert [together[i].token_id for i in (0, 2)] == logits[[0, 2]].argmax(1).tolist()
    assert together[1].token_id == sample(logits[1:2], [random_row])[0].token_id


@pytest.mark.parametrize(
    ("params", "warper"),
    [
        (dict(top_k=5), TopKLogitsWarper(5)),
        (dict(top_p=0.7), TopPLogitsWarper(0.7)),
        (dict(min_p=0.1), MinPLogitsWarper(0.1)),
        (dict(min_p=0.1, top_k=40), MinPLogitsWarper(0.1)),
        (dict(), TemperatureLogitsWarper(1.0)),
    ],
)
def test_draws_follow_the_distribution_of_transformers(params, warper):
    logits = random_logits(1)
    scores = warper(torch.zeros(1, 1, dtype=torch.long), TemperatureLogitsWarper(0.8)(None, logits))
    expected = scores.softmax(1)[0]
    num_draws = 4000
    rows = [row(temperature=0.8, seed=seed, **params) for seed in range(num_draws)]
    drawn = Counter(r.token_id for r in sample(logits.expand(num_draws, -1), rows))
    assert all(expected[token] > 0 for token in drawn)
    found = torch.tensor([drawn[token] / num_draws for token in range(VOCAB_SIZE)])
    assert (found - expected).abs().max() < 0.03


def test_a_seed_repeats_and_positions_differ():
    first, again, other = row(seed=1), row(seed=1), row(seed=2)
    assert uniform(first) == uniform(again) != uniform(other)
    again.token_ids.append(7)
    assert uniform(first) != uniform(again)
    unseeded = row()
    assert uniform(unseeded) != uniform(unseeded)


def test_stop_tokens_wait_for_min_tokens():
    logits = random_logits(1)
    best, second = logits[0].topk(2).indices.tolist()
    late = row(temperature=0.0, stop_token_ids=frozenset([best]), min_tokens=1, max_tokens=4)
    assert sample(logits, [late])[0].token_id == second
    late.token_ids.append(second)
    assert sample(logits, [late])[0].token_id == best


def test_logprobs_are_of_the_unmodified_distribution():
    logits = random_logits(2)
    rows = [row(temperature=0.0, num_logprobs=3), row(temperature=0.5, seed=1)]
    first, second = sample(logits, rows)
    expected = logits.log_softmax(1)[0]
    assert first.logprob.logprob == pytest.approx(float(expected[first.token_id]), abs=1e-5)
    values, ids = expected.topk(3)
    assert [token for token, _ in first.logprob.top] == ids.tolist()
    assert [p for _, p in first.logprob.top] == pytest.approx(values.tolist(), abs=1e-5)
    assert second.logprob is None


def test_non_finite_rows_are_marked_and_others_are_not():
    logits = random_logits(3)
    logits[1, 4] = float("nan")
    results = sample(logits, [row(seed=1), row(seed=1), row(temperature=0.0)])
    assert [r.is_finite for r in results] == [True, False, True]


def test_a_draw_is_the_same_whatever_its_neighbours_ask_for():
    """Cut or not, greedy or not, before an early stop or not, with log probabilities or not."""
    kinds = [
        dict(seed=3), dict(seed=3, top_k=7), dict(seed=3, min_p=0.2), dict(seed=3, top_p=0.5),
        dict(temperature=0.0), dict(seed=3, min_tokens=2, stop_token_ids=frozenset([4, 9])),
        dict(seed=3, num_logprobs=2),
    ]  # fmt: skip
    logits, rows = random_logits(len(kinds), seed=4), [row(**kind) for kind in kinds]
    alone = [sample(logits[i : i + 1], [rows[i]])[0] for i in range(len(rows))]
    assert sample(logits, rows) == alone
    assert sample(logits.flip(0), rows[::-1])[::-1] == alone


class HostReads(TorchDispatchMode):
    """Counts what waits for the device: copies to the host, and operations of a size in values."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._schema.name in ("aten::_local_scalar_dense", "aten::nonzero", "aten::item"):
            self.found.append(func._schema.name)
        return func(*args, **(kwargs or {}))


def test_nothing_is_read_before_the_tokens_are_known(monkeypatch):
    """`tolist` is where the host waits; `draw` does not call it, and the result calls it once,
    and once more for log probabilities.
    """
    calls, real = [], torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda t: calls.append(1) or real(t))
    rows = [row(temperature=0.0), row(seed=1), row(seed=2, top_k=3), row(seed=1, min_p=0.1)]
    with HostReads() as reads:
        plain = draw(random_logits(4), rows)
        with_logprobs = draw(random_logits(4), [*rows[:3], row(seed=1, num_logprobs=4)])
        assert calls == []
        plain.result()
        assert calls == [1]
        with_logprobs.result()
    assert calls == [1, 1, 1] and not reads.found


def test_all_parameters_go_to_the_device_in_one_copy(monkeypatch):
    """None where no row draws."""
    tables, real = [], torch.tensor
    monkeypatch.setattr(torch, "tensor", lambda *a, **k: tables.append(1) or real(*a, **k))
    logits, greedy_row = random_logits(4), row(temperature=0.0)
    sample(logits, [greedy_row] * 4)
    assert tables == []
    sample(logits, [greedy_row, row(seed=1), row(seed=2, top_k=3), row(seed=1, min_p=0.1)])
    assert tables == [1]


def test_what_is_drawn_depends_on_no_value_on_the_host(monkeypatch):
    """A fake tensor refuses to give one. It has no memory for the compiled library either."""
    monkeypatch.setattr(cpu, "library", lambda: None)
    early = row(seed=1, min_tokens=2, stop_token_ids=frozenset([4, 9]))
    rows = [row(temperature=0.0), row(seed=1), row(top_k=3, top_p=0.5), row(min_p=0.1), early]
    with FakeTensorMode():
        assert choose(torch.empty(5, VOCAB_SIZE), rows).shape == (5, 2)
        assert most_likely(torch.empty(5, VOCAB_SIZE, dtype=torch.bfloat16)).shape == (5, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_greedy_gives_the_best_token_and_whether_the_row_is_finite(dtype):
    logits = random_logits(5).to(dtype)
    logits[1, 4], logits[2, 0], logits[3, 9] = float("nan"), float("-inf"), float("inf")
    found = most_likely(logits)
    assert found[:, 1].tolist() == [1, 0, 0, 0, 1]
    assert torch.equal(found[[0, 4], 0], logits[[0, 4]].argmax(1))


def test_what_a_graph_has_chosen_is_taken_over_where_nothing_is_excluded(monkeypatch):
    """The graph's memory is its own: rows that draw do not write to it."""
    logits, greedy_row, drawing = random_logits(2), row(temperature=0.0), row(seed=1)
    early = row(temperature=0.0, min_tokens=2, stop_token_ids=frozenset([4, 9]))
    expected = [choose(logits, rows) for rows in ([greedy_row, drawing], [greedy_row, early])]
    best, calls = most_likely(logits), []
    kept = best.clone()
    real = most_likely
    monkeypatch.setattr(sampler, "most_likely", lambda *a: calls.append(1) or real(*a))
    assert torch.equal(choose(logits, [greedy_row, drawing], best), expected[0])
    assert torch.equal(best, kept) and calls == []
    assert torch.equal(choose(logits, [greedy_row, early], best), expected[1]) and calls == [1]


@pytest.mark.parametrize("cut", [dict(), dict(min_p=0.1), dict(top_k=5), dict(top_p=0.9)])
@pytest.mark.parametrize("temperature", [1e-6, 1e-38, 1e-60])
def test_a_temperature_near_zero_is_argmax(temperature, cut):
    """Although the logits divided by it are beyond float32."""
    logits = 20 * random_logits(3)
    drawn = sample(logits, [row(temperature=temperature, seed=1, **cut)] * 3)
    assert [r.token_id for r in drawn] == logits.argmax(1).tolist()


def test_a_stop_token_of_a_row_that_is_not_finite_hides_nothing():
    logits = random_logits(2)
    logits[0, 3] = float("nan")
    waiting = row(temperature=0.0, min_tokens=1, stop_token_ids=frozenset([3]))
    assert [r.is_finite for r in sample(logits, [waiting, waiting])] == [False, True]


@pytest.mark.parametrize("cut", [dict(), dict(top_k=VOCAB_SIZE)])
def test_the_largest_random_number_takes_a_token_that_is_kept(monkeypatch, cut):
    monkeypatch.setattr(sampler, "uniform", lambda late: 1 - 2**-53)
    logits = random_logits(1).expand(3, -1).clone()
    logits[:, -7:] = -1e4
    drawn = sample(logits, [row(temperature=t, **cut) for t in (1.0, 0.3, 5.0)])
    assert all(r.token_id < VOCAB_SIZE - 7 for r in drawn)

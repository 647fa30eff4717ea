"""Penalties and biases against transformers' own logits processors and OpenAI's formula: on random
logits, and in whole runs of mixed batches.
"""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import RepetitionPenaltyLogitsProcessor, SequenceBiasLogitsProcessor

from lora_runtime.core import Request, Row, SamplingParams
from lora_runtime.engine import logits_rules
from lora_runtime.engine.logits_rules import modified
from lora_runtime.errors import InvalidRequest
from tests.driver import run
from tests.lora_runtime.engine.mixed_batch import mixed_requests, tokens, with_adapters
from tests.lora_runtime.engine.test_sampler import HostReads
from tests.tiny import VOCAB_SIZE


def expected(logits, prompt, output, sampling):
    """(vocab,): transformers' processors in its order, then OpenAI's formula token by token."""
    scores, seen = logits.float()[None], torch.tensor([[*prompt, *output]])
    if sampling.logit_bias:
        bias = {(token_id,): float(value) for token_id, value in sampling.logit_bias}
        scores = SequenceBiasLogitsProcessor(bias)(seen, scores)
    if sampling.repetition_penalty != 1:
        penalty = float(sampling.repetition_penalty)
        scores = RepetitionPenaltyLogitsProcessor(penalty)(seen, scores)
    scores = scores[0].clone()
    for token_id in set(output):
        scores[token_id] -= sampling.frequency_penalty * output.count(token_id)
        scores[token_id] -= sampling.presence_penalty
    return scores


def random_rules(rng):
    """Each penalty or bias, or none of them, or all."""
    rules = {
        "repetition_penalty": rng.choice([0.5, 1.1, 1.8, 3]),
        "presence_penalty": rng.choice([-2.0, 0.7, 2]),
        "frequency_penalty": rng.choice([-1.5, 0.3, 2.0]),
        "logit_bias": tuple(
            (token_id, rng.uniform(-9, 9)) for token_id in sorted(rng.sample(range(40), 6))
        ),
    }
    return {name: value for name, value in rules.items() if rng.random() < 0.5}


def random_row(rng, vocab_size, **sampling):
    prompt = [rng.randrange(vocab_size) for _ in range(rng.randint(1, 60))]
    request = Request(
        request_id="r",
        prompt_token_ids=tuple(prompt),
        sampling=SamplingParams(**{**random_rules(rng), **sampling}),
    )
    row = Row.of(request)
    few = range(rng.randint(1, 9))
    row.token_ids += [rng.choice(few) for _ in range(rng.choice([0, 1, 30]))]
    return row


def parts(row):
    return row.token_ids[: row.num_prompt_tokens], row.token_ids[row.num_prompt_tokens :]


@pytest.mark.parametrize("rows_at_once", [1, 3, 32])
@pytest.mark.parametrize("seed", range(4))
def test_rules_are_those_of_transformers_and_openai(seed, rows_at_once, monkeypatch):
    monkeypatch.setattr(logits_rules, "MAX_ROWS_AT_ONCE", rows_at_once)
    rng = random.Random(seed)
    vocab_size = rng.randint(50, 400)
    rows = [random_row(rng, vocab_size) for _ in range(rng.randint(5, 12))]
    logits = 5 * torch.randn(len(rows), vocab_size, generator=torch.Generator().manual_seed(seed))
    kept = logits.clone()
    for num_new in (0, 1, 1, 70):  # the rows go on, and their tables grow
        for row in rows:
            row.token_ids += [rng.randrange(vocab_size) for _ in range(num_new)]
        found = modified(logits, rows)
        for row, before, after in zip(rows, logits, found, strict=True):
            wanted = expected(before, *parts(row), row.request.sampling)
            torch.testing.assert_close(after, wanted, rtol=1e-6, atol=1e-5)
    assert torch.equal(logits, kept)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_without_rules_keep_their_logits_and_a_batch_without_is_not_copied(dtype):
    rng = random.Random(3)
    plain = Row.of(Request(request_id="p", prompt_token_ids=(1, 2, 3)))
    ruled = random_row(rng, 50, presence_penalty=1.0, logit_bias=((3, 5.0),))
    ruled.token_ids.append(7)
    logits = torch.randn(3, 50).to(dtype)
    assert modified(logits[:2], [plain, plain]).data_ptr() == logits.data_ptr()
    found = modified(logits, [plain, ruled, plain])
    assert torch.equal(found[[0, 2]], logits[[0, 2]].float())
    assert not torch.equal(found[1], logits[1].float())


def test_a_token_that_only_the_device_knows_counts_as_well():
    rng = random.Random(5)
    rows = [random_row(rng, 50, presence_penalty=0.5, frequency_penalty=0.7) for _ in range(6)]
    rows += [random_row(rng, 50, repetition_penalty=1.7) for _ in range(6)]
    drawn = torch.tensor([rng.randrange(50) for _ in range(16)])
    logits = torch.randn(len(rows), 50)
    for _ in range(3):
        places = rng.sample(range(16), len(rows))
        for row, place in zip(rows, places, strict=True):
            row.token_ids.append(-1 - place)
        found = modified(logits, rows, drawn)
        for row, place in zip(rows, places, strict=True):
            row.token_ids[-1] = int(drawn[place])
        assert torch.equal(found, modified(logits, rows, drawn))
        wanted = [
            expected(x, *parts(row), row.request.sampling)
            for x, row in zip(logits, rows, strict=True)
        ]
        torch.testing.assert_close(found, torch.stack(wanted), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_is_not_hidden(value):
    row = random_row(
        random.Random(1), 50, repetition_penalty=2.0, presence_penalty=2.0,
        frequency_penalty=2.0, logit_bias=((4, -100.0),),
    )  # fmt: skip
    row.token_ids += [4, 5, 5]
    for token_id in (4, 5, 49):
        logits = torch.zeros(1, 50)
        logits[0, token_id] = value
        assert not modified(logits, [row])[0, token_id].isfinite()


def test_nothing_is_read_and_no_shape_depends_on_a_value():
    rng = random.Random(2)
    sampling = dict(min_tokens=200, stop_token_ids=frozenset([4, 9]), repetition_penalty=1.5)
    rows = [random_row(rng, 50, presence_penalty=1.0, **sampling) for _ in range(4)]
    with FakeTensorMode():
        empty = torch.empty(4, 50, dtype=torch.bfloat16)
        assert modified(empty, rows, torch.empty(4, dtype=torch.int64)).dtype == torch.float32
    rows = [random_row(rng, 50, presence_penalty=1.0, **sampling) for _ in range(4)]
    with HostReads() as reads:
        modified(torch.randn(4, 50), rows, torch.zeros(4, dtype=torch.int64))
    assert not reads.found


def ruled_requests(forms):
    """A mixed batch in which every other row has rules, and some of those draw by seed."""
    rng, requests = random.Random(8), []
    for index, request in enumerate(mixed_requests(forms)):
        rules = random_rules(rng) if index % 2 else {}
        if index % 4 == 3:
            rules |= dict(temperature=0.8, seed=index, top_k=20)
        rules |= dict(presence_penalty=1.0) if index == 5 else {}
        requests.append(replace(request, sampling=replace(request.sampling, **rules)))
    return requests


@pytest.fixture(scope="module")
def alone(base, forms):
    found = {}
    for request in ruled_requests(forms):
        found |= tokens(run(with_adapters(base, forms), [request]))
    return found


@pytest.mark.parametrize("steps_ahead", [0, 1])
@pytest.mark.parametrize("num_blocks", [400, 70])
@pytest.mark.parametrize("prefix_cache", [False, True])
def test_every_token_of_a_run_follows_the_rules(
    base, forms, alone, steps_ahead, num_blocks, prefix_cache
):
    """With a step ahead, chunks, preemption and a warm cache; and neighbours change nothing."""
    engine = with_adapters(
        base, forms, steps_ahead=steps_ahead, num_blocks=num_blocks, prefix_cache=prefix_cache
    )
    requests = ruled_requests(forms)
    for _ in range(2):
        traces = run(engine, requests)
        assert tokens(traces) == alone
        for request in requests:
            check_greedy(request, traces[request.request_id])
    assert (engine.scheduler.num_preemptions > 0) == (num_blocks == 70)
    assert (engine.blocks.num_prefix_hits > 0) == prefix_cache


def check_greedy(request, trace):
    """A token's score is the highest, but for rounding."""
    if request.sampling.temperature > 0:
        return
    for index, token_id in enumerate(trace.token_ids):
        output = trace.token_ids[:index]
        scores = expected(trace.logits[index], request.prompt_token_ids, output, request.sampling)
        assert scores[token_id] >= scores.max() - 1e-4


def test_rules_change_what_is_said(base, forms, alone):
    """Else the runs above would show nothing."""
    plain = tokens(run(with_adapters(base, forms), mixed_requests(forms)))
    assert sum(plain[str(i)] != alone[str(i)] for i in (1, 5, 9)) == 3


def test_a_biased_token_is_always_or_never_drawn(base):
    rows = [
        Request(
            request_id=name,
            prompt_token_ids=(5, 6, 7),
            sampling=SamplingParams(max_tokens=8, seed=1, logit_bias=((9, bias),)),
        )
        for name, bias in (("always", 100), ("never", -100.0))
    ]
    found = tokens(run(with_adapters(base, []), rows))
    assert found["always"] == [9] * 8 and 9 not in found["never"]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("presence_penalty", 2.1), ("presence_penalty", float("nan")), ("presence_penalty", "1"),
        ("frequency_penalty", -2.1), ("frequency_penalty", True),
        ("repetition_penalty", 0.0), ("repetition_penalty", 101.0), ("repetition_penalty", None),
        ("repetition_penalty", float("inf")), ("prompt_logprobs", 21), ("prompt_logprobs", -1),
        ("prompt_logprobs", 1.0), ("logit_bias", ((1, 100.5),)),
        ("logit_bias", ((1, float("nan")),)),
        ("logit_bias", ((2, 1.0), (1, 1.0))), ("logit_bias", ((1, 1.0), (1, 1.0))),
        ("logit_bias", {1: 2.0}), ("logit_bias", ((1.0, 2.0),)), ("logit_bias", ((1, "2"),)),
        ("logit_bias", tuple((i, 0.0) for i in range(1025))),
    ],
)  # fmt: skip
def test_values_out_of_range_are_refused_by_name(name, value):
    field = {"prompt_logprobs": "num_prompt_logprobs"}.get(name, name)
    with pytest.raises(InvalidRequest) as caught:
        SamplingParams(**{field: value})
    assert caught.value.field == f"sampling.{name}"


@pytest.mark.parametrize("token_id", [-1, VOCAB_SIZE, 10**30])
def test_a_bias_on_what_is_no_token_is_refused(base, token_id):
    sampling = SamplingParams(logit_bias=((token_id, 1.0),), max_tokens=2)
    request = Request(request_id="r", prompt_token_ids=(5,), sampling=sampling)
    with pytest.raises(InvalidRequest, match=str(token_id)) as caught:
        with_adapters(base, []).add_request(request)
    assert caught.value.field == "sampling.logit_bias"

"""Rows of structured output beside others: every finished output has its form, whatever preempts,
whatever runs ahead; judged by the package jsonschema, Python's `re` and equality.
"""

from __future__ import annotations

import asyncio
import json
import random
import re
from dataclasses import replace

import jsonschema
import pytest
import torch

from lora_runtime.core import FinishReason, Request, Row, SamplingParams, StructuredOutput
from lora_runtime.engine.sampler import draw
from lora_runtime.engine.structure_masks import unpacked
from lora_runtime.errors import InvalidRequest
from lora_runtime.text.structure_compiler import StructureCompiler
from lora_runtime.text.tokenizer import Tokenizer
from tests.driver import greedy, run
from tests.lora_runtime.engine.mixed_batch import mixed_requests, prompt, tokens, with_adapters
from tests.random_schemas import random_schema
from tests.tiny import VOCAB_SIZE
from tests.tiny_tokenizer import write_tokenizer

END = 2
NUM_SCHEMAS = 16
REGEX = r"(ab|cd)*-[0-9]{2,3}(é|狐)?"
CHOICES = ["yes", "no", "not at all", 'q"\n\\']


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return Tokenizer.load(folder)


@pytest.fixture(scope="module")
def compiler(tokenizer):
    compiler = StructureCompiler(lambda: tokenizer.vocabulary(VOCAB_SIZE))
    yield compiler
    compiler.close()


@pytest.fixture
def structured(compiler):
    def made(request: Request, kind: str, definition, **sampling) -> Request:
        form = StructuredOutput.of({kind: definition})
        params = {"max_tokens": 150, "stop_token_ids": frozenset({END}), **sampling}
        return replace(
            request,
            sampling=SamplingParams(structured_output=form, **params),
            structure=asyncio.run(compiler.compile(form)),
        )

    return made


def random_requests(forms, structured, number=NUM_SCHEMAS):
    """(request, schema) over base and adapters; every third request is free, with no schema."""
    rng = random.Random(number)
    digests = [None, *(form.digest for form in forms)]
    found = []
    for index in range(number):
        digest = digests[index % len(digests)]
        request = greedy(str(index), prompt(rng.randint(1, 40), seed=index), digest)
        schema = random_schema(rng)
        temperature = rng.choice([0.0, 0.8, 3.0])
        options = {"temperature": temperature, "seed": index, "top_k": rng.choice([0, 5])}
        found.append((structured(request, "json_schema", schema, **options), schema))
    free = mixed_requests(forms, max_tokens=12)[: number // 3]
    return found + [(replace(r, request_id=f"free{r.request_id}"), None) for r in free]


def check(traces, requests, tokenizer):
    """Every output is there; returns how many were finished."""
    num_finished = 0
    for request, schema in requests:
        trace = traces[request.request_id]
        assert trace.num_terminals == 1 and trace.error is None, trace.error
        if schema is None or trace.finish_reason is FinishReason.LENGTH:
            continue
        text = tokenizer.decode([t for t in trace.token_ids if t != END])
        jsonschema.validate(json.loads(text), schema)
        num_finished += 1
    return num_finished


def test_outputs_have_their_schemas(base, forms, structured, tokenizer):
    requests = random_requests(forms, structured)
    engine = with_adapters(base, forms, num_blocks=1000)
    plain = run(engine, [request for request, _ in requests])
    assert check(plain, requests, tokenizer) >= NUM_SCHEMAS // 2
    engine = with_adapters(base, forms, num_blocks=150, steps_ahead=1)
    arrivals = {request.request_id: i % 7 for i, (request, _) in enumerate(requests)}
    traces = run(engine, [request for request, _ in requests], arrivals=arrivals)
    assert engine.scheduler.num_preemptions > 0
    assert tokens(traces) == tokens(plain)


@pytest.mark.parametrize("steps_ahead", [0, 1])
def test_expressions_and_choices(base, forms, structured, tokenizer, steps_ahead):
    requests = [
        structured(
            greedy(f"{kind}{seed}", prompt(3 + seed, seed)), kind, definition, seed=seed, top_p=0.9
        )
        for seed in range(6)
        for kind, definition in (("regex", REGEX), ("choice", CHOICES))
    ]
    engine = with_adapters(base, forms, steps_ahead=steps_ahead)
    traces = run(engine, requests)
    for request in requests:
        trace = traces[request.request_id]
        assert trace.finish_reason is FinishReason.STOP
        text = tokenizer.decode([t for t in trace.token_ids if t != END])
        if request.request_id.startswith("regex"):
            assert re.fullmatch(REGEX, text)
        else:
            assert text in CHOICES


def test_an_end_token_comes_where_the_form_is_whole_and_not_before_min_tokens(
    base, forms, structured
):
    bias = ((END, 100.0),)  # it comes as soon as it may
    request = structured(greedy("0", prompt(5)), "regex", "(ab)+", temperature=0, logit_bias=bias)
    later = structured(
        greedy("1", prompt(5)), "regex", "(ab)+", temperature=0, logit_bias=bias, min_tokens=7
    )
    traces = run(with_adapters(base, forms), [request, later])
    assert traces["0"].token_ids[-1] == traces["1"].token_ids[-1] == END
    assert len(traces["0"].token_ids) <= 3 and len(traces["1"].token_ids) >= 8


def test_a_whole_form_ends_the_output_without_an_end_token(base, forms, structured, tokenizer):
    request = structured(
        greedy("0", prompt(5)), "choice", ["yes", "no"], stop_token_ids=frozenset(), min_tokens=9
    )
    trace = run(with_adapters(base, forms), [request])["0"]
    assert trace.finish_reason is FinishReason.STOP
    assert tokenizer.decode(trace.token_ids) in ("yes", "no")


def test_max_tokens_cut_the_form(base, forms, structured):
    request = structured(greedy("0", prompt(5)), "regex", "[a-z]{30,}", max_tokens=4)
    trace = run(with_adapters(base, forms), [request])["0"]
    assert trace.finish_reason is FinishReason.LENGTH and len(trace.token_ids) == 4


@pytest.mark.parametrize("steps_ahead", [0, 1])
def test_a_row_without_a_token_fails_alone(base, forms, alone, structured, steps_ahead):
    """The stop tokens are all that the form allows, and come too early for it to be whole."""
    lone = structured(
        greedy("lone", prompt(4)), "regex", "ab", stop_token_ids=frozenset(range(3, VOCAB_SIZE))
    )
    requests = mixed_requests(forms)
    traces = run(with_adapters(base, forms, steps_ahead=steps_ahead), [lone, *requests])
    assert traces["lone"].finish_reason is FinishReason.ERROR
    assert isinstance(traces["lone"].error, InvalidRequest)
    assert traces["lone"].error.field == "sampling.structured_output"
    del traces["lone"]
    assert tokens(traces) == alone


def test_each_of_several_outputs_has_a_state_of_its_own(base, forms, structured, tokenizer):
    one = structured(greedy("0", prompt(4)), "regex", REGEX)
    requests = [
        replace(one, request_id=str(i), sampling=replace(one.sampling, seed=i)) for i in range(5)
    ]
    traces = run(with_adapters(base, forms), requests)
    texts = [
        tokenizer.decode([t for t in trace.token_ids if t != END]) for trace in traces.values()
    ]
    assert len(set(texts)) > 1 and all(re.fullmatch(REGEX, text) for text in texts)


def test_a_form_that_was_not_compiled_is_refused(base, forms):
    form = StructuredOutput.of({"json_object": True})
    request = replace(greedy("0", [5]), sampling=SamplingParams(structured_output=form))
    with pytest.raises(InvalidRequest) as caught:
        with_adapters(base, forms).add_request(request)
    assert caught.value.field == "sampling.structured_output"


def test_bits_are_unpacked_as_they_were_packed():
    allowed = torch.rand(5, 301) < 0.3
    packed = torch.zeros(5, 38, dtype=torch.uint8)
    for row, token in allowed.nonzero().tolist():
        packed[row, token // 8] |= 128 >> token % 8
    assert torch.equal(unpacked(packed, (5, 301)), allowed)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("others", [0, 2])
def test_a_row_that_is_not_finite_is_still_seen(structured, value, others):
    """Wherever the value stands: among tokens that may follow or not."""
    for place in (5, VOCAB_SIZE - 1):
        row = Row.of(structured(greedy("0", [5]), "regex", "a", temperature=0))
        rows = [Row.of(greedy(str(i), [5])) for i in range(others)] + [row]
        logits = torch.randn(len(rows), VOCAB_SIZE)
        logits[-1, place] = value
        assert [found.is_finite for found in draw(logits, rows).result()] == [True] * others + [
            False
        ]
        logits[-1, place] = 0.0
        (*_, found) = draw(logits, rows).result()
        assert found.is_finite and found.token_id not in range(3)

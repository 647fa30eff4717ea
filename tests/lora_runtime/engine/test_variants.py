"""Every variant that PEFT can write, all in one mixed batch with base rows on one NF4 base.

float32: every logit within 2e-4 of the oracle, where each adapter's own effect is at least 1.0 and
any two differ by at least 0.5; greedy tokens equal over 48 steps, rows in random order, prompts in
chunks, some rows preempted and resumed. bfloat16: our error against float64 is at most 1.25 times
PEFT's own.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lora_runtime.core import AdapterUse
from lora_runtime.errors import AdapterFailed, InvalidRequest
from tests.driver import greedy, run, teacher_forced
from tests.lora_runtime.engine.variant_world import World, rms, shuffled
from tests.tiny import VOCAB_SIZE

NUM_STEPS = 48
SHOWN = 24
"""Of these steps the first, in which every adapter's effect must show."""


def assert_equal_to_the_oracle(world, engine):
    requests = shuffled(world, NUM_STEPS)
    arrivals = {request.request_id: 3 * (i % 4) for i, request in enumerate(requests)}
    traces = run(engine, requests, arrivals=arrivals)
    for index, row in enumerate(world.rows):
        trace = traces[str(index)]
        assert trace.error is None, f"{row}: {trace.error}"
        expected = world.expected(index, trace.token_ids, torch.float32)
        error = (torch.stack(trace.logits) - expected).abs().max()
        print(f"{world.base.spec.name} {row}: {error:.1e}")
        assert error <= 2e-4, f"{row} is off by {error:.2e}"
        assert trace.token_ids == expected.argmax(1).tolist(), row
        if row is not None:
            base = teacher_forced(world.twin, world.prompt(index), trace.token_ids[:SHOWN])
            assert (expected[:SHOWN] - base).abs().max() >= 1.0, f"{row} has no visible effect"


@pytest.mark.parametrize("shape", ["llama", "llama-bias", "qwen3", "gemma2", "gemma3", "phi3"])
def test_float32_logits_and_greedy_tokens_equal_the_oracle(shape, request, tmp_path):
    if shape == "llama":
        world = request.getfixturevalue("world")
    else:
        world = World(shape, torch.float32, tmp_path)
    engine = world.engine(num_blocks=260)
    assert_equal_to_the_oracle(world, engine)
    assert engine.scheduler.num_preemptions > 0, "the cache was not small enough to preempt"


@pytest.mark.parametrize("quantization", ["nf4-double", "fp4", "int8", "none"])
def test_other_formats_of_the_base_are_served_as_exactly(quantization, tmp_path):
    names = ["lora", "dora", "pissa", "replication-dora"]
    world = World("llama", torch.float32, tmp_path, quantization=quantization, names=names)
    assert_equal_to_the_oracle(world, world.engine())


@pytest.mark.parametrize("shape", ["llama-bias", "gemma2"])
def test_bfloat16_error_is_within_a_quarter_of_pefts(shape, tmp_path):
    """Over four texts a variant, because the errors of one text hang together."""
    world = World(shape, torch.bfloat16, tmp_path)
    rows, num_texts = world.rows, 4
    world.rows = rows * num_texts
    traces = run(world.engine(max_num_seqs=256, max_num_batched_tokens=512), shuffled(world, 16))
    for index, row in enumerate(rows):
        ours, theirs = [], []
        for text in range(index, len(world.rows), len(rows)):
            trace = traces[str(text)]
            exact = world.expected(text, trace.token_ids, torch.float64)
            theirs.append(world.expected(text, trace.token_ids, torch.bfloat16) - exact)
            ours.append(torch.stack(trace.logits) - exact)
        print(f"{shape} {row}: bfloat16 error {rms(ours) / rms(theirs):.2f} of the oracle's")
        assert rms(ours) <= 1.25 * rms(theirs), row


def tokens(traces):
    return {request_id: trace.token_ids for request_id, trace in traces.items()}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return World("llama", torch.float32, tmp_path_factory.mktemp("variants"))


@pytest.fixture(scope="module")
def alone(world):
    """Each row run by itself."""
    result = {}
    for index in range(len(world.rows)):
        result |= tokens(run(world.engine(), [world.request(index, 16)]))
    return result


def test_adapters_differ_pairwise(world):
    prompt = world.prompt(3)
    for form in world.forms.values():
        prompt = [*prompt, *form.facts.invocation_tokens]
    logits = {
        name: variant.expected(prompt, prompt[:4], torch.float32)
        for name, variant in world.variants.items()
    }
    for name, own in logits.items():
        for other, theirs in logits.items():
            if other != name:
                assert (own - theirs).abs().max() >= 0.5, f"{name} and {other} are alike"


@pytest.mark.parametrize("seed", [1, 2])
def test_rows_are_independent_of_neighbours_and_order(world, alone, seed):
    """Reordered, and with a third of the rows taken away."""
    requests = shuffled(world, 16, seed)
    assert tokens(run(world.engine(), requests)) == alone
    fewer = requests[::3] + requests[1::3]
    kept = {request.request_id for request in fewer}
    found = tokens(run(world.engine(max_num_batched_tokens=128), fewer))
    assert found == {name: token_ids for name, token_ids in alone.items() if name in kept}


def test_cached_prefixes_change_no_token(world, alone):
    """The same prompts again, under every adapter and composition, find their own blocks."""
    engine = world.engine(num_blocks=2000)
    assert tokens(run(engine, shuffled(world, 16))) == alone
    hits = engine.stats().num_prefix_hits
    assert tokens(run(engine, shuffled(world, 16, seed=5))) == alone
    assert engine.stats().num_prefix_hits - hits > 0.5 * sum(
        len(world.prompt(index)) for index in range(len(world.rows))
    )


def test_prompts_are_scored_under_every_variant(world):
    """In chunks of one mixed batch. Logits may differ by 2e-4, so log probabilities by twice that.
    An activated LoRA is left out: its oracle wants the whole prompt first.
    """
    requests = [
        replace(r, sampling=replace(r.sampling, num_prompt_logprobs=0))
        for r in shuffled(world, 1, seed=3)
    ]
    traces = run(world.engine(), requests)
    num_checked = 0
    for index, row in enumerate(world.rows):
        (entries,) = traces[str(index)].prompt_logprobs
        first, *rest = world.prompt(index)
        assert len(entries) == len(rest)
        if any("alora" in name for name, _ in row or ()):
            continue
        logits = world.oracle(row, [first], rest)
        expected = logits.log_softmax(1).gather(1, torch.tensor(rest)[:, None])[:, 0]
        found = torch.tensor([entry.logprob for entry in entries])
        assert (found - expected).abs().max() <= 4e-4, row
        num_checked += 1
    assert num_checked > len(world.rows) - 5


def test_an_activated_lora_reuses_the_bases_blocks_up_to_its_start(world):
    form = world.forms["alora"]
    shared = torch.randint(3, VOCAB_SIZE, (41,)).tolist()
    invoked = greedy("invoked", [*shared, *form.facts.invocation_tokens, 9], form.digest, 12)
    fresh = run(world.engine(prefix_cache=False), [invoked])["invoked"].token_ids
    engine = world.engine()
    run(engine, [greedy("base", shared, None, 4)])
    before = engine.stats().num_prefix_hits
    assert run(engine, [invoked])["invoked"].token_ids == fresh
    assert engine.stats().num_prefix_hits - before == 40


def test_an_activated_lora_without_its_invocation_is_the_base(world):
    prompt = torch.randint(3, VOCAB_SIZE, (20,)).tolist()
    traces = run(
        world.engine(),
        [greedy("alora", prompt, world.forms["alora"].digest, 8), greedy("base", prompt, None, 8)],
    )
    assert traces["alora"].token_ids == traces["base"].token_ids


def test_other_salts_share_no_prefix(world):
    prompt = torch.randint(3, VOCAB_SIZE, (40,)).tolist()
    engine = world.engine()
    for salt, expected_hits in (("a", 0), ("b", 0), ("a", 36)):
        before = engine.stats().num_prefix_hits
        request = replace(greedy("r" + salt, prompt, None, 2), cache_salt=salt)
        run(engine, [request])
        assert engine.stats().num_prefix_hits - before == expected_hits


def test_base_rows_beside_replicated_rows_run_exactly_their_own_layers(world):
    """Token-layer executions are counted, and the plan's calls are the fewest there can be."""
    layers = world.base.model.get_decoder().layers
    counts = []
    hooks = [
        layer.register_forward_pre_hook(lambda module, args: counts.append(args[0].shape[1]))
        for layer in layers
    ]
    names = ["replication", "replication-2"]
    depths = [len(world.forms[name].facts.layer_map) for name in names]
    prompts = {name: 7 + index for index, name in enumerate(names)}
    requests = [greedy("base", [5] * 11, None, 1)]
    requests += [greedy(n, [5] * prompts[n], world.forms[n].digest, 1) for n in names]
    run(world.engine(), requests)
    for hook in hooks:
        hook.remove()
    own = [prompts[name] * depth for name, depth in zip(names, depths, strict=True)]
    assert sum(counts) == 11 * len(layers) + sum(own)
    assert len(counts) < len(layers) + sum(depths)


def test_compositions_without_meaning_are_refused(world):
    uses = lambda *names: tuple(AdapterUse(digest=world.forms[n].digest) for n in names)  # noqa: E731
    for names in [
        ("lora", "replication"),
        ("replication", "replication-2"),
        ("modules-to-save-head", "modules-to-save-embedding"),
    ]:
        request = replace(greedy("r", [5, 6], None, 2), adapters=uses(*names))
        with pytest.raises(InvalidRequest) as caught:
            world.engine().add_request(request)
        assert caught.value.field == "adapters"


def test_a_row_deeper_than_the_cache_is_refused_at_admission(world):
    form = world.forms["replication"]
    engine = world.engine(num_blocks=20)
    engine.add_request(greedy("base", [5] * 40, None, 30))
    with pytest.raises(InvalidRequest, match="layers") as caught:
        engine.add_request(greedy("deep", [5] * 40, form.digest, 30))
    assert caught.value.field == "adapters"


def overflowing(form):
    """The same adapter with finite weights that overflow when they act."""
    modules = {
        key: replace(
            module,
            b=None if module.b is None else module.b * 1e37,
            patch=module.patch and replace(module.patch, values=module.patch.values * 1e37),
        )
        for key, module in form.modules.items()
    }
    return replace(
        form, facts=replace(form.facts, digest=f"overflowing {form.digest}"), modules=modules
    )


def test_overflowing_weights_of_any_kind_fail_their_own_rows_only(world, alone):
    names = ["dora", "alora", "patterns", "modules-to-save-head", "replication"]
    bad = {name: overflowing(world.forms[name]) for name in names}
    engine = world.engine(max_num_seqs=64, max_num_batched_tokens=64)
    for form in bad.values():
        engine.add_adapter(form)
    prompt = [5, 9, *world.forms["alora"].facts.invocation_tokens, 12, 4]
    failing = [greedy(f"bad {name}", prompt, form.digest, 8) for name, form in bad.items()]
    requests = shuffled(world, 16)
    traces = run(engine, [*failing[:3], *requests, *failing[3:]])
    for request in failing:
        trace = traces.pop(request.request_id)
        assert isinstance(trace.error, AdapterFailed), request.request_id
    assert tokens(traces) == alone

"""Bases with recurrent layers in the engine, against transformers and PEFT in float32.

Free cache blocks, free states and free rows of the adapter pool hold NaN throughout.
"""

from __future__ import annotations

from functools import cache

import pytest
import torch

from lora_runtime.adapters.reduction import load_adapter
from lora_runtime.config import BaseConfig, CacheConfig, EngineConfig, SchedulerConfig
from lora_runtime.core import FinishReason
from lora_runtime.engine import engine as engine_module
from lora_runtime.engine import memory_budget
from lora_runtime.engine.engine import load_engine
from lora_runtime.engine.llm import LLM
from lora_runtime.errors import ConfigError
from tests.driver import greedy, run, teacher_forced, tiny_engine
from tests.lora_runtime.engine.mixed_batch import prompt, tokens, with_adapters
from tests.peft_adapters import load_in_peft, write_adapter
from tests.tiny import HYBRIDS, dense_twin, tiny_base, tiny_checkpoint, tiny_model
from tests.tiny_tokenizer import write_tokenizer

base_of = cache(tiny_base)
twin_of = cache(lambda shape: dense_twin(base_of(shape), shape))


def worst_error(model, request, trace) -> float:
    """Largest difference from the model's logits; the tokens must be the model's."""
    expected = teacher_forced(model, list(request.prompt_token_ids), trace.token_ids)
    assert trace.token_ids == expected.argmax(1).tolist()
    return float((torch.stack(trace.logits) - expected).abs().max())


@pytest.mark.parametrize("shape", HYBRIDS)
def test_a_long_row_in_odd_chunks_beside_others_equals_transformers(shape):
    engine = tiny_engine(base_of(shape), num_blocks=700, max_num_batched_tokens=97)
    requests = [
        greedy("long", prompt(2000, seed=1), max_tokens=12),
        *(greedy(str(n), prompt(5 + 30 * n, seed=n), max_tokens=30) for n in range(4)),
    ]
    traces = run(engine, requests, arrivals={"1": 3, "2": 9, "3": 14})
    for request in requests:
        assert worst_error(twin_of(shape), request, traces[request.request_id]) <= 2e-4


ADAPTERS = {
    "lora": dict(r=4, lora_alpha=8),
    "dora": dict(r=8, lora_alpha=8, use_dora=True),
    "rslora": dict(r=16, lora_alpha=16, use_rslora=True),
}
MIXERS = {
    "qwen3.5": ["in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "out_proj"],
    "qwen3-next": ["in_proj_qkvz", "in_proj_ba", "out_proj"],
    "lfm2": ["in_proj", "out_proj"],
    "granite-h": ["in_proj"],
    "bamba": ["in_proj"],
    "falcon-h1": ["in_proj"],
    "nemotron-h": ["in_proj"],
}
"""Linear layers of recurrent ones. PEFT refuses `out_proj` of some Mamba models, whose kernels
would pass it by."""


@pytest.mark.parametrize("shape", HYBRIDS)
def test_a_mixed_batch_equals_peft(shape, tmp_path):
    base, twin = base_of(shape), twin_of(shape)
    attention = ["q_proj", "o_proj", "output_linear", "w2", "mixer.down_proj"]
    targets = [name for name in attention if any(p.endswith(name) for p in base.spec.linears)]
    options = {"mixers": dict(r=8, lora_alpha=16), **ADAPTERS}
    folders = [
        write_adapter(
            twin, tmp_path / name, seed=seed, scale=1.0,
            target_modules=MIXERS[shape] if name == "mixers" else [*MIXERS[shape], *targets],
            **config,
        )
        for seed, (name, config) in enumerate(options.items())
    ]  # fmt: skip
    forms = [load_adapter(folder, base.spec, base.weights) for folder in folders]
    models = [twin, *(load_in_peft(twin, folder) for folder in folders)]
    engine = with_adapters(base, forms, max_num_batched_tokens=37)
    digests = [None, *(form.digest for form in forms)]
    requests = [
        greedy(str(n), prompt(length, seed=n), digests[n % 5], 20)
        for n, length in enumerate([9, 70, 12, 33, 5, 40, 3, 90])
    ]
    traces = run(engine, requests, arrivals={"2": 4})
    effects = []
    for n, request in enumerate(requests):
        trace = traces[request.request_id]
        assert worst_error(models[n % 5], request, trace) <= 2e-4
        if n % 5:
            plain = teacher_forced(twin, list(request.prompt_token_ids), trace.token_ids)
            effects.append(float((torch.stack(trace.logits) - plain).abs().max()))
    assert min(effects) >= 1.0


@pytest.mark.parametrize("shape", ["qwen3.5", "lfm2", "granite-h"])
def test_bfloat16_error_is_within_a_quarter_of_pefts(shape, tmp_path):
    base = tiny_base(shape, dtype=torch.bfloat16)
    exact_twin = dense_twin(base, shape, dtype=torch.float64)
    single_twin = dense_twin(base, shape, dtype=torch.float32)
    folder = write_adapter(
        single_twin, tmp_path, seed=0, r=8, lora_alpha=8, target_modules=MIXERS[shape]
    )
    form = load_adapter(folder, base.spec, base.weights)
    requests = [greedy(str(n), prompt(40 + 20 * n, seed=n), form.digest, 24) for n in range(4)]
    traces = run(with_adapters(base, [form], max_num_batched_tokens=37), requests)
    exact_model = load_in_peft(exact_twin, folder).double()
    peft_model = load_in_peft(dense_twin(base, shape), folder)
    ours, theirs = [], []
    for request in requests:
        trace = traces[request.request_id]
        row = list(request.prompt_token_ids), trace.token_ids
        exact = teacher_forced(exact_model, *row)
        ours.append(torch.stack(trace.logits) - exact)
        theirs.append(teacher_forced(peft_model, *row) - exact)
    our_error, peft_error = (
        float(torch.cat(errors).double().square().mean().sqrt()) for errors in (ours, theirs)
    )
    print(f"{shape}: bfloat16 error {our_error:.4f}, peft's {peft_error:.4f}")
    assert our_error <= 1.25 * peft_error


@pytest.mark.parametrize("steps_ahead", [0, 1])
@pytest.mark.parametrize("shape", ["qwen3.5", "lfm2", "falcon-h1"])
def test_preempted_rows_give_the_tokens_they_give_alone(shape, steps_ahead):
    requests = [greedy(str(n), prompt(30 + 7 * n, seed=n), max_tokens=40) for n in range(6)]
    alone = {}
    for request in requests:
        alone |= tokens(run(tiny_engine(base_of(shape)), [request]))
    engine = tiny_engine(
        base_of(shape), num_blocks=60, max_num_batched_tokens=23, steps_ahead=steps_ahead
    )
    assert tokens(run(engine, requests)) == alone
    assert engine.scheduler.num_preemptions >= 3


@pytest.mark.parametrize("shape", HYBRIDS)
def test_a_row_that_resumes_from_a_snapshot_equals_transformers(shape):
    engine = tiny_engine(base_of(shape), block_size=16, num_blocks=100)
    system = prompt(300, seed=7)
    for n, num_cached in enumerate([0, 256, 288, 288]):
        request = greedy(str(n), [*system, *prompt(50, seed=10 + n)], max_tokens=6)
        before = engine.blocks.num_prefix_hits
        trace = run(engine, [request])[str(n)]
        assert engine.blocks.num_prefix_hits - before == num_cached
        assert worst_error(twin_of(shape), request, trace) <= 2e-4


def conversations(engine, num_turns=4) -> tuple[int, int]:
    """Chats under two system prompts, each turn with all before it, and single questions under a
    third. Returns prompt tokens asked for, and those found.
    """
    systems = [prompt(length, seed=length) for length in (300, 170, 420)]
    histories = [systems[n % 2] for n in range(4)]
    for turn in range(num_turns):
        requests = []
        for n, history in enumerate(histories):
            histories[n] = [*history, *prompt(20 + 11 * n, seed=100 * turn + n)]
            requests.append(greedy(f"{turn}-{n}", histories[n], max_tokens=25 + 9 * n))
            single = [*systems[2], *prompt(30 + n, seed=1000 + 100 * turn + n)]
            requests.append(greedy(f"{turn}-{n} single", single, max_tokens=5))
        for request in requests:  # one after the other, so that all may find what came before
            trace = run(engine, [request])[request.request_id]
            if "single" not in request.request_id:
                histories[int(request.request_id[-1])] += trace.token_ids
    return engine.blocks.num_prefix_queries, engine.blocks.num_prefix_hits


def test_prefix_hits_are_nearly_those_of_a_base_that_only_attends():
    options = dict(block_size=16, num_blocks=300, max_num_batched_tokens=256)
    asked, attending = conversations(tiny_engine(tiny_base("llama-long"), **options))
    again, found = conversations(tiny_engine(base_of("qwen3.5"), **options))
    print(f"tokens found of {asked}: {attending} by attention alone, {found} with states")
    assert again == asked
    assert attending > 0.5 * asked
    assert found >= 0.9 * attending


def test_what_others_leave_in_the_cache_changes_no_token():
    """Prompts that share much, with adapters or not and under other salts, in a cache too small for
    all of them.
    """
    base = base_of("qwen3-next")
    stem = prompt(160, seed=3)
    requests = [
        greedy(str(n), [*stem[: 40 * (n % 5)], *prompt(9 + n, seed=n)], max_tokens=15)
        for n in range(20)
    ]
    plain = {}
    for request in requests:
        plain |= tokens(run(tiny_engine(base, prefix_cache=False), [request]))
    engine = tiny_engine(base, num_blocks=90, state_snapshots=5, max_num_batched_tokens=50)
    arrivals = {str(n): 5 * n for n in range(20)}
    assert tokens(run(engine, requests, arrivals=arrivals)) == plain
    assert engine.blocks.num_prefix_hits > 300


def test_a_row_of_infinite_numbers_fails_alone(tmp_path):
    base, twin = base_of("qwen3.5"), twin_of("qwen3.5")
    targets = [*MIXERS["qwen3.5"], "gate_proj", "up_proj"]
    bad = write_adapter(twin, tmp_path, seed=0, scale=1e25, target_modules=targets)
    form = load_adapter(bad, base.spec, base.weights)
    engine = with_adapters(base, [form])
    stem = prompt(70)
    good = [greedy(f"good {n}", [*stem, n + 3], max_tokens=20) for n in range(3)]
    failing = [greedy(f"bad {n}", [*stem, n + 3], form.digest, 20) for n in range(3)]
    requests = [request for pair in zip(failing, good, strict=True) for request in pair]
    traces = run(engine, requests, arrivals={"bad 2": 12, "good 2": 12})
    assert {traces[r.request_id].finish_reason for r in failing} == {FinishReason.ERROR}
    for request in good:
        assert worst_error(twin, request, traces[request.request_id]) <= 2e-4


def test_rows_of_a_failed_step_are_computed_again_from_a_state_before_it():
    """A step fails after its recurrent layers have changed the states of all rows."""
    base = base_of("qwen3.5")
    requests = [greedy(str(n), prompt(40 + n, seed=n), max_tokens=20) for n in range(3)]
    requests.append(greedy("like 0", [*prompt(40, seed=0), 5], max_tokens=8))
    engine = tiny_engine(base)
    start, num_calls = engine.runner.start, 0

    def failing(plan, *given):
        nonlocal num_calls
        num_calls += 1
        drawn = start(plan, *given)
        if num_calls % 4 == 0 and len(plan.rows) > 1:
            raise RuntimeError("by design")
        return drawn

    engine.runner.start = failing
    traces = {r.request_id: [] for r in requests}
    pending = list(requests)
    while pending or not engine.is_idle:
        if pending and num_calls % 3 == 0:
            engine.add_request(pending.pop(0))
        for output in engine.step():
            assert output.error is None
            traces[output.request_id] += output.token_ids
        engine.check_integrity()
    for request in requests:
        assert traces[request.request_id] == tokens(run(tiny_engine(base), [request])).popitem()[1]


def test_a_checkpoint_is_served_and_its_prompts_found_again(tmp_path):
    """Through the door of a process: from files to texts."""
    shape = "qwen3.5"
    write_tokenizer(tiny_checkpoint(tmp_path / "base", shape))
    adapter = write_adapter(
        tiny_model(shape), tmp_path / "a", seed=1, scale=3.0, target_modules=MIXERS[shape]
    )
    config = EngineConfig(base=BaseConfig(model=str(tmp_path / "base"), dtype="float32"))
    system = "The quick brown fox jumps over a lazy dog while storms in the night sink ships. " * 12
    prompts = [system + end for end in ("the sun", "a dog", "what is the name", "of the ship")]
    options = dict(max_tokens=12, temperature=0.0, ignore_eos=True)
    with LLM(adapters={"a": adapter}, config=config) as llm:
        together = llm.generate(prompts, adapter=["a", None, "a", None], **options)
        engine = llm._engine
        before = engine.blocks.num_prefix_hits
        again = llm.generate(prompts, adapter=["a", None, "a", None], **options)
        num_found = engine.blocks.num_prefix_hits - before
        num_tokens = sum(len(llm._tokenizer.encode(prompt)) for prompt in prompts)
    assert [one.text for one in again] == [one.text for one in together]
    assert num_found > 0.8 * num_tokens


def test_the_state_of_a_row_is_stated_and_is_what_the_pool_takes():
    engine = tiny_engine(base_of("qwen3.5"))
    heads = 4 * 16 * 24
    convolution = 3 * (2 * 2 * 16 + 4 * 24)
    assert engine.info.base.state_bytes == 2 * 4 * (heads + convolution)
    states = engine.runner.states
    held = sum(part.nbytes for own in states.layers.values() for part in own)
    slots = engine.info.max_num_seqs + engine.info.num_snapshots
    assert held == slots * engine.info.base.state_bytes
    assert len(engine.runner.cache.layout.shapes) == 1, "only one layer attends"
    assert engine.runner.graphs is None


def test_states_without_room_are_refused_before_the_weights_are_read(tmp_path, monkeypatch):
    tiny_checkpoint(tmp_path, "qwen3.5")
    state_bytes = base_of("qwen3.5").spec.state_bytes
    monkeypatch.setattr(memory_budget, "memory_bytes", lambda device: 40 * state_bytes - 1)
    monkeypatch.setattr(engine_module, "load_base", lambda *_: pytest.fail("read"))
    config = EngineConfig(
        base=BaseConfig(model=str(tmp_path), dtype="float32", device="cpu"),
        cache=CacheConfig(state_snapshots=24),
        scheduler=SchedulerConfig(max_num_seqs=16),
    )
    numbers = f"max_num_seqs is 16 and state_snapshots 24.*{state_bytes} bytes.*{40 * state_bytes}"
    with pytest.raises(ConfigError, match=numbers) as refusal:
        load_engine(config)
    assert refusal.value.field == "state_snapshots"

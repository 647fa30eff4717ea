"""Decode steps that are played from a tape give what plain steps give, as the mix changes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from lora_runtime.adapters.reduction import load_adapter
from lora_runtime.core import AdapterUse
from lora_runtime.engine.cpu_capture import CpuCapture, can_capture_on_cpu
from lora_runtime.kernels import cpu
from lora_runtime.kernels.tape import Tape, Unrecordable, empty, is_recording, recorded_on
from tests.driver import greedy, run, tiny_engine
from tests.lora_runtime.engine.mixed_batch import prompt
from tests.peft_adapters import four_adapters, write_adapter
from tests.tiny import CONFIGS, dense_twin, tiny_base

BFLOAT16, FLOAT32 = torch.bfloat16, torch.float32


def counting(engine):
    """How often the engine captures and plays."""
    counts, graphs = {"captured": 0, "played": 0}, engine.runner.graphs
    real = graphs._capture

    def capture(forward):
        play = real(forward)
        counts["captured"] += 1

        def counted():
            counts["played"] += 1
            play()

        return counted

    capture.drop = lambda replays: None
    graphs._capture = capture
    return counts


def requests_of(forms):
    """Base rows, each adapter, one late in its prompt, and a composition; of several lengths, so
    that rows end and others take their places.
    """
    uses = [(), *((AdapterUse(digest=form.digest, weight=0.7),) for form in forms)]
    uses.append(
        (AdapterUse(digest=forms[0].digest), AdapterUse(digest=forms[1].digest, weight=-0.5))
    )
    uses.append((AdapterUse(digest=forms[2].digest, start_position=9),))
    found = []
    for i, use in enumerate([*uses, *uses[:2]]):
        request = greedy(str(i), prompt(3 + 5 * i, seed=i), max_tokens=4 + 3 * i, adapters=use)
        found.append(request)
    seeded = replace(found[1].sampling, temperature=0.8, seed=3, repetition_penalty=1.3)
    found[1] = replace(found[1], sampling=seeded)
    return found


def check_played_is_plain(base, forms):
    """Tokens and logits of an engine with a tape are those of one without, bit for bit. Returns the
    former's counts.
    """
    traces = []
    for has_graphs in (False, True):
        engine = tiny_engine(base, max_num_seqs=6)
        counts = counting(engine)
        if not has_graphs:
            engine.runner.graphs = None
        for form in forms:
            engine.add_adapter(form)
        traces.append(run(engine, requests_of(forms), arrivals={"2": 3, "5": 9}))
        assert has_graphs or counts["played"] == 0
    for request_id, plain in traces[0].items():
        played = traces[1][request_id]
        assert played.token_ids == plain.token_ids
        assert torch.equal(torch.stack(played.logits), torch.stack(plain.logits))
    return counts


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16])
@pytest.mark.parametrize("shape", [shape for shape in CONFIGS if shape != "phi3-longrope"])
def test_played_steps_are_plain_steps(tmp_path, shape, dtype):
    base = tiny_base(shape, dtype=dtype)
    folders = four_adapters(dense_twin(base, shape), tmp_path, fused=shape.startswith("phi3"))
    forms = [load_adapter(folder, base.spec, base.weights) for folder in folders]
    counts = check_played_is_plain(base, forms)
    assert 10 < counts["played"] and 0 < counts["captured"] < counts["played"]


EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
MIXTURE_ADAPTERS = (
    dict(r=4, target_modules=["q_proj", "o_proj"]),
    dict(r=3, target_modules=[], target_parameters=EXPERTS),
    dict(r=5, target_modules=["v_proj"], target_parameters=EXPERTS[1:]),
)


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16])
@pytest.mark.parametrize("shape", ["qwen3-moe", "qwen2-moe", "mixtral"])
def test_played_steps_of_a_mixture_are_plain_steps(tmp_path, shape, dtype):
    """The tokens choose other experts at every step, and the segments are others. Where no kernel
    multiplies codes, the groups are sized in Python, and nothing is played.
    """
    base = tiny_base(shape, dtype=dtype)
    twin = dense_twin(base, shape, dtype=FLOAT32)
    folders = [
        write_adapter(twin, tmp_path / str(i), seed=i, **settings)
        for i, settings in enumerate(MIXTURE_ADAPTERS)
    ]
    forms = [load_adapter(folder, base.spec, base.weights) for folder in folders]
    counts = check_played_is_plain(base, forms)
    reads_codes = cpu.can_multiply_codes(torch.empty(0, 64, dtype=dtype))
    assert (counts["played"] > 10) == reads_codes


def test_an_adapter_that_comes_goes_and_comes_back(tmp_path):
    """Its slot is another's meanwhile, and the modules that are adapted change."""
    base = tiny_base("llama")
    twin = dense_twin(base, "llama")
    forms = [
        load_adapter(
            write_adapter(twin, tmp_path / str(i), seed=i, r=3 + i, target_modules=targets),
            base.spec,
            base.weights,
        )
        for i, targets in enumerate((["q_proj"], ["down_proj", "v_proj"], "all-linear"))
    ]
    engines = [tiny_engine(base, max_slots=1) for _ in range(2)]
    engines[0].runner.graphs = None
    counts = counting(engines[1])
    for form in (forms[0], forms[1], forms[0], forms[2], forms[1]):
        found = []
        for engine in engines:
            engine.add_adapter(form)
            requests = [greedy("a", [5, 6, 7], form.digest, 6), greedy("b", [8, 9], max_tokens=9)]
            found.append(run(engine, requests))
            engine.drop_adapter(form.digest)
        for request_id in ("a", "b"):
            assert found[0][request_id].token_ids == found[1][request_id].token_ids
    assert counts["played"] > counts["captured"]


def test_steps_that_read_tables_in_python_are_not_captured(tmp_path):
    """Adapters of the embedding and the output layer go by plain torch, which looks at values."""
    base = tiny_base("llama-bias")
    twin = dense_twin(base, "llama-bias")
    forms = [
        load_adapter(
            write_adapter(twin, tmp_path / str(i), seed=i, r=4, target_modules=targets),
            base.spec,
            base.weights,
        )
        for i, targets in enumerate((["embed_tokens", "q_proj"], ["lm_head"], ["q_proj"]))
    ]
    traces = []
    for has_graphs in (False, True):
        engine = tiny_engine(base)
        counts = counting(engine)
        if not has_graphs:
            engine.runner.graphs = None
        for form in forms:
            engine.add_adapter(form)
        requests = [greedy(str(i), [5 + i, 9], form.digest, 8) for i, form in enumerate(forms)]
        traces.append(run(engine, [*requests, greedy("base", [4, 4], max_tokens=16)]))
    assert counts["played"] > 0, "the base alone is still played"
    for request_id, plain in traces[0].items():
        assert traces[1][request_id].token_ids == plain.token_ids


def test_a_base_whose_layers_are_not_all_known_is_not_captured():
    base = tiny_base("llama")
    assert can_capture_on_cpu(base)
    layers = base.model.get_decoder().layers
    layers.append(nn.Identity())
    assert not can_capture_on_cpu(base)


def test_a_tape_plays_torch_ops_into_the_same_tensors():
    x, out = torch.ones(3), torch.zeros(3)

    def forward():
        y = (x * 2).view(3, 1).squeeze(1)
        y += torch.stack([x, x]).sum(0)
        out.copy_(y)

    play = CpuCapture()(forward)
    x.copy_(torch.tensor([1.0, 2.0, 3.0]))
    out.zero_()
    play()
    assert out.tolist() == [4.0, 8.0, 12.0]


def test_a_tape_plays_the_options_of_ops_that_write():
    x, out = torch.ones(3), torch.zeros(3)

    def forward():
        y = x.clone()
        y.add_(x, alpha=2)
        torch.mul(y, y, out=out)

    play = CpuCapture()(forward)
    x.copy_(torch.tensor([1.0, 2.0, 3.0]))
    play()
    assert out.tolist() == [9.0, 36.0, 81.0]


READERS = {
    "item": lambda x: x * x[0].item(),
    "bool": lambda x: x * 2 if x[0] > 0 else x,
    "equal": lambda x: x * 2 if torch.equal(x, x) else x,
    "mask": lambda x: x[x > 1],
    "where": lambda x: torch.where(x > 1)[0],
    "repeat": lambda x: x.repeat_interleave(x.long()),
    "unique": lambda x: x.unique(),
}


@pytest.mark.parametrize("name", READERS)
def test_ops_that_tell_python_values_are_not_recorded(name):
    """A tape would give every step the value, or the shape, of the one that was recorded."""
    with pytest.raises(Unrecordable):
        CpuCapture()(lambda: READERS[name](torch.ones(3)))
    assert not is_recording()
    CpuCapture()(lambda: torch.ones(3)[torch.tensor([0, 2])])


@torch.inference_mode()
def capture_all(engine):
    """Every graph, before the first request."""
    engine.runner.graphs.warm_up(engine.pool.layout, lambda _: None)


def dequantisations(play):
    """How often a tape makes a weight of its codes."""
    names = [str(arguments[0]) for _, arguments in play.__self__.steps if arguments]
    return sum("dequantize" in name for name in names)


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16])
@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_copies_of_weights_are_made_once_and_not_at_every_step(quantization, dtype, monkeypatch):
    """Also where a step is captured before the first request, when no copy has been made yet."""
    monkeypatch.setattr(cpu, "multiplies_bfloat16", lambda: False)  # bfloat16 needs copies too
    base = tiny_base("llama", quantization=quantization, dtype=dtype)
    engine = tiny_engine(base, max_num_seqs=2)
    capture_all(engine)
    plays = [graph[0] for graph in engine.runner.graphs._captured.values() if graph]
    assert len(plays) == len(engine.runner.graphs._captured)
    sizes = {len(play.__self__.steps) for play in plays}
    assert len(sizes) == 1 and not any(map(dequantisations, plays))


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_played_steps_are_plain_steps_without_copies(tmp_path, quantization):
    base = tiny_base("llama", quantization=quantization, dequantized_cache=False)
    folders = four_adapters(dense_twin(base, "llama"), tmp_path)
    forms = [load_adapter(folder, base.spec, base.weights) for folder in folders]
    counts = check_played_is_plain(base, forms)
    assert (counts["played"] > 10) == cpu.can_multiply_codes(torch.empty(0, 64))


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_steps_that_decode_weights_are_not_captured(quantization, monkeypatch):
    """Where no kernel multiplies codes, without copies of the weights: a tape would be one."""
    monkeypatch.setattr(cpu, "can_multiply_codes", lambda x: False)
    base = tiny_base("llama", quantization=quantization, dequantized_cache=False)
    engine = tiny_engine(base, max_num_seqs=2)
    capture_all(engine)
    assert set(engine.runner.graphs._captured.values()) == {None}
    (trace,) = run(engine, [greedy("a", [5, 6, 7], max_tokens=6)]).values()
    assert len(trace.token_ids) == 6


def test_memory_of_a_tape_is_used_again_once_nobody_holds_it():
    tape = Tape()
    with recorded_on(tape):
        first = empty((4, 16), FLOAT32)
        view, address = first[1:], first.data_ptr()
        del first
        second = empty((4, 16), FLOAT32)
        assert second.data_ptr() != address, "a view still holds it"
        del view
        assert empty((4, 16), FLOAT32).data_ptr() == address
        assert is_recording()
    assert not is_recording()

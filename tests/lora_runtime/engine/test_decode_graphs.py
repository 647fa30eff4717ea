"""Decode steps from tables at fixed addresses: what a captured CUDA graph would replay.

Nothing is captured here. The stand-in for a capture runs the forward again at every replay, and
insists on what a graph could not know better: the pool's layout at its capture.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import fields, replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lora_runtime.adapters.reduction import load_adapter
from lora_runtime.base.model.recurrence import StatePool
from lora_runtime.core import AdapterUse, ScheduledBatch, ScheduledRow
from lora_runtime.engine import engine as engine_module
from lora_runtime.engine import model_runner, step_buffers
from lora_runtime.engine.batch import build_batch
from lora_runtime.engine.decode_graphs import buckets
from lora_runtime.engine.step_buffers import StepBuffers
from lora_runtime.kernels import gpu
from tests.driver import greedy, run, teacher_forced, tiny_engine
from tests.lora_runtime.engine.mixed_batch import rows_of
from tests.lora_runtime.kernels.on_triton import DEVICE
from tests.peft_adapters import four_adapters, write_adapter
from tests.tiny import HYBRIDS, dense_twin, tiny_base

PROMPTS = [[5, 6], [9], [11]]
READS_THE_HOST = {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select"}


@pytest.fixture(autouse=True)
def on_triton(monkeypatch):
    monkeypatch.setattr(gpu, "DEVICES", {DEVICE})


def base_of(shape):
    return tiny_base(shape, dequantized_cache=False, device=DEVICE)


class Captures:
    """Stands for CudaCapture, and counts. As that does, it runs once before it captures."""

    def __init__(self, engine):
        self.pool, self.num_captured, self.num_replayed = engine.pool, 0, 0
        self.num_dropped = 0

    def __call__(self, forward):
        self.num_captured += 1
        layout = self.pool.layout
        forward()

        def replay():
            self.num_replayed += 1
            assert self.pool.layout == layout
            forward()

        return replay

    def drop(self, replays):
        for replay in replays:
            assert replay is not None
            self.num_dropped += 1


def replaying_engine(base, **options):
    engine = tiny_engine(base, **options)
    captures = Captures(engine)
    engine.runner.use_graphs(6, 64, captures)
    return engine, captures


def test_a_mix_that_changes_gives_the_tokens_of_plain_steps(monkeypatch, tmp_path):
    """A base row, an adapter and a composition that arrives late, against plain torch. Penalties of
    one row act on what the graphs leave behind.
    """
    base = base_of("llama")
    folders = four_adapters(dense_twin(base, "llama"), tmp_path)
    forms = [load_adapter(folders[i], base.spec, base.weights) for i in (1, 3)]
    plain = tiny_engine(base)
    plain.runner.graphs = None  # which on a GPU it has: plain torch cannot be captured
    replaying, captures = replaying_engine(base, steps_ahead=1)
    owners = [(), (forms[0],), (forms[0], forms[1])]
    requests = [
        greedy(str(i), prompt, max_tokens=2, adapters=uses_of(owner))
        for i, (prompt, owner) in enumerate(zip(PROMPTS, owners, strict=True))
    ]
    rules = dict(repetition_penalty=3.0, presence_penalty=2.0, logit_bias=((7, 1.0),))
    requests[1] = replace(requests[1], sampling=replace(requests[1].sampling, **rules))
    traces = []
    for engine, devices in ((plain, set()), (replaying, {DEVICE})):
        monkeypatch.setattr(gpu, "DEVICES", devices)
        for form in forms:
            engine.add_adapter(form)
        traces.append(run(engine, requests, arrivals={"2": 1}))
    assert captures.num_replayed >= 2 and captures.num_captured >= 1
    for request_id, expected in traces[0].items():
        trace = traces[1][request_id]
        assert trace.token_ids == expected.token_ids
        difference = torch.stack(trace.logits) - torch.stack(expected.logits)
        assert difference.abs().max() <= 2e-4


def uses_of(forms):
    return tuple(AdapterUse(digest=form.digest, weight=0.5 + i) for i, form in enumerate(forms))


@pytest.mark.parametrize("shape", ["qwen3.5", "lfm2", "granite-h"])
def test_states_are_those_of_plain_steps_where_a_graph_leaves_them(shape):
    """Rows that come and go beside others, against transformers. The last request begins with a
    snapshot that a graph has stored, of another's output.
    """
    base = base_of(shape)
    twin = dense_twin(base, shape)
    engine, captures = replaying_engine(base, num_blocks=60)
    requests = [greedy(str(i), prompt, max_tokens=7 + i) for i, prompt in enumerate(PROMPTS)]
    requests.append(greedy("3", list(range(20, 31)), max_tokens=5))
    traces = run(engine, requests, arrivals={"1": 1, "3": 3})
    assert captures.num_captured >= 2 and captures.num_replayed >= 5
    whole = [*requests[2].prompt_token_ids, *traces["2"].token_ids]
    assert len(whole) == 10
    again = greedy("again", whole, max_tokens=3)
    taken = []
    begin = engine.blocks.snapshots.begin
    engine.blocks.snapshots.begin = lambda key: taken.append(begin(key)) or taken[-1]
    traces |= run(engine, [again])
    assert len(taken) == 1, "of the first 8 tokens, of which 7 are output"
    for request in (*requests, again):
        trace = traces[request.request_id]
        expected = teacher_forced(twin, list(request.prompt_token_ids), trace.token_ids)
        assert trace.token_ids == expected.argmax(1).tolist()
        assert (torch.stack(trace.logits).cpu() - expected.cpu()).abs().max() <= 2e-4


def test_states_are_written_by_rows_alone_and_by_none_at_a_capture():
    base = base_of("lfm2")
    engine, captures = replaying_engine(base, poison=False)
    run(engine, [greedy("1", [5, 6], max_tokens=2), greedy("2", [7], max_tokens=2)])
    own = [part for layer in engine.runner.states.layers.values() for part in layer]
    before = [part.clone() for part in own]
    with torch.inference_mode():
        engine.runner.graphs.warm_up(engine.pool.layout, lambda _: None)
    assert captures.num_captured >= 9
    assert all(part.equal(old) for part, old in zip(own, before, strict=True))


def test_rows_that_begin_or_resume_are_left_to_the_eager_way():
    states = StatePool.allocate({0: ((2, 4),)}, 3, torch.empty(0, device=DEVICE))
    buffers = StepBuffers(2, 8, 4, torch.device(DEVICE), states)
    (scheduled,) = rows_of([([3, 4], 8)], [None])
    row = scheduled.row
    row.state_slot, row.snapshots = 1, [(4, 0), (8, 2)]
    assert buffers.takes((scheduled,)) and buffers.fill((scheduled,)) == 0
    assert buffers.batch(0).recurrence is not None
    tables = buffers._views(buffers._device)
    assert tables["state_slots"].tolist() == [1, -1]
    assert tables["state_copies"].tolist() == [2, -1]
    row.snapshots = [(4, 0)]
    buffers.fill((scheduled,))
    assert tables["state_copies"].tolist() == [-1, -1]
    row.resumed = 7, 2
    assert not buffers.takes((scheduled,)), "its state is in a snapshot"
    row.resumed = 4, 2
    assert buffers.takes((scheduled,)), "it has gone on since"
    assert not buffers.takes((ScheduledRow(row, 0, 1),)), "it has no state yet"


def test_a_larger_rank_captures_anew(monkeypatch, tmp_path):
    monkeypatch.setattr(engine_module, "USUAL_MAX_RANK", 0)  # graphs on a GPU hold smaller ones
    base = base_of("llama")
    twin = dense_twin(base, "llama")
    forms = [
        load_adapter(
            write_adapter(twin, tmp_path / str(r), seed=r, r=r, target_modules=["v_proj"]),
            base.spec,
            base.weights,
        )
        for r in (4, 12)
    ]
    engine, captures = replaying_engine(base)
    for form in forms:
        engine.add_adapter(form)
        run(engine, [greedy(form.digest, [5, 6], form.digest, max_tokens=2)])
    assert captures.num_captured == captures.num_replayed == 2 and captures.num_dropped == 1


def test_the_tables_are_those_of_a_plain_step_and_the_rest_is_padding():
    buffers = StepBuffers(6, 8, 4, torch.device(DEVICE))
    full = rows_of([([1, 2, 3], 9), ([4], 2), ([5, 6], 8), ([9], 1), ([7], 1), ([8], 3)], [2] * 6)
    assert buffers.takes(full) and buffers.fill(full)
    rows = rows_of([([3, 9], 5), ([0], 4), ([7, 2], 8)], [3, None, 1])
    assert buffers.takes(rows) and buffers.fill(rows)
    batch = buffers.batch(6)
    plain = build_batch(ScheduledBatch(rows), 4, torch.device(DEVICE))
    for name in ("token_ids", "positions"):
        assert torch.equal(getattr(batch, name)[:3], getattr(plain, name))
    for name in ("positions", "cache_slots", "rows"):
        assert torch.equal(getattr(batch.attention, name)[:3], getattr(plain.attention, name))
    assert (batch.attention.positions[3:] == -1).all()
    assert (batch.attention.cache_slots[3:] == -1).all()
    assert torch.equal(batch.attention.block_tables[0, :2], plain.attention.block_tables[0])
    for name in ("tokens", "slots", "weights"):
        assert torch.equal(getattr(batch.adapters, name)[:2], getattr(plain.adapters, name))
    assert batch.adapters.segment_starts.tolist() == [0, 1, 2, 2, 2, 2, 2]
    assert buffers.batch(4).adapters.segment_starts.tolist() == [0, 1, 2, 2, 2]
    assert buffers.batch(0).adapters is None
    assert not buffers.fill(rows_of([([3], 1)], [None]))


@pytest.mark.parametrize("num_rows", [1, 2, 3, 7])
def test_tables_lie_where_one_compiled_kernel_serves_any_number_of_rows(num_rows):
    batch = StepBuffers(num_rows, 8, 4, torch.device(DEVICE)).batch(num_rows)
    tables = (batch.token_ids, batch.positions, *vars_of(batch.adapters), *vars_of(batch.attention))
    places = [table.data_ptr() for table in tables if isinstance(table, torch.Tensor)]
    assert len(places) == 11 and not any(place % 16 for place in places)


def vars_of(table):
    return [getattr(table, field.name) for field in fields(table)]


def test_blocks_of_all_rows_go_over_in_one_copy(monkeypatch):
    """Two rows have got blocks, then the first one ends and the others move up."""
    copies, real = [], step_buffers._staged
    monkeypatch.setattr(
        step_buffers,
        "_staged",
        lambda source, target: copies.append(source) or real(source, target),
    )
    buffers = StepBuffers(3, 8, 4, torch.device(DEVICE))
    rows = rows_of([([3, 9], 5), ([7, 2, 6], 9), ([8], 2)], [None] * 3)
    for step, num_places in ((rows, 6), (rows, 0), (rows[1:], 4), (rows[1:], 0)):
        copies.clear()
        buffers.fill(step)
        assert [copy.shape for copy in copies[:-1]] == ([(2, num_places)] if num_places else [])
        tables = buffers.batch(0).attention.block_tables.tolist()
        for table, scheduled in zip(tables, step, strict=False):
            own = scheduled.row.block_table
            assert table[: len(own)] == own


def test_a_table_follows_its_row_as_it_grows_moves_and_is_preempted():
    buffers = StepBuffers(2, 8, 4, torch.device(DEVICE))
    first, second = rows_of([([3, 9], 5), ([7, 2, 6], 9)], [None, None])

    def tables(*rows):
        buffers.fill(rows)
        return buffers.batch(0).attention.block_tables.tolist()

    assert [table[:3] for table in tables(first, second)] == [[3, 9, 0], [7, 2, 6]]
    first.row.block_table.append(5)
    assert [table[:3] for table in tables(first, second)] == [[3, 9, 5], [7, 2, 6]]
    assert tables(second)[0][:3] == [7, 2, 6]
    first.row.block_table, first.row.num_preemptions = [1, 4], 1
    assert [table[:2] for table in tables(first, second)] == [[1, 4], [7, 2]]
    second.row.block_table, second.row.num_preemptions = [8, 8, 8], 1
    assert [table[:2] for table in tables(first, second)] == [[1, 4], [8, 8]]


def test_what_is_no_plain_decode_step_is_left_to_the_eager_way():
    buffers = StepBuffers(2, 8, 4, torch.device(DEVICE))
    scheduled = rows_of([([3, 4], 6)], [1])[0]
    assert buffers.takes((scheduled, scheduled))
    assert not buffers.takes((scheduled,) * 3), "too many rows"
    assert not buffers.takes((ScheduledRow(scheduled.row, 3, 3),)), "a chunk of a prompt"
    assert not buffers.takes((ScheduledRow(scheduled.row, 3, 1, False),)), "nothing is sampled"
    scheduled.row.slots = (1, 2, 3)
    assert not buffers.takes((scheduled,)), "more entries than rows"
    scheduled.row.slots, scheduled.row.layer_map = (1,), (0, 0, 1)
    assert not buffers.takes((scheduled,)), "layers in another order"


class NoHostReads(TorchDispatchMode):
    """Fails where an operation needs a value, or a number of values, on the host."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func._schema.name not in READS_THE_HOST, func
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("shape", ["llama", "gemma2", "phi3-longrope", *HYBRIDS])
def test_a_forward_reads_nothing_on_the_host(shape, tmp_path):
    base = base_of(shape)
    twin = dense_twin(base, shape)
    name = "q_proj" if shape in HYBRIDS else "down_proj"
    adapter = write_adapter(twin, tmp_path, seed=1, target_modules=[name])
    engine, _ = replaying_engine(base)
    form = load_adapter(adapter, base.spec, base.weights)
    engine.add_adapter(form)
    run(engine, [greedy("1", [5, 6], form.digest, max_tokens=1)])
    buffers = StepBuffers(2, 8, 4, torch.device(DEVICE), engine.runner.states)
    buffers.fill(rows_of([([3, 4], 6)], [0]))
    with torch.inference_mode(), NoHostReads():
        logits = engine.runner.forward(buffers.batch(2))
    assert logits.shape == (2, base.spec.vocab_size)


def test_a_warm_up_changes_nothing(monkeypatch, tmp_path):
    """It runs prompts with an adapter in an empty slot, of the vocabulary too, and captures."""
    monkeypatch.setattr(model_runner, "WARM_TOKENS", (3,))
    base = base_of("llama")
    adapter = write_adapter(
        dense_twin(base, "llama"), tmp_path, seed=1, target_modules=["v_proj", "up_proj"]
    )
    form = load_adapter(adapter, base.spec, base.weights)
    tokens, launched = [], Counter()
    for name in ("embed_adapters", "patch_logits", "apply_gated_adapters"):
        real = getattr(gpu, name)
        monkeypatch.setattr(
            gpu, name, lambda *a, name=name, real=real: launched.update([name]) or real(*a)
        )
    for is_warm in (False, True):
        engine, captures = replaying_engine(base)
        engine.add_adapter(form)
        if is_warm:
            engine.runner.warm_up(lambda _: None)
            assert captures.num_captured == 4 + 5 and captures.num_replayed == 0
            assert launched.keys() == {"embed_adapters", "patch_logits", "apply_gated_adapters"}
        traces = run(engine, [greedy("1", [5, 6], form.digest, 2), greedy("2", [9], None, 2)])
        tokens.append([trace.token_ids for trace in traces.values()])
        logits = [
            scheduled.isfinite().all() for trace in traces.values() for scheduled in trace.logits
        ]
        assert all(logits)
    assert tokens[0] == tokens[1]


def test_buckets_hold_what_runs_at_once():
    assert buckets(1) == (1,) and buckets(3) == (1, 2, 3) and buckets(33)[-2:] == (32, 33)
    for most in (1, 7, 64, 255, 256, 257, 300, 1000):
        found = buckets(most)
        assert found[-1] == min(most, 256) and list(found) == sorted(set(found))

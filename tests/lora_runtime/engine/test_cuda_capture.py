"""Graphs on stand-ins for CUDA that go wrong as torch does: on the second device, on ever new
streams, in a pool that has lost its graphs."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest
import torch

from lora_runtime.config import BaseConfig, EngineConfig
from lora_runtime.core import ScheduledBatch
from lora_runtime.engine import engine as engine_module
from lora_runtime.engine import loop
from lora_runtime.engine.decode_graphs import CudaCapture, DecodeGraphs, segment_bounds
from lora_runtime.engine.step_buffers import StepBuffers
from tests.lora_runtime.engine.fake_cuda import fake_cuda
from tests.lora_runtime.engine.mixed_batch import rows_of

VOCAB = 3


@pytest.fixture
def cuda(monkeypatch):
    found = fake_cuda()
    found.install(monkeypatch)
    return found


class Model:
    """A forward of one kernel on `device`: of row r its token and how many adapters may act."""

    def __init__(self, cuda, device):
        self.cuda, self.device, self.bounds = cuda, device, []

    def __call__(self, batch):
        meta = batch.adapters
        bound = 0 if meta is None else len(meta.segment_starts) - 1
        logits = torch.zeros(len(batch.token_ids), VOCAB)

        def kernel():
            self.bounds.append(bound)
            logits[:, 0], logits[:, 1] = batch.token_ids, bound

        self.cuda.launch(kernel, self.device)
        return logits, logits


class Graphs(DecodeGraphs):
    """Its own copies of the outputs, both the logits here, are kernels of the same device, too."""

    def __init__(self, cuda, device, sizes=(2, 6)):
        self.model = Model(cuda, device)
        buffers = tuple(StepBuffers(size, 8, 4, torch.device("cpu")) for size in sizes)
        logits, best = (
            Launched(torch.full((sizes[-1], VOCAB), -1.0), cuda, device) for _ in range(2)
        )
        capture = CudaCapture(torch.device(device))
        super().__init__(self.model, buffers, capture, (logits, best))

    def step(self, slots, layout="a"):
        plan = ScheduledBatch(rows_of([([1, 2], 5)] * len(slots), slots))
        logits, best = self.run(plan, layout)
        assert logits.tolist() == best.tolist()
        return logits.tolist()


class Launched:
    """A tensor whose copies are kernels."""

    def __init__(self, tensor, cuda, device):
        self.tensor, self.cuda, self.device = tensor, cuda, device

    def __getitem__(self, rows):
        return Launched(self.tensor[rows], self.cuda, self.device)

    def copy_(self, source):
        self.cuda.launch(lambda: self.tensor.copy_(source), self.device)

    def tolist(self):
        return self.tensor.tolist()


@pytest.mark.parametrize("device", ["cuda:0", "cuda:1"])
def test_a_replay_runs_the_step_on_any_device(cuda, device):
    """The thread's own device is 0. What the table holds at the replay counts."""
    table, seen = [1], []
    capture = CudaCapture(torch.device(device))
    replay = capture(lambda: cuda.launch(lambda: seen.append(table[0]), device))
    assert seen == [1], "once outside, and not while it is captured"
    table[0] = 5
    replay()
    replay()
    assert seen == [1, 5, 5] and cuda.device_index == 0


def test_all_captures_share_one_stream(cuda):
    graphs = Graphs(cuda, "cuda:1", sizes=(1, 2, 4, 6))
    graphs.warm_up("a", lambda _: None)
    assert len(graphs._captured) == 4 + sum(len(segment_bounds(n)) for n in (1, 2, 4, 6))
    assert len(cuda.shared["workspaces"]) == 1
    graphs.step([None])
    assert len(cuda.shared["workspaces"]) == 1 and len(graphs.model.bounds) == 9 + 1


@pytest.mark.parametrize("has_base_graph", [False, True])
def test_another_layout_drops_graphs_that_are_not_running_and_captures_anew(cuda, has_base_graph):
    """Without a graph of the base alone all are dropped, and their pool with them."""
    graphs = Graphs(cuda, "cuda:1")
    if has_base_graph:
        graphs.step([None, None])
    assert graphs.step([3, 3])[0][1] == 2
    assert graphs.step([3, 3, 4])[0][1] == 4
    before = set(cuda.shared["pools"])
    for layout in ("b", "c"):
        assert graphs.step([3, 3], layout)[0][1] == 2
    assert len(before) == 1 and (set(cuda.shared["pools"]) == before) == has_base_graph
    live = sum(cuda.shared["pools"].values())
    assert live == len(graphs._captured) == 1 + has_base_graph


def test_a_step_takes_the_graph_of_the_next_number_of_adapters(cuda):
    graphs = Graphs(cuda, "cuda:0", sizes=(2, 6, 20))
    cases = {(None,): 0, (1,): 2, (1, 2): 2, (1, 2, 3): 4, (1, 1, 1, 2, None): 4}
    cases |= {(1, 2, 3, 4, 5): 6, (*range(8), 8): 16, (*range(16), 1): 16, tuple(range(17)): 20}
    for slots, bound in cases.items():
        found = graphs.step(list(slots))
        assert [row[:2] for row in found] == [[44, bound]] * len(slots), slots
    assert segment_bounds(256) == (4, 16, 64, 256) and segment_bounds(4) == (4,)


class Engine:
    """Stands for an engine on the second device; notes the device that is current."""

    info = SimpleNamespace(num_blocks=1, block_size=1, kernel_backend="triton")

    def __init__(self, cuda):
        self.base = SimpleNamespace(device=torch.device("cuda:1"), folder=None)
        self.cuda, self.seen, self.is_idle = cuda, [], True
        self.note("start")
        self.runner = SimpleNamespace(warm_up=lambda say: self.note("warm-up"))

    def note(self, what):
        self.seen.append((what, self.cuda.device_index))

    def stats(self):
        return None

    def take_outputs(self):
        return []

    def collect(self):
        self.note("step")

    def abort_all(self, error):
        return []


def test_the_engine_is_started_and_run_on_its_own_device(cuda, monkeypatch):
    spec = SimpleNamespace(state_bytes=0, dtype="bfloat16")
    base = SimpleNamespace(device=torch.device("cuda:1"), spec=spec, nbytes=0)
    monkeypatch.setattr(engine_module, "resolve_base", lambda *_, **__: SimpleNamespace(folder=""))
    monkeypatch.setattr(engine_module, "outline", lambda *_: spec)
    monkeypatch.setattr(engine_module, "check_states", lambda *_: None)
    monkeypatch.setattr(engine_module, "load_base", lambda config, say, found: base)
    monkeypatch.setattr(engine_module, "Engine", lambda base, config: Engine(cuda))
    engine = loop.start_engine(EngineConfig(base=BaseConfig(device="cpu", dtype="float32")))
    asyncio.run(engine.close(drain_s=0))
    seen = set(engine._engine.seen)
    assert seen == {("start", 1), ("warm-up", 1), ("step", 1)} and cuda.device_index == 0

"""Stands for the part of torch.cuda that capturing graphs depends on, in Python alone.

Each stand-in does what torch does where a graph comes out wrong without an error:

- Every thread begins on device 0, and every device has a current stream of its own in every thread
  (c10/cuda/CUDAFunctions.cpp, c10/cuda/CUDAStream.cpp).
- `Stream(device)` without a device is one of the current device (torch/cuda/streams.py); making a
  stream current makes its device current too (torch/csrc/cuda/Module.cpp, THCPModule_setStream).
- A kernel goes to the current stream of the device that its tensors are on. Only what goes to the
  capturing stream is captured and not run; anything else runs at once, and a replay knows nothing
  of it (aten/src/ATen/cuda/CUDAGraph.cpp, capture_begin, replay).
- `graph` without a stream captures on one that was made on the device that was current when the
  first graph of the process was captured (torch/cuda/graphs.py, graph.__init__).
- A memory pool counts its graphs; one whose last graph is gone may not be captured into again
  (c10/cuda/CUDACachingAllocator.cpp, create_or_incref_pool asserts use_count > 0).
- Libraries keep a workspace for every stream that they have run on
  (aten/src/ATen/cuda/CublasHandlePool.cpp).

Stricter than torch: a graph that may still be running is not to be freed.
"""

from __future__ import annotations

import itertools
import threading
from collections import Counter
from contextlib import contextmanager

import torch


class FakeCuda(threading.local):
    """Some devices. `install` puts it in the place of torch.cuda's functions."""

    shared: dict

    def __init__(self, shared: dict) -> None:
        """Runs again in every thread; what threads share is in `shared`."""
        self.shared, self.device_index, self.streams = shared, 0, {}
        self.capturing: FakeGraph | None = None

    def install(self, monkeypatch) -> None:
        for name in ("current_stream", "device", "stream", "synchronize"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))
        monkeypatch.setattr(torch.cuda, "Stream", lambda device=None: FakeStream(self, device))
        monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: FakeGraph(self))
        monkeypatch.setattr(torch.cuda, "graph", self.graph)
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: next(self.shared["handles"]))

    def index(self, device) -> int:
        index = None if device is None else torch.device(device).index
        return self.device_index if index is None else index

    def current_stream(self, device=None):
        index = self.index(device)
        default = self.shared["defaults"].setdefault(index, FakeStream(self, f"cuda:{index}"))
        return self.streams.get(index, default)

    @contextmanager
    def device(self, device):
        before, self.device_index = self.device_index, self.index(device)
        yield
        self.device_index = before

    @contextmanager
    def stream(self, stream):
        before, streams = self.device_index, dict(self.streams)
        self.device_index, self.streams[stream.index] = stream.index, stream
        yield
        self.device_index, self.streams = before, streams

    def synchronize(self, device=None) -> None:
        index = self.index(device)
        running = self.shared["running"]
        running -= {graph for graph in running if graph.index == index}

    def launch(self, kernel, device) -> None:
        """Run a library's kernel on tensors of `device`, or capture it."""
        stream = self.current_stream(device)
        self.shared["workspaces"].add(stream)
        if self.capturing is not None and self.capturing.stream is stream:
            self.capturing.kernels.append(kernel)
        else:
            kernel()

    @contextmanager
    def graph(self, graph, pool=None, stream=None, capture_error_mode="global"):
        if stream is None:
            stream = self.shared.setdefault("capture stream", FakeStream(self, None))
        uses = self.shared["pools"]
        assert pool not in uses or uses[pool] > 0, "INTERNAL ASSERT FAILED: use_count > 0"
        uses[pool] += 1
        graph.stream, graph.pool, graph.index = stream, pool, stream.index
        with self.stream(stream):
            self.capturing = graph
            yield
            self.capturing = None


class FakeStream:
    def __init__(self, cuda: FakeCuda, device) -> None:
        self.index = cuda.index(device)

    def wait_stream(self, other) -> None:
        """Everything runs in order here."""


class FakeGraph:
    def __init__(self, cuda: FakeCuda) -> None:
        self.cuda, self.kernels = cuda, []

    def replay(self) -> None:
        self.cuda.shared["running"].add(self)
        for kernel in self.kernels:
            kernel()

    def reset(self) -> None:
        assert self not in self.cuda.shared["running"], "freed while it may be running"
        self.cuda.shared["pools"][self.pool] -= 1


def fake_cuda() -> FakeCuda:
    return FakeCuda(
        dict(
            handles=itertools.count(), defaults={}, pools=Counter(), running=set(), workspaces=set()
        )
    )

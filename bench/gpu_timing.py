"""Seconds of short GPU calls, and the ceilings they are held against.

Calls are timed inside CUDA graphs, each on another copy of its weights, so that neither launches
from Python nor the cache flatter anything. Without a GPU the same code runs by the clock: a dry
run, whose figures mean nothing.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

HAS_GPU = torch.cuda.is_available()
IS_INTERPRETED = not HAS_GPU and os.environ.get("TRITON_INTERPRET") == "1"
if IS_INTERPRETED:
    import tests.lora_runtime.kernels.on_triton  # noqa: F401  mends the interpreter
DEVICE = torch.device("cuda" if HAS_GPU else "cpu")
ROTATED_BYTES = (512 << 20) if HAS_GPU else 1
"""Copies of a weight come to at least as much together; the second-level cache is 50 MB."""
REPLAYS = 20 if HAS_GPU else 1


@dataclass(frozen=True)
class Ceilings:
    """What this device reaches on the simplest work, measured in the same run."""

    read_bytes_per_s: float
    copy_bytes_per_s: float
    multiply_adds_per_s: float

    @classmethod
    def measured(cls) -> Ceilings:
        return cls(read_bandwidth(), copy_bandwidth(), gemm_rate())

    def read_seconds(self, num_bytes: float) -> float:
        return num_bytes / self.read_bytes_per_s

    def copy_seconds(self, num_bytes: float) -> float:
        """`num_bytes`: what is read and what is written."""
        return num_bytes / self.copy_bytes_per_s


def copies_of(num_bytes: int) -> int:
    """How many copies of so many bytes to rotate over."""
    return max(2, -(-ROTATED_BYTES // max(num_bytes, 1))) if num_bytes < ROTATED_BYTES else 2


def seconds_per_call(call: Callable[[int], object], num_calls: int) -> float:
    """Median time of one of call(0) … call(num_calls − 1), replayed as one graph."""
    call(0)
    replay = _captured(call, num_calls) if HAS_GPU else lambda: _all(call, num_calls)
    return statistics.median(timed(replay) for _ in range(REPLAYS)) / num_calls


def timed(action: Callable[[], object]) -> float:
    """Seconds until what `action` started has ended on the device."""
    if not HAS_GPU:
        start = time.perf_counter()
        action()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    action()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1000


def _all(call: Callable[[int], object], num_calls: int) -> None:
    for index in range(num_calls):
        call(index)


def _captured(call: Callable[[int], object], num_calls: int) -> Callable[[], None]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call(0)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        _all(call, num_calls)
    graph.replay()
    return graph.replay


def read_bandwidth() -> float:
    """Bytes a second that a sum over 4 GB reads: the ceiling of every step that reads weights."""
    values = torch.ones((1 << 30) if HAS_GPU else 1 << 16, device=DEVICE)
    return values.nbytes / seconds_per_call(lambda _: values.sum(), 2)


def copy_bandwidth() -> float:
    """Bytes a second read and written by a copy of 2 GB."""
    source = torch.ones((1 << 30) if HAS_GPU else 1 << 16, dtype=torch.bfloat16, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * source.nbytes / seconds_per_call(lambda _: target.copy_(source), 2)


def gemm_rate() -> float:
    """Multiply-adds a second of a large bfloat16 product."""
    size = 8192 if HAS_GPU else 64
    a, b = (torch.randn(size, size, device=DEVICE).bfloat16() for _ in range(2))
    return size**3 / seconds_per_call(lambda _: a @ b, 2)

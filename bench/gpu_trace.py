"""Where a step's time goes: on the device by a profiler, on the host by the clock."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from bench.gpu_timing import HAS_GPU
from lora_runtime.engine.engine import Engine

NUM_STEPS = 20 if HAS_GPU else 2
NUM_SHOWN = 12


def device_kernels(step: Callable[[], object], path: Path) -> dict[str, object]:
    """Kernels of NUM_STEPS steps: launches a step, µs a step in all, and the longest by name. The
    whole trace goes to `path` (.json.gz), for chrome://tracing or Perfetto.
    """
    activity = ProfilerActivity.CUDA if HAS_GPU else ProfilerActivity.CPU
    step()
    with profile(activities=[activity]) as found:
        for _ in range(NUM_STEPS):
            step()
        if HAS_GPU:
            torch.cuda.synchronize()
    path.parent.mkdir(parents=True, exist_ok=True)
    found.export_chrome_trace(str(path))
    times: dict[str, float] = {}
    num_launches = 0
    for event in found.key_averages():
        microseconds = event.self_device_time_total if HAS_GPU else event.self_cpu_time_total
        times[event.key] = microseconds / NUM_STEPS
        num_launches += event.count
    longest = sorted(times, key=times.__getitem__, reverse=True)[:NUM_SHOWN]
    return {
        "launches": num_launches / NUM_STEPS,
        "device_us": sum(times.values()),
        "kernels_us": {name[:60]: round(times[name], 1) for name in longest},
        "trace": path.name,
    }


HOST_PARTS = {
    "schedule": lambda engine: (engine.scheduler, "schedule"),
    "start": lambda engine: (engine.runner, "start"),
    "commit": lambda engine: (engine.scheduler, "commit"),
}
"""Part of a step → the object and method that do it."""


def host_microseconds(engine: Engine, step: Callable[[], object]) -> dict[str, float]:
    """Median µs of the host in each part of an engine step, and in the step as a whole.

    `step` must call `engine.step()` once.
    """
    seconds: dict[str, list[float]] = defaultdict(list)

    def timed(name: str, function: Callable) -> Callable:
        def call(*args: object, **kwargs: object) -> object:
            start = time.perf_counter_ns()
            try:
                return function(*args, **kwargs)
            finally:
                seconds[name].append((time.perf_counter_ns() - start) / 1000)

        return call

    places = [(name, *find(engine)) for name, find in HOST_PARTS.items()]
    for name, owner, method in places:
        setattr(owner, method, timed(name, getattr(owner, method)))
    try:
        whole = timed("whole", step)
        for _ in range(NUM_STEPS):
            whole()
    finally:
        for _, owner, method in places:
            delattr(owner, method)  # the class's own is under it
    return {f"{name}_us": statistics.median(found) for name, found in seconds.items()}

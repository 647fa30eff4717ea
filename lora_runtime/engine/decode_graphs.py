"""Decode steps as CUDA graphs: the launches of a whole forward are replayed in one call.

A graph is captured for every bucket of rows: one for the base alone, and a few by how many
different adapters the step may hold, because a launch has a program for every tile that so many
could need. What changes from step to step (tokens, cache blocks, which adapters of which ranks act
on which rows) is read from tables at fixed addresses, so one graph serves any mix. It holds as long
as the pool's layout does: which modules have adapters at all, and the largest rank.
Tests run the same tables and kernels without capturing, and capture on stand-ins for CUDA.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Protocol

import torch
from torch import Tensor

from lora_runtime.core import ScheduledBatch
from lora_runtime.engine.batch import ForwardBatch, Rows
from lora_runtime.engine.step_buffers import StepBuffers
from lora_runtime.kernels.tape import Unrecordable

BUCKETS = (1, 2, 4, 8, 12, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256)
"""Rows that a graph is captured for; a step takes the smallest that holds it."""

MAX_SEGMENTS = (4, 16, 64)
"""Different adapters that a graph is captured for, below its number of rows. One for one adapter
alone would save a few empty programs of the one for four, which end at once."""

Outputs = tuple[Tensor, Tensor]
"""Logits (n, vocab) of the rows, and what `kernels.most_likely` makes of them (n, 2)."""
Replay = Callable[[], object]
"""Runs again what was captured."""


class Capture(Protocol):
    """Makes functions that a device repeats on its own."""

    def __call__(self, run: Callable[[], object]) -> Replay:
        """Capture what `run` does on the device. Raises Unrecordable where it cannot."""
        ...

    def drop(self, replays: Iterable[Replay]) -> None:
        """Free what was captured: none of these is called again."""
        ...


def buckets(max_num_seqs: int) -> tuple[int, ...]:
    """The numbers of rows to capture, ascending; the last holds `max_num_seqs`, up to 256."""
    largest = min(max_num_seqs, BUCKETS[-1])
    return (*(size for size in BUCKETS if size < largest), largest)


def segment_bounds(num_rows: int) -> tuple[int, ...]:
    """The numbers of different adapters to capture a bucket for, ascending; the last is all."""
    return (*(bound for bound in MAX_SEGMENTS if bound < num_rows), num_rows)


class DecodeGraphs:
    """Replays a step where a graph fits it; captures the graph when it is wanted first."""

    def __init__(
        self,
        forward: Callable[[ForwardBatch], Outputs],
        buffers: tuple[StepBuffers, ...],
        capture: Capture,
        outputs: Outputs | None = None,
    ) -> None:
        """`buffers`: one a bucket, ascending. `outputs`: room for those of the largest bucket,
        where every graph leaves its own; None: each keeps the memory of its own.
        """
        self._forward, self._buffers, self._capture = forward, buffers, capture
        self._outputs = outputs
        self._captured: dict[tuple[int, int], tuple[Replay, list[Outputs]] | None] = {}
        """By rows and different adapters, 0 for the base alone: what plays it, and where it leaves
        its outputs. None: it cannot be captured."""
        self._layout: object = None

    def run(self, plan: ScheduledBatch, layout: object) -> Outputs | None:
        """Run a step: outputs of its rows in order, or None when it fits no graph.

        `layout` of the adapter pool: graphs with adapters that were captured under another are
        dropped. The result is overwritten by the next step.
        """
        rows = plan.rows
        buffers = next((b for b in self._buffers if b.takes(rows)), None)
        if buffers is None:
            return None
        num_segments = buffers.fill(rows)
        if num_segments > 0 and layout != self._layout:
            self._drop_adapted()
            self._layout = layout
        bounds = (0, *segment_bounds(buffers.num_rows))
        bound = next(bound for bound in bounds if num_segments <= bound)
        found = self._graph(buffers, bound, rows)
        if found is None:
            return None
        replay, outputs = found
        replay()
        logits, best = outputs[0]
        return logits[: len(rows)], best[: len(rows)]

    def warm_up(self, layout: object, on_progress: Callable[[str], None]) -> None:
        """Capture all graphs now; the largest first, whose memory the others then share."""
        self._layout = layout
        todo = [
            (buffers, bound)
            for buffers in reversed(self._buffers)
            for bound in (*reversed(segment_bounds(buffers.num_rows)), 0)
        ]
        for done, (buffers, bound) in enumerate(todo, 1):
            self._graph(buffers, bound, ())
            on_progress(f"capturing decode graphs {done}/{len(todo)}")

    def _graph(
        self, buffers: StepBuffers, max_segments: int, rows: Rows
    ) -> tuple[Replay, list[Outputs]] | None:
        """The graph, captured if there is none yet; `rows` are what the buffers hold."""
        key = (buffers.num_rows, max_segments)
        if key not in self._captured:
            found: list[Outputs] = []

            def run() -> None:
                outputs = self._forward(buffers.batch(max_segments))
                found[:] = [outputs if self._outputs is None else self._kept(outputs)]

            # What is captured runs once outside: of a step, recurrent states would move twice.
            buffers.fill(())
            try:
                self._captured[key] = self._capture(run), found
            except Unrecordable:
                self._captured[key] = None
            buffers.fill(rows)
        return self._captured[key]

    def _kept(self, outputs: Outputs) -> Outputs:
        """Copy outputs to where those of all graphs lie."""
        assert self._outputs is not None
        logits, best = (
            room[: len(part)] for room, part in zip(self._outputs, outputs, strict=True)
        )
        logits.copy_(outputs[0])
        best.copy_(outputs[1])
        return logits, best

    def _drop_adapted(self) -> None:
        keys = [key for key in self._captured if key[1] > 0]
        dropped = [self._captured.pop(key) for key in keys]
        self._capture.drop([graph[0] for graph in dropped if graph is not None])


class CudaCapture:
    """Captures graphs that share one memory pool: only one of them runs at a time.

    All are captured on one stream: libraries keep a workspace for every stream they have seen.
    Other threads, which may be packing adapters, are free to use CUDA meanwhile.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._stream = device, torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()
        self._graphs: dict[Replay, torch.cuda.CUDAGraph] = {}

    def __call__(self, run: Callable[[], object]) -> Replay:
        """Run once outside, where kernels are compiled and libraries set up, then capture."""
        with torch.cuda.device(self._device):
            current = torch.cuda.current_stream(self._device)
            self._stream.wait_stream(current)
            with torch.cuda.stream(self._stream):
                run()
            current.wait_stream(self._stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(
                graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
            ):
                run()
        self._graphs[graph.replay] = graph
        return graph.replay

    def drop(self, replays: Iterable[Replay]) -> None:
        """Free graphs when the device is done with them. Without any left their pool ends: torch
        asserts that a pool which is captured into again is still some graph's.
        """
        torch.cuda.synchronize(self._device)
        for replay in replays:
            self._graphs.pop(replay).reset()
        if not self._graphs:
            self._pool = torch.cuda.graph_pool_handle()

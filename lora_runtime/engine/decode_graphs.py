"""Decode steps as CUDA graphs: the launches of a whole forward are replayed in one call.

A graph is captured for every bucket of rows, with adapters and for the base alone. What changes
from step to step (tokens, cache blocks, which adapters of which ranks act on which rows) is read
from tables at fixed addresses, so one graph serves any mix. It holds as long as the pool's layout
does: which modules have adapters at all, and the largest rank.
Unmeasured on a GPU; tests run the same tables and kernels without capturing.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import torch
from torch import Tensor

from lora_runtime.core import ScheduledBatch
from lora_runtime.engine.batch import ForwardBatch
from lora_runtime.engine.step_buffers import StepBuffers

BUCKETS = (1, 2, 4, 8, 12, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256)
"""Rows that a graph is captured for; a step takes the smallest that holds it."""

Outputs = tuple[Tensor, Tensor]
"""Logits (n, vocab) of the rows, and what `sampler.greedy` makes of them (n, 2)."""
Replay = Callable[[], Outputs]
Capture = Callable[[Callable[[], Outputs]], Replay]


def buckets(max_num_seqs: int) -> tuple[int, ...]:
    """The numbers of rows to capture, ascending; the last holds `max_num_seqs`, up to 256."""
    below = tuple(size for size in BUCKETS if size < max_num_seqs)
    return (*below, min(max_num_seqs, BUCKETS[-1]))


class DecodeGraphs:
    """Replays a step where a graph fits it; captures the graph when it is wanted first."""

    def __init__(
        self,
        forward: Callable[[ForwardBatch], Outputs],
        buffers: tuple[StepBuffers, ...],
        capture: Capture,
    ) -> None:
        """`forward`: a batch → Outputs. `buffers`: one a bucket, ascending."""
        self._forward, self._buffers, self._capture = forward, buffers, capture
        self._replays: dict[tuple[int, bool], Replay] = {}
        self._layout: object = None

    def run(self, plan: ScheduledBatch, layout: object) -> Outputs | None:
        """Run a step: outputs of its rows in order, or None when it fits no graph.

        `layout` of the adapter pool: graphs with adapters that were captured under another are
        dropped. The result is overwritten by the next step.
        """
        rows = plan.sequences
        buffers = next((b for b in self._buffers if b.takes(rows)), None)
        if buffers is None:
            return None
        has_adapters = buffers.fill(rows)
        if has_adapters and layout != self._layout:
            self._replays = {key: r for key, r in self._replays.items() if not key[1]}
            self._layout = layout
        logits, best = self._replay(buffers, has_adapters)()
        return logits[: len(rows)], best[: len(rows)]

    def warm_up(self, layout: object, on_progress: Callable[[str], None]) -> None:
        """Capture all graphs now; the largest first, whose memory the others then share."""
        self._layout = layout
        todo = list(product(reversed(self._buffers), (True, False)))
        for done, (buffers, has_adapters) in enumerate(todo, 1):
            self._replay(buffers, has_adapters)
            on_progress(f"capturing decode graphs {done}/{len(todo)}")

    def _replay(self, buffers: StepBuffers, has_adapters: bool) -> Replay:
        key = (buffers.num_rows, has_adapters)
        if key not in self._replays:
            self._replays[key] = self._capture(
                lambda: self._forward(buffers.batch(has_adapters=has_adapters))
            )
        return self._replays[key]


class CudaCapture:
    """Captures graphs that share one memory pool: only one of them runs at a time.

    Other threads, which may be packing adapters, are free to use CUDA meanwhile.
    """

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, run: Callable[[], Outputs]) -> Replay:
        """Run once outside, where kernels are compiled and libraries set up, then capture."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            outputs = run()

        def replay() -> Outputs:
            graph.replay()
            return outputs

        return replay

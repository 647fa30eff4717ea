"""One token of recurrent layers: right against float64, then beside the states it must move."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.gpu_kernels import BFLOAT16, error
from bench.gpu_rows import Case, Figures, Table
from bench.gpu_timing import DEVICE, HAS_GPU, Ceilings, copies_of, seconds_per_call
from lora_runtime import kernels

CHECKED_ROWS = (1, 3, 17) if HAS_GPU else (1, 3)
TIMED_ROWS = (1, 8, 32, 64) if HAS_GPU else (3,)


class Layer(NamedTuple):
    """Heads of keys, heads, numbers of a key and of a value, whether there is a β; channels and
    taps of the convolution.
    """

    key_heads: int
    heads: int
    keys: int
    values: int
    has_beta: bool
    channels: int
    taps: int


LAYERS = (
    {
        "qwen3.5-9b": Layer(16, 32, 128, 128, True, 8192, 4),
        "granite-4-h-micro": Layer(1, 64, 128, 64, False, 4352, 4),
        "falcon-h1-7b": Layer(1, 24, 256, 128, False, 3584, 4),
    }
    if HAS_GPU
    else {"small": Layer(1, 2, 16, 8, True, 40, 3)}
)
ODD_LAYERS = {True: Layer(3, 9, 72, 80, True, 1296, 4), False: Layer(1, 3, 40, 24, False, 130, 3)}
"""No power of two on any side, with a β and without."""


def recurrence_in_torch(
    states: Tensor, slots: Tensor, q: Tensor, k: Tensor, v: Tensor, keep: Tensor,
    beta: Tensor | None,
) -> Tensor:  # fmt: skip
    """`kernels.recurrent_step` as torch's own operations do it in a graph: every row has a slot."""
    share = v.shape[1] // q.shape[1]
    q, k = (part.repeat_interleave(share, dim=1)[:, :, None] for part in (q, k))
    state, v = states.index_select(0, slots) * keep[..., None, None], v[:, :, None]
    if beta is not None:
        v = (v - k @ state) * beta[..., None, None]
    state += k.mT * v
    states.index_copy_(0, slots, state)
    return (q @ state)[:, :, 0]


def convolution_in_torch(
    histories: Tensor, slots: Tensor, x: Tensor, weight: Tensor, bias: Tensor, *, is_silu: bool
) -> Tensor:
    """`kernels.conv_step`, likewise."""
    inputs = torch.cat([histories.index_select(0, slots), x.to(histories.dtype)[:, None]], dim=1)
    histories.index_copy_(0, slots, inputs[:, 1:])
    y = (inputs * weight.T).sum(1) + bias
    return (F.silu(y) if is_silu else y).to(x.dtype)


OPS: dict[str, dict[str, Callable[..., Tensor]]] = {
    "recurrent": {"triton": kernels.recurrent_step, "torch": recurrence_in_torch},
    "convolution": {"triton": kernels.conv_step, "torch": convolution_in_torch},
}
"""What a layer does with a token, by candidate."""


class Step(NamedTuple):
    """What an op is given: its memory, which it changes in place, and the rest."""

    memory: Tensor
    rest: tuple[Any, ...]
    options: dict[str, Any]
    num_bytes: int
    """What it must move: of every row its memory once in and once out, and what it is given."""

    def run(self, op: Callable[..., Tensor]) -> Tensor:
        return op(self.memory, *self.rest, **self.options)

    def exact(self) -> Step:
        """The same in float64."""
        wide = [part.double() if _is_number(part) else part for part in self.rest]
        return self._replace(memory=self.memory.double(), rest=tuple(wide))


def _is_number(part: object) -> bool:
    return isinstance(part, Tensor) and part.is_floating_point()


def step_of(what: str, layer: Layer, rows: int, dtype: torch.dtype) -> Step:
    """`rows` rows, each with a slot of its own among twice as many. States are float32 whatever
    the dtype, and so is all that a recurrence is given.
    """
    slots = torch.randperm(2 * rows, device=DEVICE)[:rows]
    if what == "convolution":
        memory = torch.randn(2 * rows, layer.taps - 1, layer.channels, device=DEVICE)
        x = torch.randn(rows, layer.channels, device=DEVICE).to(dtype)
        weight = torch.randn(layer.channels, layer.taps, device=DEVICE).to(dtype)
        bias = torch.randn(layer.channels, device=DEVICE).to(dtype)
        moved = 2 * x.nbytes + weight.nbytes + bias.nbytes + memory.nbytes
        return Step(memory, (slots, x, weight, bias), {"is_silu": True}, moved)
    memory = torch.randn(2 * rows, layer.heads, layer.keys, layer.values, device=DEVICE)
    q, k = torch.randn(2, rows, layer.key_heads, layer.keys, device=DEVICE) / layer.keys**0.5
    v = torch.randn(rows, layer.heads, layer.values, device=DEVICE)
    keep, beta = torch.rand(2, rows, layer.heads, device=DEVICE)
    given = (slots, q, k, v, keep, beta if layer.has_beta else None)
    moved = 2 * v.nbytes + q.nbytes + k.nbytes + 2 * keep.nbytes + memory.nbytes
    return Step(memory, given, {}, moved)


def check_cases() -> Iterator[Case]:
    for has_beta in (True, False):
        for rows in CHECKED_ROWS:
            yield {"kernel": "recurrent", "dtype": "float32", "rows": rows, "has_beta": has_beta}
    for dtype in ("bfloat16", "float32"):
        for rows in CHECKED_ROWS:
            yield {"kernel": "convolution", "dtype": dtype, "rows": rows, "has_beta": True}


def check(kernel: str, dtype: str, rows: int, has_beta: bool) -> Figures:
    """Relative error against float64, of what is given or of the memory afterwards."""
    step = step_of(kernel, ODD_LAYERS[has_beta], rows, getattr(torch, dtype))
    exact = step.exact()
    expected = exact.run(OPS[kernel]["torch"])
    y = step.run(OPS[kernel]["triton"])
    return {"error": max(error(y, expected), error(step.memory, exact.memory))}


def recurrent_table(ceilings: Ceilings) -> Table:
    """Steps of real models' layers by the kernel and by torch, beside a copy of what they move."""

    def cases() -> Iterator[Case]:
        for layer in LAYERS:
            for rows in TIMED_ROWS:
                for what in OPS:
                    for candidate in OPS[what]:
                        yield {"layer": layer, "what": what, "rows": rows, "candidate": candidate}

    def measure(layer: str, what: str, rows: int, candidate: str) -> Figures:
        op = OPS[what][candidate]
        first = step_of(what, LAYERS[layer], rows, BFLOAT16)
        others = range(min(16, copies_of(first.memory.nbytes)) - 1)
        steps = [first, *(step_of(what, LAYERS[layer], rows, BFLOAT16) for _ in others)]
        seconds = seconds_per_call(lambda i: steps[i].run(op), len(steps))
        floor = ceilings.copy_seconds(first.num_bytes)
        return {"us": seconds * 1e6, "floor_us": floor * 1e6, "over_floor": seconds / floor}

    return Table("recurrent", cases, measure)

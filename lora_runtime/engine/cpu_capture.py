"""Decode steps on a CPU without Python between their ops: what one forward calls is played again.

The counterpart of a CUDA graph. Calls of the compiled library are noted on a tape; what torch
itself computes is noted by a dispatch mode, and done again into the tensors that it gave.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lora_runtime.base.loader import Base
from lora_runtime.base.model.experts import is_mixture
from lora_runtime.base.model.fused_modules import are_fused
from lora_runtime.base.model.parts import decoder_layers
from lora_runtime.engine.decode_graphs import Replay
from lora_runtime.kernels import can_fuse, can_run_on_gpu
from lora_runtime.kernels.tape import Tape, Unrecordable, is_recording, recorded_on


def can_capture_on_cpu(base: Base) -> bool:
    """True on a CPU with the compiled library, for a base whose layers are all fused ones: what
    others call is not known to be the same at every step.
    """
    like = torch.empty(0, dtype=base.dtype, device=base.device)
    # Where Triton's interpreter stands in for the compiled library, as in tests, a tape misses it.
    is_compiled = like.is_cpu and can_fuse(like) and not can_run_on_gpu(like)
    return is_compiled and are_fused(decoder_layers(base.model), is_mixture)


VALUE_TAGS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
"""Of ops that tell Python what a tensor holds, or whose result's shape does."""
UNTAGGED = {
    torch.ops.aten.is_nonzero.default,
    torch.ops.aten.repeat_interleave.self_Tensor,
    torch.ops.aten.where.default,
}
"""Ops made of such, which have no tag themselves."""
UNFILLED = ("aten::empty", "aten::new_empty")
"""Ops that give memory and write nothing to it."""


class CpuCapture:
    """Captures functions whose every tensor is on the CPU; see `decode_graphs.Capture`."""

    def __call__(self, run: Callable[[], object]) -> Replay:
        tape = Tape()
        with _TorchOps(tape), recorded_on(tape):
            run()
        return tape.play

    def drop(self, replays: Iterable[Replay]) -> None:
        """A tape's memory goes with it."""


class _TorchOps(TorchDispatchMode):
    """Notes on a tape what torch computes."""

    def __init__(self, tape: Tape) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._tape = tape

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not is_recording():
            return func(*args, **kwargs)
        if _reads_values(func, args):
            raise Unrecordable(str(func))
        outputs = func(*args, **kwargs)
        if func._schema.is_mutable:
            self._tape.steps.append((partial(func, **kwargs), args))
            return outputs
        taken = {_memory(tensor) for tensor in _tensors((*args, *kwargs.values()))}
        fresh = [output for output in _tensors((outputs,)) if _memory(output) not in taken]
        if fresh:
            self._tape.kept += fresh
            if not func._schema.name.startswith(UNFILLED):
                self._tape.steps.append((_again, (func, args, kwargs, outputs)))
        return outputs


def _reads_values(func: Any, args: Any) -> bool:
    """True where another step's values could give other numbers to Python, or another shape."""
    if func is torch.ops.aten.index.Tensor:
        return any(index is not None and not index.dtype.is_signed for index in args[1])
    return func in UNTAGGED or not VALUE_TAGS.isdisjoint(func.tags)


def _tensors(values: Iterable[object]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _again(func: Any, args: Any, kwargs: Any, outputs: Any) -> None:
    """Compute what an op gave once more, into the same tensors."""
    new = func(*args, **kwargs)
    for output, value in zip(_tensors((outputs,)), _tensors((new,)), strict=True):
        output.copy_(value)

"""Calls of the compiled library, and tapes, on which they are noted to be made again.

A step of a batch in which the same rows go on makes the same calls as the last one, on the same
memory: played from a tape they need none of the Python between them.
"""

from __future__ import annotations

import math
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lora_runtime.kernels.cpu_library import (
    Function,
    function_of,
    num_threads,
    play,
    set_torch_threads,
)

ALIGNMENT = 64
"""Bytes; where tensors of a tape begin."""
Step = tuple[Callable[..., object], tuple[Any, ...]]
"""What to call, and with what."""


class Tape:
    """The library's calls of one run, to be made again in the same order on the same memory.

    What an op gives lies meanwhile in memory of the tape's own, which is used again as soon as
    nobody holds the tensor any more, as the run's other tensors would be.
    """

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self.kept: list[object] = []
        """What must not be freed while the tape may be played."""
        self._free: dict[int, list[np.ndarray[Any, Any]]] = {}
        self._addresses: set[int] = set()

    def play(self) -> None:
        """Run all again. Calls of the library that follow one another are one call of Python's:
        each would let other threads have the interpreter, and wait for them to give it back. What
        torch does in between is little: it would wait longer for its threads than it computes.
        """
        before = set_torch_threads(1)
        try:
            for function, arguments in self._joined:
                function(*arguments)
        finally:
            set_torch_threads(before)

    @cached_property
    def _joined(self) -> list[Step]:
        """The steps once all are noted."""
        joined: list[Step] = []
        calls: list[tuple[Function, tuple[Any, ...]]] = []
        for function, arguments in self.steps:
            if isinstance(function, Function):
                calls.append((function, arguments))
                continue
            joined += [*_as_one(calls), (function, arguments)]
            calls = []
        joined += _as_one(calls)
        return joined

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """As `torch.empty`, of the tape's memory."""
        size = -(-math.prod(shape) * dtype.itemsize // ALIGNMENT) * ALIGNMENT
        free = self._free.setdefault(size, [])
        memory = free.pop() if free else _aligned(size)
        self._addresses.add(memory.ctypes.data)
        lent = memory.view()
        weakref.finalize(lent, free.append, memory)  # once the last tensor over it has gone
        values = torch.from_numpy(lent).view(dtype)
        return values[: math.prod(shape)].view(*shape)

    def keep(self, tensor: Tensor) -> None:
        """Hold a tensor of others' memory that a call reads or writes."""
        if tensor.untyped_storage().data_ptr() not in self._addresses:
            self.kept.append(tensor)


class Unrecordable(Exception):
    """This forward cannot be played again: it computes in Python what its tensors hold, or makes
    more than a tape should keep.
    """


class _Recording(threading.local):
    tape: Tape | None = None


_recording = _Recording()


@contextmanager
def recorded_on(tape: Tape) -> Iterator[None]:
    """Note this thread's calls of the library on `tape`; they run as well."""
    _recording.tape = tape
    try:
        yield
    finally:
        _recording.tape = None


@contextmanager
def unrecorded() -> Iterator[None]:
    """What is made within stays: a tape that is recorded holds it, and not how it is made."""
    tape, _recording.tape = _recording.tape, None
    try:
        yield
    finally:
        _recording.tape = tape


def is_recording() -> bool:
    """True within `recorded_on`, on its thread, outside of `unrecorded`."""
    return _recording.tape is not None


def refuse_recording() -> None:
    """Raise Unrecordable while a tape is recorded: what follows must not be on it."""
    if is_recording():
        raise Unrecordable


def run(op: str, dtype: torch.dtype | None, *arguments: Any) -> None:
    """Call the library's function of an op for a dtype (None: it has one form), and note the call
    where this thread records.
    """
    function, arguments = function_of(op, dtype), (*arguments, num_threads())
    if (tape := _recording.tape) is not None:
        tape.steps.append((function, arguments))
    function(*arguments)


def empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """An uninitialised CPU tensor for an op's result."""
    tape = _recording.tape
    return torch.empty(shape, dtype=dtype) if tape is None else tape.empty(shape, dtype)


def pointers(*tensors: Tensor | None) -> list[int | None]:
    """Where tensors lie; a tape that is recorded keeps them from being freed."""
    if (tape := _recording.tape) is not None:
        for tensor in tensors:
            if tensor is not None:
                tape.keep(tensor)
    return [None if tensor is None else tensor.data_ptr() for tensor in tensors]


def _aligned(size: int) -> np.ndarray[Any, Any]:
    """Memory that begins at a multiple of ALIGNMENT."""
    raw = np.empty(size + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + size]


def _as_one(calls: Sequence[tuple[Function, tuple[Any, ...]]]) -> list[Step]:
    """Calls of the library as one step, which also holds what they point at; none as none."""
    words = [word for function, arguments in calls for word in function.words(arguments)]
    return [(play, (np.array(words, np.int64), calls))] if calls else []

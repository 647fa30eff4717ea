"""The compiled library of the CPU backend: how it is found and how its functions are called.

It is optional: without a compiler the install goes through and `reference` serves.
"""

from __future__ import annotations

import ctypes
import importlib.util
import struct
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from ctypes import c_float, c_int, c_long, c_void_p
from functools import cache
from typing import Any

import numpy as np
import torch

ABI = 12
LEVELS = ("baseline", "avx2", "avx512", "avx512_bf16", "amx")
SUFFIXES = {torch.float32: "f32", torch.bfloat16: "bf16"}
TYPES = {"p": c_void_p, "i": c_int, "l": c_long, "f": c_float}
SIGNATURES = {
    "panel_product": "ppp iii i",
    "four_bit_product": "pp pppppp iii i",
    "int8_product": "pp pp iii i",
    "dense_product": "pp p iii i",
    "grouped_four_bit_product": "pp pppppp p iii i",
    "grouped_int8_product": "pp pp p iii i",
    "grouped_dense_product": "pp p p iii i",
    "apply_adapters": "pppp ppp ii pi ppppp i iii i",
    "apply_half_adapters": "pppp ppp ii pi ppppp i iii i",
    "attention": "pppp ppp p iiiiiii ff i",
    "row_attention": "pppp p iiii f i",
    "row_attention_gradient": "ppp pppp p iiii f i",
    "rms_norm": "pppppp iii f i",
    "rotate": "ppp ppp pp pp p lll iiiiii f i",
    "gated_activation": "ppp ll iii i",
    "rms_norm_gradient": "ppppp iii f i",
    "rotate_gradient": "pp pppp pp pp llll iiiiii f i",
    "gated_activation_gradient": "pp ppp ll iii i",
    "most_likely": "pp ii i",
    "sort_pairs": "p pppp iii i",
    "quantize_four_bit": "pp ppp l i",
    "find_segments": "pppp ppp ppppp pp iii i",
    "find_extents": "pp ppp iiii i",
    "sum_pairs": "pp pp iii i",
    "recurrent_step": "ppp ppppp iiii i",
    "train_adapter": "pp ppp iiii i",
    "adapter_gradients": "ppp pp ppp iiii i",
}
"""Arguments of the library's functions: p a pointer, i int, l long, f float; the last one is the
number of threads, see `num_threads`.
"""
POINTER, FLOAT = "p", "f"


@cache
def library() -> ctypes.CDLL | None:
    """The compiled library, or None if it was not built or is of another version."""
    spec = importlib.util.find_spec("lora_runtime.kernels._cpu")
    if spec is None or spec.origin is None:
        return None
    found = ctypes.CDLL(spec.origin)
    return found if found.loramux_abi() == ABI else None


def name() -> str | None:
    """`cpu-avx2` and the like; None without the library."""
    found = library()
    return None if found is None else f"cpu-{LEVELS[found.loramux_level()]}"


class Function:
    """One of the library's functions, for Python to call and for a tape to play."""

    def __init__(self, op: str, dtype: torch.dtype | None) -> None:
        found, name = library(), op if dtype is None else f"{op}_{SUFFIXES[dtype]}"
        self._kinds = SIGNATURES[op].replace(" ", "")
        self._call = getattr(found, f"loramux_{name}")
        self._call.restype = None
        self._call.argtypes = [TYPES[kind] for kind in self._kinds]
        self._played = ctypes.cast(getattr(found, f"loramux_played_{name}"), c_void_p).value

    def __call__(self, *arguments: Any) -> None:
        _announce_call()
        self._call(*arguments)

    def words(self, arguments: Sequence[Any]) -> list[int]:
        """A call as `loramux_play` reads it: what to call, how many arguments, and these."""
        assert self._played is not None
        packed = map(_word, self._kinds, arguments)
        return [self._played, len(self._kinds), *packed]


function_of = cache(Function)
"""(op, dtype or None) → the function."""


def _word(kind: str, value: Any) -> int:
    """An argument in 8 bytes; a float as the bits of a double."""
    if kind == POINTER:
        return ctypes.addressof(value) if isinstance(value, ctypes.Array) else value or 0
    if kind == FLOAT:
        return int.from_bytes(struct.pack("=d", value), sys.byteorder, signed=True)
    return int(value)


def play(program: np.ndarray[Any, Any], calls: Sequence[object]) -> None:
    """Make calls whose `Function.words` are in `program`, one after the other; `calls` are held
    meanwhile, as the words point at what is in them.
    """
    found = library()
    assert found is not None
    _announce_call()
    found.loramux_play(c_void_p(program.ctypes.data), c_long(len(calls)))


class Announcement:
    """Something that is done once, before the next call of the library."""

    def __init__(self, action: Callable[[], None]) -> None:
        self._action = action
        self.is_made = False

    def make(self) -> None:
        """Do it, if it has not been done."""
        if not self.is_made:
            self.is_made = True
            self._action()


class _Announcements(threading.local):
    current: Announcement | None = None


_announcements = _Announcements()


@contextmanager
def before_first_call(action: Callable[[], None]) -> Iterator[Announcement]:
    """Within it `action` is done before this thread's first call of the library, if there is one.
    From then on other threads have the interpreter for a while: what wakes them, and would
    otherwise hold this thread up, should come then.
    """
    before, _announcements.current = _announcements.current, Announcement(action)
    try:
        yield _announcements.current
    finally:
        _announcements.current = before


def _announce_call() -> None:
    if _announcements.current is not None:
        _announcements.current.make()


class _Threads(threading.local):
    are_torchs = False
    number: int | None = None
    """Of a call; None: as many as torch's ops of this thread use."""


_threads = _Threads()


@contextmanager
def beside_torch() -> Iterator[None]:
    """Within it this thread's calls of the library run on torch's threads: for few calls between
    many ops of torch, whose threads keep the cores for milliseconds after each.
    """
    before, _threads.are_torchs = _threads.are_torchs, True
    try:
        yield
    finally:
        _threads.are_torchs = before


@contextmanager
def threads(*, of_torch: int, of_library: int) -> Iterator[None]:
    """Within it this thread's ops of torch use so many threads and its calls of the library so
    many: for small ops of torch between calls that want all cores. Without the library nothing
    changes.
    """
    torchs, own = set_torch_threads(of_torch), _threads.number
    _threads.number = of_library
    try:
        yield
    finally:
        _threads.number = own
        set_torch_threads(torchs)


def set_torch_threads(number: int) -> int:
    """Let torch compute in `number` threads what this thread asks of it, and return how many they
    were; 0, and nothing is done, where there is no library, torch has no OpenMP, or `number` is
    less than 1.

    `torch.set_num_threads` also sets the number of every thread that has not asked for its own yet.
    """
    found = library()
    return 0 if found is None else int(found.loramux_set_torch_threads(number))


def num_threads() -> int:
    """Threads for a call of this thread, as the library takes them: a negative number is one of
    torch's threads.
    """
    number = torch.get_num_threads() if _threads.number is None else _threads.number
    return -number if _threads.are_torchs else number

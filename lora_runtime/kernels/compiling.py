"""Whether a kernel is being compiled now, which the watchdog must not take for a hang.

The first step that needs a kernel waits for seconds while it is compiled, longer on a busy machine.
Triton calls one hook before it compiles and another after; our own calls of a compiler stand in
`compiling`.
Source: triton.knobs.runtime, jit_cache_hook and jit_post_compile_hook.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

MAX_COMPILE_S = 300.0
"""Seconds after which a compilation counts as hanging."""

_begun_at: float | None = None


def watch_compiles() -> None:
    """From now on note when Triton compiles, unless another hook is set already."""
    from triton import knobs

    if knobs.runtime.jit_cache_hook is None and knobs.runtime.jit_post_compile_hook is None:
        knobs.runtime.jit_cache_hook = _begin
        knobs.runtime.jit_post_compile_hook = _end


@contextmanager
def compiling() -> Iterator[None]:
    """Note that a kernel is being compiled while the context lasts."""
    _begin()
    try:
        yield
    finally:
        _end()


def is_compiling() -> bool:
    """Tell whether a kernel is being compiled, in any thread."""
    return _begun_at is not None and time.monotonic() - _begun_at < MAX_COMPILE_S


def _begin(**_: Any) -> bool:
    global _begun_at
    _begun_at = time.monotonic()
    return False  # True would tell Triton not to compile


def _end(**_: Any) -> None:
    global _begun_at
    _begun_at = None

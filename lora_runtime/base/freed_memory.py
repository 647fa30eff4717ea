"""Memory that is free and not yet the system's again."""

from __future__ import annotations

import ctypes
import sys


def give_back_freed_memory() -> None:
    """Return to the system what the C library keeps of freed memory for later use.

    A load of a base frees many pieces below the size that glibc returns by itself: of SmolLM2-135M
    60 to 260 MB, more than its packed weights. Does nothing where there is no glibc.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)

"""Memory that is freed below memory in use, as a load of a base leaves it."""

from __future__ import annotations

import ctypes

import psutil
import pytest
import torch

from lora_runtime.base.freed_memory import give_back_freed_memory

MIB = 1 << 20


def resident_bytes():
    return psutil.Process().memory_info().rss


@pytest.mark.skipif(
    not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="glibc alone can be asked for it"
)
def test_what_is_freed_below_something_kept_is_the_systems_again():
    blocks = [torch.ones(16_000) for _ in range(2_000)]
    kept = blocks[::500]
    full = resident_bytes()
    del blocks
    give_back_freed_memory()
    assert full - resident_bytes() > 100 * MIB
    assert all(block.sum() == 16_000 for block in kept)

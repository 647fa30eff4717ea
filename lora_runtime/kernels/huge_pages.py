"""Host memory in pages of 2 MiB, for what every step reads in full.

A decode step on a CPU is bound by memory, and with pages of 4 KiB a large part of its time goes
into finding them: one thread of a virtual machine read 156 MB at 8.8 GB/s, and at 15.6 from huge
pages. Where the system has none, this is plain memory.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterable

import torch
from torch import Tensor

ALIGNMENT = 64
"""Bytes; where each storage begins in memory that several share."""


def zeros(num_bytes: int, device: torch.device | str = "cpu") -> Tensor:
    """(num_bytes,) uint8 of zeros; on a CPU memory is taken as it is first written to. Plain memory
    on other devices.
    """
    if num_bytes == 0 or torch.device(device).type != "cpu":
        return torch.zeros(num_bytes, dtype=torch.uint8, device=device)
    mapped = _mapped(num_bytes)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        try:
            mapped.madvise(mmap.MADV_HUGEPAGE)
        except OSError:  # a kernel without them
            pass
    return torch.frombuffer(mapped, dtype=torch.uint8)  # it keeps the mapping


def _mapped(num_bytes: int) -> mmap.mmap:
    """Memory of this process alone. By default Python's is shared: a process that is forked from
    this one would write to the same, and most systems give shared memory no huge pages.
    """
    if not hasattr(mmap, "MAP_PRIVATE"):
        return mmap.mmap(-1, num_bytes)
    return mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


def move_there(tensors: Iterable[Tensor]) -> None:
    """Move CPU tensors into one run of huge pages, in place; those that share memory still do."""
    by_storage: dict[int, list[Tensor]] = {}
    for tensor in {id(tensor): tensor for tensor in tensors}.values():
        by_storage.setdefault(tensor.untyped_storage().data_ptr(), []).append(tensor)
    sizes = [sharing[0].untyped_storage().nbytes() for sharing in by_storage.values()]
    starts = [0]
    for size in sizes:
        starts.append(starts[-1] + -(-size // ALIGNMENT) * ALIGNMENT)
    memory = zeros(starts[-1])
    for start, size, sharing in zip(starts, sizes, by_storage.values(), strict=False):
        own = memory[start : start + size]
        own.copy_(torch.empty(0, dtype=torch.uint8).set_(sharing[0].untyped_storage()))
        for tensor in sharing:
            values = own.view(tensor.dtype)
            place = values.storage_offset() + tensor.storage_offset()
            tensor.data = values.as_strided(tensor.size(), tensor.stride(), place)

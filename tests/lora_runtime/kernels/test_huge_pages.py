"""Memory in huge pages: whose it is, and that tensors which are moved there stay what they are."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import torch
from torch import nn

from lora_runtime.kernels import huge_pages

HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
MIB = 1 << 20


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_has_its_own():
    memory = huge_pages.zeros(4 * MIB)
    child = os.fork()
    if child == 0:
        memory.numpy()[:] = 7
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert memory.sum() == 0


@pytest.mark.skipif(
    not HUGE_PAGES.exists() or "[never]" in HUGE_PAGES.read_text(),
    reason="the system has no huge pages",
)
def test_the_pages_are_huge():
    memory = huge_pages.zeros(64 * MIB)
    memory.fill_(1)
    address, found = memory.data_ptr(), 0
    mappings = re.split(r"(?m)^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text())
    for mapping in filter(None, mappings):
        begin, end = (int(part, 16) for part in mapping.split()[0].split("-"))
        if begin <= address < end:
            found = int(re.search(r"AnonHugePages: +(\d+) kB", mapping).group(1))
    assert found > 0


def test_moved_tensors_keep_values_strides_and_what_they_share():
    whole = torch.randn(8, 6)
    buffer = torch.arange(7, dtype=torch.uint8)
    tensors = [
        nn.Parameter(whole, requires_grad=False), whole[2:5], whole.T, whole[:, 1::2], buffer,
        torch.empty(0), torch.empty(3, 0, dtype=torch.int32), torch.tensor(2.5), torch.ones(1),
    ]  # fmt: skip
    wanted = [(tensor.clone(), tensor.stride(), tensor.dtype) for tensor in tensors]
    huge_pages.move_there([*tensors, tensors[0]])
    for tensor, (values, stride, dtype) in zip(tensors, wanted, strict=True):
        assert torch.equal(tensor, values) and tensor.stride() == stride and tensor.dtype == dtype
    tensors[0][3, 3] = 99.0
    assert tensors[1][1, 3] == 99 and tensors[2][3, 3] == 99 and tensors[3][3, 1] == 99
    assert len({t.untyped_storage().data_ptr() for t in tensors if t.numel()}) == 1
    huge_pages.move_there([])

"""What the tests of kernels share."""

from __future__ import annotations

import pytest
import torch

from lora_runtime.kernels.cpu_library import LEVELS, library


@pytest.fixture(params=["amx", "avx512_bf16"])
def level(request):
    """The instructions that are used, where the processor has them."""
    found, wanted = library(), LEVELS.index(request.param)
    if found.loramux_level() < wanted:
        pytest.skip(f"the processor has no {request.param}")
    found.loramux_limit_level(wanted)
    yield request.param
    found.loramux_limit_level(len(LEVELS) - 1)


@pytest.fixture
def poisoned_outputs(monkeypatch):
    """What the kernels allocate is full of NaN, as memory that was used before may be."""
    for name in ("empty_like", "empty"):
        make = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *a, make=make, **k: _poison(make(*a, **k)))
    new_empty = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: _poison(new_empty(*a, **k)))


def _poison(tensor):
    return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

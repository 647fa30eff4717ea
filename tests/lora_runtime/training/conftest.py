"""Bases and a tokenizer shared by the training tests; training never changes them."""

from __future__ import annotations

import pytest
import torch

from tests.lora_runtime.training.tiny_runs import make_tokenizer
from tests.tiny import in_float64, tiny_base


@pytest.fixture(scope="package", autouse=True)
def one_thread():
    """Threads only slow tiny models down, most of all on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def base():
    """NF4 linears, float32 compute."""
    return tiny_base("llama")


@pytest.fixture(scope="session")
def exact_base():
    """Unquantised and float64, so that equalities are not hidden by rounding."""
    base = tiny_base("llama", quantization="none", dtype=torch.float64)
    in_float64(base.model)
    return base

"""A tiny base and four adapters of the real peft on it, once for each file that asks."""

from __future__ import annotations

import pytest

from lora_runtime.adapters.reduction import load_adapter
from tests.driver import run
from tests.lora_runtime.engine.mixed_batch import mixed_requests, tokens, with_adapters
from tests.peft_adapters import four_adapters
from tests.tiny import dense_twin, tiny_base


@pytest.fixture(scope="module")
def base():
    return tiny_base("llama")


@pytest.fixture(scope="module")
def forms(base, tmp_path_factory):
    folders = four_adapters(dense_twin(base, "llama"), tmp_path_factory.mktemp("adapters"))
    return [load_adapter(folder, base.spec, base.weights) for folder in folders]


@pytest.fixture(scope="module")
def alone(base, forms):
    """Each request of `mixed_requests` run by itself."""
    result = {}
    for request in mixed_requests(forms):
        result |= tokens(run(with_adapters(base, forms), [request]))
    return result

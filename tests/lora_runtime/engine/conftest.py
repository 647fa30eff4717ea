"""A tiny base and four adapters of the real peft on it, once for each file that asks."""

from __future__ import annotations

import pytest

from lora_runtime.adapters.reduction import load_adapter
from tests.peft_adapters import four_adapters
from tests.tiny import dense_twin, tiny_base


@pytest.fixture(scope="module")
def base():
    return tiny_base("llama")


@pytest.fixture(scope="module")
def forms(base, tmp_path_factory):
    folders = four_adapters(dense_twin(base, "llama"), tmp_path_factory.mktemp("adapters"))
    return [load_adapter(folder, base.spec, base.weights) for folder in folders]

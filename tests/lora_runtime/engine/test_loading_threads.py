"""In how many threads torch loads a base on a CPU."""

from __future__ import annotations

import pytest
import torch

from lora_runtime.base.outline import outline
from lora_runtime.config import BaseConfig, CacheConfig, EngineConfig
from lora_runtime.engine import engine as engine_module
from lora_runtime.engine.engine import load_engine
from lora_runtime.kernels.cpu_library import library
from tests.tiny import tiny_checkpoint


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.skipif(library() is None, reason="needs the compiled library")
@pytest.mark.parametrize(("is_small", "expected"), [(True, 1), (False, 2)])
def test_a_small_base_is_loaded_in_one_thread(
    two_threads, is_small, expected, tmp_path, monkeypatch
):
    tiny_checkpoint(tmp_path)
    num_weights = outline(tmp_path, torch.float32).num_weights
    monkeypatch.setattr(engine_module, "SMALL_BASE", num_weights - (not is_small))
    found = {}
    config = EngineConfig(
        base=BaseConfig(model=str(tmp_path), dtype="float32", device="cpu"),
        cache=CacheConfig(num_blocks=16),
    )
    load_engine(config, on_progress=lambda text: found.update({text: torch.get_num_threads()}))
    assert found["checking against the original model"] == expected
    assert found["running a first step"] == 2
    assert torch.get_num_threads() == 2

"""What a start says of the machine that it computes on."""

from __future__ import annotations

import pytest
import torch

from lora_runtime.config import BaseConfig, CacheConfig, EngineConfig
from lora_runtime.engine import engine as engine_module
from lora_runtime.engine.engine import load_engine
from lora_runtime.kernels import LIBRARY_MISSING
from tests.tiny import tiny_checkpoint


@pytest.fixture
def config(tmp_path):
    tiny_checkpoint(tmp_path)
    return EngineConfig(
        base=BaseConfig(model=str(tmp_path), dtype="float32", device="cpu"),
        cache=CacheConfig(num_blocks=16),
    )


@pytest.mark.parametrize(("backend", "is_missing"), [("torch", True), ("cpu-avx2", False)])
def test_a_start_warns_where_the_compiled_library_is_missing(
    config, backend, is_missing, monkeypatch, caplog
):
    monkeypatch.setattr(engine_module, "BACKEND", backend)
    load_engine(config)
    assert (LIBRARY_MISSING in caplog.messages) is is_missing


def test_a_start_says_in_how_many_threads_it_computes(config):
    said: list[str] = []
    before = torch.get_num_threads()
    try:
        for number in (1, 2):
            torch.set_num_threads(number)
            load_engine(config, said.append)
    finally:
        torch.set_num_threads(before)
    found = [text for text in said if text.startswith("computing in")]
    assert found[0].endswith("on 1 thread") and found[1].endswith("on 2 threads")

"""In how many threads torch loads a base on a CPU."""

from __future__ import annotations

import pytest
import torch

from lora_runtime.base import loader
from lora_runtime.base.catalog import resolve_base
from lora_runtime.config import BaseConfig
from lora_runtime.kernels.cpu_library import library, num_threads
from tests.tiny import tiny_checkpoint


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def load(config, on_progress):
    return loader.load_base(config, on_progress=on_progress).spec.model_type


def judge(config, on_progress):
    return loader.judge_base(config, resolve_base(config.model), on_progress).model_type


@pytest.mark.skipif(library() is None, reason="needs the compiled library")
@pytest.mark.parametrize("act", [load, judge])
@pytest.mark.parametrize(("is_small", "expected"), [(True, 1), (False, 2)])
def test_a_small_base_is_loaded_in_one_thread_of_torch(
    two_threads, is_small, expected, act, tmp_path, monkeypatch
):
    tiny_checkpoint(tmp_path)
    num_bytes = sum(file.stat().st_size for file in tmp_path.glob("*.safetensors"))
    monkeypatch.setattr(loader, "SMALL_CHECKPOINT", num_bytes - (not is_small))
    found = {}
    act(
        BaseConfig(model=str(tmp_path), dtype="float32", device="cpu"),
        lambda text: found.update({text: (torch.get_num_threads(), abs(num_threads()))}),
    )
    assert found["checking against the original model"] == (expected, 2)
    assert torch.get_num_threads() == 2
    assert abs(num_threads()) == 2


@pytest.mark.skipif(library() is None, reason="needs the compiled library")
def test_a_load_that_fails_leaves_the_threads_as_they_were(two_threads, tmp_path):
    tiny_checkpoint(tmp_path)
    weights = next(tmp_path.glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(loader.BaseRefused):
        load(BaseConfig(model=str(tmp_path), dtype="float32", device="cpu"), print)
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize("act", [load, judge])
def test_a_dead_link_beside_the_weights_is_passed_over(act, tmp_path):
    tiny_checkpoint(tmp_path)
    (tmp_path / "extra.safetensors").symlink_to("gone")
    config = BaseConfig(model=str(tmp_path), dtype="bfloat16", device="cpu")
    assert act(config, print) == "llama"

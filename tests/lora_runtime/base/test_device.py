from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from lora_runtime.base.device import device_defaults, resolve_device, resolve_dtype
from lora_runtime.config import CPU_DEFAULTS
from lora_runtime.errors import ConfigError


def machine(monkeypatch, num_gpus: int, total_bytes: int = 0) -> None:
    """torch.cuda's view of a machine."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: num_gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: num_gpus)
    properties = SimpleNamespace(total_memory=total_bytes)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)


@pytest.mark.parametrize(
    ("num_gpus", "name", "expected"),
    [
        (0, "auto", "cpu"),
        (2, "auto", "cuda"),
        (2, "cpu", "cpu"),
        (1, "cuda", "cuda"),
        (2, "cuda:1", "cuda:1"),
    ],
)
def test_the_device_of_a_setting(monkeypatch, num_gpus, name, expected):
    machine(monkeypatch, num_gpus)
    assert resolve_device(name) == torch.device(expected)


@pytest.mark.parametrize(
    ("num_gpus", "name", "message"),
    [
        (0, "cuda", "'cuda', and torch finds no CUDA device here .*use cpu or auto"),
        (0, "cuda:0", "'cuda:0', and torch finds no CUDA device"),
        (2, "cuda:2", "'cuda:2', .* are cuda:0 to cuda:1; use one of them"),
    ],
)
def test_a_device_that_is_not_here_is_refused(monkeypatch, num_gpus, name, message):
    machine(monkeypatch, num_gpus)
    with pytest.raises(ConfigError, match=message) as caught:
        resolve_device(name)
    assert caught.value.field == "device"


@pytest.mark.parametrize(
    ("total_bytes", "expected"),
    [
        (12 << 30, (128, 2048, 1536 << 20)),
        (24 << 30, (128, 2048, 3 << 30)),
        (80 << 30, (256, 4096, 10 << 30)),
        (85_017_755_648, (256, 4096, 10134 << 20)),
    ],
)
def test_defaults_follow_the_device(monkeypatch, total_bytes, expected):
    machine(monkeypatch, 1, total_bytes)
    found = device_defaults("cuda:0")
    assert (found.max_num_seqs, found.max_num_batched_tokens, found.pool_bytes) == expected
    assert device_defaults("auto") == found and device_defaults("cpu") == CPU_DEFAULTS


@pytest.mark.parametrize(
    ("capability", "expected"),
    [
        ((6, 1), torch.float32),
        ((7, 5), torch.float32),
        ((8, 0), torch.bfloat16),
        ((8, 9), torch.bfloat16),
        ((9, 0), torch.bfloat16),
        ((12, 0), torch.bfloat16),
    ],
)
def test_auto_is_bfloat16_where_a_gpu_multiplies_it_natively(monkeypatch, capability, expected):
    """Each device is asked for itself: another one of the machine may be older."""
    asked = []
    monkeypatch.setattr(
        torch.cuda, "get_device_capability", lambda device: asked.append(device) or capability
    )
    assert resolve_dtype("auto", torch.device("cuda:1")) == expected
    assert asked == [torch.device("cuda:1")]
    assert resolve_dtype("bfloat16", torch.device("cuda:1")) == torch.bfloat16
    assert resolve_dtype("float32", torch.device("cuda:1")) == torch.float32


@pytest.mark.parametrize(("has_bf16", "has_amx"), [(False, False), (True, False), (False, True)])
def test_auto_is_bfloat16_where_a_processor_multiplies_it_natively(monkeypatch, has_bf16, has_amx):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has_bf16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: has_amx)
    expected = torch.bfloat16 if has_bf16 or has_amx else torch.float32
    assert resolve_dtype("auto", torch.device("cpu")) == expected

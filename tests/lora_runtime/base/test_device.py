from __future__ import annotations

import pytest
import torch

from lora_runtime.base.device import resolve_device, resolve_dtype
from lora_runtime.errors import ConfigError


def test_a_device_that_is_not_here_is_refused():
    with pytest.raises(ConfigError, match="'cuda:99' cannot be used here") as caught:
        resolve_device("cuda:99")
    assert caught.value.field == "device"


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

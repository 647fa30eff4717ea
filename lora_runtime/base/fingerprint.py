"""The identity of a base: the same digest on every device, in every compute dtype and version."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from lora_runtime.base.model.quant_linear import BLOCK_SIZE

UNHASHED_CONFIG = {*PreTrainedConfig().to_dict(), "use_cache"} - {"model_type"}
"""Config entries that every model has: how and by which version it was loaded, not what it is."""
QUANTIZER_STATE = (".absmax", ".nested_absmax", ".nested_offset")
"""Ends of the names of buffers that the quantiser computed, in float32."""
CONVERTED_AT_ONCE = 1 << 20
"""Values of a tensor that are copied to bfloat16 at once: few enough that the next are copied to
the same memory.
"""


def fingerprint(model: PreTrainedModel, quantization: str) -> str:
    """SHA-256 over every parameter and persistent buffer, the config and the quantiser settings.

    Floating-point values are hashed as bfloat16, the precision of the quantiser's input, so that
    a float32 and a bfloat16 load of one checkpoint agree; the quantiser's buffers are hashed as
    they are.
    """
    digest = hashlib.sha256()
    settings = {
        "quantization": quantization,
        "block_size": BLOCK_SIZE,
        "config": {
            key: value
            for key, value in model.config.to_dict().items()
            if key not in UNHASHED_CONFIG and value is not None
        },
    }
    digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        for part in _parts(tensor):
            digest.update(_canonical_bytes(name, part))
    return digest.hexdigest()


def exceeds_bfloat16(model: PreTrainedModel) -> bool:
    """True where a value of a parameter or persistent buffer is none of bfloat16, beside what the
    quantiser computed.
    """
    return any(
        not torch.equal(part, part.to(torch.bfloat16).to(part.dtype))
        for name, tensor in model.state_dict().items()
        if tensor.is_floating_point()
        and not name.endswith(QUANTIZER_STATE)
        and tensor.dtype != torch.bfloat16
        for part in _parts(tensor)
    )


def _parts(tensor: Tensor) -> Iterable[Tensor]:
    """Its values in order, some at a time: see `CONVERTED_AT_ONCE`."""
    return tensor.detach().flatten().split(CONVERTED_AT_ONCE)


def _canonical_bytes(name: str, part: Tensor) -> memoryview:
    """Of some of a tensor's values, (n,)."""
    if part.is_floating_point() and not name.endswith(QUANTIZER_STATE):
        part = part.to(torch.bfloat16)
    return memoryview(part.cpu().view(torch.uint8).numpy().data)

"""The identity of a base: the same digest on every device, in every compute dtype and version."""

from __future__ import annotations

import hashlib
import json

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from lora_runtime.base.model.quant_linear import BLOCK_SIZE

UNHASHED_CONFIG = {*PreTrainedConfig().to_dict(), "use_cache"} - {"model_type"}
"""Config entries that every model has: how and by which version it was loaded, not what it is."""
QUANTIZER_STATE = (".absmax", ".nested_absmax", ".nested_offset")
"""Ends of the names of buffers that the quantiser computed, in float32."""


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
        digest.update(_canonical_bytes(name, tensor))
    return digest.hexdigest()


def exceeds_bfloat16(model: PreTrainedModel) -> bool:
    """True where a value of a parameter or persistent buffer is none of bfloat16, beside what the
    quantiser computed.
    """
    return any(
        tensor.is_floating_point()
        and not name.endswith(QUANTIZER_STATE)
        and tensor.dtype != torch.bfloat16
        and not torch.equal(tensor, tensor.to(torch.bfloat16).to(tensor.dtype))
        for name, tensor in model.state_dict().items()
    )


def _canonical_bytes(name: str, tensor: Tensor) -> memoryview:
    if tensor.is_floating_point() and not name.endswith(QUANTIZER_STATE):
        tensor = tensor.to(torch.bfloat16)
    flat = tensor.detach().cpu().contiguous().flatten()
    return memoryview(flat.view(torch.uint8).numpy().data)

"""Records a trained unit's logits for the parity gate: see `lora_runtime/adapters/parity.py`."""

from __future__ import annotations

from collections.abc import Callable

import torch

from lora_runtime.adapters.parity import ParityRecord, measure, public_rows
from lora_runtime.base.dtype_view import in_dtype
from lora_runtime.base.loader import Base
from lora_runtime.text.tokenizer import Tokenizer
from lora_runtime.training.losses import unit_logits
from lora_runtime.training.units import Unit


def recorder(base: Base, tokenizer: Tokenizer) -> Callable[[Unit], ParityRecord]:
    """A function that makes a unit's parity record from its logits in float32 and in bfloat16,
    whichever of the two the unit was trained in. `base` is not changed: both are views of it.
    """
    exact, rounded = (in_dtype(base, dtype) for dtype in (torch.float32, torch.bfloat16))
    rows = public_rows(tokenizer.encode, base.spec.vocab_size, base.spec.max_model_len)

    def record(unit: Unit) -> ParityRecord:
        views = unit_logits(exact, unit), unit_logits(rounded, unit)
        spec = base.spec
        return measure(rows, *views, fingerprint=spec.fingerprint, base_dtype=spec.dtype)

    return record

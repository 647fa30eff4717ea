"""Adapters of random weights for benchmarks, as PEFT's folders, and parity records for them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from lora_runtime.adapters.files.parity_record import write_parity_record
from lora_runtime.adapters.files.peft_writer import peft_files
from lora_runtime.adapters.packed_adapter import pack_for
from lora_runtime.adapters.parity import measure, public_rows
from lora_runtime.adapters.reduction import load_adapter
from lora_runtime.base.dtype_view import in_dtype
from lora_runtime.base.loader import Base
from lora_runtime.engine.probe import KnownRows, adapter_logits
from lora_runtime.text.tokenizer import Tokenizer


def write_random_adapters(base: Base, folder: Path, ranks: Sequence[int]) -> list[Path]:
    """Write adapter-0, adapter-1 … of these ranks: small, on every inner linear layer."""
    folders = []
    for index, rank in enumerate(ranks):
        generator = torch.Generator().manual_seed(index)
        tensors = {
            path: (
                torch.randn(rank, shape.in_features, generator=generator) / shape.in_features**0.5,
                0.02 * torch.randn(shape.out_features, rank, generator=generator),
            )
            for path, shape in base.spec.linears.items()
        }
        names = sorted({path.rpartition(".")[2] for path in tensors})
        files = peft_files(
            rank=rank, alpha=rank, use_rslora=False, target_modules=names,
            tensors=tensors, base=base.spec,
        )  # fmt: skip
        folders.append(folder / f"adapter-{index}")
        files.write(folders[-1])
    return folders


def write_records(base: Base, folders: Sequence[Path]) -> None:
    """Write beside each adapter what the trainer would: its logits and the base's in float32, and
    how far off bfloat16 is, on the public rows.
    """
    spec = base.spec
    rows = public_rows(Tokenizer.load(base.folder).encode, spec.vocab_size, spec.max_model_len)
    views = [(in_dtype(base, dtype), KnownRows()) for dtype in (torch.float32, torch.bfloat16)]
    for folder in folders:
        form = load_adapter(folder, spec, base.weights)
        packed = [pack_for(view, form) for view, _ in views]
        exact, rounded = (
            adapter_logits(view, bytes_, known)
            for (view, known), bytes_ in zip(views, packed, strict=True)
        )
        record = measure(rows, exact, rounded, fingerprint=spec.fingerprint, base_dtype=spec.dtype)
        write_parity_record(folder, record)

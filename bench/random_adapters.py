"""Adapters of random weights for benchmarks, as PEFT's folders."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from lora_runtime.adapters.files.peft_writer import peft_files
from lora_runtime.base.loader import Base


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

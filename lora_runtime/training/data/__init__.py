"""Training data: files → rows → examples of token ids and targets → micro-batches."""

from lora_runtime.training.data.batches import ExampleStream, PackedBatch, micro_batches
from lora_runtime.training.data.dataset import (
    Dataset,
    Example,
    Pair,
    load_all,
    load_dataset,
    load_datasets,
)

__all__ = [
    "Dataset",
    "Example",
    "ExampleStream",
    "PackedBatch",
    "Pair",
    "load_all",
    "load_dataset",
    "load_datasets",
    "micro_batches",
]

"""Training data: files → rows → examples of token ids and targets → micro-batches."""

from lora_runtime.training.data.batches import (
    ExampleStream,
    Limits,
    balanced,
    micro_batches,
)
from lora_runtime.training.data.dataset import Dataset, load_all, load_dataset, load_datasets
from lora_runtime.training.data.examples import Example, Item, Pair, num_tokens
from lora_runtime.training.data.packed_batch import PackedBatch

__all__ = [
    "Dataset",
    "Example",
    "ExampleStream",
    "Item",
    "Limits",
    "PackedBatch",
    "Pair",
    "balanced",
    "load_all",
    "load_dataset",
    "load_datasets",
    "micro_batches",
    "num_tokens",
]

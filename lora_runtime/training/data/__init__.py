"""Training data: files → rows → examples of token ids and targets → micro-batches."""

from lora_runtime.training.data.batches import (
    ExampleStream,
    Limits,
    PackedBatch,
    balanced,
    micro_batches,
    num_tokens,
)
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

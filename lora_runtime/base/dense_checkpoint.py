"""A base as a plain transformers checkpoint again: dense tensors under transformers' own names.

The only writer of whole models. Knows nothing of adapters.
Source: transformers, `PreTrainedModel.save_pretrained` (layout, index of shards).
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from lora_runtime.base.loader import Base
from lora_runtime.base.model.adapted_linear import AdaptedEmbedding, AdaptedLinear
from lora_runtime.base.model.experts import AdaptedExperts
from lora_runtime.base.model.routers import AdaptedRouter
from lora_runtime.base.weights import INDEX_FILE, SINGLE_FILE
from lora_runtime.errors import BaseRefused

SHARD_BYTES = 4 << 30
CONFIG_FILE = "config.json"
COMPANIONS = ("*.json", "*.jinja", "*.model", "merges.txt", "vocab.txt")
"""Files of the base's folder that go along: tokenizer, generation settings."""


def dense_tensors(base: Base) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, tensor) of the whole model, packed weights dequantised, in the compute dtype.

    Both tables of a tied vocabulary are given.
    """
    adapted = {
        path: module
        for path, module in base.model.named_modules()
        if isinstance(module, AdaptedLinear | AdaptedEmbedding | AdaptedExperts)
    }
    inner = tuple(f"{path}." for path in adapted)
    for path, module in adapted.items():
        if isinstance(module, AdaptedExperts):
            yield from _expert_tensors(path, module)
            continue
        yield f"{path}.weight", dense_weight(module)
        if isinstance(module, AdaptedRouter):
            for name, buffer in module.choose.state_dict().items():
                yield f"{path}.{name}", buffer
        if isinstance(module, AdaptedLinear) and module.linear.bias is not None:
            yield f"{path}.bias", module.linear.bias
    for name, tensor in base.model.state_dict().items():
        if not name.startswith(inner):
            yield name, tensor


def _expert_tensors(path: str, experts: AdaptedExperts) -> Iterator[tuple[str, Tensor]]:
    """The parameters in whose place the experts are, as the family holds them."""
    count, bias = experts.layout.count, experts.linear.bias
    values = experts.linear.weight_values().detach().unflatten(0, (count, -1))
    yield path, values.transpose(1, 2) if experts.layout.is_transposed else values
    if bias is not None:
        yield f"{path}_bias", bias.view(count, -1)


def dense_weight(module: AdaptedLinear | AdaptedEmbedding) -> Tensor:
    """W (out, in), or the embedding's table (vocab, hidden)."""
    if isinstance(module, AdaptedEmbedding):
        return module.weight.detach()
    return module.linear.weight_values().detach()


def write_checkpoint(
    folder: Path,
    base: Base,
    tensors: Iterable[tuple[str, Tensor]],
    dtype: torch.dtype,
    files: Mapping[str, bytes],
) -> None:
    """Write a new folder, whole or not at all: tensors, config and the base's tokenizer.

    The vocabulary's tables are tied in it if and only if `tensors` holds no output layer. `files`
    go along, in the place of the base's own of that name. Of a model of text and images it is the
    model of its text; raises BaseRefused where transformers has none.
    """
    config, rename = _text_model(base)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".writing-") as work:
        unfinished = Path(work) / folder.name
        unfinished.mkdir()
        _copy_companions(base.folder, unfinished)
        names = _write_tensors(unfinished, ((rename(name), tensor) for name, tensor in tensors))
        config.tie_word_embeddings = rename(f"{base.spec.head}.weight") not in names
        config.dtype = dtype
        config.save_pretrained(unfinished)
        for name, content in files.items():
            (unfinished / name).write_bytes(content)
        os.rename(unfinished, folder)


def _text_model(base: Base) -> tuple[PreTrainedConfig, Callable[[str], str]]:
    """The config of a checkpoint of the base, and from its tensors' names to those in it."""
    whole = AutoConfig.from_pretrained(base.folder, local_files_only=True)
    config = whole.get_text_config()
    if config is whole:
        return config, lambda name: name
    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise BaseRefused(
            f"{whole.model_type} is served without the parts that are not text, and transformers "
            f"{transformers.__version__} has no model of its text alone that could be written; "
            "serve the adapter unmerged"
        )
    kind: Any = AutoModelForCausalLM._model_mapping[type(config)]
    config.architectures = [kind.__name__]
    prefix = base.spec.embedding.rpartition(".")[0] + "."

    def rename(name: str) -> str:
        return f"model.{name.removeprefix(prefix)}" if name.startswith(prefix) else name

    return config, rename


def _copy_companions(source: Path, target: Path) -> None:
    for path in (path for pattern in COMPANIONS for path in source.glob(pattern)):
        if path.name not in (CONFIG_FILE, INDEX_FILE):
            shutil.copyfile(path, target / path.name)


def _write_tensors(folder: Path, tensors: Iterable[tuple[str, Tensor]]) -> set[str]:
    """Write shards, and their index where there is more than one; return the tensors' names."""
    shards: list[list[str]] = []
    total = 0
    for shard in _shards(tensors):
        save_file(shard, folder / f"{len(shards)}.part", metadata={"format": "pt"})
        shards.append(list(shard))
        total += sum(tensor.nbytes for tensor in shard.values())
    files = [SINGLE_FILE] if len(shards) == 1 else _shard_names(len(shards))
    for number, file in enumerate(files):
        os.rename(folder / f"{number}.part", folder / file)
    if len(shards) > 1:
        weight_map = {name: file for file, s in zip(files, shards, strict=True) for name in s}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2, sort_keys=True))
    return {name for shard in shards for name in shard}


def _shard_names(count: int) -> list[str]:
    return [f"model-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)]


def _shards(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    shard: dict[str, Tensor] = {}
    for name, tensor in tensors:
        if shard and sum(t.nbytes for t in shard.values()) + tensor.nbytes > SHARD_BYTES:
            yield shard
            shard = {}
        shard[name] = tensor.cpu().contiguous()
    yield shard

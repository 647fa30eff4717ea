"""The names of an adapter's tensors, whoever wrote them → one form.

Knows strings only. PEFT writes `base_model.model.<module>.<part>`; other writers leave the names
of compilers, of sharded and checkpointed wrappers, or the adapter's own name in it, or write the
prefix twice. Source: peft 0.21.2, `save_and_load.py`; torch `OptimizedModule`, FSDP.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from enum import StrEnum
from typing import NamedTuple

from lora_runtime.core import BaseSpec
from lora_runtime.errors import AdapterRefused


class Part(StrEnum):
    """What a tensor is to its module, as PEFT ends its name."""

    A = "lora_A.weight"
    B = "lora_B.weight"
    B_BIAS = "lora_B.bias"
    MAGNITUDE = "lora_magnitude_vector"
    EMBEDDING_A = "lora_embedding_A"
    EMBEDDING_B = "lora_embedding_B"
    WEIGHT = "weight"
    BIAS = "bias"
    TOKENS = "token_adapter.trainable_tokens_delta"


class TensorName(NamedTuple):
    """A module's name in the model of the training, and the part of it."""

    module: str
    part: Part


WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
"""What torch.compile, FSDP and activation checkpointing put between the names of modules."""
_PREFIX = r"(?:base_model\.model\.)+(?P<module>.+?)\."
_ADAPTER = r"(?:\.(?P<adapter>[^.]+))?"
_ENDINGS = {
    Part.A: rf"lora_A{_ADAPTER}\.weight",
    Part.B: rf"lora_B{_ADAPTER}\.weight",
    Part.B_BIAS: rf"lora_B{_ADAPTER}\.bias",
    Part.MAGNITUDE: r"lora_magnitude_vector(?:\.(?P<adapter>(?!weight$)[^.]+))?(?:\.weight)?",
    Part.EMBEDDING_A: rf"lora_embedding_A{_ADAPTER}",
    Part.EMBEDDING_B: rf"lora_embedding_B{_ADAPTER}",
    Part.TOKENS: rf"token_adapter\.trainable_tokens_delta{_ADAPTER}",
    Part.WEIGHT: r"(?:base_layer\.|modules_to_save\.(?P<adapter>[^.]+)\.)?weight",
    Part.BIAS: r"(?:base_layer\.|modules_to_save\.(?P<adapter>[^.]+)\.)?bias",
}
_NAMES = {part: re.compile(_PREFIX + ending) for part, ending in _ENDINGS.items()}

TEXT_PREFIXES = ("model.language_model.", "language_model.model.", "model.")
"""Where a text decoder sits: in multimodal models of transformers 5 and 4, and alone. An adapter
trained in one of them fits the same decoder in another. The longest match comes first."""
OLD_BLOCKS = {".block_sparse_moe.": ".mlp."}
"""What transformers 4 called a block of Mixtral → what 5 calls it."""
_HEADS = {"language_model.model.": "language_model.lm_head"}
"""The output layer's name where it is not at the top."""


def parse_names(keys: Iterable[str]) -> dict[TensorName, str]:
    """Return what each tensor is → its key in the file.

    Raises: AdapterRefused for a key of no known form, for two keys of one meaning, and for the
    tensors of more than one adapter.
    """
    found: dict[TensorName, str] = {}
    adapters: dict[str, str] = {}
    for key in sorted(keys):
        name, adapter = _parse(key)
        if name in found:
            raise AdapterRefused(
                f"tensors {found[name]} and {key} mean the same part of one module", field=key
            )
        found[name] = key
        if adapter or name.part not in (Part.WEIGHT, Part.BIAS):
            adapters.setdefault(adapter, key)
    if len(adapters) > 1:
        names = sorted(name or "(none)" for name in adapters)
        raise AdapterRefused(
            f"the tensors belong to several adapters ({', '.join(names)[:80]}); save each in its "
            "own folder",
            field=max(adapters.values()),
        )
    return found


def _parse(key: str) -> tuple[TensorName, str]:
    plain = ".".join(piece for piece in key.split(".") if piece not in WRAPPERS)
    for part, pattern in _NAMES.items():
        if match := pattern.fullmatch(plain):
            return TensorName(match["module"], part), match["adapter"] or ""
    raise AdapterRefused(
        f"tensor {key[:160]} has no name that PEFT gives: base_model.model.<module>.<part>",
        field=key[:160],
    )


def trained_names(names: Iterable[TensorName], base: BaseSpec) -> dict[str, str]:
    """Return base path → the module's name in the model that the tensors were trained in."""
    ours = base.embedding.rpartition(".")[0] + "."
    prefixes = (ours, *TEXT_PREFIXES) if ours in TEXT_PREFIXES else (ours,)
    roots = {_root(path.removeprefix(ours)) for path in (*base.linears, base.embedding)}
    modules = {name.module for name in names}
    prefix = next((p for p in prefixes if any(_is_named_by(m, p, roots) for m in modules)), ours)
    found = _renamed(base, ours, prefix)
    for old, new in OLD_BLOCKS.items():
        if any(old in module for module in modules) and not any(old in path for path in found):
            found = {path: name.replace(new, old) for path, name in found.items()}
    return found


def left_out_part(module: str, base: BaseSpec) -> str | None:
    """The part of the base's checkpoint that is not served, if the module belongs to one: by its
    path in transformers 5, or in 4, which had most of these parts one level higher.
    """
    plain = f"{module.removeprefix('model.')}."
    parts = (part for part in base.left_out if plain.startswith(f"{part.removeprefix('model.')}."))
    return next(parts, None)


def _root(path: str) -> str:
    return path.partition(".")[0]


def _is_named_by(module: str, prefix: str, roots: set[str]) -> bool:
    return module == _HEADS.get(prefix) or (
        module.startswith(prefix) and _root(module.removeprefix(prefix)) in roots
    )


def _renamed(base: BaseSpec, ours: str, prefix: str) -> dict[str, str]:
    names = {path: prefix + path.removeprefix(ours) for path in (*base.linears, base.embedding)}
    return {**names, base.head: _HEADS.get(prefix, base.head)}

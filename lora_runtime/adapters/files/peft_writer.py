"""A trained or converted adapter as the two files that PEFT loads, made and written here only.

Source: peft 0.21.2, `save_and_load.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from torch import Tensor

from lora_runtime.adapters.files.file_names import (
    FINGERPRINT_KEY,
    QUANTIZATION_KEY,
    VERSION_KEY,
)
from lora_runtime.adapters.files.folder import write_adapter
from lora_runtime.adapters.files.tensor_names import Part
from lora_runtime.core import BaseSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class PeftFiles:
    """What `adapter_config.json` and `adapter_model.safetensors` are to hold."""

    config: dict[str, object]
    tensors: dict[str, Tensor]
    """By the names that PEFT gives them."""
    metadata: dict[str, str]
    """`__metadata__` of the safetensors file."""

    def add(self, path: str, part: Part, tensor: Tensor) -> None:
        """Add a tensor of the module at `path` of the base."""
        self.tensors[f"base_model.model.{path}.{part}"] = tensor

    def add_factors(self, path: str, a: Tensor, b: Tensor, base: BaseSpec) -> None:
        """Add A (r, in) and B (out, r) of a module; PEFT has other names for the embedding's."""
        is_embedding = path == base.embedding
        self.add(path, Part.EMBEDDING_A if is_embedding else Part.A, a)
        self.add(path, Part.EMBEDDING_B if is_embedding else Part.B, b)

    def write(self, folder: Path) -> None:
        """Write both files; see `write_adapter`."""
        write_adapter(folder, self.config, self.tensors, self.metadata)


def peft_files(
    *,
    rank: int,
    alpha: float,
    use_rslora: bool,
    target_modules: str | Sequence[str],
    tensors: Mapping[str, tuple[Tensor, Tensor]],
    base: BaseSpec,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> PeftFiles:
    """Return the files of a LoRA; what else an adapter has is added to them.

    `tensors`: module path in the base → (A (r, in), B (out, r)), unscaled. The base's fingerprint
    is in the metadata, so that no other base serves the adapter.
    """
    targets = target_modules if isinstance(target_modules, str) else sorted(target_modules)
    config: dict[str, object] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base.name_or_path or base.name,
        "r": rank,
        "lora_alpha": alpha,
        "use_rslora": use_rslora,
        "rank_pattern": dict(rank_pattern or {}),
        "alpha_pattern": dict(alpha_pattern or {}),
        "target_modules": targets,
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
    }
    facts = {
        FINGERPRINT_KEY: base.fingerprint,
        QUANTIZATION_KEY: base.quantization,
        VERSION_KEY: _version(),
    }
    files = PeftFiles(config=config, tensors={}, metadata={**(metadata or {}), **facts})
    for path, (a, b) in tensors.items():
        files.add_factors(path, a, b, base)
    return files


def _version() -> str:
    try:
        return version("loramux")
    except PackageNotFoundError:
        return "source"

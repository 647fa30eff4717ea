"""An adapter's files → its serving form, and a trained adapter → its files.

Knows PEFT's tensor names and the scaling of each variant; knows neither the device nor the pool.
Source: peft 0.21.2, `save_and_load.py`; rsLoRA arXiv:2312.03732.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from lora_runtime.adapters.files import MAX_TENSORS_BYTES, AdapterFiles, read_adapter
from lora_runtime.adapters.peft_config import AdapterSpec, TargetSpec, parse_config
from lora_runtime.adapters.serving_form import ModuleForm, ModuleKey, ServingForm
from lora_runtime.core import BaseSpec, LinearShape
from lora_runtime.errors import AdapterRefused, BaseMismatch

FINGERPRINT_KEY = "loramux.base_fingerprint"
VERSION_KEY = "loramux.version"

TEXT_PREFIXES = ("model.language_model.", "language_model.model.", "model.")
"""Where a text decoder sits: in multimodal models of transformers 5 and 4, and alone. An adapter
trained in one of them fits the same decoder in another. The longest match comes first."""

Part = Literal["A", "B"]
_TENSOR_NAME = re.compile(r"base_model\.model\.(?P<path>.+)\.lora_(?P<part>[AB])\.weight")


def load_adapter(
    folder: Path, base: BaseSpec, *, max_bytes: int = MAX_TENSORS_BYTES
) -> ServingForm:
    """Read a folder written by PEFT or by our trainer and reduce it for one base.

    Raises: AdapterRefused and its kinds, naming the file, field or tensor.
    """
    files = read_adapter(folder, max_bytes=max_bytes)
    _check_fingerprint(files.metadata, base)  # another base explains every mismatch after this
    names = trained_names(files.tensors, base.linears)
    spec = parse_config(files.config, base.linears, base.num_layers, trained_names=names)
    return reduce_adapter(spec, files, base)


def reduce_adapter(spec: AdapterSpec, files: AdapterFiles, base: BaseSpec) -> ServingForm:
    """Fold every scaling into B' = scaling · B, in float32.

    Each target needs A (rank, in) and B (out, rank); no other tensor may be there.
    The digest is the SHA-256 of the canonical JSON of [honoured fields, SHA-256 of the tensors'
    file].

    Raises: BaseMismatch where the files name another base's fingerprint; AdapterRefused naming the
    tensor that is missing, unknown or of the wrong shape.
    """
    _check_fingerprint(files.metadata, base)
    names = trained_names(files.tensors, base.linears)
    _check_tensor_names(files.tensors, [names[path] for path in spec.targets])
    modules = {
        ModuleKey(path): _module_form(names[path], target, base.linears[path], files.tensors)
        for path, target in spec.targets.items()
    }
    return ServingForm(
        digest=_digest(spec.honoured, files.tensors_sha256),
        variant=spec.variant,
        modules=modules,
        honoured=spec.honoured,
        inert=spec.inert,
    )


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
) -> tuple[dict[str, object], dict[str, Tensor], dict[str, str]]:
    """Return config, tensors and metadata of a trained adapter, for `write_adapter`.

    `tensors`: module path in the base → (A (r, in), B (out, r)), unscaled. The result loads in
    PEFT; the base's fingerprint is in the metadata, so that no other base serves it.
    """
    targets = target_modules if isinstance(target_modules, str) else sorted(target_modules)
    config: dict[str, object] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base.name,
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
    named = {}
    for path, (a, b) in tensors.items():
        named[_tensor_name(path, "A")] = a
        named[_tensor_name(path, "B")] = b
    facts = {FINGERPRINT_KEY: base.fingerprint, VERSION_KEY: _version()}
    return config, named, {**(metadata or {}), **facts}


def trained_names(
    tensor_names: Iterable[str], linears: Mapping[str, LinearShape]
) -> dict[str, str]:
    """Return base path → the module's name in the model that the tensors were trained in."""
    matches = (_TENSOR_NAME.fullmatch(name) for name in tensor_names)
    paths = {match["path"] for match in matches if match}
    same = {path: path for path in linears}
    dialects = [{path: _with_prefix(path, prefix) for path in linears} for prefix in TEXT_PREFIXES]
    return next((names for names in (same, *dialects) if paths & set(names.values())), same)


def _with_prefix(path: str, prefix: str) -> str:
    ours = next((known for known in TEXT_PREFIXES if path.startswith(known)), "")
    return prefix + path.removeprefix(ours)


def _tensor_name(name: str, part: Part) -> str:
    return f"base_model.model.{name}.lora_{part}.weight"


def _check_fingerprint(metadata: Mapping[str, str], base: BaseSpec) -> None:
    trained_on = metadata.get(FINGERPRINT_KEY, base.fingerprint)
    if trained_on != base.fingerprint:
        raise BaseMismatch(
            f"the adapter was trained on the base with fingerprint {trained_on[:12]!r}; this one, "
            f"{base.name}, has {base.fingerprint[:12]!r}",
            field=FINGERPRINT_KEY,
        )


def _check_tensor_names(found: Iterable[str], targets: Iterable[str]) -> None:
    expected = {_tensor_name(name, part) for name in targets for part in ("A", "B")}
    unknown = sorted(set(found) - expected)
    if unknown:
        raise AdapterRefused(
            f"tensor {unknown[0]} belongs to no module that the config adapts on this base "
            f"({len(unknown)} such tensors)",
            field=unknown[0],
        )
    missing = sorted(expected.difference(found))
    if missing:
        raise AdapterRefused(
            f"tensor {missing[0]} is missing, though the config adapts its module "
            f"({len(missing)} such tensors)",
            field=missing[0],
        )


def _module_form(
    name: str, target: TargetSpec, shape: LinearShape, tensors: Mapping[str, Tensor]
) -> ModuleForm:
    a_name, b_name = _tensor_name(name, "A"), _tensor_name(name, "B")
    a, b = tensors[a_name], tensors[b_name]
    _check_shape(a_name, a, (target.rank, shape.in_features))
    _check_shape(b_name, b, (shape.out_features, target.rank))
    scaled = b.float() * target.scaling
    if not torch.isfinite(scaled).all():
        raise AdapterRefused(f"tensor {b_name} overflows float32 when scaled", field=b_name)
    return ModuleForm(a=a.float(), b=scaled)


def _check_shape(name: str, tensor: Tensor, expected: tuple[int, int]) -> None:
    if tuple(tensor.shape) != expected:
        raise AdapterRefused(
            f"tensor {name} has shape {tuple(tensor.shape)}; the config and this base expect "
            f"{expected}",
            field=name,
        )


def _digest(honoured: Mapping[str, object], tensors_sha256: str) -> str:
    """Top-level keys are sorted; patterns keep their order, because the first match decides."""
    content = [[[name, honoured[name]] for name in sorted(honoured)], tensors_sha256]
    return hashlib.sha256(json.dumps(content, separators=(",", ":")).encode()).hexdigest()


def _version() -> str:
    try:
        return version("loramux")
    except PackageNotFoundError:
        return "source"

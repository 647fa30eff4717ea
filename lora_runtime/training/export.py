"""A trained unit as PEFT's files, with the record that the parity gate compares with.

First factors are not written: ΔW is exported as a plain LoRA of twice the rank for the untouched
base, with the scaling unchanged, so that alpha grows with the rank.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_runtime.adapters.config.expert_sites import TAKEN_FOR_EXPERTS
from lora_runtime.adapters.config.layer_sites import layer_index
from lora_runtime.adapters.files.folder import read_adapter
from lora_runtime.adapters.files.parity_record import remove_parity_record, write_parity_record
from lora_runtime.adapters.files.peft_writer import PeftFiles, peft_files
from lora_runtime.adapters.files.tensor_names import Part
from lora_runtime.adapters.parity import ParityRecord
from lora_runtime.adapters.variants.mutated_base import Factors, rebalanced
from lora_runtime.core import BaseSpec
from lora_runtime.training.config import UnitConfig
from lora_runtime.training.trained_modules import Trained, TrainedModule

PARAMETER_LAYOUT = "0.21.2"
"""A version of PEFT whose order of A and B of experts is the file's; versions differ in it."""


def target_names(config: UnitConfig, base: BaseSpec) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """target_modules and target_parameters as the file names them.

    "all-linear" leaves out routers and experts. On a base with experts PEFT takes `gate_proj` and
    its like in target_modules for theirs: so plain layers of these names, of shared experts or of
    layers without experts, are written as parameters.
    """
    targets, parameters = config.target_modules, config.target_parameters
    plain = [p for p, shape in base.linears.items() if shape.experts is None]
    if targets == "all-linear":
        # A module of a list is named by its place, as layers are: its path alone means only it.
        names = {p: p.rpartition(".")[2] for p in plain if p not in base.routers}
        targets = tuple({p if name.isdecimal() else name for p, name in names.items()})
    if len(plain) == len(base.linears):
        return targets, parameters
    taken = tuple(name for name in targets if name.rpartition(".")[2] in TAKEN_FOR_EXPERTS)
    named = [p for p in plain if any(f".{p}".endswith(f".{name}") for name in taken)]
    layers = config.layers_to_transform
    named = [p for p in named if not layers or layer_index(p) in layers]
    rest = tuple(name for name in targets if name not in taken)
    return rest, (*parameters, *(f"{path}.weight" for path in named))


def adapter_config(config: UnitConfig, base: BaseSpec, growth: int = 1) -> dict[str, object]:
    """adapter_config.json of a unit whose ranks are `growth` times those of its settings."""
    return _files(config, base, {}, {}, growth).config


def adapter_files(
    config: UnitConfig,
    base: BaseSpec,
    modules: Mapping[str, Trained],
    metadata: Mapping[str, str],
) -> PeftFiles:
    """The files of a trained adapter."""
    adapted = {name: m for name, m in modules.items() if isinstance(m, TrainedModule)}
    growth = 2 if any(module.start is not None for module in adapted.values()) else 1
    dtype = getattr(torch, config.adapter_dtype)
    tensors = {
        module.holder or name: _exported(module, growth, dtype) for name, module in adapted.items()
    }
    files = _files(config, base, tensors, metadata, growth=growth)
    for name, module in modules.items():
        holder = module.holder if isinstance(module, TrainedModule) else ""
        for part, tensor in _whole_tensors(module).items():
            files.add(holder or name, part, tensor)
    return files


def _whole_tensors(module: Trained) -> dict[Part, Tensor]:
    """A module's tensors that are no factors. As PEFT's, the file has a weight that two modules
    share twice, and tokens once.
    """
    found: dict[Part, Tensor | None]
    if isinstance(module, TrainedModule):
        found = {Part.MAGNITUDE: module.magnitude}
    elif module.ids is None:
        found = {Part.WEIGHT: module.rows, Part.BIAS: module.bias}
    else:
        found = {Part.TOKENS: None if module.is_shared else module.rows}
    return {
        part: tensor.detach().float().clone()
        for part, tensor in found.items()
        if tensor is not None
    }


def export(folder: Path, files: PeftFiles, record: ParityRecord) -> None:
    """Write an adapter and, after it, what its own training says it does."""
    remove_parity_record(folder)
    files.write(folder)
    tensors_sha256 = read_adapter(folder).tensors_sha256
    write_parity_record(folder, replace(record, tensors_sha256=tensors_sha256))


def _files(
    config: UnitConfig,
    base: BaseSpec,
    tensors: Mapping[str, tuple[Tensor, Tensor]],
    metadata: Mapping[str, str],
    growth: int,
) -> PeftFiles:
    """The files of a unit whose saved ranks are `growth` times those of its settings.

    A start that is no zero doubles them: ΔW = s·(BA − B₀A₀) is one product of rank 2r. alpha grows
    too, so that the scaling s stays.
    """
    targets, parameters = target_names(config, base)
    alpha_growth = math.sqrt(growth) if config.has_root_scaling else growth
    files = peft_files(
        rank=growth * config.rank,
        alpha=alpha_growth * config.alpha,
        use_rslora=config.has_root_scaling,
        target_modules=targets,
        tensors=tensors,
        base=base,
        rank_pattern={key: growth * rank for key, rank in config.rank_pattern.items()},
        alpha_pattern={key: alpha_growth * alpha for key, alpha in config.alpha_pattern.items()},
        metadata=metadata,
    )
    if parameters:
        files.config["target_parameters"] = sorted(parameters)
        files.config["peft_version"] = PARAMETER_LAYOUT
    files.config["use_dora"] = config.has_gain
    files.config["init_lora_weights"] = True
    files.config["layers_to_transform"] = list(config.layers_to_transform) or None
    files.config["modules_to_save"] = list(config.modules_to_save) or None
    files.config["trainable_token_indices"] = list(config.trainable_token_indices) or None
    if config.ensure_weight_tying:
        files.config["ensure_weight_tying"] = True
    files.config["layer_replication"] = [list(pair) for pair in config.layer_replication] or None
    return files


def _exported(module: TrainedModule, growth: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A and B, unscaled, of `growth` times the parameters' rank. With first factors from ΔW's
    singular vectors, so that rounding the file to bfloat16 costs ΔW as little as a plain LoRA.
    """
    factors = Factors(*(part.detach() for part in module.unscaled()))
    if module.start is not None:
        factors = rebalanced(factors)
    if module.num_experts > 1:  # PEFT's B has the columns of all experts for one rank together
        b = factors.b.unflatten(1, (module.num_experts, -1)).transpose(1, 2).flatten(1)
        factors = Factors(factors.a, b)
    missing = growth * len(module.a) - len(factors.a)
    a, b = (part.to(dtype).contiguous() for part in factors)
    return F.pad(a, (0, 0, 0, missing)), F.pad(b, (0, missing))

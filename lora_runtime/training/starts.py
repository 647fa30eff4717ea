"""The modules of a unit and their first weights, from its settings and the base.

What a setting means is decided where adapters are read: the unit's own adapter_config.json is
parsed against the base before there is a weight, so training and serving cannot disagree on it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import Parameter

from lora_runtime.adapters.config.layer_sites import Site
from lora_runtime.adapters.config.peft_config import AdapterSpec, TargetSpec, parse_config
from lora_runtime.adapters.variants.mutated_base import Factors
from lora_runtime.base.loader import Base
from lora_runtime.core import BaseSpec
from lora_runtime.errors import AdapterRefused, ConfigError
from lora_runtime.training.calibration import calibration_rows, input_rms
from lora_runtime.training.config import UnitConfig
from lora_runtime.training.data import Example
from lora_runtime.training.export import adapter_config
from lora_runtime.training.fields import nearest
from lora_runtime.training.inits import (
    FACTOR_OF_WEIGHT,
    LOST_BY_QUANTISATION,
    factors_of_weight,
    kaiming,
    quantisation_loss,
)
from lora_runtime.training.variants import TrainedModule, norms


def adapter_spec(config: UnitConfig, base: BaseSpec) -> AdapterSpec:
    """What a unit's settings mean on a base. Raises ConfigError naming the setting."""
    _check_names(config, base)
    try:
        spec = parse_config(adapter_config(config, base), base)
    except AdapterRefused as error:
        raise ConfigError(f"unit {config.name!r}: {error}", field=error.field) from error
    for site in spec.targets:
        if site.path not in base.linears:
            raise ConfigError(
                f"unit {config.name!r}: target_modules selects {site.path}; only the linear layers "
                "inside the decoder are trained",
                field="target_modules",
            )
    return spec


def start_modules(
    config: UnitConfig, spec: AdapterSpec, base: Base, seed: int, examples: Sequence[Example]
) -> dict[str, TrainedModule]:
    """Name in the trained model → its first weights, drawn on the CPU in the modules' order.

    float32, or float64 on a float64 base, on the base's device. `examples`: of the unit's data, on
    which some inits measure the base. Raises ConfigError.
    """
    generator = torch.Generator().manual_seed(seed)
    measured: Mapping[tuple[str, int], Tensor] = {}
    if config.start == "qera":
        paths = {site.path for site in spec.targets}
        measured = input_rms(base, spec.layer_map, paths, calibration_rows(examples, seed))
    try:
        return {
            site.name: _start(config, base, site, target, generator, measured)
            for site, target in spec.targets.items()
        }
    except AdapterRefused as error:
        raise ConfigError(
            f"unit {config.name!r}: init {config.start!r} needs the base's own weights: {error}",
            field="init",
        ) from error


def _start(
    config: UnitConfig,
    base: Base,
    site: Site,
    target: TargetSpec,
    generator: torch.Generator,
    measured: Mapping[tuple[str, int], Tensor],
) -> TrainedModule:
    path, start = site.path, None
    if FACTOR_OF_WEIGHT.fullmatch(config.start):
        _check_rank(config, base, path, target.rank)
        weight = base.weights.serving(path)
        found = factors_of_weight(config.start, weight, target.rank, target.scaling, generator)
        start = Factors(*(part.contiguous() for part in found))
        factors = Factors(*map(torch.zeros_like, start))
    elif config.start in LOST_BY_QUANTISATION:
        rms = measured.get((path, site.replica))
        factors = _lost_by_quantisation(config, base, path, target, rms)
    else:
        factors = kaiming(base.spec.linears[path], target.rank, generator)
    a, b = (_parameter(part, base) for part in factors)
    module = TrainedModule(
        path=path, replica=site.replica, scaling=target.scaling, a=a, b=b, start=start
    )
    return _with_magnitude(module, base) if config.has_gain else module


def _with_magnitude(module: TrainedModule, base: Base) -> TrainedModule:
    """DoRA's first magnitude: the rows' norms as they are, so the gain is exactly 1."""
    a, b = module.unscaled()
    first = norms(base.weights, module.path, Factors(a, module.scaling * b))
    return replace(module, magnitude=Parameter(first))


def _parameter(values: Tensor, base: Base) -> Parameter:
    dtype = torch.promote_types(base.dtype, torch.float32)
    return Parameter(values.to(base.device, dtype).contiguous())


def _lost_by_quantisation(
    config: UnitConfig, base: Base, path: str, target: TargetSpec, rms: Tensor | None
) -> Factors:
    if base.spec.quantization == "none":
        raise ConfigError(
            f"unit {config.name!r}: init is {config.start!r}, which starts at what quantisation "
            "lost, and this base is not quantised; use 'default' or 'pissa'",
            field="init",
        )
    _check_rank(config, base, path, target.rank)
    serving = base.weights.serving(path)
    original = base.weights.original(path).to(serving)
    return quantisation_loss(original, serving, target.rank, target.scaling, rms)


def _check_rank(config: UnitConfig, base: Base, path: str, rank: int) -> None:
    shape = base.spec.linears[path]
    largest = min(shape.in_features, shape.out_features)
    if rank > largest:
        raise ConfigError(
            f"unit {config.name!r}: rank is {rank}, and {path} has only {largest} singular values "
            f"for init {config.start!r}; lower it, for some modules by rank_pattern",
            field="rank",
        )


def _check_names(config: UnitConfig, base: BaseSpec) -> None:
    """An end of a module's path that matches nothing is answered with the nearest that does."""
    for target in config.target_modules if config.target_modules != "all-linear" else ():
        if not any(f".{path}".endswith(f".{target}") for path in base.shapes):
            names = sorted({path.rpartition(".")[2] for path in base.linears})
            raise ConfigError(
                f"unit {config.name!r}: target_modules has {target!r}, which the base has not; "
                f"{nearest(target, names)}",
                field="target_modules",
            )

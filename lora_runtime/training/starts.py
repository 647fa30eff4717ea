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

from lora_runtime.adapters.config.expert_sites import parameter_names
from lora_runtime.adapters.config.layer_sites import Site, sites_of
from lora_runtime.adapters.config.matching import PatternMatcher, likely_meant
from lora_runtime.adapters.config.peft_config import AdapterSpec, TargetSpec, parse_config
from lora_runtime.adapters.variants.mutated_base import Factors
from lora_runtime.base.loader import Base
from lora_runtime.core import BaseSpec
from lora_runtime.errors import AdapterRefused, ConfigError
from lora_runtime.settings import in_group
from lora_runtime.training.calibration import calibration_rows, input_rms
from lora_runtime.training.config import ADAPTER, DATA, UnitConfig
from lora_runtime.training.data import Example
from lora_runtime.training.export import adapter_config
from lora_runtime.training.inits import (
    FACTOR_OF_WEIGHT,
    LOST_BY_QUANTISATION,
    embedding_start,
    factors_of_weight,
    kaiming,
    quantisation_loss,
)
from lora_runtime.training.trained_modules import Trained, TrainedModule, TrainedRows, norms


def start_alike(one: UnitConfig, other: UnitConfig) -> bool:
    """True when units of these settings and one seed have the same first weights: nothing but data
    and adapter decides them.
    """
    deciding = in_group(UnitConfig, DATA, ADAPTER)
    return all(getattr(one, name) == getattr(other, name) for name in deciding)


def adapter_spec(config: UnitConfig, base: BaseSpec) -> AdapterSpec:
    """A unit's settings parsed against a base, as an adapter's files are when they are read.

    Raises ConfigError naming the setting.
    """
    _check_names(config, base)
    try:
        spec = parse_config(adapter_config(config, base), base)
    except AdapterRefused as error:
        raise ConfigError(f"unit {config.name!r}: {error}", field=error.field) from error
    _check_patterns(config, spec)
    if config.router_aux_loss and not base.routers:
        raise ConfigError(
            f"unit {config.name!r}: router_aux_loss is {config.router_aux_loss}, and this base has "
            "no routers; leave it at 0",
            field="router_aux_loss",
        )
    if config.start == "loftq" and any(site.path not in base.linears for site in spec.targets):
        raise ConfigError(
            f"unit {config.name!r}: init is 'loftq', which starts at what quantisation lost, and "
            "the embedding and the output layer are not quantised; use 'default'",
            field="init",
        )
    return spec


def _check_patterns(config: UnitConfig, spec: AdapterSpec) -> None:
    """Raise ConfigError for a pattern that none of the adapted modules matches. PEFT passes over
    it, and the module that was meant would get the rank or alpha of all others.
    """
    names, matcher = [site.name for site in spec.targets], PatternMatcher()
    for field in ("rank_pattern", "alpha_pattern"):
        for pattern, value in getattr(config, field).items():
            is_meant = matcher.first_match({pattern: value}, field)
            if all(is_meant(name) is None for name in names):
                raise ConfigError(
                    f"unit {config.name!r}: {field} has {pattern!r}, which no adapted module's "
                    f"path ends with; they are like {names[0]}",
                    field=field,
                )


def start_modules(
    config: UnitConfig, spec: AdapterSpec, base: Base, seed: int, examples: Sequence[Example]
) -> dict[str, Trained]:
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
        modules: dict[str, TrainedModule] = {}
        for site, target in spec.targets.items():
            if spec.ties_head and site.path == base.spec.head:
                tied = modules[base.spec.embedding]
                modules[site.name] = _tied(config, base, site.path, target, tied)
            else:
                modules[site.name] = _start(config, base, site, target, generator, measured)
        return modules | _trained_rows(spec, base)
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
    """A module at the start of training, see `UnitConfig.init`."""
    path, start = site.path, None
    shape = base.spec.shapes[path]
    if shape.experts is not None and config.start != "default":
        raise ConfigError(
            f"unit {config.name!r}: init is {config.start!r}, which has no meaning for a mixture's "
            f"experts as {path}; use 'default', or leave them out of target_parameters",
            field="init",
        )
    if path == base.spec.embedding:
        is_tied = config.ensure_weight_tying and base.spec.is_tied
        factors = embedding_start(shape, target.rank, generator, is_tied=is_tied)
    elif FACTOR_OF_WEIGHT.fullmatch(config.start):
        _check_rank(config, base, path, target.rank)
        weight = base.weights.serving(path)
        found = factors_of_weight(config.start, weight, target.rank, target.scaling, generator)
        start = Factors(*(part.contiguous() for part in found))
        factors = Factors(*map(torch.zeros_like, start))
    elif config.start in LOST_BY_QUANTISATION:
        rms = measured[path, site.replica] if config.start == "qera" else None
        factors = _lost_by_quantisation(config, base, path, target, rms)
    else:
        factors = kaiming(shape, target.rank * shape.num_experts, generator)
    a, b = (_parameter(part, base) for part in factors)
    module = TrainedModule(
        path=path,
        replica=site.replica,
        scaling=target.scaling,
        a=a,
        b=b,
        start=start,
        num_experts=shape.num_experts,
        holder=site.holder,
    )
    return _with_magnitude(module, base) if config.has_gain else module


def _with_magnitude(module: TrainedModule, base: Base) -> TrainedModule:
    """DoRA's first magnitude: the rows' norms as they are, so the gain is exactly 1."""
    a, b = module.unscaled()
    first = norms(base.weights, module.path, Factors(a, module.scaling * b))
    if not first.all():
        raise ConfigError(
            f"{module.path} has {int((first == 0).sum())} rows of zeros, the first of them "
            f"{int(first.argmin())}: DoRA divides by their length; train it without use_dora",
            field="use_dora",
        )
    return replace(module, magnitude=Parameter(first))


def _tied(
    config: UnitConfig, base: Base, path: str, target: TargetSpec, embedding: TrainedModule
) -> TrainedModule:
    """The output layer with the embedding's factors."""
    module = replace(
        embedding, path=path, scaling=target.scaling, magnitude=None, is_transposed=True
    )
    return _with_magnitude(module, base) if config.has_gain else module


def _trained_rows(spec: AdapterSpec, base: Base) -> dict[str, TrainedRows]:
    """Name in the trained model → rows of the vocabulary, which start as the base's."""
    found: dict[str, TrainedRows] = {}
    names = {site.path: site.name for site in spec.sites}
    vocabulary = spec.vocabulary
    for path, ids in {**dict.fromkeys(vocabulary.replaced), **vocabulary.tokens}.items():
        values = base.weights.vocabulary_rows(path, slice(None))
        bias = base.weights.bias(path) if ids is None else None
        found[names[path]] = TrainedRows(
            path=path,
            rows=_parameter(values.clone() if ids is None else values[list(ids)], base),
            ids=None if ids is None else torch.tensor(ids, device=base.device),
            bias=None if bias is None else _parameter(bias.clone(), base),
        )
    for path, source in vocabulary.tied_to.items():
        found[names[path]] = replace(found[names[source]], path=path, is_shared=True)
    return found


def master_dtype(base: Base) -> torch.dtype:
    """The dtype of trained weights: float32, or float64 on a float64 base."""
    return torch.promote_types(base.dtype, torch.float32)


def _parameter(values: Tensor, base: Base) -> Parameter:
    return Parameter(values.to(base.device, master_dtype(base)).contiguous())


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
    shape = base.spec.shapes[path]
    largest = min(shape.in_features, shape.out_features)
    if rank > largest:
        raise ConfigError(
            f"unit {config.name!r}: rank is {rank}, and {path} has only {largest} singular values "
            f"for init {config.start!r}; lower it, for some modules by rank_pattern",
            field="rank",
        )


def _check_names(config: UnitConfig, base: BaseSpec) -> None:
    """Raise ConfigError for a target that matches nothing, proposing the nearest name."""
    modules = () if config.target_modules == "all-linear" else config.target_modules
    if "all-linear" in modules:
        raise ConfigError(
            f"unit {config.name!r}: target_modules is a list with 'all-linear' in it; write "
            "target_modules: all-linear, without other names",
            field="target_modules",
        )
    linears = tuple(path for path, shape in base.shapes.items() if shape.experts is None)
    has_experts = len(linears) < len(base.shapes)
    hint = "; experts are named in target_parameters" if has_experts else ""
    _check_targets(config, "target_modules", modules, linears, hint)
    sites = sites_of(base, {path: path for path in base.shapes}, None)
    weights = parameter_names(sites, base)
    _check_targets(config, "target_parameters", config.target_parameters, weights)


def _check_targets(
    config: UnitConfig, field: str, targets: Sequence[str], paths: Sequence[str], hint: str = ""
) -> None:
    """Raise ConfigError for a target that ends no path, proposing the nearest."""
    kind = "module" if field == "target_modules" else "weight"
    for target in targets:
        if not any(f".{path}".endswith(f".{target}") for path in paths):
            raise ConfigError(
                f"unit {config.name!r}: {field} has {target!r}, and the base has no such {kind}; "
                f"{likely_meant(target, paths)}{hint}",
                field=field,
            )

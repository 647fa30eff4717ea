"""adapter_config.json → what it asks of one base: modules, ranks and scalings; or a refusal.

Knows PEFT's fields (`config_fields.py`) and the base's module names; knows no tensor.
Source: peft 0.21.2, `LoraConfig` and `LoraModel._create_and_replace`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from lora_runtime.adapters.config_fields import FIELDS, Treatment
from lora_runtime.adapters.matching import PatternMatcher, Selection, select_modules
from lora_runtime.core import LinearShape
from lora_runtime.errors import AdapterRefused

MAX_RANK = 1 << 16
MAX_ALPHA = 1e12

Number = TypeVar("Number", int, float)


@dataclass(frozen=True, slots=True)
class TargetSpec:
    """One adapted module: y += scaling · B(Ax) with A (rank, in), B (out, rank)."""

    rank: int
    alpha: float
    scaling: float
    """alpha / rank, or alpha / sqrt(rank) with use_rslora."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterSpec:
    """What a config asks for, on one base."""

    variant: str
    """`lora` or `rslora`."""
    targets: Mapping[str, TargetSpec]
    """Module path in the base → its numbers, in the base's order."""
    honoured: Mapping[str, object]
    """Fields that decide the result; sets are sorted, patterns keep their order."""
    inert: Mapping[str, str]
    """Fields present without effect at serving, each with its reason."""


def parse_config(
    config: Mapping[str, object],
    linears: Mapping[str, LinearShape],
    num_layers: int,
    *,
    trained_names: Mapping[str, str] | None = None,
) -> AdapterSpec:
    """Resolve a config against the base's linears, exactly as PEFT would, or refuse it.

    `trained_names` maps a base path to the module's name in the model the adapter was trained in,
    where that differs: patterns are matched against that name.

    Raises: AdapterRefused; `field` is the key of the config.
    """
    _check_fields(config)
    fields = _read_honoured(config)
    names = {(trained_names or {}).get(path, path): path for path in linears}
    matcher = PatternMatcher()
    selected = select_modules(fields.selection, names, num_layers, matcher)
    return AdapterSpec(
        variant="rslora" if fields.use_rslora else "lora",
        targets=_targets(fields, {n: path for n, path in names.items() if n in selected}, matcher),
        honoured=_honoured(fields),
        inert=_inert(config),
    )


def _is_neutral(value: object) -> bool:
    return value is None or value is False or (isinstance(value, str | list | dict) and not value)


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _check_fields(config: Mapping[str, object]) -> None:
    for name, value in config.items():
        if _is_neutral(value):
            continue
        rule = FIELDS.get(name)
        if rule is None:
            raise AdapterRefused(
                f"{_shown(name)} is {_shown(value)}; no such field is known, so its effect cannot "
                "be honoured. Remove it if it has none",
                field=name[:80],
            )
        is_open = rule.treatment is not Treatment.REFUSED and not rule.accepted
        if not is_open and value not in rule.accepted:
            raise AdapterRefused(f"{name} is {_shown(value)}: {rule.reason}", field=name)
    if config.get("peft_type") != "LORA":
        raise AdapterRefused("peft_type is missing; it must be 'LORA'", field="peft_type")


def _inert(config: Mapping[str, object]) -> dict[str, str]:
    return {
        name: rule.reason
        for name, rule in FIELDS.items()
        if rule.treatment is Treatment.INERT and not _is_neutral(config.get(name))
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class _HonouredFields:
    """The honoured fields, typed, with PEFT's defaults filled in."""

    r: int
    lora_alpha: float
    use_rslora: bool
    rank_pattern: dict[str, int]
    alpha_pattern: dict[str, float]
    selection: Selection


def _read_honoured(config: Mapping[str, object]) -> _HonouredFields:
    use_rslora = config.get("use_rslora") or False
    if use_rslora not in (True, False):
        raise _wrong_type("use_rslora", use_rslora, "true or false")
    return _HonouredFields(
        r=_rank(config.get("r", 8), "r"),
        lora_alpha=_alpha(config.get("lora_alpha", 8), "lora_alpha"),
        use_rslora=bool(use_rslora),
        rank_pattern=_pattern_values(config, "rank_pattern", _rank),
        alpha_pattern=_pattern_values(config, "alpha_pattern", _alpha),
        selection=_selection(config),
    )


def _selection(config: Mapping[str, object]) -> Selection:
    targets = _names(config, "target_modules")
    layers_pattern = _names(config, "layers_pattern")
    selection = Selection(
        target_modules=targets,
        exclude_modules=_names(config, "exclude_modules"),
        layers_to_transform=_layers(config.get("layers_to_transform")),
        layers_pattern=(layers_pattern,) if isinstance(layers_pattern, str) else layers_pattern,
    )
    if not targets:
        raise AdapterRefused(
            "target_modules is missing; list the modules the adapter changes",
            field="target_modules",
        )
    if selection.layers_pattern and not selection.layers_to_transform:
        raise AdapterRefused(
            "layers_pattern needs layers_to_transform, which is not set", field="layers_pattern"
        )
    if selection.layers_to_transform and isinstance(targets, str):
        raise AdapterRefused(
            "layers_to_transform needs target_modules to be a list", field="layers_to_transform"
        )
    return selection


def _honoured(fields: _HonouredFields) -> dict[str, object]:
    """What decides the result, as plain JSON values: the part of a config that names an adapter."""
    selection = fields.selection
    values: dict[str, object] = {
        "peft_type": "LORA",
        "r": fields.r,
        "lora_alpha": fields.lora_alpha,
        "use_rslora": fields.use_rslora,
        "rank_pattern": fields.rank_pattern,
        "alpha_pattern": fields.alpha_pattern,
        "target_modules": _as_json(selection.target_modules),
        "exclude_modules": _as_json(selection.exclude_modules),
        "layers_to_transform": sorted(selection.layers_to_transform),
        "layers_pattern": list(selection.layers_pattern),
    }
    return {name: value for name, value in values.items() if not _is_neutral(value)}


def _as_json(names: str | tuple[str, ...]) -> str | list[str]:
    return names if isinstance(names, str) else sorted(set(names))


def _targets(
    fields: _HonouredFields, paths: Mapping[str, str], matcher: PatternMatcher
) -> dict[str, TargetSpec]:
    rank_of = matcher.first_match(fields.rank_pattern, "rank_pattern")
    alpha_of = matcher.first_match(fields.alpha_pattern, "alpha_pattern")
    targets = {}
    for name, path in paths.items():
        rank, alpha = rank_of(name), alpha_of(name)
        rank = fields.r if rank is None else rank
        alpha = fields.lora_alpha if alpha is None else alpha
        scaling = alpha / (math.sqrt(rank) if fields.use_rslora else rank)
        targets[path] = TargetSpec(rank, alpha, scaling)
    return targets


def _wrong_type(field: str, value: object, expected: str) -> AdapterRefused:
    return AdapterRefused(f"{field} is {_shown(value)}; it must be {expected}", field=field)


def _rank(value: object, field: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= MAX_RANK:
        raise _wrong_type(field, value, f"an integer from 1 to {MAX_RANK}")
    return value


def _alpha(value: object, field: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= MAX_ALPHA:
        raise _wrong_type(field, value, f"a number of at most {MAX_ALPHA:g}")
    return value


def _pattern_values(
    config: Mapping[str, object], field: str, read: Callable[[object, str], Number]
) -> dict[str, Number]:
    patterns = config.get(field) or {}
    if not isinstance(patterns, dict):
        raise _wrong_type(field, patterns, "an object of patterns and numbers")
    return {pattern: read(value, field) for pattern, value in patterns.items()}


def _names(config: Mapping[str, object], field: str) -> str | tuple[str, ...]:
    value = config.get(field) or ()
    if isinstance(value, str):
        return value
    if isinstance(value, list | tuple) and all(isinstance(name, str) for name in value):
        return tuple(value)
    raise _wrong_type(field, value, "a pattern or a list of names")


def _layers(value: object) -> tuple[int, ...]:
    layers = [] if value is None else value if isinstance(value, list) else [value]
    for layer in layers:
        if not isinstance(layer, int) or isinstance(layer, bool):
            raise _wrong_type("layers_to_transform", layer, "a layer index or a list of them")
    return tuple(layers)

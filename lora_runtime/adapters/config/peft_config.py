"""What an adapter_config.json asks of one base: modules, ranks and scalings; or a refusal.

Knows PEFT's fields (`fields.py`) and the base's module names; knows no tensor.
Source: peft 0.21.2, `LoraConfig` and `LoraModel._create_and_replace`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from lora_runtime.adapters.config import values as read
from lora_runtime.adapters.config.conflicts import check_conflicts, mutates_base
from lora_runtime.adapters.config.expert_sites import (
    PerExpert,
    is_mixture,
    likely_parameter,
    parameter_names,
    parameter_sites,
    split_experts,
)
from lora_runtime.adapters.config.fields import FIELDS, Treatment
from lora_runtime.adapters.config.layer_sites import (
    Site,
    parse_layer_map,
    sites_of,
)
from lora_runtime.adapters.config.matching import (
    PatternMatcher,
    Selection,
    likely_meant,
    unmatched_targets,
)
from lora_runtime.adapters.config.target_sites import select_sites
from lora_runtime.adapters.config.values import Config, is_neutral, shown
from lora_runtime.adapters.config.verdicts import field_refusals
from lora_runtime.adapters.config.vocabulary_fields import VocabularySpec, parse_vocabulary
from lora_runtime.core import BaseSpec
from lora_runtime.errors import AdapterRefused

PLAIN_INITS = ("gaussian", "eva", "orthogonal", "mica")
"""Inits that leave the base as it was, beside true and false."""
_LOFTQ_BITS = {"nf4": 4, "int8": 8}
"""Format of the base that LoftQ leaves → its loftq_bits; PEFT has no other."""


@dataclass(frozen=True, slots=True)
class TargetSpec:
    """One adapted module: y += scaling · B(Ax) with A (rank, in), B (out, rank)."""

    rank: int
    alpha: float
    scaling: float
    """alpha / rank, or alpha / sqrt(rank) with use_rslora."""
    rank_pattern: str | None = None
    """The key of rank_pattern that gives the rank; None where `r` does."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterSpec:
    """What a config asks for, on one base."""

    variant: str
    """`lora`, `rslora`, `dora+pissa`, …: for people."""
    sites: tuple[Site, ...]
    """Every module at every visit, adapted or not."""
    targets: Mapping[Site, TargetSpec]
    """The adapted ones, in the order of `sites`."""
    ties_head: bool
    """True when the output layer's A and B are the embedding's, transposed."""
    initialisation: str
    """`pissa`, `pissa_niter_N` or `olora` where the base was changed at the start, else empty."""
    use_dora: bool
    bias: str
    """Whose trained biases the files hold: `none`, `lora_only` (of the targets) or `all`."""
    lora_bias: bool
    vocabulary: VocabularySpec
    layer_map: tuple[int, ...] | None
    invocation_tokens: tuple[int, ...]
    honoured: Mapping[str, object]
    """Fields that decide the result; sets are sorted, patterns keep their order."""
    inert: Mapping[str, str]
    """Fields present without effect at serving, each with its reason."""
    unmatched: Mapping[str, tuple[str, ...]]
    """Field → its entries that mean nothing of this base, where others do: PEFT passes them over.
    No tensor is lost with them: one that belongs to no target is refused later."""
    peft_version: str = ""
    """Of the writer, where the file says it."""


def parse_config(
    config: Config,
    base: BaseSpec,
    *,
    trained_names: Mapping[str, str] | None = None,
    experts: PerExpert | None = None,
) -> AdapterSpec:
    """Resolve a config against a base, exactly as PEFT would, or refuse it.

    `trained_names` maps every path of `base.shapes` to the module's name in the model the adapter
    was trained in, where that differs: patterns are matched against that name. `experts`: how that
    model named each expert's own layers, where it had such.

    Raises: AdapterRefused; `field` is the key of the config.
    """
    _check_fields(config)
    names = trained_names or {path: path for path in base.shapes}
    layer_map = parse_layer_map(config.get("layer_replication"), base)
    sites = sites_of(base, names, layer_map)
    if experts is not None:
        sites = split_experts(sites, base, experts)
    scalings = _Scalings.of(config)
    selection = _selection(config)
    vocabulary = parse_vocabulary(config, base, names)
    initialisation = _initialisation(config, base)
    matcher = PatternMatcher()
    depth = base.num_layers if layer_map is None else len(layer_map)
    chosen, ties_head = select_sites(selection, sites, depth, base, vocabulary, config, matcher)
    return AdapterSpec(
        variant=_variant(config, initialisation),
        sites=sites,
        targets=scalings.targets(chosen, matcher),
        ties_head=ties_head,
        initialisation=initialisation,
        use_dora=read.flag(config, "use_dora"),
        bias=_bias(config),
        lora_bias=read.flag(config, "lora_bias"),
        vocabulary=vocabulary,
        layer_map=layer_map,
        invocation_tokens=_invocation_tokens(config, base),
        honoured=_honoured(config, scalings, selection),
        inert=_inert(config),
        unmatched=_unmatched(selection, sites, base),
        peft_version=str(config.get("peft_version") or ""),
    )


def passed_over(spec: AdapterSpec, base: BaseSpec) -> list[str]:
    """A sentence for each field with entries that mean nothing, with the name likely meant."""
    names = {
        "target_modules": [site.name for site in spec.sites if not is_mixture(site, base)],
        "target_parameters": parameter_names(spec.sites, base),
    }
    kinds = {
        "target_modules": ("module of this base", likely_meant),
        "target_parameters": ("weight of this base that can be adapted", likely_parameter),
    }
    return [
        f"{field} also names {', '.join(repr(name[:40]) for name in entries[:8])}: no "
        f"{kinds[field][0]}, passed over as in PEFT; {kinds[field][1](entries[0], names[field])}"
        for field, entries in spec.unmatched.items()
    ]


def _unmatched(
    selection: Selection, sites: tuple[Site, ...], base: BaseSpec
) -> dict[str, tuple[str, ...]]:
    names = [site.name for site in sites if not is_mixture(site, base)]
    _, parameters = parameter_sites(selection.target_parameters, sites, base)
    found = {
        "target_modules": unmatched_targets(selection, names),
        "target_parameters": parameters,
    }
    return {name: tuple(entries) for name, entries in found.items() if entries}


def _check_fields(config: Config) -> None:
    for refusal in field_refusals(config):
        raise refusal
    if config.get("peft_type") != "LORA":
        raise AdapterRefused("peft_type is missing; it must be 'LORA'", field="peft_type")
    check_conflicts(config)


def _initialisation(config: Config, base: BaseSpec) -> str:
    field, value = "init_lora_weights", config.get("init_lora_weights")
    if value is None or isinstance(value, bool) or value in PLAIN_INITS:
        return ""
    if isinstance(value, str) and re.fullmatch(r"pissa(_niter_\d{1,4})?|olora", value):
        return value
    if value == "loftq":
        _check_loftq(config.get("loftq_config"), base)
        return ""
    raise AdapterRefused(
        f"{field} is {shown(value)}, which changed the base in a way that cannot be recovered from "
        "the adapter; save it with PEFT's path_initial_model_for_weight_conversion",
        field=field,
    )


def _check_loftq(value: object, base: BaseSpec) -> None:
    """Refuse LoftQ but that of one iteration on a base of this format, whose base is q(W): ours."""
    settings = value if isinstance(value, dict) else {}
    bits = settings.get("loftq_bits", 4)
    formats = [name for name, own in _LOFTQ_BITS.items() if own == bits]
    is_served = formats and settings.get("loftq_iter", 1) == 1
    if not is_served or settings.keys() - {"loftq_bits", "loftq_iter"}:
        raise AdapterRefused(
            f"loftq_config is {shown(value)}: only 4 or 8 bits and one iteration leave the "
            "quantised base as it is; more iterations train on a base of their own. Train with "
            "loftq_iter 1",
            field="loftq_config",
        )
    if base.quantization not in formats:
        raise AdapterRefused(
            f"init_lora_weights is 'loftq' of {bits} bits, whose base is the {formats[0]} one; "
            f"this base is held as {base.quantization!r}. Serve it with quantization {formats[0]}",
            field="init_lora_weights",
        )


def _bias(config: Config) -> str:
    value = config.get("bias") or "none"
    if value not in ("none", "all", "lora_only"):
        raise read.wrong_value("bias", value, "'none', 'all' or 'lora_only'")
    return str(value)


def _invocation_tokens(config: Config, base: BaseSpec) -> tuple[int, ...]:
    field = "alora_invocation_tokens"
    value = config.get(field)
    return () if is_neutral(value) else read.token_ids(value, field, base.vocab_size)


def _variant(config: Config, initialisation: str) -> str:
    facts = {
        "alora": not is_neutral(config.get("alora_invocation_tokens")),
        "dora": bool(config.get("use_dora")),
        initialisation.partition("_")[0]: bool(initialisation),
        "loftq": config.get("init_lora_weights") == "loftq",
        "rslora": bool(config.get("use_rslora")),
        "replicated": not is_neutral(config.get("layer_replication")),
    }
    return "+".join(name for name, holds in facts.items() if holds) or "lora"


def _inert(config: Config) -> dict[str, str]:
    inert = {
        name: rule.reason
        for name, rule in FIELDS.items()
        if rule.treatment is Treatment.INERT and not is_neutral(config.get(name))
    }
    if not is_neutral(config.get("init_lora_weights")) and not mutates_base(config):
        inert["init_lora_weights"] = FIELDS["init_lora_weights"].reason
    return inert


@dataclass(frozen=True, slots=True, kw_only=True)
class _Scalings:
    """The fields that decide ranks and scalings, with PEFT's defaults filled in."""

    r: int
    lora_alpha: float
    use_rslora: bool
    rank_pattern: dict[str, int]
    alpha_pattern: dict[str, float]

    @classmethod
    def of(cls, config: Config) -> _Scalings:
        return cls(
            r=read.rank(config.get("r", 8), "r"),
            lora_alpha=read.alpha(config.get("lora_alpha", 8), "lora_alpha"),
            use_rslora=read.flag(config, "use_rslora"),
            rank_pattern=read.patterns(config, "rank_pattern", read.rank),
            alpha_pattern=read.patterns(config, "alpha_pattern", read.alpha),
        )

    def targets(self, sites: tuple[Site, ...], matcher: PatternMatcher) -> dict[Site, TargetSpec]:
        own = {pattern: (rank, pattern) for pattern, rank in self.rank_pattern.items()}
        rank_of = matcher.first_match(own, "rank_pattern")
        alpha_of = matcher.first_match(self.alpha_pattern, "alpha_pattern")
        targets = {}
        for site in sites:
            rank, pattern = rank_of(site.name) or (self.r, None)
            alpha = alpha_of(site.name)
            alpha = self.lora_alpha if alpha is None else alpha
            scaling = alpha / (math.sqrt(rank) if self.use_rslora else rank)
            targets[site] = TargetSpec(rank, alpha, scaling, pattern)
        return targets


def _selection(config: Config) -> Selection:
    targets, parameters = read.names(config, "target_modules"), _parameters(config)
    layers_pattern = read.names(config, "layers_pattern")
    selection = Selection(
        target_modules=targets,
        target_parameters=parameters,
        exclude_modules=read.names(config, "exclude_modules"),
        layers_to_transform=read.layers(config, "layers_to_transform"),
        layers_pattern=(layers_pattern,) if isinstance(layers_pattern, str) else layers_pattern,
    )
    if not targets and not parameters:
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


def _parameters(config: Config) -> tuple[str, ...]:
    found = read.names(config, "target_parameters")
    if isinstance(found, str):
        raise read.wrong_value("target_parameters", found, "a list of names of parameters")
    return tuple(sorted(set(found)))


_VERBATIM = (
    "modules_to_save", "trainable_token_indices", "ensure_weight_tying", "layer_replication",
    "alora_invocation_tokens", "use_dora", "lora_bias",
)  # fmt: skip
"""Honoured fields that enter the digest with the value they have in the file."""


def _honoured(config: Config, scalings: _Scalings, selection: Selection) -> dict[str, object]:
    """What decides the result, as plain JSON values: what of a config enters the digest."""
    values: dict[str, object] = {
        "peft_type": "LORA",
        "r": scalings.r,
        "lora_alpha": scalings.lora_alpha,
        "use_rslora": scalings.use_rslora,
        "rank_pattern": scalings.rank_pattern,
        "alpha_pattern": scalings.alpha_pattern,
        "target_modules": _as_json(selection.target_modules),
        "target_parameters": list(selection.target_parameters),
        "exclude_modules": _as_json(selection.exclude_modules),
        "layers_to_transform": sorted(selection.layers_to_transform),
        "layers_pattern": list(selection.layers_pattern),
        "bias": None if _bias(config) == "none" else _bias(config),
        "init_lora_weights": config["init_lora_weights"] if mutates_base(config) else None,
        **{name: config.get(name) for name in _VERBATIM},
    }
    return {name: value for name, value in values.items() if not is_neutral(value)}


def _as_json(names: str | tuple[str, ...]) -> str | list[str]:
    return names if isinstance(names, str) else sorted(set(names))

"""Which sites an adapter targets, embedding and output layer included. Plain Python.

Source: peft 0.21.2, `inject_adapter`, `_check_tied_modules`, `_add_targets_to_tie`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from lora_runtime.adapters.config.conflicts import mutates_base
from lora_runtime.adapters.config.expert_sites import (
    is_mixture,
    likely_parameter,
    parameter_names,
    parameter_sites,
    refuse_expert_biases,
)
from lora_runtime.adapters.config.layer_sites import Site
from lora_runtime.adapters.config.matching import (
    PatternMatcher,
    Selection,
    select_modules,
)
from lora_runtime.adapters.config.values import Config, flag, refused
from lora_runtime.adapters.config.vocabulary_fields import VocabularySpec
from lora_runtime.core import BaseSpec
from lora_runtime.errors import AdapterRefused

EMBEDDING_LAYER_NAMES = ("embed_tokens", "lm_head")
"""Last names by which PEFT knows the ends of a model."""


def select_sites(
    selection: Selection,
    sites: tuple[Site, ...],
    num_layers: int,
    base: BaseSpec,
    vocabulary: VocabularySpec,
    config: Config,
    matcher: PatternMatcher,
) -> tuple[tuple[Site, ...], bool]:
    """The targeted sites in their order, and whether the output layer shares the embedding's A, B.

    `num_layers` counts the visits of the layer map.

    Raises: AdapterRefused for a target that matches nothing or cannot be adapted as asked.
    """
    ends = {site.path: site.name for site in sites if site.path in (base.embedding, base.head)}
    ties_head = flag(config, "ensure_weight_tying") and base.is_tied
    ties_head = ties_head and not vocabulary.replaced and _targets_end(selection, matcher)
    if ties_head and isinstance(selection.target_modules, tuple):
        targets = (*selection.target_modules, ends[base.embedding])
        selection = replace(selection, target_modules=targets)
    layers = [site for site in sites if not is_mixture(site, base)]
    apart = set(ends.values()) | {site.name for site in layers if site.path in base.routers}
    inner = [site for site in sites if site.path not in (base.embedding, base.head)]
    parameters, unmatched = parameter_sites(selection.target_parameters, inner, base)
    refuse_expert_biases(unmatched, inner, base)
    _refuse_ends(unmatched, ends.values())
    chosen: frozenset[str] = frozenset()
    if selection.target_modules:
        names = [site.name for site in layers]
        chosen = select_modules(
            selection, names, num_layers, matcher, ends=apart, may_be_none=bool(parameters)
        )
    if ties_head:
        chosen = chosen | set(ends.values())
    replaced = vocabulary.replaced
    found = tuple(site for site in layers if site.name in chosen and site.path not in replaced)
    if unmatched and not parameters and not found:
        raise AdapterRefused(
            f"target_parameters names {unmatched[0][:80]!r}, which is no weight of this base that "
            "can be adapted, and neither is any other of its names: "
            f"{likely_parameter(unmatched[0], parameter_names(inner, base))}",
            field="target_parameters",
        )
    _refuse_twice(parameters, found)
    found += tuple(parameters)
    _check_ends({site.path for site in found}, base, vocabulary, config)
    return found, ties_head


def _refuse_ends(entries: Iterable[str], ends: Iterable[str]) -> None:
    """Raise AdapterRefused for weights of embedding and output layer in target_parameters."""
    for entry in entries:
        meant = next((name for name in ends if f".{name}.weight".endswith(f".{entry}")), None)
        if meant is not None:
            raise AdapterRefused(
                f"target_parameters names {entry[:80]!r}, a weight of the vocabulary: that is not "
                f"served, though PEFT has it; train with {meant.rpartition('.')[2]!r} in "
                "target_modules",
                field="target_parameters",
            )


def _refuse_twice(parameters: Sequence[Site], modules: Sequence[Site]) -> None:
    """Raise AdapterRefused for a parameter of target_parameters that is a target already."""
    twice = {site.path for site in modules} & {site.path for site in parameters}
    if twice:
        raise AdapterRefused(
            f"target_parameters names {min(twice)}, which target_modules adapts already",
            field="target_parameters",
        )


def _targets_end(selection: Selection, matcher: PatternMatcher) -> bool:
    targets = selection.target_modules
    if isinstance(targets, tuple):
        return any(name.rpartition(".")[2] in EMBEDDING_LAYER_NAMES for name in targets)
    match = matcher.compile(targets, "target_modules", is_whole=True)
    return any(match(name) for name in EMBEDDING_LAYER_NAMES)


def _check_ends(
    targeted: set[str], base: BaseSpec, vocabulary: VocabularySpec, config: Config
) -> None:
    """Refuse what PEFT cannot do to the embedding and the output layer."""
    if not targeted:
        raise AdapterRefused(
            "target_modules selects only what modules_to_save replaces", field="target_modules"
        )
    if targeted & {*vocabulary.tokens, *vocabulary.tied_to}:
        raise refused("target_modules", "a module whose rows are replaced cannot have A and B too")
    if base.embedding in targeted:
        _check_embedding(config)
    if base.head in targeted and base.is_tied and mutates_base(config):
        raise refused(
            "init_lora_weights",
            "on the output layer of a base with tied weights it changed the embedding as well",
        )


def _check_embedding(config: Config) -> None:
    if flag(config, "lora_bias"):
        raise refused("lora_bias", "PEFT has no lora_bias on an embedding")
    if config.get("alora_invocation_tokens"):
        raise refused("alora_invocation_tokens", "PEFT has no activated LoRA on an embedding")
    if config.get("init_lora_weights") == "loftq":
        raise refused("init_lora_weights", "PEFT has no LoftQ on an embedding")

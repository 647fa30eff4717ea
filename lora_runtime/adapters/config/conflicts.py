"""Combinations of fields that PEFT cannot run, runs wrongly, or that one request cannot express."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from lora_runtime.adapters.config.values import Config, is_neutral
from lora_runtime.errors import AdapterRefused

MUTATING_INITS = ("pissa", "olora")
"""Inits, by how their names start, that take the first factors out of the base."""


def mutates_base(config: Config) -> bool:
    """True when the training began by subtracting the adapter's first factors from the base."""
    return str(config.get("init_lora_weights")).startswith(MUTATING_INITS)


class _Conflict(NamedTuple):
    field: str
    """Refused where it is set and `clashes` is true."""
    clashes: Callable[[Config], bool]
    reason: str


def _is_set(*fields: str) -> Callable[[Config], bool]:
    return lambda config: any(not is_neutral(config.get(field)) for field in fields)


def _trains_bias(config: Config) -> bool:
    return config.get("bias") not in (None, "none")


_OF_MODULES = ("loftq", "mica")
"""Inits of linear layers alone."""
_BASE_BEFORE_START = "before its start a request sees the base, which this would change as well"
_CONFLICTS = (
    _Conflict("lora_bias", _is_set("use_dora"), "PEFT has no DoRA with lora_bias"),
    _Conflict(
        "lora_bias",
        lambda config: config.get("init_lora_weights", True) not in (True, False),
        "PEFT accepts lora_bias only with init_lora_weights true or false",
    ),
    _Conflict("alora_invocation_tokens", _is_set("use_dora"), "PEFT has no activated DoRA"),
    _Conflict(
        "alora_invocation_tokens",
        lambda config: config.get("init_lora_weights") == "mica",
        "PEFT has no activated MiCA",
    ),
    _Conflict(
        "alora_invocation_tokens",
        lambda config: config.get("task_type") != "CAUSAL_LM",
        "PEFT activates it only with task_type CAUSAL_LM and serves the base without; set it",
    ),
    _Conflict("alora_invocation_tokens", _trains_bias, f"with bias: {_BASE_BEFORE_START}"),
    _Conflict(
        "alora_invocation_tokens",
        _is_set("modules_to_save", "trainable_token_indices", "layer_replication"),
        f"with modules_to_save, trained tokens or layer_replication: {_BASE_BEFORE_START}",
    ),
    _Conflict("alora_invocation_tokens", mutates_base, f"with its init: {_BASE_BEFORE_START}"),
    _Conflict(
        "use_dora",
        lambda config: config.get("init_lora_weights") == "mica",
        "PEFT has no DoRA with MiCA",
    ),
    *(
        _Conflict(
            "target_parameters",
            _is_set(field),
            f"PEFT has no {kind} of parameters: leave out {field}, or adapt modules alone",
        )
        for field, kind in (
            ("use_dora", "DoRA"),
            ("lora_bias", "bias"),
            ("alora_invocation_tokens", "activated LoRA"),
        )
    ),
    _Conflict(
        "target_parameters",
        lambda config: mutates_base(config) or config.get("init_lora_weights") in _OF_MODULES,
        "PEFT has no such init of parameters; convert the adapter with PEFT's "
        "path_initial_model_for_weight_conversion",
    ),
    _Conflict(
        "layer_replication",
        mutates_base,
        "each visit of a layer took its first factors out of the same weight, one after the other; "
        "convert the adapter with PEFT's path_initial_model_for_weight_conversion",
    ),
)


def check_conflicts(config: Config) -> None:
    """Raise AdapterRefused for the first combination that cannot be honoured."""
    for conflict in _CONFLICTS:
        if not is_neutral(config.get(conflict.field)) and conflict.clashes(config):
            raise AdapterRefused(f"{conflict.field}: {conflict.reason}", field=conflict.field)

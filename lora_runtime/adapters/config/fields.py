"""What is done with every field of adapter_config.json: honoured, inert for a reason, or refused.

A table, no code: `peft_config.py` acts on it. Source: peft 0.21.2, `LoraConfig`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType


class Treatment(StrEnum):
    """What is done with a field of adapter_config.json."""

    HONOURED = "honoured"
    INERT = "inert"
    REFUSED = "refused"


@dataclass(frozen=True, slots=True)
class FieldRule:
    """How one field is treated, and why.

    `accepted`: the only values, beside null, false and empty, that are not refused. A rule without
    it takes any value when honoured or inert, and none when refused.
    """

    treatment: Treatment
    reason: str
    accepted: tuple[object, ...] = ()


_HONOURED, _INERT, _REFUSED = Treatment.HONOURED, Treatment.INERT, Treatment.REFUSED

FIELDS: Mapping[str, FieldRule] = MappingProxyType(
    {
        "peft_type": FieldRule(_HONOURED, "LORA is the only method served", ("LORA",)),
        "r": FieldRule(_HONOURED, "rank of the modules that rank_pattern does not name"),
        "lora_alpha": FieldRule(_HONOURED, "alpha of the modules that alpha_pattern does not name"),
        "use_rslora": FieldRule(_HONOURED, "scaling is alpha / sqrt(rank) instead of alpha / rank"),
        "rank_pattern": FieldRule(_HONOURED, "rank of the modules it names"),
        "alpha_pattern": FieldRule(_HONOURED, "alpha of the modules it names"),
        "target_modules": FieldRule(_HONOURED, "the modules it adapts"),
        "target_parameters": FieldRule(
            _HONOURED, "weights it adapts by name, those of experts too"
        ),
        "exclude_modules": FieldRule(_HONOURED, "modules taken out of target_modules"),
        "layers_to_transform": FieldRule(_HONOURED, "layers that target_modules is limited to"),
        "layers_pattern": FieldRule(_HONOURED, "where layers_to_transform finds the layer index"),
        "task_type": FieldRule(_REFUSED, "only text generation is served", ("CAUSAL_LM",)),
        "loftq_config": FieldRule(
            _HONOURED, "with the init 'loftq': how its quantised base was made"
        ),
        "init_lora_weights": FieldRule(
            _HONOURED,
            "the start of training: PiSSA and OLoRA took it out of the base, so it is subtracted; "
            "without effect for those that left the base as it was",
        ),
        "bias": FieldRule(_HONOURED, "trained biases replace the base's"),
        "lora_bias": FieldRule(_HONOURED, "biases of lora_B, scaled like it"),
        "use_dora": FieldRule(_HONOURED, "rows of W + ΔW are rescaled to a trained magnitude"),
        "modules_to_save": FieldRule(
            _HONOURED, "the embedding or output layer it replaces; any other module is refused"
        ),
        "trainable_token_indices": FieldRule(_HONOURED, "the vocabulary rows it replaces"),
        "ensure_weight_tying": FieldRule(
            _HONOURED, "on a tied base, the embedding and the output layer change together"
        ),
        "layer_replication": FieldRule(_HONOURED, "the order in which layers are visited"),
        "alora_invocation_tokens": FieldRule(_HONOURED, "where in the prompt it begins to act"),
        "lora_dropout": FieldRule(_INERT, "acts only while training"),
        "eva_config": FieldRule(_INERT, "used only to initialise training"),
        "corda_config": FieldRule(_INERT, "read only with the init 'corda', refused there"),
        "lora_ga_config": FieldRule(_INERT, "read only with the init 'lora_ga', refused there"),
        "qalora_group_size": FieldRule(_INERT, "read only with use_qalora, refused there"),
        "fan_in_fan_out": FieldRule(_INERT, "PEFT ignores it on what is no Conv1D; none is served"),
        "megatron_core": FieldRule(_INERT, "read only with megatron_config, refused there"),
        "base_model_name_or_path": FieldRule(_INERT, "names a base; the fingerprint decides"),
        "revision": FieldRule(_INERT, "names a base; the fingerprint decides"),
        "peft_version": FieldRule(_INERT, "says who wrote the files"),
        "auto_mapping": FieldRule(_INERT, "names Python classes, which are never imported"),
        "inference_mode": FieldRule(_INERT, "freezes parameters in training"),
        "runtime_config": FieldRule(_INERT, "describes the process that wrote it"),
        "megatron_config": FieldRule(_REFUSED, "Megatron layers are not served"),
        "use_qalora": FieldRule(_REFUSED, "QALoRA is not served"),
        "use_bdlora": FieldRule(_REFUSED, "BD-LoRA is not served"),
        "velora_config": FieldRule(_REFUSED, "VeLoRA is not served"),
        "monteclora_config": FieldRule(_REFUSED, "MonteCLoRA is not served"),
        "arrow_config": FieldRule(_REFUSED, "Arrow routing is not served"),
        "kasa_config": FieldRule(_REFUSED, "KaSA changes the base, which is shared"),
    }
)
"""All fields of peft 0.21.2's LoraConfig; any other is refused unless null, false or empty."""

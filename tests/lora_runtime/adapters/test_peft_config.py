"""Every field of PEFT's LoraConfig is honoured, inert with a reason, or refused by name."""

from __future__ import annotations

import dataclasses
import json
import math

import peft
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_runtime.adapters.config_fields import FIELDS, Treatment
from lora_runtime.adapters.peft_config import TargetSpec, parse_config
from lora_runtime.core import LinearShape
from lora_runtime.errors import AdapterRefused

NUM_LAYERS = 2
LINEARS = {
    f"model.layers.{layer}.{module}": LinearShape(8, 8)
    for layer in range(NUM_LAYERS)
    for module in ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj")
}
MINIMAL = {"peft_type": "LORA", "target_modules": ["q_proj"]}


def parse(**fields: object):
    return parse_config({**MINIMAL, **fields}, LINEARS, NUM_LAYERS)


def test_the_table_has_exactly_pefts_fields() -> None:
    assert set(FIELDS) == {field.name for field in dataclasses.fields(peft.LoraConfig)}
    assert all(rule.reason for rule in FIELDS.values())


def test_pefts_variants_are_refused() -> None:
    """Whatever PEFT marks as another forward pass than plain LoRA."""
    fields = dataclasses.fields(peft.LoraConfig)
    variants = [field.name for field in fields if field.metadata.get("is_lora_variant")]
    assert len(variants) >= 7
    assert {FIELDS[name].treatment for name in variants} == {Treatment.REFUSED}


def test_pefts_defaults_are_accepted() -> None:
    """The config PEFT writes for a plain adapter, and the same with nothing but the minimum."""
    written = peft.LoraConfig(target_modules=["q_proj"]).to_dict()
    written = {name: list(v) if isinstance(v, set) else v for name, v in written.items()}
    written = json.loads(json.dumps(written))
    full, minimal = parse_config(written, LINEARS, NUM_LAYERS), parse()
    assert full.honoured == minimal.honoured
    assert full.targets == minimal.targets
    assert full.targets["model.layers.0.self_attn.q_proj"] == TargetSpec(8, 8, 1.0)
    assert set(full.inert) == {
        "init_lora_weights", "lora_dropout", "megatron_core", "peft_version", "qalora_group_size",
    }  # fmt: skip


def test_inert_fields_carry_their_reasons() -> None:
    spec = parse(
        lora_dropout=0.2,
        init_lora_weights="eva",
        eva_config={"rho": 2.0},
        auto_mapping={"parent_library": "os"},
        revision="main",
        task_type="CAUSAL_LM",
        bias="none",
        merge_weights=False,
        enable_lora=None,
        some_future_list=[],
    )
    assert set(spec.inert) == {
        "lora_dropout", "init_lora_weights", "eva_config", "auto_mapping", "revision",
    }  # fmt: skip
    assert spec.honoured == parse().honoured


def test_patterns_and_rslora_decide_the_scaling() -> None:
    spec = parse(
        r=4,
        lora_alpha=6,
        use_rslora=True,
        rank_pattern={"layers.1.*": 9},
        alpha_pattern={"q_proj": 1.5},
    )
    assert spec.variant == "rslora"
    assert spec.targets == {
        "model.layers.0.self_attn.q_proj": TargetSpec(4, 1.5, 0.75),
        "model.layers.1.self_attn.q_proj": TargetSpec(9, 1.5, 1.5 / math.sqrt(9)),
    }


REFUSED = [
    ("peft_type", "LOHA", "only method"),
    ("peft_type", None, "missing"),
    ("task_type", "SEQ_CLS", "text generation"),
    ("use_dora", True, "DoRA"),
    ("layer_replication", [[0, 1], [0, 2]], "replication"),
    ("modules_to_save", ["lm_head"], "replaced modules"),
    ("trainable_token_indices", [1, 2], "trained tokens"),
    ("lora_bias", True, "lora_B"),
    ("bias", "all", "biases"),
    ("bias", "lora_only", "biases"),
    ("alora_invocation_tokens", [1, 2], "activated LoRA"),
    ("target_parameters", ["mlp.experts.gate_up_proj"], "MoE"),
    ("fan_in_fan_out", True, "Conv1D"),
    ("megatron_config", {"tp": 2}, "Megatron"),
    ("use_qalora", True, "QALoRA"),
    ("use_bdlora", {"nblocks": 2}, "BD-LoRA"),
    ("velora_config", {"num_groups": 64}, "VeLoRA"),
    ("monteclora_config", {"num_samples": 8}, "MonteCLoRA"),
    ("arrow_config", {"top_k": 3}, "Arrow"),
    ("kasa_config", {"beta": 1e-4}, "KaSA"),
    ("init_lora_weights", "pissa", "pissa"),
    ("init_lora_weights", "pissa_niter_16", "pissa_niter_16"),
    ("init_lora_weights", "olora", "olora"),
    ("init_lora_weights", "corda", "corda"),
    ("init_lora_weights", "lora_ga", "lora_ga"),
    ("init_lora_weights", "loftq", "loftq"),
    ("init_lora_weights", "brand_new", "brand_new"),
    ("use_something_new", True, "no such field"),
    ("a_new_number", 0, "no such field"),
    ("target_modules", None, "missing"),
    ("target_modules", [], "missing"),
    ("target_modules", ["lm_head"], "output head"),
    ("target_modules", ["q_proj", "embed_tokens"], "output head"),
    ("target_modules", r".*(q_proj|lm_head)", "output head"),
    ("target_modules", ["q_proj", "v_proj"], "'v_proj'"),
    ("target_modules", ["proj"], "'proj'"),
    ("target_modules", "q_proj", "matches no linear"),
    ("target_modules", [1], "list of names"),
    ("target_modules", {"q_proj": 1}, "list of names"),
    ("target_modules", ".*[", "not a regular expression"),
    ("exclude_modules", 3, "list of names"),
    ("layers_to_transform", [0, 2], "layers 0 to 1"),
    ("layers_to_transform", -1, "layers 0 to 1"),
    ("layers_to_transform", "0", "layer index"),
    ("layers_to_transform", True, "layer index"),
    ("layers_pattern", "layers", "needs layers_to_transform"),
    ("r", 0, "integer from 1"),
    ("r", 4.0, "integer from 1"),
    ("r", True, "integer from 1"),
    ("r", None, "integer from 1"),
    ("r", 10**30, "integer from 1"),
    ("lora_alpha", "16", "a number"),
    ("lora_alpha", None, "a number"),
    ("lora_alpha", float("nan"), "a number"),
    ("lora_alpha", 10**400, "a number"),
    ("rank_pattern", {"q_proj": 0}, "integer from 1"),
    ("rank_pattern", ["q_proj"], "an object"),
    ("rank_pattern", {"(": 4}, "not a regular expression"),
    ("alpha_pattern", {"q_proj": "4"}, "a number"),
    ("use_rslora", "yes", "true or false"),
]


@pytest.mark.parametrize(("field", "value", "message"), REFUSED)
def test_refused_by_name(field: str, value: object, message: str) -> None:
    with pytest.raises(AdapterRefused, match=message) as refusal:
        parse(**{field: value})
    assert refusal.value.field == field


def test_every_refused_field_has_a_row() -> None:
    refused = {name for name, rule in FIELDS.items() if rule.treatment is Treatment.REFUSED}
    assert refused <= {field for field, _, _ in REFUSED}


COMBINATIONS = [
    ("layers_to_transform", dict(target_modules=".*q_proj", layers_to_transform=[0])),
    ("target_modules", dict(exclude_modules=["q_proj"])),
    ("target_modules", dict(layers_to_transform=[0], layers_pattern=["blocks"])),
    ("layers_pattern", dict(layers_to_transform=[0], layers_pattern=["(?P<idx>x)"])),
]


@pytest.mark.parametrize(("field", "fields"), COMBINATIONS)
def test_combinations_that_peft_refuses_or_that_select_nothing(field: str, fields: dict) -> None:
    with pytest.raises(AdapterRefused) as refusal:
        parse(**fields)
    assert refusal.value.field == field


def test_messages_stay_short() -> None:
    with pytest.raises(AdapterRefused) as refusal:
        parse(**{"k" * 10_000: "v" * 10_000})
    assert len(refusal.value.message) < 400
    assert len(refusal.value.field) <= 80


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=4,
)


KEYS = st.sampled_from(sorted(FIELDS)) | st.text(max_size=6)


@given(st.dictionaries(KEYS, JSON_VALUES, max_size=3))
@settings(max_examples=200, deadline=None)
def test_any_json_is_honoured_or_refused(fields: dict) -> None:
    try:
        spec = parse(**fields)
    except AdapterRefused as refusal:
        assert refusal.field is not None
    else:
        assert spec.targets

"""Every field of PEFT's LoraConfig is honoured, inert with a reason, or refused by name."""

from __future__ import annotations

import dataclasses
import json
import math
import time

import peft
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_runtime.adapters.config.fields import FIELDS, Treatment
from lora_runtime.adapters.config.layer_sites import Site
from lora_runtime.adapters.config.peft_config import TargetSpec, parse_config
from lora_runtime.config import MAX_ALPHA, MAX_RANK
from lora_runtime.core import BaseSpec, LinearShape
from lora_runtime.errors import AdapterRefused

NUM_LAYERS = 2
LINEARS = {
    f"model.layers.{layer}.{module}": LinearShape(8, 8)
    for layer in range(NUM_LAYERS)
    for module in ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj")
}
BASE = BaseSpec(
    name="tiny",
    fingerprint="f" * 64,
    linears=LINEARS,
    embedding="model.embed_tokens",
    head="lm_head",
    is_tied=False,
    num_layers=NUM_LAYERS,
    hidden_size=8,
    vocab_size=20,
    max_model_len=64,
    quantization="none",
    dtype="float32",
    device="cpu",
    model_type="llama",
)
TIED = dataclasses.replace(BASE, is_tied=True)
NF4 = dataclasses.replace(BASE, quantization="nf4")
MINIMAL = {"peft_type": "LORA", "target_modules": ["q_proj"]}
LOFTQ = {"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4, "loftq_iter": 1}}
LOFTQ_8 = {**LOFTQ, "loftq_config": {"loftq_bits": 8, "loftq_iter": 1}}


def parse(base: BaseSpec = BASE, **fields: object):
    return parse_config({**MINIMAL, **fields}, base)


def q_proj(layer: int) -> Site:
    path = f"model.layers.{layer}.self_attn.q_proj"
    return Site(path, 0, path)


def test_the_table_has_exactly_pefts_fields() -> None:
    assert set(FIELDS) == {field.name for field in dataclasses.fields(peft.LoraConfig)}
    assert all(rule.reason for rule in FIELDS.values())


def test_pefts_other_forward_passes_are_honoured_or_refused() -> None:
    """Whatever PEFT marks as another forward pass than plain LoRA is never inert."""
    fields = dataclasses.fields(peft.LoraConfig)
    variants = {field.name for field in fields if field.metadata.get("is_lora_variant")}
    assert len(variants) >= 7
    honoured = {name for name in variants if FIELDS[name].treatment is Treatment.HONOURED}
    assert honoured == {"use_dora", "alora_invocation_tokens"}
    rest = variants - honoured
    assert {FIELDS[name].treatment for name in rest} == {Treatment.REFUSED}


def test_pefts_defaults_are_accepted() -> None:
    """The config PEFT writes for a plain adapter, and the same with nothing but the minimum."""
    written = peft.LoraConfig(target_modules=["q_proj"]).to_dict()
    written = {name: list(v) if isinstance(v, set) else v for name, v in written.items()}
    written = json.loads(json.dumps(written))
    full, minimal = parse_config(written, BASE), parse()
    assert full.honoured == minimal.honoured
    assert full.targets == minimal.targets
    assert full.targets[q_proj(0)] == TargetSpec(8, 8, 1.0)
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
        q_proj(0): TargetSpec(4, 1.5, 0.75),
        q_proj(1): TargetSpec(9, 1.5, 1.5 / math.sqrt(9), "layers.1.*"),
    }


REFUSED = [
    ("peft_type", "LOHA", "only method"),
    ("peft_type", None, "missing"),
    ("task_type", "SEQ_CLS", "text generation"),
    ("target_parameters", "q_proj.weight", "a list of names"),
    ("megatron_config", {"tp": 2}, "Megatron"),
    ("use_qalora", True, "QALoRA"),
    ("use_bdlora", {"nblocks": 2}, "BD-LoRA"),
    ("velora_config", {"num_groups": 64}, "VeLoRA"),
    ("monteclora_config", {"num_samples": 8}, "MonteCLoRA"),
    ("arrow_config", {"top_k": 3}, "Arrow"),
    ("kasa_config", {"beta": 1e-4}, "KaSA"),
    ("init_lora_weights", "corda", "corda"),
    ("init_lora_weights", "lora_ga", "lora_ga"),
    ("init_lora_weights", "loftq", "nf4"),
    ("init_lora_weights", "pissa_niter_", "pissa_niter_"),
    ("init_lora_weights", 3, "cannot be recovered"),
    ("use_dora", "yes", "true or false"),
    ("lora_bias", 1, "true or false"),
    ("bias", "some", "'none', 'all'"),
    ("ensure_weight_tying", "yes", "true or false"),
    ("modules_to_save", ["norm"], "only the embedding and the output layer"),
    ("modules_to_save", ["embed_tokens", "up_proj"], "'up_proj'"),
    ("modules_to_save", {"lm_head": 1}, "list of names"),
    ("trainable_token_indices", [1, 20], "0 to 19"),
    ("trainable_token_indices", [-1], "0 to 19"),
    ("trainable_token_indices", [1, 1], "once"),
    ("trainable_token_indices", {"norm": [1]}, "only the embedding"),
    ("trainable_token_indices", {"embed_tokens": [1], "model.embed_tokens": [2]}, "once"),
    ("trainable_token_indices", {"lm_head": "1"}, "list of token ids"),
    ("alora_invocation_tokens", [1, 20], "0 to 19"),
    ("alora_invocation_tokens", "1", "list of token ids"),
    ("layer_replication", [[0, 3]], "layers of this base"),
    ("layer_replication", [[1, 1]], "layers of this base"),
    ("layer_replication", [[-1, 1]], "layers of this base"),
    ("layer_replication", [0, 1], "layers of this base"),
    ("layer_replication", [[0, 1.0]], "layers of this base"),
    ("layer_replication", [[0, 2]] * 600, "1200 layers"),
    ("init_lora_weights", "brand_new", "brand_new"),
    ("use_something_new", True, "no such field.*Remove it"),
    ("lora_alhpa", 3, "no such field.*did you mean 'lora_alpha'"),
    ("a_new_number", 0, "no such field"),
    ("target_modules", None, "missing"),
    ("target_modules", [], "missing"),
    ("target_modules", ["proj"], "'proj'"),
    ("target_modules", "q_proj", "matches no module"),
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
        parse(**{"task_type": "CAUSAL_LM", field: value})
    assert refusal.value.field == field


ALORA = {"alora_invocation_tokens": [1, 2], "task_type": "CAUSAL_LM"}
COMBINATIONS = [
    ("layers_to_transform", dict(target_modules=".*q_proj", layers_to_transform=[0])),
    ("target_modules", dict(exclude_modules=["q_proj"])),
    ("target_modules", dict(layers_to_transform=[0], layers_pattern=["blocks"])),
    ("target_modules", dict(target_modules=["lm_head"], modules_to_save=["lm_head"])),
    ("layers_pattern", dict(layers_to_transform=[0], layers_pattern=["(?P<idx>x)"])),
    ("layers_to_transform", dict(layers_to_transform=[2], layer_replication=[[0, 1], [1, 2]])),
    ("lora_bias", dict(lora_bias=True, use_dora=True)),
    ("lora_bias", dict(lora_bias=True, init_lora_weights="gaussian")),
    ("lora_bias", dict(lora_bias=True, target_modules=["embed_tokens"])),
    ("alora_invocation_tokens", dict(alora_invocation_tokens=[1])),
    ("alora_invocation_tokens", dict(ALORA, use_dora=True)),
    ("alora_invocation_tokens", dict(ALORA, bias="lora_only")),
    ("alora_invocation_tokens", dict(ALORA, modules_to_save=["lm_head"])),
    ("alora_invocation_tokens", dict(ALORA, trainable_token_indices=[1])),
    ("alora_invocation_tokens", dict(ALORA, layer_replication=[[0, 2], [1, 2]])),
    ("alora_invocation_tokens", dict(ALORA, init_lora_weights="pissa")),
    ("alora_invocation_tokens", dict(ALORA, init_lora_weights="mica")),
    ("alora_invocation_tokens", dict(ALORA, target_modules=["embed_tokens", "q_proj"])),
    ("use_dora", dict(use_dora=True, init_lora_weights="mica")),
    ("layer_replication", dict(layer_replication=[[0, 2], [1, 2]], init_lora_weights="olora")),
    ("loftq_config", {**LOFTQ, "loftq_config": {"loftq_bits": 4, "loftq_iter": 5}}),
    ("loftq_config", {**LOFTQ, "loftq_config": {"loftq_bits": 2, "loftq_iter": 1}}),
    ("loftq_config", {**LOFTQ, "loftq_config": {"loftq_bits": 8, "loftq_iter": 2}}),
    ("loftq_config", {**LOFTQ, "loftq_config": {"loftq_bits": [4], "loftq_iter": 1}}),
    ("init_lora_weights", dict(LOFTQ)),
    (
        "trainable_token_indices",
        dict(trainable_token_indices=[1], modules_to_save=["embed_tokens"]),
    ),
    (
        "target_modules",
        dict(trainable_token_indices=[1], target_modules=["q_proj", "embed_tokens"]),
    ),
]


@pytest.mark.parametrize(("field", "fields"), COMBINATIONS)
def test_combinations_that_peft_refuses_or_that_select_nothing(field: str, fields: dict) -> None:
    with pytest.raises(AdapterRefused) as refusal:
        parse(**fields)
    assert refusal.value.field == field


TIED_COMBINATIONS = [
    ("init_lora_weights", dict(init_lora_weights="pissa", target_modules=["lm_head"])),
    (
        "trainable_token_indices",
        dict(trainable_token_indices=[1], modules_to_save=["lm_head"]),
    ),
    (
        "trainable_token_indices",
        dict(
            trainable_token_indices={"embed_tokens": [1], "lm_head": [2]}, ensure_weight_tying=True
        ),
    ),
    ("target_modules", dict(trainable_token_indices=[1], target_modules=["lm_head"])),
]


@pytest.mark.parametrize(("field", "fields"), TIED_COMBINATIONS)
def test_combinations_that_a_tied_base_forbids(field: str, fields: dict) -> None:
    with pytest.raises(AdapterRefused) as refusal:
        parse(TIED, **fields)
    assert refusal.value.field == field


def test_loftq_is_plain_lora_on_the_base_it_left() -> None:
    spec = parse(NF4, **LOFTQ)
    assert spec.variant == "loftq"
    assert spec.targets == parse(NF4).targets
    int8 = dataclasses.replace(BASE, quantization="int8")
    assert parse(int8, **LOFTQ_8).targets == spec.targets


@pytest.mark.parametrize("quantization", ["nf4", "nf4-double", "fp4", "int8", "none"])
@pytest.mark.parametrize(("fields", "wanted"), [(LOFTQ, "nf4"), (LOFTQ_8, "int8")])
def test_loftq_is_refused_on_a_base_of_another_format(quantization, fields, wanted) -> None:
    """PEFT quantises to NF4 with 4 bits and to LLM.int8 with 8; no other q(W) is its base."""
    base = dataclasses.replace(BASE, quantization=quantization)
    if quantization == wanted:
        parse(base, **fields)
        return
    with pytest.raises(AdapterRefused, match=f"'{quantization}'. Serve it .* {wanted}$") as refusal:
        parse(base, **fields)
    assert refusal.value.field == "init_lora_weights"


def test_replicated_layers_are_named_anew() -> None:
    spec = parse(layer_replication=[[0, 2], [1, 2]], rank_pattern={"layers.2.*": 3})
    found = [(site.path[13:15], site.replica, site.name[13:15]) for site in spec.targets]
    assert found == [("0.", 0, "0."), ("1.", 0, "1."), ("1.", 1, "2.")]
    assert [target.rank for target in spec.targets.values()] == [8, 8, 3]
    assert spec.layer_map == (0, 1, 1)
    assert parse(layer_replication=[[0, 1], [1, 2]]).layer_map is None


HONOURED = {
    "peft_type": "LORA",
    "r": 5,
    "lora_alpha": 3.5,
    "use_rslora": True,
    "rank_pattern": {"q_proj": 3},
    "alpha_pattern": {"q_proj": 3},
    "target_modules": ["k_proj", "lm_head"],
    "target_parameters": ["v_proj.weight"],
    "exclude_modules": ["0.self_attn.q_proj"],
    "layers_to_transform": [1],
    "layers_pattern": ["layers"],
    "init_lora_weights": "pissa",
    "bias": "lora_only",
    "lora_bias": True,
    "use_dora": True,
    "modules_to_save": ["lm_head"],
    "trainable_token_indices": [4, 2],
    "ensure_weight_tying": True,
    "layer_replication": [[0, 2], [0, 1]],
    "alora_invocation_tokens": [3, 4],
}
"""A value that changes the result, for every field that can."""
NOT_CONTENT = {"loftq_config"}
"""Honoured by the check that the base is the one it names; the result is plain LoRA."""


def test_every_field_is_accounted_for() -> None:
    """Honoured and part of the adapter's identity, inert with a reason, or refused by name."""
    by_treatment = {
        treatment: {name for name, rule in FIELDS.items() if rule.treatment is treatment}
        for treatment in Treatment
    }
    assert by_treatment[Treatment.HONOURED] == HONOURED.keys() | NOT_CONTENT
    assert by_treatment[Treatment.REFUSED] <= {field for field, _, _ in REFUSED}
    for field in by_treatment[Treatment.INERT]:
        spec = parse(**{field: {"anything": 1}})
        assert spec.honoured == parse().honoured
        assert spec.inert[field] == FIELDS[field].reason


@pytest.mark.parametrize("field", HONOURED)
def test_an_honoured_field_is_content(field: str) -> None:
    others = {"task_type": "CAUSAL_LM"}
    if field == "layers_pattern":
        others["layers_to_transform"] = [1]
    spec = parse(**others, **{field: HONOURED[field]})
    assert spec.honoured[field] == HONOURED[field]
    if field != "peft_type":
        assert spec.honoured != parse(**others).honoured


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
@settings(max_examples=200)
def test_any_json_is_honoured_or_refused(fields: dict) -> None:
    try:
        spec = parse_config({**MINIMAL, **fields}, BASE)
    except AdapterRefused as refusal:
        assert refusal.field is not None
    else:
        assert spec.targets


ABSURD = [10**30, -1, 1e308, "1e30", True]


@pytest.mark.parametrize("field", sorted(FIELDS))
def test_absurd_numbers_in_a_field_are_refused_by_its_name_or_change_nothing(field: str) -> None:
    """Alone, in a list, in a list of lists, and as values of an object."""
    plain = parse()
    for number in ABSURD:
        for value in (number, [number], [[0, number]], [[number, 2]], {"q_proj": number}):
            started = time.thread_time()
            try:
                spec = parse(**{field: value})
            except AdapterRefused as error:
                assert error.field == field, (field, value)
                assert len(str(error)) < 500
            else:
                assert all(1 <= target.rank <= MAX_RANK for target in spec.targets.values())
                assert all(abs(t.scaling) <= MAX_ALPHA for t in spec.targets.values())
                assert field in {*spec.honoured, *spec.inert} or spec == plain
            assert time.thread_time() - started < 1

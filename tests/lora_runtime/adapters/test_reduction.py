"""Adapters written by PEFT reduce to PEFT's own ΔW; ours load in PEFT; misfits are refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import peft
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from lora_runtime.adapters.files.file_names import FINGERPRINT_KEY, QUANTIZATION_KEY
from lora_runtime.adapters.files.folder import TENSORS_FILE
from lora_runtime.adapters.files.peft_writer import peft_files
from lora_runtime.adapters.reduction import load_adapter
from lora_runtime.errors import AdapterRefused, BaseMismatch
from tests.lora_runtime.adapters.peft_oracle import (
    assert_same_deltas,
    base_spec,
    base_weights,
    edit_config,
    form_deltas,
    read_peft_adapter,
    write_peft_adapter,
)
from tests.tiny import SHAPES, tiny_model

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*did not match any targeted module:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:Could not find a config file:UserWarning"),
]

LLAMA = tiny_model("llama")
LLAMA_BASE = base_spec(LLAMA)
LLAMA_WEIGHTS = base_weights(LLAMA, LLAMA_BASE)
QV = ["q_proj", "v_proj"]

CONFIGS = {
    "list": dict(r=4, lora_alpha=8, target_modules=QV),
    "full names": dict(r=4, target_modules=["model.layers.1.mlp.up_proj", "0.self_attn.k_proj"]),
    "all-linear": dict(r=3, lora_alpha=5, target_modules="all-linear"),
    "regex": dict(r=4, target_modules=r".*\.(?:0|2)\..*(q|k|down)_proj"),
    "rslora": dict(r=16, lora_alpha=8, use_rslora=True, target_modules=["o_proj"]),
    "float alpha": dict(r=8, lora_alpha=11.3137, use_rslora=True, target_modules=QV),
    "negative alpha": dict(r=4, lora_alpha=-3, target_modules=QV),
    "rank_pattern": dict(
        r=4, target_modules=QV, rank_pattern={"q_proj": 2, "layers.1.self_attn.v_proj": 7}
    ),
    "patterns are regexes": dict(
        r=4,
        target_modules=[*QV, "down_proj"],
        rank_pattern={r"layers\.[02]\..*": 6},
        alpha_pattern={r"^model\.layers\.1\..*_proj": 2.5, "down_proj": 40},
    ),
    "rslora with patterns": dict(
        r=4,
        use_rslora=True,
        target_modules=QV,
        rank_pattern={"q_proj": 9},
        alpha_pattern={r"0\.self_attn\.(q|k)_proj": 1.5},
    ),
    "a pattern is no suffix": dict(
        r=4, target_modules=["up_proj"], alpha_pattern={"p_proj": 99, r".*p_proj": 3}
    ),
    "exclude list": dict(
        r=4,
        target_modules=[*QV, "up_proj"],
        exclude_modules=["layers.1.self_attn.q_proj", "up_proj"],
    ),
    "exclude regex": dict(r=4, target_modules="all-linear", exclude_modules=r".*\.1\..*|.*gate.*"),
    "one layer": dict(r=4, target_modules=QV, layers_to_transform=1),
    "some layers": dict(r=4, target_modules=QV, layers_to_transform=[0, 2]),
    "layers_pattern": dict(
        r=4, target_modules=QV, layers_to_transform=[2], layers_pattern=["blocks", "layers"]
    ),
    "no effect at serving": dict(
        r=4,
        target_modules=QV,
        lora_dropout=0.3,
        init_lora_weights="gaussian",
        task_type="CAUSAL_LM",
    ),
    "random init": dict(r=4, target_modules=QV, init_lora_weights=False),
    "orthogonal": dict(r=4, target_modules=QV, init_lora_weights="orthogonal"),
    "mica": dict(r=4, target_modules=QV, init_lora_weights="mica"),
}  # fmt: skip


def write_llama_adapter(folder: Path, **overrides: object) -> dict[str, torch.Tensor]:
    config = peft.LoraConfig(**{"r": 4, "target_modules": QV, **overrides})
    return write_peft_adapter(LLAMA, config, folder)


@pytest.mark.parametrize("name", CONFIGS)
def test_deltas_equal_pefts(name: str, tmp_path: Path) -> None:
    deltas = write_llama_adapter(tmp_path, **CONFIGS[name])
    form = load_adapter(tmp_path, LLAMA_BASE, LLAMA_WEIGHTS)
    assert_same_deltas(form_deltas(form), deltas)
    assert form.facts.variant == ("rslora" if CONFIGS[name].get("use_rslora") else "lora")


@pytest.mark.parametrize("shape", SHAPES)
def test_every_family(shape: str, tmp_path: Path) -> None:
    """Phi-3's fused qkv_proj and gate_up_proj are ordinary linears."""
    model = tiny_model(shape)
    config = peft.LoraConfig(r=4, target_modules="all-linear", alpha_pattern={r".*_proj": 3})
    deltas = write_peft_adapter(model, config, tmp_path)
    spec = base_spec(model)
    form = load_adapter(tmp_path, spec, base_weights(model, spec))
    assert_same_deltas(form_deltas(form), deltas)


NAMES = sorted({path.rpartition(".")[2] for path in LLAMA_BASE.linears})
PATTERNS = st.sampled_from([
    *NAMES, "self_attn.q_proj", r".*\.1\..*", r"layers\.[01]\..*", ".*(up|down)_proj", "_proj",
])  # fmt: skip


@given(
    targets=st.lists(st.sampled_from(NAMES), min_size=1, unique=True) | st.just("all-linear"),
    exclude=st.lists(st.sampled_from(NAMES), max_size=2),
    layers=st.none() | st.lists(st.integers(0, 2), min_size=1, max_size=2),
    ranks=st.dictionaries(PATTERNS, st.integers(1, 9), max_size=3),
    alphas=st.dictionaries(PATTERNS, st.floats(0.5, 64), max_size=3),
    use_rslora=st.booleans(),
)
@settings(max_examples=15, suppress_health_check=[HealthCheck.too_slow])
def test_any_config(tmp_path_factory, targets, exclude, layers, ranks, alphas, use_rslora) -> None:
    """PEFT sorts patterns when it saves, so the oracle is the adapter as PEFT reads it back."""
    ranks, alphas = dict(sorted(ranks.items())), dict(sorted(alphas.items()))
    if isinstance(targets, str):
        layers = None
    elif not set(targets) - set(exclude):
        exclude = []
    if set(exclude) >= set(NAMES):
        exclude = []
    folder = tmp_path_factory.mktemp("any")
    deltas = write_llama_adapter(
        folder,
        target_modules=targets,
        exclude_modules=exclude,
        layers_to_transform=layers,
        rank_pattern=ranks,
        alpha_pattern=alphas,
        use_rslora=use_rslora,
    )
    assert_same_deltas(form_deltas(load_adapter(folder, LLAMA_BASE, LLAMA_WEIGHTS)), deltas)


def test_facts_of_the_form(tmp_path: Path) -> None:
    write_llama_adapter(tmp_path, r=4, rank_pattern={"q_proj": 6}, lora_dropout=0.1)
    form = load_adapter(tmp_path, LLAMA_BASE, LLAMA_WEIGHTS)
    assert form.ranks == (4, 6)
    assert form.facts.honoured == {
        "peft_type": "LORA",
        "r": 4,
        "lora_alpha": 8,
        "rank_pattern": {"q_proj": 6},
        "target_modules": QV,
    }
    assert form.facts.inert["lora_dropout"] == "acts only while training"
    dtypes = {tensor.dtype for module in form.modules.values() for tensor in (module.a, module.b)}
    assert dtypes == {torch.float32}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_files_are_exact(dtype: torch.dtype, tmp_path: Path) -> None:
    write_llama_adapter(tmp_path)
    rewrite_tensors(tmp_path, lambda t: {name: tensor.to(dtype) for name, tensor in t.items()})
    expected = read_peft_adapter(LLAMA, tmp_path)
    assert_same_deltas(form_deltas(load_adapter(tmp_path, LLAMA_BASE, LLAMA_WEIGHTS)), expected)


def test_digest_is_the_content(tmp_path: Path) -> None:
    """Inert fields and the order of a set leave it; honoured fields and tensors change it."""
    digests = {}
    for name in ("same", "inert", "order", "alpha", "tensors", "pattern order"):
        folder = tmp_path / name
        write_llama_adapter(folder, alpha_pattern={"q_proj": 1, ".*_proj": 2})
        if name == "inert":
            edit_config(folder, lora_dropout=0.5, base_model_name_or_path="elsewhere")
        if name == "order":
            edit_config(folder, target_modules=QV[::-1])
        if name == "alpha":
            edit_config(folder, lora_alpha=9)
        if name == "tensors":
            rewrite_tensors(folder, lambda t: {key: -value for key, value in t.items()})
        if name == "pattern order":
            edit_config(folder, alpha_pattern={"q_proj": 1, ".*_proj": 2})
        digests[name] = load_adapter(folder, LLAMA_BASE, LLAMA_WEIGHTS).digest
    assert digests["same"] == digests["inert"] == digests["order"]
    assert len({digests[name] for name in ("same", "alpha", "tensors", "pattern order")}) == 4


FIRST_A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
FIRST_B = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"
FIRST_MAGNITUDE = FIRST_A.replace("lora_A.weight", "lora_magnitude_vector")
MISFITS = {
    "A missing": (lambda t: t.pop(FIRST_A), FIRST_A, "is missing"),
    "B missing": (lambda t: t.pop(FIRST_B), FIRST_B, "is missing"),
    "extra tensor": (lambda t: t.update(extra=torch.ones(1)), "extra", "no name that PEFT"),
    "a module the config does not name": (
        lambda t: t.update({FIRST_A.replace("q_proj", "k_proj"): torch.ones(4, 64)}),
        FIRST_A.replace("q_proj", "k_proj"),
        "belongs to no module",
    ),
    "DoRA magnitude": (
        lambda t: t.update({FIRST_MAGNITUDE: torch.ones(64)}),
        FIRST_MAGNITUDE,
        "belongs to no module",
    ),
    "other rank": (
        lambda t: t.update({FIRST_A: torch.ones(5, 64)}), FIRST_A, r"\(5, 64\).*\(4, 64\)"
    ),
    "other width": (
        lambda t: t.update({FIRST_A: torch.ones(4, 32)}), FIRST_A, r"\(4, 32\).*\(4, 64\)"
    ),
    "transposed B": (
        lambda t: t.update({FIRST_B: t[FIRST_B].T.contiguous()}), FIRST_B, r"\(4, 64\).*\(64, 4\)"
    ),
    "1-D": (lambda t: t.update({FIRST_B: torch.ones(64)}), FIRST_B, r"\(64,\).*\(64, 4\)"),
    "overflow when scaled": (
        lambda t: t.update({FIRST_B: torch.full((64, 4), 3e38)}), FIRST_B, "overflows"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MISFITS)
def test_tensors_that_do_not_fit_are_refused(name: str, tmp_path: Path) -> None:
    change, field, message = MISFITS[name]
    write_llama_adapter(tmp_path)

    def changed(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        change(tensors)
        return tensors

    rewrite_tensors(tmp_path, changed)
    with pytest.raises(AdapterRefused, match=message) as refusal:
        load_adapter(tmp_path, LLAMA_BASE, LLAMA_WEIGHTS)
    assert refusal.value.field == field


def test_a_target_without_tensors_is_refused(tmp_path: Path) -> None:
    write_llama_adapter(tmp_path)
    edit_config(tmp_path, target_modules=[*QV, "k_proj"])
    with pytest.raises(AdapterRefused, match=r"k_proj.*is missing"):
        load_adapter(tmp_path, LLAMA_BASE, LLAMA_WEIGHTS)


def test_another_base_is_refused(tmp_path: Path) -> None:
    """The fingerprint is looked at before anything that would differ on another base."""
    trained_files().write(tmp_path)
    with pytest.raises(BaseMismatch) as refusal:
        load_adapter(tmp_path, base_spec(tiny_model("phi3"), fingerprint="0" * 64), LLAMA_WEIGHTS)
    assert refusal.value.field == FINGERPRINT_KEY


@pytest.mark.parametrize(
    "trained_in, words",
    [
        ("nf4", "in nf4; serve that with quantization nf4, or train the adapter in int8"),
        ("int8", "in int8 too, so on another checkpoint"),
        (None, "in another quantization, which its files do not say"),
    ],
)
def test_what_is_another_of_the_base_is_said(
    tmp_path: Path, trained_in: str | None, words: str
) -> None:
    """Files of older releases do not say how their base was quantised."""
    files = trained_files(base=replace(LLAMA_BASE, quantization=trained_in or "nf4"))
    if trained_in is None:
        del files.metadata[QUANTIZATION_KEY]
    files.write(tmp_path)
    served = replace(LLAMA_BASE, name="tiny", quantization="int8", fingerprint="0" * 64)
    with pytest.raises(BaseMismatch, match=f"tiny as int8, has .*{words}"):
        load_adapter(tmp_path, served, LLAMA_WEIGHTS)


@pytest.mark.parametrize("change", ["narrower", "deeper", "in the config"])
def test_what_does_not_fit_names_both_bases(change: str, tmp_path: Path) -> None:
    """Their shapes alone do not tell people that they took the wrong base."""
    write_llama_adapter(tmp_path)
    base = replace(LLAMA_BASE, name="models/tiny")
    if change == "in the config":
        edit_config(tmp_path, layers_to_transform=[99])
    else:
        other = {FIRST_A: torch.ones(4, 32)}
        if change == "deeper":
            other = {FIRST_A.replace("layers.0", "layers.77"): torch.ones(4, 64)}
        rewrite_tensors(tmp_path, lambda tensors: {**tensors, **other})
    for named, is_said in {"someone/other": True, "someone/Tiny": False, None: False}.items():
        edit_config(tmp_path, base_model_name_or_path=named)
        with pytest.raises(AdapterRefused) as refusal:
            load_adapter(tmp_path, base, LLAMA_WEIGHTS)
        said = "names the base 'someone/other', and this one is 'models/tiny'"
        assert (said in refusal.value.message) == is_said and refusal.value.field


NAMED_BASES = {
    None: "do not say which base",
    "  ": "do not say which base",
    "someone/Tiny": "only the name",
    "/models/tiny/": "only the name",
    "C:\\models\\tiny": "only the name",
    "someone/other": "names the base 'someone/other', and this one is 'models/tiny'",
}


@pytest.mark.parametrize("named", NAMED_BASES)
def test_a_base_that_cannot_be_verified_is_said(named: str | None, tmp_path: Path) -> None:
    write_llama_adapter(tmp_path)
    edit_config(tmp_path, base_model_name_or_path=named)
    base = replace(LLAMA_BASE, name="models/tiny")
    (note,) = load_adapter(tmp_path, base, LLAMA_WEIGHTS).facts.notes
    assert NAMED_BASES[named] in note


def test_our_own_adapters_need_no_such_note(tmp_path: Path) -> None:
    trained_files().write(tmp_path)
    assert load_adapter(tmp_path, LLAMA_BASE, LLAMA_WEIGHTS).facts.notes == ()


def trained_files(**overrides: object):
    """Random A and B for the q and v projections, as a trainer would export them."""
    torch.manual_seed(3)
    ranks = {"q_proj": 6, "v_proj": 4}
    tensors = {}
    for path, shape in LLAMA_BASE.linears.items():
        if rank := ranks.get(path.rpartition(".")[2]):
            a = 0.1 * torch.randn(rank, shape.in_features)
            tensors[path] = (a, 0.1 * torch.randn(shape.out_features, rank))
    options = dict(
        rank=4,
        alpha=7.5,
        use_rslora=True,
        target_modules=QV,
        tensors=tensors,
        base=LLAMA_BASE,
        rank_pattern={"q_proj": 6},
        alpha_pattern={"layers.0.self_attn.q_proj": 3.0},
        metadata={"note": "kept"},
    )
    return peft_files(**{**options, **overrides})


def test_ours_load_in_peft_and_in_ours_alike(tmp_path: Path) -> None:
    trained_files().write(tmp_path)
    deltas = read_peft_adapter(LLAMA, tmp_path)
    form = load_adapter(tmp_path, LLAMA_BASE, LLAMA_WEIGHTS)
    assert_same_deltas(form_deltas(form), deltas)
    a, b = (trained_files().tensors[name] for name in (FIRST_A, FIRST_B))
    torch.testing.assert_close(
        deltas["model.layers.0.self_attn.q_proj"], 3.0 / 6**0.5 * (b @ a), rtol=1e-5, atol=1e-6
    )


def test_an_adapter_goes_through_peft_and_back(tmp_path: Path) -> None:
    """Ours → PEFT loads and saves → ours: the same ΔW."""
    trained_files(alpha_pattern=None).write(tmp_path / "ours")
    adapted = peft.PeftModel.from_pretrained(tiny_model("llama"), tmp_path / "ours")
    adapted.save_pretrained(tmp_path / "theirs")
    ours, theirs = (
        load_adapter(tmp_path / name, LLAMA_BASE, LLAMA_WEIGHTS) for name in ("ours", "theirs")
    )
    assert_same_deltas(form_deltas(theirs), form_deltas(ours))


def rewrite_tensors(folder: Path, change) -> None:
    path = folder / TENSORS_FILE
    save_file(change(load_file(path)), path, {"format": "pt"})


def rename(folder: Path, old: str, new: str) -> None:
    rewrite_tensors(folder, lambda t: {name.replace(old, new): v for name, v in t.items()})

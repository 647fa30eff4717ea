"""What PiSSA and OLoRA took out of the base is subtracted exactly, or the adapter is refused."""

from __future__ import annotations

import copy
import os
import shutil
from pathlib import Path

import peft
import pytest
import torch

from lora_runtime.adapters.reduction import load_adapter
from lora_runtime.adapters.serving_form import ServingForm
from lora_runtime.adapters.variants.mutated_base import (
    Factors,
    cancelling,
    difference,
    rebalanced,
)
from lora_runtime.base.loader import Base
from lora_runtime.errors import AdapterRefused
from tests.lora_runtime.adapters.peft_oracle import edit_config, form_deltas, read_peft_adapter
from tests.tiny import tiny_base, tiny_checkpoint, tiny_model
from tests.variants import perturb

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

SIZE, RANK = (96, 80), 4


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    return tiny_base("llama", folder=tiny_checkpoint(tmp_path_factory.mktemp("base"), "llama"))


def load(base: Base, folder: Path) -> ServingForm:
    return load_adapter(folder, base.spec, base.weights)


def write(folder: Path, *, with_initial: bool = False, **config: object) -> dict[str, torch.Tensor]:
    """A raw adapter on the 16-bit model; returns ΔW = s·BA − (W − W_res) of every module."""
    original = tiny_model("llama")
    options = {"r": RANK, "target_modules": "all-linear", **config}
    adapted = peft.get_peft_model(copy.deepcopy(original), peft.LoraConfig(**options))
    if with_initial:
        kind = str(config["init_lora_weights"]).partition("_")[0]
        adapted.save_pretrained(folder / f"{kind}_init")
    perturb(adapted, 5)
    adapted.save_pretrained(folder)
    deltas = {}
    for name, module in adapted.named_modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            path = name.removeprefix("base_model.model.")
            taken = original.get_submodule(path).weight - module.get_base_layer().weight
            deltas[path] = module.get_delta_weight("default").detach() - taken.detach()
    return deltas


INITS = {
    "pissa": dict(init_lora_weights="pissa", lora_alpha=7),
    "pissa, rsLoRA and patterns": dict(
        init_lora_weights="pissa", use_rslora=True, rank_pattern={"q_proj": 9},
        alpha_pattern={".*up_proj": 31},
    ),
    "olora": dict(init_lora_weights="olora", lora_alpha=3),
    "olora, rsLoRA": dict(init_lora_weights="olora", use_rslora=True),
}  # fmt: skip


@pytest.mark.parametrize("with_initial", [False, True])
@pytest.mark.parametrize("name", INITS)
def test_deltas_are_pefts(name: str, with_initial: bool, base: Base, tmp_path: Path) -> None:
    deltas = write(tmp_path, with_initial=with_initial, **INITS[name])
    form = load(base, tmp_path)
    for path, found in form_deltas(form).items():
        torch.testing.assert_close(found, deltas[path], rtol=0, atol=2e-5)
    note = form.facts.notes[-1]
    assert ("in the folder" if with_initial else "relative error") in note
    assert form.facts.honoured["init_lora_weights"] == INITS[name]["init_lora_weights"]


def test_fast_svd_needs_its_first_factors(base: Base, tmp_path: Path) -> None:
    deltas = write(tmp_path, with_initial=True, init_lora_weights="pissa_niter_2")
    for path, found in form_deltas(load(base, tmp_path)).items():
        torch.testing.assert_close(found, deltas[path], rtol=0, atol=2e-5)
    shutil.rmtree(tmp_path / "pissa_init")
    with pytest.raises(AdapterRefused, match="pissa_init") as refusal:
        load(base, tmp_path)
    assert refusal.value.field == "init_lora_weights"


def test_the_first_factors_are_content(base: Base, tmp_path: Path) -> None:
    write(tmp_path, with_initial=True, init_lora_weights="pissa")
    digests = {load(base, tmp_path).digest}
    shutil.rmtree(tmp_path / "pissa_init")
    digests.add(load(base, tmp_path).digest)
    edit_config(tmp_path, init_lora_weights=True)
    digests.add(load(base, tmp_path).digest)
    assert len(digests) == 3


def test_without_a_checkpoint_it_is_refused(tmp_path: Path) -> None:
    write(tmp_path, init_lora_weights="olora")
    with pytest.raises(AdapterRefused, match="16-bit weight") as refusal:
        load(tiny_base("llama", folder=tmp_path / "none"), tmp_path)
    assert refusal.value.field == "init_lora_weights"


def test_first_factors_behind_a_link_are_refused(base: Base, tmp_path: Path) -> None:
    write(tmp_path / "real", with_initial=True, init_lora_weights="pissa")
    write(tmp_path / "linked", init_lora_weights="pissa")
    os.symlink(tmp_path / "real" / "pissa_init", tmp_path / "linked" / "pissa_init")
    with pytest.raises(AdapterRefused, match="link"):
        load(base, tmp_path / "linked")


def test_undetermined_factors_are_refused(tmp_path: Path) -> None:
    """Equal singular values: the best approximation of rank r is not one matrix."""
    folder = tiny_checkpoint(tmp_path / "base", "llama")
    base = tiny_base("llama", folder=folder)
    write(tmp_path / "a", init_lora_weights="pissa", target_modules=["q_proj"])
    base.weights.original = lambda path: torch.eye(64)
    with pytest.raises(AdapterRefused, match="cannot be told") as refusal:
        load(base, tmp_path / "a")
    assert refusal.value.field == "init_lora_weights"


def factors(scale: float = 1.0) -> Factors:
    return Factors(torch.randn(RANK, SIZE[1]), scale * torch.randn(SIZE[0], RANK))


@pytest.mark.parametrize("move", [1e-1, 1e-2, 1e-3])
def test_a_difference_survives_bfloat16(move: float) -> None:
    """The concatenated factors lose ΔW when they are rounded; the refactored ones do not."""
    torch.manual_seed(0)
    first = factors()
    trained = Factors(*(part + move * torch.randn_like(part) for part in first))
    exact = trained.b.double() @ trained.a.double() - first.b.double() @ first.a.double()
    found = difference(trained, first)
    assert found.a.shape[0] == 2 * RANK

    def error(a: torch.Tensor, b: torch.Tensor) -> float:
        return float((b.double() @ a.double() - exact).norm() / exact.norm())

    assert error(*found) < 1e-5
    assert error(found.a.bfloat16(), found.b.bfloat16()) < 0.01
    plain_a = torch.cat([trained.a, first.a]).bfloat16()
    plain_b = torch.cat([trained.b, -first.b], dim=1).bfloat16()
    assert error(plain_a, plain_b) > 2 * error(found.a.bfloat16(), found.b.bfloat16())


def test_only_cancelling_factors_are_refactored() -> None:
    torch.manual_seed(0)
    plain = factors()
    moved = plain.b + 0.01 * torch.randn_like(plain.b)
    converted = Factors(torch.cat([plain.a, plain.a]), torch.cat([moved, -plain.b], dim=1))
    wide = Factors(torch.randn(RANK, 40), torch.randn(30, RANK))
    found = rebalanced(converted)
    assert cancelling([plain, converted, wide, found]) == [False, True, False, False]
    assert cancelling([]) == []
    torch.testing.assert_close(found.b @ found.a, converted.b @ converted.a, rtol=0, atol=1e-4)


def test_a_converted_file_of_a_small_change_is_refactored(base: Base, tmp_path: Path) -> None:
    """PEFT's own conversion of a barely trained PiSSA is a plain LoRA whose terms cancel."""
    options = dict(r=RANK, target_modules=["q_proj", "down_proj"], init_lora_weights="pissa")
    adapted = peft.get_peft_model(tiny_model("llama"), peft.LoraConfig(**options))
    adapted.peft_config["default"].init_lora_weights = True
    adapted.save_pretrained(tmp_path / "start")
    adapted.peft_config["default"].init_lora_weights = "pissa"
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.add_(0.01 * parameter.std() * torch.randn_like(parameter))
    folder = tmp_path / "converted"
    start = str(tmp_path / "start")
    adapted.save_pretrained(folder, path_initial_model_for_weight_conversion=start)
    expected = read_peft_adapter(tiny_model("llama"), folder)
    form = load(base, folder)
    assert form.facts.variant == "lora" and form.ranks == (2 * RANK,)
    for key, module in form.modules.items():
        assert cancelling([Factors(module.a, module.b)]) == [False]
        rounded = module.b.bfloat16().double() @ module.a.bfloat16().double()
        exact = expected[key.path].double()
        assert float((rounded - exact).norm() / exact.norm()) < 0.01

"""Every way in which files name the adapters of experts, against the change of each weight.

Where PEFT can write the form, PEFT's own file is the fixture; the others are made of its tensors
under the names and in the layouts that their writers use.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lora_runtime.adapters.reduction import load_adapter
from lora_runtime.adapters.serving_form import ModuleKey
from lora_runtime.adapters.variants import experts
from lora_runtime.errors import AdapterRefused, BaseMismatch
from tests.peft_adapters import load_in_peft, write_adapter
from tests.tiny import dense_twin, tiny_base, tiny_model

EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
RANK = 3


@pytest.fixture(scope="module")
def base():
    return tiny_base("qwen3-moe")


@pytest.fixture(scope="module")
def twin(base):
    return dense_twin(base, "qwen3-moe")


def changes(form, base):
    """Path → (E, out, in): what the form adds to each expert's weight."""
    found = {}
    for key, module in form.modules.items():
        if module.num_experts > 1:
            a = module.a.unflatten(0, (module.num_experts, -1))
            b = module.b.unflatten(1, (module.num_experts, -1))
            change = torch.einsum("oer,eri->eoi", b, a)
            if module.gain is not None:
                gain = module.gain.unflatten(0, (module.num_experts, -1))[..., None]
                weight = base.weights.serving(key.path).unflatten(0, (module.num_experts, -1))
                change = change + (gain - 1) * weight
            found[key.path] = change
    return found


def peft_changes(model, folder):
    """The same of peft's own reading of a folder: merged weights less those of the base."""
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.ndim == 3}
    merged = load_in_peft(model, folder)
    merged = copy.deepcopy(merged).merge_and_unload()
    after = dict(merged.named_parameters())
    return {n: after[n].detach() - weight for n, weight in before.items()}


def test_peft_s_own_file(base, twin, tmp_path):
    folder = write_adapter(
        twin, tmp_path / "a", seed=1, r=RANK, lora_alpha=6, target_modules=["q_proj"],
        target_parameters=EXPERTS, rank_pattern={"down_proj": 5}, scale=6.0,
    )  # fmt: skip
    form = load_adapter(folder, base.spec, base.weights)
    expected, found = peft_changes(twin, folder), changes(form, base)
    assert found.keys() == expected.keys()
    for path, change in found.items():
        torch.testing.assert_close(change, expected[path], rtol=1e-4, atol=1e-5)
    assert form.modules[ModuleKey("model.layers.0.mlp.experts.down_proj")].rank == 5


def test_targets_that_peft_takes_for_experts(base, twin, tmp_path):
    """`all-linear` on this family is attention, experts with twice the rank for gate and up, and
    routers: peft writes what it made of it.
    """
    folder = write_adapter(twin, tmp_path / "a", seed=1, r=RANK, lora_alpha=6, scale=6.0)
    form = load_adapter(folder, base.spec, base.weights)
    expected, found = peft_changes(twin, folder), changes(form, base)
    for path, change in found.items():
        torch.testing.assert_close(change, expected[path], rtol=1e-4, atol=1e-5)
    ranks = {key.path.rpartition(".")[2]: module.rank for key, module in form.modules.items()}
    assert ranks["gate_up_proj"] == 2 * RANK and ranks["gate"] == RANK


def rewritten(folder, edit: Callable, **config):
    """A folder with other tensors and some other fields."""
    file = folder / "adapter_model.safetensors"
    save_file(edit(load_file(file)), file)
    fields = json.loads((folder / "adapter_config.json").read_text()) | config
    (folder / "adapter_config.json").write_text(json.dumps(fields))
    return folder


def written(twin, folder, **config):
    options = dict(r=RANK, lora_alpha=6, target_modules=[], target_parameters=EXPERTS, scale=6.0)
    return write_adapter(twin, folder, seed=2, **{**options, **config})


def test_a_and_b_swapped_as_peft_0_18_wrote_them(base, twin, tmp_path):
    """There A took the second size of a weight (E, out, in): its columns are the outputs."""
    expected = changes(load_adapter(written(twin, tmp_path / "a"), base.spec, base.weights), base)

    def swap(tensors):
        found = {}
        for name, a in tensors.items():
            if "lora_A" in name:
                b = tensors[name.replace("lora_A", "lora_B")]
                num_experts = len(a) // RANK
                as_a = b.view(-1, RANK, num_experts).permute(2, 1, 0).flatten(0, 1)
                as_b = a.view(num_experts, RANK, -1).permute(2, 1, 0).flatten(1)
                found |= {name: as_a.contiguous()}
                found |= {name.replace("lora_A", "lora_B"): as_b.contiguous()}
        return found

    folder = rewritten(written(twin, tmp_path / "b"), swap, peft_version="0.18.1")
    found = changes(load_adapter(folder, base.spec, base.weights), base)
    for path, change in found.items():
        torch.testing.assert_close(change, expected[path])


def square_base():
    """A mixture whose down projections have as many inputs as outputs."""
    return tiny_base("olmoe")


def test_square_experts_of_an_unknown_writer_are_refused(tmp_path):
    base = square_base()
    twin = dense_twin(base, "olmoe")
    folder = written(twin, tmp_path / "a")
    load_adapter(folder, base.spec, base.weights)
    for version in (None, "0.19.0"):
        rewritten(folder, dict, peft_version=version)
        with pytest.raises(AdapterRefused, match="peft_version"):
            load_adapter(folder, base.spec, base.weights)


class Experts(nn.Module):
    """A layer's experts as transformers 4 held them: a linear layer for each matrix."""

    def __init__(self, gate_up, down, names) -> None:
        super().__init__()
        gate, up = gate_up.chunk(2, dim=1)
        for index, own in enumerate(zip(gate, up, down, strict=True)):
            expert = nn.Module()
            for name, weight in zip(names, own, strict=True):
                linear = nn.Linear(*reversed(weight.shape), bias=False)
                linear.weight = nn.Parameter(weight.clone())
                setattr(expert, name, linear)
            self.add_module(str(index), expert)


def of_transformers_4(model, names=("gate_proj", "up_proj", "down_proj")):
    """The modules of a mixture in transformers 4, without their forward: for their names."""
    model = copy.deepcopy(model)
    for layer in model.model.layers:
        experts = getattr(layer.mlp, "experts", None)
        if experts is not None:
            with torch.no_grad():
                layer.mlp.experts = Experts(experts.gate_up_proj, experts.down_proj, names)
            router = nn.Linear(*reversed(layer.mlp.gate.weight.shape), bias=False)
            router.weight = layer.mlp.gate.weight
            layer.mlp.gate = router
    model.config.model_type = "an older one"  # or peft would rename the targets
    return model


@pytest.mark.parametrize(
    "settings",
    [
        dict(target_modules=["q_proj", "gate_proj", "up_proj", "down_proj"]),
        dict(target_modules=["down_proj", "gate"], use_rslora=True),
        dict(target_modules=["up_proj", "v_proj"], use_dora=True),
        dict(
            target_modules=r".*experts\.\d+\.(gate_proj|down_proj)",
            rank_pattern={r"experts\.[0-3]\.gate_proj": 5},
            alpha_pattern={r"experts\.2\.down_proj": 9},
        ),
    ],
    ids=["lora", "rslora and a router", "dora", "patterns"],
)
def test_a_layer_for_each_expert(base, twin, tmp_path, settings):
    """As transformers 4's PEFT, vLLM's examples, Megatron's and ms-swift's exports name them."""
    older = of_transformers_4(twin)
    folder = write_adapter(older, tmp_path / "a", seed=3, r=RANK, lora_alpha=6, **settings)
    form = load_adapter(folder, base.spec, base.weights)
    merged = load_in_peft(older, folder).merge_and_unload()
    found = changes(form, base)
    assert found
    for path, change in found.items():
        layer = int(path.split(".")[2])
        own = merged.model.layers[layer].mlp.experts
        names = ("gate_proj", "up_proj") if path.endswith("gate_up_proj") else ("down_proj",)
        for expert, weight in enumerate(twin.get_parameter(path)):
            parts = [own.get_submodule(f"{expert}.{name}").weight for name in names]
            torch.testing.assert_close(
                change[expert], torch.cat(parts) - weight, rtol=1e-4, atol=1e-5
            )
    router = form.modules.get(ModuleKey("model.layers.0.mlp.gate"))
    assert (router is not None) == (settings["target_modules"] == ["down_proj", "gate"])


def test_mixtral_s_older_names(tmp_path):
    base = tiny_base("mixtral")
    older = of_transformers_4(dense_twin(base, "mixtral"), ("w1", "w3", "w2"))
    folder = write_adapter(
        older, tmp_path / "a", seed=3, r=RANK, lora_alpha=6, target_modules=["w1", "w2", "w3"]
    )
    plain = changes(load_adapter(folder, base.spec, base.weights), base)
    rewritten(folder, lambda t: {n.replace(".mlp.", ".block_sparse_moe."): v for n, v in t.items()})
    found = changes(load_adapter(folder, base.spec, base.weights), base)
    assert len(found) == 6
    for path, change in found.items():
        assert torch.equal(change, plain[path]) and change.abs().max() > 0


def test_gpt_oss_in_lists_of_layers_as_unsloth_holds_it_in_4_bits(tmp_path):
    """Each layer has gate's and up's outputs in turn, as the parameter has them."""
    base = tiny_base("gpt-oss")
    folder = written(dense_twin(base, "gpt-oss"), tmp_path / "a")
    expected = changes(load_adapter(folder, base.spec, base.weights), base)

    def listed(tensors):
        found = {}
        for name, a in tensors.items():
            if "lora_A" in name:
                holder = name.partition("experts.")[0] + "experts."
                own = "gate_up_projs" if "base_layer" in name else "down_projs"
                b = tensors[name.replace("lora_A", "lora_B")]
                for expert, part in enumerate(a.split(RANK)):
                    found[f"{holder}{own}.{expert}.lora_A.weight"] = part.clone()
                    columns = b[:, expert :: len(a) // RANK]
                    found[f"{holder}{own}.{expert}.lora_B.weight"] = columns.contiguous()
        return found

    targets = r".*experts\.(gate_up|down)_projs\.\d+"
    rewritten(folder, listed, target_modules=targets, target_parameters=None)
    found = changes(load_adapter(folder, base.spec, base.weights), base)
    assert found.keys() == expected.keys()
    for path, change in found.items():
        torch.testing.assert_close(change, expected[path])


def test_attention_alone_though_the_config_names_experts_layers(base, twin, tmp_path):
    """Writers that could not adapt experts left them out, and the names in the config."""
    names = ["q_proj", "k_proj", "v_proj", "o_proj"]
    folder = write_adapter(twin, tmp_path / "a", seed=1, r=4, target_modules=names)
    rewritten(folder, dict, target_modules=[*names, "w1", "w2"])
    form = load_adapter(folder, base.spec, base.weights)
    assert not changes(form, base)
    assert any("'w1', 'w2'" in note for note in form.facts.notes)


@pytest.mark.parametrize("targets", [["fc1"], r".*\.fc1"])
def test_experts_alone_though_the_config_names_modules_that_are_not_there(
    base, twin, tmp_path, targets
):
    folder = written(twin, tmp_path / "a", target_modules=targets)
    form = load_adapter(folder, base.spec, base.weights)
    expected, found = peft_changes(twin, folder), changes(form, base)
    assert found.keys() == expected.keys()
    for path, change in found.items():
        torch.testing.assert_close(change, expected[path], rtol=1e-4, atol=1e-5)
    assert any("fc1" in note for note in form.facts.notes) == isinstance(targets, list)


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(use_dora=True), "DoRA"),
        (dict(alora_invocation_tokens=[5, 6]), "activated"),
        (dict(init_lora_weights="pissa"), "init"),
        (dict(target_parameters=["experts.gate_proj"]), "no weight"),
        (dict(target_parameters=["experts.down_proj"]), "belongs to no module"),
    ],
)
def test_what_peft_does_not_define_is_refused(base, twin, tmp_path, fields, message):
    folder = rewritten(written(twin, tmp_path / "a"), dict, **fields)
    with pytest.raises(AdapterRefused, match=message):
        load_adapter(folder, base.spec, base.weights)


@pytest.mark.parametrize(
    "options, fields, field, words",
    [
        ({}, dict(r=5), "r", "r is 5.*rank 3.*8 experts of 3 rows.*set it to 3"),
        (
            dict(rank_pattern={"down_proj": 4}),
            dict(rank_pattern={"experts.down_proj": 7}),
            "rank_pattern",
            "'experts.down_proj' the rank 7.*rank 4.*set it to 4",
        ),
        (
            {},
            dict(target_parameters=["experts.gate_up_porj"]),
            "target_parameters",
            "'experts.gate_up_porj'.*did you mean 'experts.gate_up_proj'",
        ),
        (
            {},
            dict(target_parameters=["experts.gate_up_porj", EXPERTS[1]]),
            "target_parameters",
            "'experts.gate_up_porj'.*did you mean 'experts.gate_up_proj'.*belongs to no module",
        ),
        (
            {},
            dict(target_parameters=[EXPERTS[0], "mlp.expert.down_proj"]),
            "target_parameters",
            "'mlp.expert.down_proj'.*did you mean 'mlp.experts.down_proj'.*has shape",
        ),
        (
            dict(target_modules=["q_proj", "o_proj"]),
            dict(target_modules=["q_porj", "o_proj"]),
            "target_modules",
            "'q_porj'.*did you mean 'q_proj'.*belongs to no module",
        ),
    ],
)
def test_a_wrong_entry_of_the_config_is_named(base, twin, tmp_path, options, fields, field, words):
    """Not the tensor in which it shows."""
    folder = rewritten(written(twin, tmp_path / "a", **options), dict, **fields)
    with pytest.raises(AdapterRefused, match=words) as refusal:
        load_adapter(folder, base.spec, base.weights)
    assert refusal.value.field == field


@pytest.fixture(scope="module")
def smaller():
    """The same model with half the experts."""
    model = tiny_model("qwen3-moe")
    model.config.num_experts //= 2
    return type(model)(model.config)


@pytest.mark.parametrize("options", [{}, dict(target_modules=["q_proj", "mlp.gate"])])
@pytest.mark.parametrize("rank", [16, 3])
def test_experts_of_another_number_are_named(base, smaller, tmp_path, rank, options):
    """Also where their rows are as many as another rank would have here, which would cut them."""
    folder = written(smaller, tmp_path / "a", r=rank, **options)
    words = f"r is {rank}.* 4 experts of that rank.*this base, qwen3-moe, has 8"
    with pytest.raises(BaseMismatch, match=words) as refusal:
        load_adapter(folder, base.spec, base.weights)
    assert refusal.value.field == "target_parameters" and "set it to" not in refusal.value.message
    rewritten(folder, dict, rank_pattern={name: rank for name in EXPERTS})
    with pytest.raises(BaseMismatch, match=rf"rank_pattern gives .* the rank {rank}.* 4 experts"):
        load_adapter(folder, base.spec, base.weights)


def test_a_rank_that_nothing_in_the_file_shows_is_said(base, twin, smaller, tmp_path):
    """A file of experts alone is the same for 4 of rank 16 and for 8 of rank 8."""
    said = "24 rows of A of .*gate_up_proj were taken for 8 experts of rank 3"
    for options, is_said in (({}, True), (dict(target_modules=["q_proj"]), False)):
        folder = written(twin, tmp_path / str(is_said), **options)
        notes = load_adapter(folder, base.spec, base.weights).facts.notes
        assert any(re.search(said, note) for note in notes) == is_said
    folder = written(smaller, tmp_path / "edited", r=16)
    notes = load_adapter(rewritten(folder, dict, r=8), base.spec, base.weights).facts.notes
    assert any("64 rows of A" in note and "8 experts of rank 8" in note for note in notes)
    folder = written(smaller, tmp_path / "shown", r=16, target_modules=["q_proj"])
    with pytest.raises(AdapterRefused, match="r is 8.*q_proj have rank 16"):
        load_adapter(rewritten(folder, dict, r=8), base.spec, base.weights)


def test_experts_saved_whole_are_refused_by_the_entry_that_saved_them(base, twin, tmp_path):
    folder = written(
        twin, tmp_path / "a", target_modules=["q_proj"], target_parameters=None,
        modules_to_save=["experts"],
    )  # fmt: skip
    with pytest.raises(AdapterRefused, match="as modules_to_save saves it") as refusal:
        load_adapter(folder, base.spec, base.weights)
    assert refusal.value.field == "modules_to_save"


@pytest.mark.parametrize("others", [[], EXPERTS])
def test_biases_of_experts_are_refused_by_name(tmp_path, others):
    """PEFT adapts them, as matrices of one row for each expert."""
    base = tiny_base("gpt-oss")
    folder = written(
        tiny_model("gpt-oss"), tmp_path / "a", target_modules=["q_proj"],
        target_parameters=["experts.gate_up_proj_bias", *others],
    )  # fmt: skip
    assert any("experts" in name for name in load_file(folder / "adapter_model.safetensors"))
    words = "'experts.gate_up_proj_bias', the biases of experts.*not served, though PEFT"
    with pytest.raises(AdapterRefused, match=words) as refusal:
        load_adapter(folder, base.spec, base.weights)
    assert refusal.value.field == "target_parameters"


@pytest.mark.parametrize("others", [[], EXPERTS])
@pytest.mark.parametrize("name", ["embed_tokens", "lm_head"])
def test_weights_of_the_vocabulary_are_refused_by_name(base, twin, tmp_path, name, others):
    folder = written(
        twin, tmp_path / "a", target_modules=["q_proj"],
        target_parameters=[f"{name}.weight", *others],
    )  # fmt: skip
    words = f"'{name}.weight', a weight of the vocabulary.*'{name}' in target_modules"
    with pytest.raises(AdapterRefused, match=words) as refusal:
        load_adapter(folder, base.spec, base.weights)
    assert refusal.value.field == "target_parameters"


def test_granite_s_older_names_of_experts_are_answered_by_the_newer(tmp_path):
    """Nearer in letters is the router's."""
    base = tiny_base("granite-moe")
    folder = written(tiny_model("granite-moe"), tmp_path / "a", target_modules=["q_proj"])
    for entry, newer in [
        ("block_sparse_moe.input_linear.weight", "experts.gate_up_proj"),
        ("output_linear.weight", "experts.down_proj"),
    ]:
        rewritten(folder, dict, target_parameters=[entry])
        with pytest.raises(AdapterRefused, match=f"transformers 5 calls it '{newer}'"):
            load_adapter(folder, base.spec, base.weights)


def test_an_expert_too_many_is_refused(base, twin, tmp_path):
    older = of_transformers_4(twin)
    folder = write_adapter(
        older, tmp_path / "a", seed=3, r=RANK, lora_alpha=6, target_modules=["down_proj"]
    )
    rewritten(folder, lambda t: {n.replace("experts.7.", "experts.8."): v for n, v in t.items()})
    with pytest.raises(AdapterRefused, match="experts.7"):
        load_adapter(folder, base.spec, base.weights)


def test_one_expert_of_a_rank_that_all_others_would_be_filled_up_to_is_refused(
    base, twin, tmp_path, monkeypatch
):
    """Otherwise a small file takes the host's memory: hundreds of experts of the largest rank."""
    older = of_transformers_4(twin)
    folder = write_adapter(
        older, tmp_path / "a", seed=3, r=1, target_modules=["down_proj"],
        rank_pattern={r"layers\.0\.mlp\.experts\.0\.down_proj": 512},
    )  # fmt: skip
    monkeypatch.setattr(experts, "MAX_TENSORS_BYTES", 1 << 20)
    with pytest.raises(AdapterRefused, match="largest rank") as refusal:
        load_adapter(folder, base.spec, base.weights)
    assert refusal.value.field == "rank_pattern"

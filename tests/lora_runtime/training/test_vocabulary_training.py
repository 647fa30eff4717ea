"""Training the embedding and the output layer, tied and untied, against PEFT and serving."""

from __future__ import annotations

import copy
from dataclasses import replace

import peft
import pytest
import torch

from lora_runtime.adapters.files.parity_record import read_parity_record
from lora_runtime.adapters.packed_adapter import pack_for
from lora_runtime.adapters.parity import gate
from lora_runtime.adapters.reduction import load_adapter
from lora_runtime.base import attention
from lora_runtime.base.fingerprint import fingerprint
from lora_runtime.base.loader import prepare_base
from lora_runtime.base.varlen_attention import Rows, VarlenAttention
from lora_runtime.config import BaseConfig
from lora_runtime.engine.probe import adapter_logits, probe_logits
from lora_runtime.errors import ConfigError
from lora_runtime.training import losses
from lora_runtime.training.config import UnitConfig
from lora_runtime.training.losses import token_losses, unit_logits, window_losses
from lora_runtime.training.trainer import run_pass
from lora_runtime.training.variants import TrainedModule
from tests.lora_runtime.training.test_variants import mean_loss, randomise, train_until_done
from tests.lora_runtime.training.tiny_runs import (
    StopAfter,
    at_every_token,
    make_unit,
    ragged_data,
    run,
)
from tests.peft_adapters import load_in_peft
from tests.tiny import dense_twin, in_float64, tiny_base, tiny_model

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]

SEEN, UNSEEN = 299, 270
TOKENS = (264, UNSEEN, 7, SEEN, 2)
"""Ids to train: some are in the data, others are not."""
ROWS = [[5, 17, 2, 250, 33, 264, 120, 7], [200, 270, 41]]
ENDS, Q_AND_EMBEDDING = ("q_proj", "embed_tokens", "lm_head"), ("q_proj", "embed_tokens")
DORA = {"variant": "rslora", "use_dora": True}
BOTH = ("embed_tokens", "lm_head")
UNITS = {
    "ends": {"target_modules": ENDS, "rank_pattern": {"embed_tokens": 3}},
    "embedding": {"target_modules": Q_AND_EMBEDDING, "alpha_pattern": {"embed_tokens": 9.0}},
    "ends-dora": {"target_modules": ENDS, **DORA},
    "tied": {"target_modules": Q_AND_EMBEDDING, "ensure_weight_tying": True},
    "tied-dora": {"target_modules": ("lm_head",), "ensure_weight_tying": True, **DORA},
    "save-both": {"modules_to_save": BOTH, "target_modules": ("q_proj",)},
    "save-tied": {"modules_to_save": ("lm_head",), "ensure_weight_tying": True},
    "save-head": {"modules_to_save": ("lm_head",), "target_modules": Q_AND_EMBEDDING},
    "tokens": {"trainable_token_indices": TOKENS, "target_modules": ("up_proj",)},
    "tokens-tied": {"trainable_token_indices": TOKENS, "ensure_weight_tying": True},
}
STARTED = {
    "pissa": {"target_modules": ENDS, "variant": "pissa"},
    "pissa-tied": {"target_modules": ENDS, "variant": "pissa", "ensure_weight_tying": True},
    "olora-dora": {"target_modules": ENDS, "init": "olora", "use_dora": True},
}
REPLICATED = {"target_modules": ENDS, "layer_replication": ((0, 2), (0, 3))}
EVERY = {**UNITS, **STARTED, "replicated": REPLICATED}


def pairs_of(names_of_shapes):
    return [(shape, name) for shape, names in names_of_shapes.items() for name in names]


def unit_config(tmp_path, name, **options):
    data = options.pop("data", None) or ragged_data(tmp_path / f"{name}.jsonl", 6)
    return UnitConfig(
        name=name, data=data, **{"rank": 4, "alpha": 6.0, "warmup": 0, **EVERY[name], **options}
    )


def unit_of(base, tokenizer, tmp_path, name, **options):
    return make_unit(base, tokenizer, unit_config(tmp_path, name, **options))


def filled(model):
    """The padding token's row is not zero, as DoRA on it would divide by."""
    with torch.no_grad():
        model.get_input_embeddings().weight[0] = 0.125
    return model


def vocabulary_base(shape, **options):
    base = tiny_base(shape, **options)
    filled(base.model)
    return base


def exact_vocabulary_base(shape):
    base = vocabulary_base(shape, quantization="none", dtype=torch.float64)
    in_float64(base.model)
    return base


SHAPES = {"llama": UNITS, "gemma2": UNITS, "qwen3": [name for name in UNITS if "tied" not in name]}
"""Tied; tied, with an embedding scale and soft caps; untied."""


@pytest.fixture(scope="module")
def bases():
    """A float64 base of each shape."""
    found = {shape: exact_vocabulary_base(shape) for shape in SHAPES}
    assert [base.spec.is_tied for base in found.values()] == [True, True, False]
    return found


@pytest.fixture(scope="module")
def exact_base(bases):
    return bases["llama"]


@pytest.mark.parametrize("shape", SHAPES)
def test_the_start_is_exactly_the_base(tmp_path, tokenizer, bases, shape):
    for name in EVERY:
        unit = unit_of(bases[shape], tokenizer, tmp_path, name)
        started = at_every_token(unit_logits(bases[shape], unit))(ROWS, True)
        unit.modules = {}
        plain = at_every_token(unit_logits(bases[shape], unit))(ROWS, True)
        assert all(torch.equal(one, other) for one, other in zip(started, plain, strict=True)), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_the_first_losses_in_other_dtypes_are_the_bases(tmp_path, tokenizer, dtype):
    """A whole weight of the output layer is multiplied by another kernel than the base's."""
    base = vocabulary_base("gemma2", dtype=dtype)
    for name in UNITS:
        unit = unit_of(base, tokenizer, tmp_path, name)
        examples = unit.next_micro_batches()[0]
        started = token_losses(base, [unit], [examples])
        unit.modules = {}
        limit = 5e-6 if name.startswith("save") and dtype == torch.float32 else 0
        assert (started - token_losses(base, [unit], [examples])).abs().max() <= limit


def peft_oracle(base, shape, config):
    """PEFT on the same weights in float64. It skips the padding token's row in gradients, which
    here is a token like any other.
    """
    twin = filled(in_float64(dense_twin(base, shape)))
    twin.model.embed_tokens.padding_idx = None
    twin.set_attn_implementation(attention.NAME)
    options = dict(
        r=config.rank, lora_alpha=config.alpha, use_dora=config.has_gain,
        use_rslora=config.has_root_scaling, target_modules="all-linear",
        rank_pattern=config.rank_pattern, alpha_pattern=config.alpha_pattern,
        ensure_weight_tying=config.ensure_weight_tying,
        modules_to_save=list(config.modules_to_save) or None,
        trainable_token_indices=list(config.trainable_token_indices) or None,
    )  # fmt: skip
    if config.target_modules != "all-linear":
        options["target_modules"] = list(config.target_modules)
    oracle = peft.get_peft_model(twin, peft.LoraConfig(**options))
    for parameter in oracle.parameters():
        parameter.data = parameter.data.double()
    return oracle


def peers(unit, oracle, base):
    """(our parameter, PEFT's) of everything that is trained; a shared one has several."""
    for path, module in unit.modules.items():
        layer = oracle.base_model.model.get_submodule(path)
        if not isinstance(module, TrainedModule):
            if module.ids is None:
                yield module.rows, layer.modules_to_save.default.weight
            elif not module.is_shared:
                yield module.rows, layer.token_adapter.trainable_tokens_delta.default
            continue
        if path == base.spec.embedding:
            yield module.a, layer.lora_embedding_A.default
            yield module.b, layer.lora_embedding_B.default
        else:
            a, b = layer.lora_A.default.weight, layer.lora_B.default.weight
            yield (module.b if module.is_transposed else module.a), a
            yield (module.a if module.is_transposed else module.b), b
        if module.magnitude is not None:
            yield module.magnitude, layer.lora_magnitude_vector.default.weight


def as_ours(theirs, ours):
    """PEFT's tied output layer has the embedding's factors transposed."""
    return theirs if theirs.shape == ours.shape else theirs.T


@pytest.mark.parametrize(("shape", "name"), pairs_of(SHAPES))
def test_gradients_are_those_of_peft(tmp_path, tokenizer, bases, shape, name):
    base = bases[shape]
    unit = unit_of(base, tokenizer, tmp_path, name, micro_batch_size=6)
    randomise(unit)
    examples = unit.next_micro_batches()[0]
    losses = window_losses(base, [unit], [examples])
    losses.sum().backward()
    oracle = peft_oracle(base, shape, unit.config)
    pairs = list(peers(unit, oracle, base))
    trained = {id(p) for p in oracle.parameters() if p.requires_grad}
    assert {id(theirs) for _, theirs in pairs} == trained
    for ours, theirs in pairs:
        theirs.data.copy_(as_ours(ours.data, theirs))

    def logits_of(ids):
        batch = VarlenAttention([Rows([len(ids)])], base.device)
        return oracle(ids[None], use_cache=False, batch=batch).logits[0]

    expected_loss = mean_loss(logits_of, examples)
    expected_loss.backward()
    assert (losses.sum() - expected_loss).abs() <= 1e-7
    grads = {}
    for ours, theirs in {id(theirs): pair for pair in pairs for theirs in pair[1:]}.values():
        grads[ours] = grads.get(ours, 0) + as_ours(theirs.grad, ours)
    assert grads.keys() == set(unit.parameters)
    for ours, expected in grads.items():
        assert expected.norm() > 0
        limit = 1e-7 if shape == "gemma2" else 1e-9  # whose softmax is in float32
        assert (ours.grad - expected).norm() <= limit * expected.norm()


def test_a_whole_output_layer_has_its_bias_trained_too(tmp_path, tokenizer):
    """Against plain autograd at the start, where the adapter is the model itself."""
    twin = tiny_model("llama-bias")
    twin.lm_head.bias = torch.nn.Parameter(torch.linspace(-1, 1, twin.config.vocab_size))
    base = prepare_base(copy.deepcopy(twin), BaseConfig(quantization="none"), "phi", tmp_path)
    unit = unit_of(base, tokenizer, tmp_path, "save-both")
    examples = unit.next_micro_batches()[0]
    window_losses(base, [unit], [examples]).sum().backward()
    twin.model.embed_tokens.padding_idx = None
    mean_loss(lambda ids: twin(ids[None]).logits[0], examples).backward()
    embedding, head = unit.modules["model.embed_tokens"], unit.modules["lm_head"]
    for ours, theirs in [
        (embedding.rows, twin.model.embed_tokens.weight),
        (head.rows, twin.lm_head.weight),
        (head.bias, twin.lm_head.bias),
    ]:
        assert (ours.grad - theirs.grad).norm() <= 1e-5 * theirs.grad.norm()
    config = unit_config(tmp_path, "save-both", learning_rate=1e-2, max_steps=3)
    (result,) = run(base, tokenizer, tmp_path / "out", [config])
    form = load_adapter(result.folder, base.spec, base.weights)
    assert (form.modules["lm_head", 0].bias - twin.lm_head.bias).abs().min() > 1e-3
    assert parity_of(base, result.folder).error < 1e-4


@pytest.mark.parametrize("name", ["ends", "tied-dora", "save-tied", "replicated"])
def test_gradients_of_chunked_logits(tmp_path, tokenizer, exact_base, monkeypatch, name):
    units = [
        unit_of(exact_base, tokenizer, tmp_path, other)
        for other in (name, "save-both", "tokens", "ends-dora")
    ]
    batches = [unit.next_micro_batches()[0] for unit in units]
    parameters = []
    for unit in units:
        randomise(unit)
        parameters += unit.parameters
    whole = torch.autograd.grad(window_losses(exact_base, units, batches).sum(), parameters)
    monkeypatch.setattr(losses, "CHUNK_LOGITS", 5 * exact_base.spec.vocab_size)
    chunked = torch.autograd.grad(window_losses(exact_base, units, batches).sum(), parameters)
    for one, other in zip(chunked, whole, strict=True):
        assert other.norm() > 0
        assert (one - other).norm() <= 1e-12 * other.norm()


def mixed_configs(tmp_path):
    settings = {"max_steps": 6, "learning_rate": 3e-3, "weight_decay": 0.1}
    names = ["ends-dora", "tied", "save-both", "save-tied", "tokens", "pissa", "replicated"]
    found = [
        unit_config(
            tmp_path, name, data=ragged_data(tmp_path / name, 5 + index, seed=index), 
            rank=2 + index,
            micro_batch_size=1 + index % 3, **settings,
        )
        for index, name in enumerate(names)
    ]  # fmt: skip
    data = ragged_data(tmp_path / "plain", 9, seed=50)
    return [*found[:3], UnitConfig(name="plain", data=data, rank=3, **settings), *found[3:]]


def test_a_mix_equals_each_alone_and_the_base_stays(tmp_path, tokenizer, exact_base):
    base = exact_base
    configs = mixed_configs(tmp_path)
    before = fingerprint(base.model, "none")
    together = [make_unit(base, tokenizer, config, seed=3) for config in configs]
    train_until_done(base, together)
    for unit, config in zip(together, configs, strict=True):
        alone = make_unit(base, tokenizer, config, seed=3)
        start = {name: value.detach().clone() for name, value in alone.named_parameters().items()}
        train_until_done(base, [alone])
        assert unit.step == alone.step == 6
        limit = 1e-12 if unit.name == "plain" else 1e-8
        for ours, theirs in zip(unit.records, alone.records, strict=True):
            assert ours.loss == pytest.approx(theirs.loss, rel=limit)
        for name, value in alone.named_parameters().items():
            assert (unit.named_parameters()[name] - value).abs().max() <= 1e-8
            assert (start[name] - value).abs().max() >= 1e-4
    assert fingerprint(base.model, "none") == before


def test_only_a_trained_embedding_makes_the_first_layers_input_need_a_gradient(
    tmp_path, tokenizer, base
):
    seen = []
    layer = base.model.get_decoder().layers[0]
    hook = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].requires_grad))
    plain = UnitConfig(name="plain", data=ragged_data(tmp_path / "p", 3))
    head = unit_config(tmp_path, "save-head", target_modules=("q_proj",))
    configs = [plain, head, *(unit_config(tmp_path, name) for name in ("embedding", "tokens"))]
    for config in configs:
        run_pass(base, [make_unit(base, tokenizer, config)])
    hook.remove()
    assert seen == [False, False, True, True]


def test_weight_decay_acts_on_the_whole_row(tmp_path, tokenizer, exact_base):
    """As AdamW does on PEFT's copy: a row that no token asks for shrinks by rate · decay."""
    options = {"weight_decay": 0.25, "learning_rate": 1e-2, "max_steps": 1, "schedule": "constant"}
    first = exact_base.weights.vocabulary_rows("model.embed_tokens", slice(None)).clone()
    for name in ("save-both", "tokens"):
        unit = unit_of(exact_base, tokenizer, tmp_path, name, **options)
        rows = unit.modules["model.embed_tokens"].rows
        place = TOKENS.index if name == "tokens" else int
        unit.modules.pop("lm_head")  # there every token has a gradient
        train_until_done(exact_base, [unit])
        shrunk = first * (1 - 1e-2 * 0.25)
        assert (rows[place(UNSEEN)] - shrunk[UNSEEN]).abs().max() <= 1e-15
        assert (rows[place(SEEN)] - shrunk[SEEN]).abs().min() > 9e-3
    assert torch.equal(first, exact_base.weights.vocabulary_rows("model.embed_tokens", slice(None)))


def test_tied_parameters_are_one(tmp_path, tokenizer, exact_base):
    spec, q = exact_base.spec, 3 * 2
    assert len(unit_of(exact_base, tokenizer, tmp_path, "tied").parameters) == q + 2
    saved = unit_of(exact_base, tokenizer, tmp_path, "save-tied", target_modules=("q_proj",))
    assert len(saved.parameters) == q + 1
    assert saved.num_parameters - sum(p.numel() for p in saved.parameters[:q]) == (
        spec.vocab_size * spec.hidden_size
    )
    both = unit_of(exact_base, tokenizer, tmp_path, "save-both")
    assert len(both.parameters) == q + 2


def served(base, folder):
    form = load_adapter(folder, base.spec, base.weights)
    return lambda rows, with_adapter: probe_logits(base, form if with_adapter else None, rows)


def parity_of(base, folder):
    form = load_adapter(folder, base.spec, base.weights)
    logits = adapter_logits(base, pack_for(base, form))
    return gate(read_parity_record(folder, base.spec), logits, "float32", form.facts.tensors_sha256)


EXPORTED = {
    "llama": EVERY,
    "llama-bias": ["ends", "save-both", "tokens", "pissa"],
    "gemma2": ["ends-dora", "tied-dora", "save-tied", "tokens"],
}


@pytest.fixture(scope="module")
def exported(tmp_path_factory, tokenizer):
    """All kinds trained in one run on an NF4 base of each shape: (base, name → folder)."""
    found = {}
    for shape, names in EXPORTED.items():
        folder = tmp_path_factory.mktemp(shape)
        base = vocabulary_base(shape)
        configs = [
            unit_config(
                folder, name, data=ragged_data(folder / f"{name}.jsonl", 8, seed=seed),
                learning_rate=2e-2, max_steps=4,
            )
            for seed, name in enumerate(names)
        ]  # fmt: skip
        before = fingerprint(base.model, "nf4")
        results = run(base, tokenizer, folder / "out", configs)
        assert fingerprint(base.model, "nf4") == before
        found[shape] = base, {result.name: result.folder for result in results}
    return found


@pytest.mark.parametrize(("shape", "name"), pairs_of(EXPORTED))
def test_exports_pass_the_parity_gate_and_do_the_same_in_peft(exported, shape, name):
    base, folders = exported[shape]
    parity = parity_of(base, folders[name])
    assert parity.error < 1e-4 and parity.effect_rms > 0.1
    oracle = load_in_peft(filled(dense_twin(base, shape)), folders[name])
    with torch.no_grad():
        for row, ours in zip(ROWS, served(base, folders[name])(ROWS, True), strict=True):
            theirs = oracle(torch.tensor([row]), use_cache=False).logits[0]
            assert (theirs - ours).abs().max() <= 1e-4


def test_resume_equals_the_uninterrupted_run(tmp_path, tokenizer, exact_base):
    base = exact_base
    configs = [
        unit_config(tmp_path, name, max_steps=3, gradient_accumulation=2, micro_batch_size=2)
        for name in ("ends-dora", "tied", "save-both", "tokens")
    ]
    expected = run(base, tokenizer, tmp_path / "whole", configs)
    run(base, tokenizer, tmp_path / "out", configs, should_stop=StopAfter(3))
    changed = [*configs[:-1], replace(configs[-1], trainable_token_indices=(3,))]
    with pytest.raises(ConfigError, match="trainable_token_indices was"):
        run(base, tokenizer, tmp_path / "out", changed, resume=True)
    for result in run(base, tokenizer, tmp_path / "out", configs, resume=True):
        name = f"{result.name}/adapter_model.safetensors"
        found, wanted = (tmp_path / kind / name for kind in ("out", "whole"))
        assert found.read_bytes() == wanted.read_bytes()
    assert len(expected) == len(configs)


@pytest.mark.parametrize(
    ("options", "field", "message"),
    [
        ({"modules_to_save": ("norm",)}, "modules_to_save", "only the embedding and the output"),
        ({"trainable_token_indices": (300,)}, "trainable_token_indices", "from 0 to 299"),
        ({"trainable_token_indices": (3, 3)}, "trainable_token_indices", "each of its tokens once"),
        (
            {"trainable_token_indices": (3,), "modules_to_save": ("lm_head",)},
            "trainable_token_indices",
            "change the same rows",
        ),
        (
            {"trainable_token_indices": (3,), "target_modules": ("embed_tokens",)},
            "target_modules",
            "cannot have A and B too",
        ),
        ({"target_modules": ENDS, "variant": "loftq"}, "init", "output layer are not quantised"),
        ({"target_modules": ENDS, "variant": "dora"}, "use_dora", "lm_head has 1 rows of zeros"),
    ],
)
def test_settings_that_cannot_be_followed_are_named(
    tmp_path, tokenizer, base, options, field, message
):
    config = UnitConfig(name="u", data=ragged_data(tmp_path / "d", 2), **options)
    with pytest.raises(ConfigError, match=message) as caught:
        make_unit(base, tokenizer, config)
    assert caught.value.field == field

"""Every kind of adapter that is served, written by the real `peft`, and what PEFT says it does.

`write_variants` makes the folders; each Variant knows the logits expected of it, computed by PEFT
on the dequantised base. PEFT cannot say them itself in three cases, where this is done instead:
PiSSA and OLoRA on a quantised base are PEFT's own conversion of the adapter; DoRA with PiSSA,
whose conversion loses the magnitudes, is a dense layer of PEFT's own ΔW; replication on families
where PEFT's crashes is the adapter on a dense stack of copied layers.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path

import peft
import torch
import torch.nn.functional as F
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from lora_runtime.base.loader import Base
from lora_runtime.core import activation_start
from tests.tiny import dense_twin, tiny_model

INVOCATION = (7, 11, 13)
"""What an activated LoRA waits for; prompts for `alora` hold it."""
LAYER_MAPS = {
    "replication": [[0, 2], [1, 3]],
    "replication-2": [[0, 1], [0, 3], [1, 2]],
    "replication-dora": [[0, 3], [1, 3]],
    "replication-layers": [[0, 2], [0, 2]],
}
NATIVELY_REPLICATED = ("llama", "llama-bias")
"""Shapes on which PEFT's own replication runs."""
Logits = Callable[[list[int], list[int], torch.dtype], Tensor]
Model = Callable[[torch.dtype], nn.Module]


@dataclass(frozen=True)
class Variant:
    """One adapter's folder, and what is expected of it."""

    name: str
    folder: Path
    expected: Logits
    """(prompt, token_ids, dtype) → (n, vocab): logits before each of token_ids after prompt."""
    adapted: Model
    """The adapted model in a dtype."""
    skeleton: Model
    """The base, of the adapter's depth, without the adapter."""
    invocation: tuple[int, ...] = ()
    config: dict = field(default_factory=dict)
    """Options of PEFT's LoraConfig, where they were asked for by `write_plain`."""


@dataclass(frozen=True)
class _Setting:
    """What a recipe may use."""

    base: Base
    shape: str
    root: Path

    def twin(self, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
        return dense_twin(self.base, self.shape, dtype=dtype)

    @property
    def modules(self) -> list[str]:
        return sorted({path.rpartition(".")[2] for path in self.base.spec.linears})

    @property
    def has_bias(self) -> bool:
        return any(self.base.weights.bias(path) is not None for path in self.base.spec.linears)


def write_variants(
    base: Base, shape: str, folder: Path, names: Sequence[str] | None = None
) -> list[Variant]:
    """Write the named variants, by default all that the shape has, each in folder/name.

    `base` must be `tiny_base(shape)`; for PiSSA and OLoRA its folder must be a checkpoint.
    """
    setting = _Setting(base, shape, folder)
    chosen = names if names is not None else variant_names(setting.has_bias)
    seeds = {name: seed for seed, name in enumerate(_RECIPES, start=1)}
    return [_RECIPES[name](setting, name, seeds[name]) for name in chosen]


def write_plain(
    base: Base, shape: str, folder: Path, name: str, *, seed: int, **config: object
) -> Variant:
    """Write a random adapter of these options in folder/name; raises what PEFT raises."""
    variant = _plain(**config)(_Setting(base, shape, folder), name, seed)
    return replace(variant, config=config)


def variant_names(has_bias: bool) -> list[str]:
    """Names that a shape with or without biases in its linears has."""
    needs_bias = ("dora-bias", "bias-lora-only")
    return [name for name in _RECIPES if has_bias or name not in needs_bias]


def composed(
    weighted: Sequence[tuple[Variant, float]],
    prompt: list[int],
    token_ids: list[int],
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """y = Wx + b₀ + Σ_j w_j Δ_j(x) in every layer, Δ_j being PEFT's layer minus the base's."""
    model = copy.deepcopy(weighted[0][0].skeleton(dtype))
    length = len(prompt) + len(token_ids) - 1
    paths = [p for p, m in model.named_modules() if isinstance(m, nn.Linear | nn.Embedding)]
    for path in paths:
        layers = []
        for variant, weight in weighted:
            layer = _module(variant.adapted(dtype), path)
            layers.append((layer, weight, _offsets(variant, prompt, length)))
        parent, _, name = path.rpartition(".")
        own = model.get_submodule(path)
        setattr(model.get_submodule(parent), name, _Composed(own, layers))
    return _logits(model, prompt, token_ids)


class _Composed(nn.Module):
    def __init__(self, base: nn.Module, layers: list) -> None:
        super().__init__()
        self.base = base
        self.layers = layers  # a plain list: these modules belong to other models

    def forward(self, x: Tensor) -> Tensor:
        own = self.base(x)
        deltas = [weight * (layer(x, **kwargs) - own) for layer, weight, kwargs in self.layers]
        return own + sum(deltas)


def _offsets(variant: Variant, prompt: list[int], length: int) -> dict:
    if not variant.invocation:
        return {}
    start = activation_start(prompt, variant.invocation)
    return {"alora_offsets": [0 if start is None else length - start]}


def _module(model: nn.Module, path: str) -> nn.Module:
    inner = model.base_model.model if isinstance(model, peft.PeftModel) else model
    module = inner.get_submodule(path)
    return _Ignoring(module) if not isinstance(module, LoraLayer) else module


class _Ignoring(nn.Module):
    """A layer without LoRA takes no aLoRA arguments."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor, **_: object) -> Tensor:
        return self.module(x)


@torch.no_grad()
def _logits(model: nn.Module, prompt: list[int], token_ids: list[int], **kwargs) -> Tensor:
    ids = torch.tensor([*prompt, *token_ids[:-1]])
    return model(input_ids=ids[None], use_cache=False, **kwargs).logits[0, len(prompt) - 1 :]


def _variant(
    setting: _Setting,
    name: str,
    adapted: Model,
    skeleton: Model | None = None,
    invocation: tuple[int, ...] = (),
) -> Variant:
    adapted, skeleton = lru_cache(adapted), lru_cache(skeleton or setting.twin)

    def expected(prompt: list[int], token_ids: list[int], dtype: torch.dtype) -> Tensor:
        if not invocation:
            return _logits(adapted(dtype), prompt, token_ids)
        start = activation_start(prompt, invocation)
        if start is None:
            return _logits(skeleton(dtype), prompt, token_ids)
        offset = len(prompt) + len(token_ids) - 1 - start
        return _logits(adapted(dtype), prompt, token_ids, alora_offsets=[offset])

    return Variant(name, setting.root / name, expected, adapted, skeleton, invocation)


# Weights that visibly act


def _options(**config: object) -> dict:
    return {
        "r": 8, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **config
    }  # fmt: skip


def randomise(adapted: nn.Module, seed: int, *, with_bias: bool = False) -> None:
    """Fill what PEFT trains with noise; the base's biases too where PEFT trains them."""
    generator = torch.Generator().manual_seed(seed)
    seen: set[int] = set()
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            part = next((part for part in _CHANGES if part in name), None)
            is_trained = part is not None and (part != BASE_BIAS or with_bias)
            if is_trained and parameter.data_ptr() not in seen:
                seen.add(parameter.data_ptr())
                parameter.copy_(_CHANGES[part](parameter, noise))


BASE_BIAS = ".bias"
_CHANGES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "lora_B.default.bias": lambda p, noise: 0.5 * noise,
    "lora_embedding_A": lambda p, noise: noise,
    "lora_embedding_B": lambda p, noise: 0.2 * noise / p.shape[1] ** 0.5,
    "lora_A": lambda p, noise: noise / p.shape[1] ** 0.5,
    "lora_B": lambda p, noise: noise / p.shape[1],
    "lora_magnitude_vector": lambda p, noise: p * (0.4 * noise).exp(),
    "modules_to_save": lambda p, noise: p + 0.15 * noise,
    "trainable_tokens_delta": lambda p, noise: p + 0.3 * noise,
    BASE_BIAS: lambda p, noise: p + 0.5 * noise,
}
"""Part of a parameter's name → its random value; the first that matches."""


def perturb(adapted: nn.Module, seed: int) -> None:
    """Train away from an init that is not zero: A and B move by half of their size."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "lora_A" in name or "lora_B" in name:
                parameter.add_(0.5 * parameter.std() * noise)
            elif "magnitude" in name:
                parameter.mul_((0.3 * noise).exp())


def _edit_config(folder: Path, **changes: object) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


# Recipes


def _plain(**config: object):
    """An adapter that PEFT both writes and loads on the dequantised base."""

    def recipe(setting: _Setting, name: str, seed: int) -> Variant:
        options = {key: v(setting) if callable(v) else v for key, v in config.items()}
        adapted = peft.get_peft_model(setting.twin(), peft.LoraConfig(**_options(**options)))
        randomise(adapted, seed, with_bias="bias" in options)
        adapted.save_pretrained(setting.root / name)
        return _variant(
            setting,
            name,
            lambda dtype: _load(setting.twin(dtype), setting.root / name),
            invocation=tuple(options.get("alora_invocation_tokens", ())),
        )

    return recipe


def _load(model: PreTrainedModel, folder: Path) -> nn.Module:
    return peft.PeftModel.from_pretrained(model, folder, torch_device=str(model.device)).eval()


def _mutating(keeps_initial: bool = False, is_converted: bool = False, **config: object):
    """An init that takes its factors out of the 16-bit base; the oracle is PEFT's conversion."""

    def recipe(setting: _Setting, name: str, seed: int) -> Variant:
        folder, scratch = setting.root / name, setting.root / f".{name}"
        adapted = peft.get_peft_model(
            tiny_model(setting.shape), peft.LoraConfig(**_options(**config))
        )
        kind, start = config["init_lora_weights"], adapted.peft_config["default"]
        initial = scratch / f"{kind}_init"
        start.init_lora_weights = True
        adapted.save_pretrained(initial)
        start.init_lora_weights = kind
        perturb(adapted, seed)
        adapted.save_pretrained(folder)
        if keeps_initial:
            shutil.copytree(initial, folder / initial.name)
        adapted.save_pretrained(
            scratch / "converted", path_initial_model_for_weight_conversion=str(initial)
        )
        if is_converted:
            shutil.rmtree(folder)
            shutil.copytree(scratch / "converted", folder)
        return _variant(
            setting, name, lambda dtype: _load(setting.twin(dtype), scratch / "converted")
        )

    return recipe


def _dora_pissa(setting: _Setting, name: str, seed: int) -> Variant:
    original = tiny_model(setting.shape)
    config = peft.LoraConfig(**_options(init_lora_weights="pissa", use_dora=True))
    adapted = peft.get_peft_model(copy.deepcopy(original), config)
    perturb(adapted, seed)
    adapted.save_pretrained(setting.root / name)
    facts = {
        path: (_dora_delta(adapted, original, path), _magnitude(adapted, path))
        for path in setting.base.spec.linears
    }

    def dense(dtype: torch.dtype) -> nn.Module:
        model = setting.twin(dtype)
        for path, (delta, magnitude) in facts.items():
            parent, _, last = path.rpartition(".")
            layer = _DenseDora(model.get_submodule(path), delta, magnitude)
            setattr(model.get_submodule(parent), last, layer)
        return model

    return _variant(setting, name, dense)


def _magnitude(adapted: peft.PeftModel, path: str) -> Tensor:
    layer = adapted.base_model.model.get_submodule(path)
    return layer.lora_magnitude_vector["default"].weight.detach()


@torch.no_grad()
def _dora_delta(adapted: peft.PeftModel, original: nn.Module, path: str) -> Tensor:
    """ΔW = s·BA − (W − W_res): what training changed of the 16-bit weight."""
    layer = adapted.base_model.model.get_submodule(path)
    taken = original.get_submodule(path).weight.double() - layer.get_base_layer().weight.double()
    return layer.get_delta_weight("default").double() - taken


class _DenseDora(nn.Module):
    """y = m / ‖W + ΔW‖ ∘ (W + ΔW) x + b."""

    def __init__(self, linear: nn.Linear, delta: Tensor, magnitude: Tensor) -> None:
        super().__init__()
        self.linear = linear
        changed = linear.weight.double() + delta
        dtype = linear.weight.dtype
        self.delta = delta.to(dtype)
        self.gain = (magnitude.double() / changed.norm(dim=1)).to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        product = F.linear(x, self.linear.weight) + F.linear(x, self.delta)
        product = self.gain * product
        return product if self.linear.bias is None else product + self.linear.bias


def _loftq(setting: _Setting, name: str, seed: int) -> Variant:
    """PEFT's own loftq_init needs CUDA: B A starts at the best rank-r part of W − q(W) here."""
    folder, oracle = setting.root / name, setting.root / f".{name}"
    adapted = peft.get_peft_model(setting.twin(), peft.LoraConfig(**_options()))
    original = tiny_model(setting.shape)
    with torch.no_grad():
        for path in setting.base.spec.linears:
            layer = adapted.base_model.model.get_submodule(path)
            rest = original.get_submodule(path).weight - layer.get_base_layer().weight
            left, values, right = torch.linalg.svd(rest, full_matrices=False)
            root = values[:8].sqrt()
            layer.lora_A["default"].weight.copy_(root[:, None] * right[:8])
            layer.lora_B["default"].weight.copy_(left[:, :8] * root)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter_name, parameter in adapted.named_parameters():
            if "lora_" in parameter_name:
                parameter.add_(0.15 * torch.randn(parameter.shape, generator=generator))
    adapted.save_pretrained(oracle)
    shutil.copytree(oracle, folder)
    _edit_config(folder, init_lora_weights="loftq", loftq_config={"loftq_bits": 4, "loftq_iter": 1})
    return _variant(setting, name, lambda dtype: _load(setting.twin(dtype), oracle))


def _replicated(**config: object):
    def recipe(setting: _Setting, name: str, seed: int) -> Variant:
        ranges, folder = LAYER_MAPS[name], setting.root / name
        stack = lambda dtype: _stacked(setting.twin(dtype), ranges)  # noqa: E731
        is_native = setting.shape in NATIVELY_REPLICATED
        options = {key: v(setting) if callable(v) else v for key, v in config.items()}
        model = setting.twin() if is_native else stack(torch.float32)
        native = {"layer_replication": ranges} if is_native else {}
        adapted = peft.get_peft_model(model, peft.LoraConfig(**_options(**native, **options)))
        randomise(adapted, seed)
        adapted.save_pretrained(folder)
        if is_native:
            return _variant(setting, name, lambda dtype: _load(setting.twin(dtype), folder), stack)
        oracle = setting.root / f".{name}"
        shutil.copytree(folder, oracle)
        _edit_config(folder, layer_replication=ranges)
        return _variant(setting, name, lambda dtype: _load(stack(dtype), oracle), stack)

    return recipe


def _stacked(model: PreTrainedModel, ranges: list[list[int]]) -> PreTrainedModel:
    """A dense model of the same layers in the order of their visits."""
    order = [layer for start, end in ranges for layer in range(start, end)]
    config = copy.deepcopy(model.config)
    config.num_hidden_layers = len(order)
    if getattr(config, "layer_types", None):
        config.layer_types = [model.config.layer_types[layer] for layer in order]
    stack = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    for parameter in stack.parameters():
        parameter.data = parameter.data.to(model.dtype)
    weights = {name: t for name, t in model.state_dict().items() if ".layers." not in name}
    for position, layer in enumerate(order):
        inner = model.model.layers[layer].state_dict()
        weights.update({f"model.layers.{position}.{name}": t for name, t in inner.items()})
    stack.load_state_dict(weights)
    return stack


def _attention(setting: _Setting) -> list[str]:
    return [name for name in setting.modules if "q" in name or "v_proj" in name or "o_" in name]


def _other_ranks(setting: _Setting) -> dict[str, int]:
    return {name: 2 + index for index, name in enumerate(setting.modules)}


def _some_tokens(setting: _Setting) -> list[int]:
    return list(range(2, setting.base.spec.vocab_size, 3))[::-1]


_RECIPES: dict[str, Callable[[_Setting, str, int], Variant]] = {
    "lora": _plain(),
    "rslora": _plain(r=16, lora_alpha=12, use_rslora=True),
    "patterns": _plain(
        r=4,
        rank_pattern={r".*\.o_proj": 3, r"layers\.[02]\..*": 6},
        alpha_pattern={r".*\.1\..*": 2.5, "down_proj": 40},
    ),
    "dora": _plain(use_dora=True),
    "dora-rslora": _plain(use_dora=True, use_rslora=True, r=4, lora_alpha=6),
    "dora-patterns": _plain(
        use_dora=True, rank_pattern={r"layers\.1\..*": 5}, alpha_pattern={"down_proj": 24}
    ),
    "dora-bias": _plain(use_dora=True, bias="lora_only"),
    "pissa": _mutating(init_lora_weights="pissa"),
    "pissa-converted": _mutating(init_lora_weights="pissa", is_converted=True),
    "pissa-rslora": _mutating(init_lora_weights="pissa", use_rslora=True, keeps_initial=True),
    "olora": _mutating(init_lora_weights="olora"),
    "dora-pissa": _dora_pissa,
    "loftq": _loftq,
    "eva-like": _plain(
        init_lora_weights="eva", eva_config=peft.EvaConfig(), rank_pattern=_other_ranks
    ),
    "layers-to-transform": _plain(
        target_modules=lambda s: s.modules, layers_to_transform=[0, 2], r=6, lora_alpha=12
    ),
    "regex-target": _plain(target_modules=r".*\.[12]\..*(down|o|qkv|q)_proj", lora_alpha=24),
    "bias-lora-only": _plain(bias="lora_only", target_modules=_attention),
    "lora-bias": _plain(lora_bias=True),
    "embedding": _plain(target_modules=lambda s: ["embed_tokens", *_attention(s)]),
    "lm-head": _plain(target_modules=lambda s: ["lm_head", *s.modules[:1]]),
    "dora-vocabulary": _plain(
        use_dora=True, target_modules=lambda s: ["embed_tokens", "lm_head", *s.modules[:1]]
    ),
    "modules-to-save-head": _plain(modules_to_save=["lm_head"]),
    "modules-to-save-embedding": _plain(modules_to_save=["embed_tokens"]),
    "trainable-tokens": _plain(target_modules=_attention, trainable_token_indices=_some_tokens),
    "alora": _plain(alora_invocation_tokens=list(INVOCATION), lora_alpha=16),
    "replication": _replicated(),
    "replication-2": _replicated(r=4),
    "replication-dora": _replicated(use_dora=True),
    "replication-layers": _replicated(
        target_modules=lambda s: s.modules, layers_to_transform=[0, 1]
    ),
}  # fmt: skip

"""A serving form as an ordinary transformers model: what every field of the form means."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from lora_runtime.adapters.serving_form import ModuleForm, ModuleKey, ServingForm
from lora_runtime.core import BaseSpec, activation_start


def stacked(model: PreTrainedModel, order: tuple[int, ...] | None) -> PreTrainedModel:
    """A model of the same layers in another order and number."""
    if order is None:
        return copy.deepcopy(model)
    config = copy.deepcopy(model.config)
    config.num_hidden_layers = len(order)
    if getattr(config, "layer_types", None):
        config.layer_types = [model.config.layer_types[layer] for layer in order]
    deep = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    own = model.state_dict()
    weights = {name: tensor for name, tensor in own.items() if ".layers." not in name}
    for position, layer in enumerate(order):
        prefix = f"model.layers.{layer}."
        inner = {n.removeprefix(prefix): t for n, t in own.items() if n.startswith(prefix)}
        weights.update({f"model.layers.{position}.{n}": t for n, t in inner.items()})
    deep.load_state_dict(weights)
    return deep


def form_logits(
    form: ServingForm, spec: BaseSpec, model: PreTrainedModel, prompt: list[int], ids: list[int]
) -> Tensor:
    """(len(ids), vocab): logits before each of `ids` when it follows `prompt`."""
    deep = stacked(model, form.facts.layer_map)
    invocation = form.facts.invocation_tokens
    start = activation_start(prompt, invocation) if invocation else 0
    start = len(prompt) + len(ids) if start is None else start
    paths = {(path, 0): path for path in spec.shapes}
    if form.facts.layer_map is not None:
        paths = _deep_paths(spec, form.facts.layer_map)
    for key, module in form.modules.items():
        path = paths[key]
        parent, _, name = path.rpartition(".")
        own = deep.get_submodule(path)
        kind = _Embedding if isinstance(own, nn.Embedding) else _Linear
        setattr(deep.get_submodule(parent), name, kind(own, module, start))
    with torch.no_grad():
        out = deep(torch.tensor([[*prompt, *ids[:-1]]]), use_cache=False)
    return out.logits[0, len(prompt) - 1 :]


def _deep_paths(spec: BaseSpec, order: tuple[int, ...]) -> dict[tuple[str, int], str]:
    paths = {(path, 0): path for path in (spec.embedding, spec.head)}
    for position, layer in enumerate(order):
        replica = order[:position].count(layer)
        for path in spec.linears:
            if f".layers.{layer}." in path:
                deep = path.replace(f".layers.{layer}.", f".layers.{position}.")
                paths[ModuleKey(path, replica)] = deep
    return paths


class _Linear(nn.Module):
    def __init__(self, own: nn.Linear, form: ModuleForm, start: int) -> None:
        super().__init__()
        self.own, self.form, self.start = own, form, start
        self.weight = patched(own.weight, form)

    def forward(self, x: Tensor) -> Tensor:
        form = self.form
        y = F.linear(x, self.weight)
        if form.gain is not None:
            y = form.gain * y
        if form.a is not None:
            y = y + F.linear(F.linear(x, form.a), form.b)
        bias = self.own.bias if form.bias is None else form.bias
        y = y if bias is None else y + bias
        return torch.cat([self.own(x)[:, : self.start], y[:, self.start :]], dim=1)


class _Embedding(nn.Module):
    def __init__(self, own: nn.Embedding, form: ModuleForm, start: int) -> None:
        super().__init__()
        assert start == 0
        self.own, self.form = own, form
        self.weight = patched(own.weight, form)

    def forward(self, ids: Tensor) -> Tensor:
        form = self.form
        y = self.weight[ids]
        if form.gain is not None:
            y = form.gain * y
        if form.a is not None:
            y = y + F.linear(form.a.T[ids], form.b)
        return y * getattr(self.own, "embed_scale", 1.0)


def patched(weight: Tensor, form: ModuleForm) -> Tensor:
    """The vocabulary's rows with the patch in place."""
    if form.patch is None:
        return weight
    if form.patch.ids is None:
        return form.patch.values
    rows = weight.clone()
    rows[form.patch.ids.long()] = form.patch.values
    return rows

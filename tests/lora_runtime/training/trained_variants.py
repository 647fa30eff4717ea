"""Every variant that is trained, units of them, and their oracles in plain torch."""

from __future__ import annotations

import copy

import torch

from lora_runtime.training.config import UnitConfig
from tests.lora_runtime.training.tiny_runs import make_unit, ragged_data

PATTERNS = {"rank_pattern": {r"layers\.1\..*v_proj": 3}, "alpha_pattern": {"down_proj": 5.0}}

VARIANTS = {
    "lora": {},
    "rslora": {"variant": "rslora", **PATTERNS},
    "dora": {"variant": "dora", **PATTERNS},
    "dora-rslora": {"variant": "rslora", "use_dora": True},
    "pissa": {"variant": "pissa", **PATTERNS},
    "pissa-niter": {"init": "pissa_niter_4"},
    "pissa-dora-rslora": {"variant": "rslora", "use_dora": True, "init": "pissa", **PATTERNS},
    "olora": {"variant": "olora"},
    "layers": {"layers_to_transform": (0, 2), "variant": "rslora"},
    "replicated": {"layer_replication": ((0, 2), (0, 3), (1, 2))},
    "replicated-part": {
        "layer_replication": ((1, 3), (0, 3)),
        "layers_to_transform": (2, 3),
        "variant": "dora",
        "init": "pissa",
    },
}

ROWS = [[5, 17, 2, 250, 33, 9, 120, 7], [200, 3, 41]]


def stacked(model, layer_map):
    """A model of copies of the layers, in the order of the map."""
    if layer_map is not None:
        layers = [copy.deepcopy(model.model.layers[layer]) for layer in layer_map]
        for index, layer in enumerate(layers):
            layer.self_attn.layer_idx = index
        model.model.layers = torch.nn.ModuleList(layers)
        model.config.num_hidden_layers = len(layers)
    return model


def unit_of(base, tokenizer, tmp_path, name="lora", **options):
    settings = {"rank": 4, "alpha": 6.0, "warmup": 0, **VARIANTS.get(name, {}), **options}
    data = settings.pop("data", None) or ragged_data(tmp_path / f"{name}.jsonl", 6)
    return make_unit(base, tokenizer, UnitConfig(name=name, data=data, **settings))


def mean_loss(logits_of, examples):
    """The mean over all target tokens, by plain torch."""
    losses = []
    for example in examples:
        logits = logits_of(example.token_ids)[example.predictors]
        labels = example.token_ids[example.predictors + 1]
        losses.append(torch.nn.functional.cross_entropy(logits, labels, reduction="none"))
    return torch.cat(losses).mean()


def lost_and_left(base, module):
    """W16 − q(W), and what of it ΔW leaves, in float64."""
    lost = base.weights.original(module.path).double() - base.weights.serving(module.path).double()
    a, b = (part.detach().double() for part in module.unscaled())
    return lost, lost - module.scaling * b @ a

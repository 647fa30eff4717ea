"""LoftQ and QERA on SmolLM2-135M: nearer to the 16-bit checkpoint than the quantised base is.

Per module by the Frobenius error of the weight, as a whole by the KL divergence of the next-token
distributions from the checkpoint's, on English prose that is no training data.
"""

from __future__ import annotations

import os
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import torch
from transformers import AutoModelForCausalLM

from lora_runtime.base.loader import load_base
from lora_runtime.config import BaseConfig
from lora_runtime.text.tokenizer import Tokenizer
from lora_runtime.training import calibration
from lora_runtime.training.config import UnitConfig
from lora_runtime.training.data import load_dataset
from lora_runtime.training.losses import unit_logits
from lora_runtime.training.units import Unit

PIRATE = Path(__file__).parents[3] / "deploy" / "demo" / "pirate.jsonl"
"""The units' own data, and so the inputs that QERA is measured on: chats."""
PROSE = ("naming", "objects", "types", "specialnames")
"""Chapters of the Python reference, on which the divergence is measured."""
NUM_ROWS, ROW_LENGTH = 8, 256
LAYERS = tuple(range(0, 30, 3))
"""A third of the layers, to save singular value decompositions."""


@pytest.fixture(scope="module", autouse=True)
def all_threads():
    """This model is large enough for them."""
    before = torch.get_num_threads()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", os.cpu_count())))
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def world():
    """The NF4 base, its tokenizer, and the held-out rows."""
    base = load_base(BaseConfig(dtype="float32", device="cpu"))
    tokenizer = Tokenizer.load(base.folder)
    token_ids = tokenizer.encode("\n".join(topics[name] for name in PROSE))
    starts = range(0, NUM_ROWS * ROW_LENGTH, ROW_LENGTH)
    rows = [token_ids[start : start + ROW_LENGTH] for start in starts]
    assert sum(map(len, rows)) >= 2000
    return base, tokenizer, rows


def started(base, tokenizer, init):
    config = UnitConfig(name=init, data=PIRATE, init=init, layers_to_transform=LAYERS)
    return Unit(config, load_dataset(PIRATE, tokenizer, 256), base, seed=0)


@torch.no_grad()
def checkpoint_probabilities(base, rows):
    """Of the next token, (n, vocab) a row."""
    model = AutoModelForCausalLM.from_pretrained(base.folder, dtype=torch.float32).eval()
    return [model(torch.tensor([row])).logits[0].softmax(1) for row in rows]


def mean_divergence(exact, found):
    """Mean over all tokens of KL(checkpoint ‖ model) = Σ p (log p − z) + log Σ exp z."""
    divergences = [
        z.logsumexp(1) - torch.linalg.vecdot(p, z) - torch.special.entr(p).sum(1)
        for p, z in zip(exact, found, strict=True)
    ]
    return torch.cat(divergences).mean().item()


def errors_left(base, unit):
    """‖W16 − q(W) − s·BA‖ / ‖W16 − q(W)‖ of every module."""
    shares = []
    for module in unit.modules.values():
        lost = base.weights.original(module.path).float() - base.weights.serving(module.path)
        left = lost - module.scaling * (module.b @ module.a).detach()
        shares.append((left.norm() / lost.norm()).item())
    return shares


@pytest.mark.timeout(300)  # a minute of one core, which on a busy machine is more
def test_both_are_nearer_to_the_checkpoint_than_the_quantised_base(world, capsys, monkeypatch):
    monkeypatch.setattr(calibration, "MAX_TOKENS", 512)
    base, tokenizer, rows = world
    units = {init: started(base, tokenizer, init) for init in ("loftq", "qera")}
    exact = checkpoint_probabilities(base, rows)
    plain = mean_divergence(exact, unit_logits(base, units["qera"])(rows, False))
    divergence = {
        init: mean_divergence(exact, unit_logits(base, unit)(rows, True))
        for init, unit in units.items()
    }
    errors = {init: errors_left(base, unit) for init, unit in units.items()}
    with capsys.disabled():
        print(f"\nSmolLM2 NF4, mean KL to the checkpoint over 2,048 tokens: {plain:.4f}")
        for init, shares in errors.items():
            print(
                f"  with {init} {divergence[init]:.4f}; error of a module's weight over the base's "
                f"{sum(shares) / len(shares):.3f}, at most {max(shares):.3f}"
            )
    assert all(len(shares) == 7 * len(LAYERS) for shares in errors.values())
    assert max(errors["loftq"]) < 0.97 and max(errors["qera"]) < 0.99
    assert divergence["loftq"] < 0.98 * plain
    assert divergence["qera"] < 0.9 * plain

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

from lora_runtime.base.model.varlen_attention import RowLengths
from lora_runtime.engine.probe import probe_logits
from lora_runtime.training import calibration
from lora_runtime.training.binding import bind
from lora_runtime.training.config import UnitConfig
from lora_runtime.training.data import load_dataset
from lora_runtime.training.forward import UnitRows, hidden_states, logits
from lora_runtime.training.units import Unit

PIRATE = Path(__file__).parents[3] / "deploy" / "demo" / "pirate.jsonl"
"""The units' own data, and so the inputs that QERA is measured on: chats."""
PROSE = ("naming", "objects", "types", "specialnames")
"""Chapters of the Python reference, on which the divergence is measured."""
NUM_ROWS, ROW_LENGTH = 4, 256
LAYERS = (27, 28, 29)
"""The last ones, so that all models but the checkpoint share what the layers before make."""


@pytest.fixture(scope="module", autouse=True)
def all_threads():
    """This model is large enough for them."""
    before = torch.get_num_threads()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", os.cpu_count())))
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def rows(smollm2):
    """Held-out token ids."""
    _, tokenizer = smollm2
    token_ids = tokenizer.encode("\n".join(topics[name] for name in PROSE))
    starts = range(0, NUM_ROWS * ROW_LENGTH, ROW_LENGTH)
    rows = [token_ids[start : start + ROW_LENGTH] for start in starts]
    assert sum(map(len, rows)) >= 1000
    return rows


def started(base, tokenizer, init):
    config = UnitConfig(
        name=init, data=PIRATE, init=init, rank=64, alpha=128.0, layers_to_transform=LAYERS
    )
    return Unit(config, load_dataset(PIRATE, tokenizer, 256), base, seed=0)


@torch.no_grad()
def checkpoint_probabilities(base, rows):
    """Of the next token, (n, vocab) a row, and their mean entropy."""
    model = AutoModelForCausalLM.from_pretrained(base.folder, dtype=torch.float32).eval()
    found = [model(torch.tensor([row])).logits[0].softmax(1) for row in rows]
    return found, torch.cat([torch.special.entr(p).sum(1) for p in found]).mean().item()


def plain_logits(base, rows):
    """The base's, and what it hands to the first of LAYERS, (1, T, hidden)."""
    inputs = []
    layer = base.model.get_decoder().layers[LAYERS[0]]
    hook = layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    with hook:
        return probe_logits(base, None, rows), inputs[0]


@torch.no_grad()
def logits_from(base, units, states, rows):
    """Logits of a model that is run from LAYERS on: `states` is what the first of them is given."""
    lengths = [len(row) for row in rows]
    token_ids = torch.tensor([token for row in rows for token in row])
    positions = torch.cat([torch.arange(length) for length in lengths])
    bindings = bind(units, base)
    with base.model.get_input_embeddings().register_forward_hook(lambda *_: states):
        last = hidden_states(
            base, [UnitRows([RowLengths(lengths)], LAYERS)], bindings, token_ids, positions
        )
    return logits(base, bindings, last, [len(token_ids)]).split(lengths)


def mean_divergence(exact, found):
    """Mean over all tokens of KL(checkpoint ‖ model) = Σ p (log p − z) + log Σ exp z."""
    probabilities, entropy = exact
    crossed = [
        z.logsumexp(1) - torch.linalg.vecdot(p, z)
        for p, z in zip(probabilities, found, strict=True)
    ]
    return torch.cat(crossed).mean().item() - entropy


def errors_left(base, unit):
    """‖W16 − q(W) − s·BA‖ / ‖W16 − q(W)‖ of every module."""
    shares = []
    for module in unit.modules.values():
        lost = base.weights.original(module.path).float() - base.weights.serving(module.path)
        left = lost - module.scaling * (module.b @ module.a).detach()
        shares.append((left.norm() / lost.norm()).item())
    return shares


@pytest.mark.timeout(600)  # 40 seconds of one core, which on a busy machine is more
def test_both_are_nearer_to_the_checkpoint_than_the_quantised_base(
    smollm2, rows, capsys, monkeypatch
):
    monkeypatch.setattr(calibration, "MAX_TOKENS", 512)
    base, tokenizer = smollm2
    units = {init: started(base, tokenizer, init) for init in ("loftq", "qera")}
    exact = checkpoint_probabilities(base, rows)
    without, states = plain_logits(base, rows)
    assert torch.equal(logits_from(base, [], states[:, :ROW_LENGTH], rows[:1])[0], without[0])
    plain = mean_divergence(exact, without)
    divergence = {
        init: mean_divergence(exact, logits_from(base, [unit], states, rows))
        for init, unit in units.items()
    }
    errors = {init: errors_left(base, unit) for init, unit in units.items()}
    with capsys.disabled():
        print(f"\nSmolLM2 NF4, mean KL to the checkpoint over 1,024 tokens: {plain:.4f}")
        for init, shares in errors.items():
            print(
                f"  with {init} {divergence[init]:.4f}; error of a module's weight over the base's "
                f"{sum(shares) / len(shares):.3f}, at most {max(shares):.3f}"
            )
    assert all(len(shares) == 7 * len(LAYERS) for shares in errors.values())
    assert max(errors["loftq"]) < 0.9 and max(errors["qera"]) < 0.95
    assert divergence["loftq"] < 0.95 * plain
    assert divergence["qera"] < 0.9 * plain

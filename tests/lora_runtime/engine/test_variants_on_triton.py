"""The variants that PEFT can write, in one mixed batch through the Triton kernels.

On a GPU all of them; through the interpreter one of every serving form, short prompts, few steps.
"""

from __future__ import annotations

import pytest
import torch

from lora_runtime.base.model import stacked_linears
from lora_runtime.kernels import gpu
from tests.driver import run, teacher_forced
from tests.lora_runtime.engine.variant_world import World, rms, shuffled
from tests.lora_runtime.kernels.on_triton import DEVICE

HAS_GPU = DEVICE == "cuda"
NAMES = None if HAS_GPU else ["lora", "dora", "dora-bias", "trainable-tokens"]
"""None: all. These are low rank, gains, biases and rows of the vocabulary, and with the
compositions of test_variants.py two of them on one token.
"""
NUM_STEPS = 16 if HAS_GPU else 2
NUM_TEXTS = 6 if HAS_GPU else 1


@pytest.fixture(autouse=True)
def on_triton(monkeypatch):
    monkeypatch.setattr(gpu, "DEVICES", {DEVICE})


def world_of(shape, dtype, folder, names):
    prompts = (40, 8) if HAS_GPU else (3, 4)
    world = World(
        shape, dtype, folder, names=names, prompts=prompts, dequantized_cache=False, device=DEVICE
    )
    world.rows = world.rows * NUM_TEXTS
    return world


def served(world, num_steps):
    """(row, prompt's index, token ids, logits on the host) of every row, from one engine."""
    serving = world.engine(max_num_seqs=256, max_num_batched_tokens=512)
    traces = run(serving, shuffled(world, num_steps))
    for index, row in enumerate(world.rows):
        trace = traces[str(index)]
        assert trace.error is None, f"{row}: {trace.error}"
        yield index, row, trace.token_ids, torch.stack(trace.logits).cpu()


def test_float32_logits_equal_the_oracle(monkeypatch, tmp_path):
    """q, k and v go together, and so do gate and up with their activation."""
    launches = []
    for name in ("apply_stacked_adapters", "apply_gated_adapters"):
        real = getattr(stacked_linears, name)

        def noted(*arguments, real=real, **options):
            launches.append(len(arguments[4]))
            return real(*arguments, **options)

        monkeypatch.setattr(stacked_linears, name, noted)
    world = world_of("llama-bias", torch.float32, tmp_path, NAMES)
    for index, row, token_ids, logits in served(world, NUM_STEPS):
        expected = world.expected(index, token_ids, torch.float32)
        assert (logits - expected).abs().max() <= 2e-4, row
        assert token_ids == expected.argmax(1).tolist(), row
        if row is not None:
            base = teacher_forced(world.twin, world.prompt(index), token_ids)
            assert (expected - base).abs().max() >= 1.0, f"{row} has no visible effect"
    assert set(launches) == {2, 3}


def test_bfloat16_error_is_within_a_quarter_of_pefts(tmp_path):
    """Of every variant where a GPU makes six texts of it affordable, else of all together."""
    world = world_of("llama-bias", torch.bfloat16, tmp_path, NAMES and NAMES[:3])
    ours, theirs = {}, {}
    for index, row, token_ids, logits in served(world, NUM_STEPS if HAS_GPU else 1):
        exact = world.expected(index, token_ids, torch.float64)
        own = row if HAS_GPU else "all"
        ours.setdefault(own, []).append(logits - exact)
        peft = world.expected(index, token_ids, torch.bfloat16)
        theirs.setdefault(own, []).append(peft - exact)
    for row in ours:
        print(f"{row}: bfloat16 error {rms(ours[row]) / rms(theirs[row]):.2f} of the oracle's")
        assert rms(ours[row]) <= 1.25 * rms(theirs[row]), row

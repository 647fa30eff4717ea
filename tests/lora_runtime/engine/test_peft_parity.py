"""Adapters written by peft, all in one mixed batch of the engine, against peft itself.

float32: every logit within 2e-4 of peft on the dequantised base, where each adapter's own effect
is at least 1.0 and any two differ by at least 0.5. bfloat16: our error against float64 is at most
1.25 times peft's own.
"""

from __future__ import annotations

import pytest
import torch

from lora_runtime.adapters.reduction import load_adapter
from tests.driver import greedy, run, teacher_forced, tiny_engine
from tests.peft_adapters import four_adapters, load_in_peft
from tests.tiny import SHAPES, VOCAB_SIZE, dense_twin, tiny_base

NUM_STEPS = 64
PROMPT_LENGTHS = [5, 33, 12, 70, 3, 9]


def prompts():
    generator = torch.Generator().manual_seed(3)
    return [
        torch.randint(3, VOCAB_SIZE, (n,), generator=generator).tolist() for n in PROMPT_LENGTHS
    ]


def serve_mixed(base, folders, max_tokens):
    """All adapters and two base rows in one engine; returns (adapter index or None, trace) rows."""
    engine = tiny_engine(base)
    forms = [load_adapter(folder, base.spec, base.weights) for folder in folders]
    for form in forms:
        engine.add_adapter(form)
    owners = [0, None, 1, 2, 3, None]
    requests = [
        greedy(str(i), prompt, None if owner is None else forms[owner].digest, max_tokens)
        for i, (prompt, owner) in enumerate(zip(prompts(), owners, strict=True))
    ]
    traces = run(engine, requests, arrivals={"2": 4})
    return [(owner, traces[str(i)]) for i, owner in enumerate(owners)]


@pytest.mark.parametrize("shape", SHAPES)
def test_float32_logits_and_greedy_tokens_equal_peft(shape, tmp_path):
    base = tiny_base(shape)
    twin = dense_twin(base, shape)
    folders = four_adapters(twin, tmp_path, fused=shape.startswith("phi3"))
    oracles = [load_in_peft(twin, folder) for folder in folders]
    effects = []
    for prompt, (owner, trace) in zip(
        prompts(), serve_mixed(base, folders, NUM_STEPS), strict=True
    ):
        oracle = twin if owner is None else oracles[owner]
        expected = teacher_forced(oracle, prompt, trace.token_ids)
        assert (torch.stack(trace.logits) - expected).abs().max() <= 2e-4
        assert trace.token_ids == expected.argmax(1).tolist()
        if owner is not None:
            others = [teacher_forced(m, prompt, trace.token_ids) for m in (twin, *oracles)]
            effects.append((expected - others[0]).abs().max())
            apart = [(expected - o).abs().max() for i, o in enumerate(others[1:]) if i != owner]
            assert min(apart) >= 0.5
    assert min(effects) >= 1.0


@pytest.mark.parametrize("shape", SHAPES)
def test_bfloat16_error_is_within_a_quarter_of_pefts(shape, tmp_path):
    base = tiny_base(shape, dtype=torch.bfloat16)
    exact_twin = dense_twin(base, shape, dtype=torch.float64)
    single_twin = dense_twin(base, shape, dtype=torch.float32)
    folders = four_adapters(single_twin, tmp_path, fused=shape.startswith("phi3"))
    rows = serve_mixed(base, folders, 24)
    for owner, folder in enumerate(folders):
        prompt, trace = next(
            (p, t) for p, (o, t) in zip(prompts(), rows, strict=True) if o == owner
        )
        exact_model = load_in_peft(exact_twin, folder).double()
        peft_model = load_in_peft(dense_twin(base, shape), folder)
        exact = teacher_forced(exact_model, prompt, trace.token_ids)
        peft_error = rms(teacher_forced(peft_model, prompt, trace.token_ids) - exact)
        our_error = rms(torch.stack(trace.logits) - exact)
        print(f"{shape} adapter {owner}: bfloat16 error {our_error:.4f}, peft's {peft_error:.4f}")
        assert our_error <= 1.25 * peft_error


def rms(error: torch.Tensor) -> float:
    return float(error.double().pow(2).mean().sqrt())

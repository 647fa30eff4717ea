"""A row's tokens are its own: alone, mixed, reordered, or beside a very long row."""

from __future__ import annotations

import pytest
import torch

from lora_runtime.adapters.reduction import load_adapter
from tests.driver import greedy, run, tiny_engine
from tests.peft_adapters import four_adapters
from tests.tiny import VOCAB_SIZE, dense_twin, tiny_base

NUM_STEPS = 48
VERY_LONG = 400


def served(shape, dtype, folder):
    base = tiny_base(shape, dtype=dtype)
    twin = dense_twin(base, shape, dtype=torch.float32)
    folders = four_adapters(twin, folder, fused=shape.startswith("phi3"))
    return base, [load_adapter(path, base.spec, base.weights) for path in folders]


def rows(forms, num_copies=1):
    generator = torch.Generator().manual_seed(5)
    digests = [None, *(form.digest for form in forms)] * num_copies
    lengths = torch.randint(2, 60, (len(digests),), generator=generator).tolist()
    return [
        greedy(
            str(i),
            torch.randint(3, VOCAB_SIZE, (n,), generator=generator).tolist(),
            digest,
            NUM_STEPS,
        )
        for i, (n, digest) in enumerate(zip(lengths, digests, strict=True))
    ]


def tokens(base, forms, requests):
    engine = tiny_engine(base, num_blocks=800)
    for form in forms:
        engine.add_adapter(form)
    return {name: trace.token_ids for name, trace in run(engine, requests).items()}


@pytest.mark.parametrize("shape", ["llama", "gemma2", "phi3-longrope"])
def test_tokens_are_identical_in_float32(shape, tmp_path):
    base, forms = served(shape, torch.float32, tmp_path)
    requests = rows(forms)
    long_row = greedy("long", [7] * VERY_LONG, forms[0].digest, NUM_STEPS)
    alone = {}
    for request in requests:
        alone |= tokens(base, forms, [request])
    assert tokens(base, forms, requests) == alone
    assert tokens(base, forms, requests[::-1]) == alone
    beside = tokens(base, forms, [requests[0], long_row, *requests[1:]])
    del beside["long"]
    assert beside == alone


def test_the_bfloat16_divergence_rate_is_stated(tmp_path, capsys):
    """In bfloat16 a matrix product's rounding depends on its shape, so some rows part ways."""
    base, forms = served("llama", torch.bfloat16, tmp_path)
    requests = rows(forms, num_copies=3)
    mixed = tokens(base, forms, requests)
    diverged = sum(
        tokens(base, forms, [request])[request.request_id] != mixed[request.request_id]
        for request in requests
    )
    with capsys.disabled():
        print(f"\nbfloat16: {diverged} of {len(requests)} rows differ alone and mixed, 48 tokens")
    assert all(len(token_ids) == NUM_STEPS for token_ids in mixed.values())

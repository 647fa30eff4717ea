"""Memory is what the adapters' own tensors take: counted exactly, and given back."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest

from lora_runtime.adapters.reduction import load_adapter
from tests.driver import greedy, run, tiny_engine
from tests.peft_adapters import SEPARATE, write_adapter
from tests.tiny import dense_twin, tiny_base

RANKS = [4 + (60 * i) // 63 for i in range(64)]


@pytest.fixture(scope="module")
def base():
    return tiny_base("llama")


@pytest.fixture(scope="module")
def folders(base, tmp_path_factory):
    """64 adapters of ranks 4 to 64, over changing targets, a third of them DoRA."""
    twin, folder = dense_twin(base, "llama"), tmp_path_factory.mktemp("adapters")
    return [
        write_adapter(
            twin,
            folder / str(index),
            seed=index,
            r=rank,
            target_modules=SEPARATE[: 1 + index % len(SEPARATE)],
            use_dora=index % 3 == 0,
        )
        for index, rank in enumerate(RANKS)
    ]


def resident_bytes() -> int:
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def serve_all(engine, folders, base):
    """Load every adapter, run a row of each, and unload them all; returns their serving bytes."""
    forms = [load_adapter(folder, base.spec, base.weights) for folder in folders]
    for form in forms:
        engine.add_adapter(form)
    run(engine, [greedy(str(i), [5, 9, 3], form.digest, 2) for i, form in enumerate(forms)])
    assert len(engine.slots.resident) == len(forms)
    used = engine.stats().pool_bytes_used
    for form in forms:
        engine.drop_adapter(form.digest)
    assert engine.stats().pool_bytes_used == 0 and engine.host.nbytes == 0
    return used, sum(form.nbytes for form in forms)


def test_pool_accounting_is_exact_and_memory_comes_back(base, folders):
    engine = tiny_engine(base, max_slots=64, pool_bytes=64 << 20)
    serve_all(engine, folders, base)
    before = resident_bytes()
    for _ in range(3):
        used, serving_bytes = serve_all(engine, folders, base)
        assert used == serving_bytes
    after = resident_bytes()
    assert after <= 1.02 * before, f"{before} bytes resident before, {after} after three cycles"


def test_a_fragmented_pool_still_takes_what_fits(base, folders):
    """Adapters of very different sizes come and go through a pool that holds only a few."""
    forms = [load_adapter(folder, base.spec, base.weights) for folder in folders]
    largest = max(form.nbytes for form in forms)
    engine = tiny_engine(base, max_slots=8, pool_bytes=2 * largest)
    for form in forms:
        engine.add_adapter(form)
    requests = [greedy(str(i), [7, 2, 4], form.digest, 4) for i, form in enumerate(forms)]
    traces = run(engine, requests)
    assert all(len(trace.token_ids) == 4 for trace in traces.values())

"""The benchmark of the wires runs from end to end on a tiny base."""

from __future__ import annotations

import pytest

from tests.bench.running import run_bench

SIZES = {
    "requests": 5, "prompt-tokens": 9, "new-tokens": 12, "adapters": 2, "rank": 2, "rounds": 2,
    "alone": 2,
}  # fmt: skip


@pytest.mark.timeout(300)
def test_every_wire_carries_every_token(tmp_path):
    result = run_bench("bench.wires", tmp_path, SIZES)
    assert set(result["wires"]) == {"grpc", "http", "openai", "engine"}
    for name, figures in result["wires"].items():
        assert all(value > 0 for key, value in figures.items() if not key.endswith("cpu_s")), name
        assert figures["full_first_p50_ms"] <= figures["full_first_p99_ms"]
        assert len(result["full_tokens_per_s"][name]) == SIZES["rounds"]
    assert result["against_grpc"]["grpc"]["full_tokens_per_s"]["median"] == 1.0

"""The benchmark of slow clients runs from end to end on a tiny base."""

from __future__ import annotations

import pytest

from tests.bench.running import run_bench

SIZES = {
    "streams": 2, "slow-streams": 3, "prompt-tokens": 4, "new-tokens": 6, "rounds": 2, "pause-s": 1,
    "patience-s": 60,
}  # fmt: skip


@pytest.mark.timeout(300)
def test_fast_streams_are_measured_alone_and_beside_slow_ones(tmp_path):
    result = run_bench("bench.slow_readers", tmp_path, SIZES)
    assert result["alone_tokens_per_s"] > 0 and result["beside_tokens_per_s"] > 0
    assert len(result["ratio"]["rounds"]) == SIZES["rounds"]
    assert result["ready_s"] > 0

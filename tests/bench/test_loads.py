"""The benchmark of loads runs from end to end on a tiny base."""

from __future__ import annotations

import pytest

from tests.bench.running import run_bench

SIZES = {
    "streams": 2, "loads": 2, "rank": 2, "rounds": 2, "quiet-s": 1, "settle-s": 1
}  # fmt: skip


@pytest.mark.timeout(300)
def test_loads_of_both_kinds_are_measured_beside_streams(tmp_path):
    result = run_bench("bench.loads", tmp_path, SIZES)
    for kind in ("without_a_record", "with_a_record"):
        found = result[kind]
        assert 0 < found["load_ms"]["median"] <= found["load_ms"]["p95"]
        for phase in ("quiet_ms", "loading_ms"):
            figures = found[phase]
            assert 0 < figures["p50"] <= figures["p99"] <= figures["largest"]
        assert len(found["p99_ratio"]["rounds"]) == SIZES["rounds"]

"""The benchmark of serving runs from end to end on a tiny base, and its floor counts bytes."""

from __future__ import annotations

import math

import matplotlib.image
import pytest

from bench.serving_load import BASE, EIGHT, MANY, MIXES, RANKS, ZIPF, Batch, Ceilings, owners
from tests.bench.running import run_bench
from tests.tiny import tiny_base

SIZES = {"prompt-tokens": 9, "new-tokens": 6, "rounds": 2}


@pytest.mark.timeout(300)
def test_every_side_makes_every_token(tmp_path):
    result = run_bench("bench.serving", tmp_path, SIZES, ["--rows", "1", "32"])
    (picture,) = (tmp_path / "out").glob("*.png")
    found = {(cell["side"], cell["mix"], cell["rows"]): cell for cell in result["cells"]}
    for side, mixes in (
        ("loramux", MIXES), ("loramux over gRPC", (BASE, EIGHT)), ("transformers", (BASE,)),
    ):  # fmt: skip
        for mix in mixes:
            for rows in (1, 32):
                cell = found[side, mix, rows]
                assert len(cell["seconds"]) == SIZES["rounds"] and min(cell["seconds"]) >= 0
                assert 0 < cell["tokens_per_s"] < math.inf
    assert found["PEFT", EIGHT, 32]["tokens_per_s"] > 0
    assert found["floor", MANY, 32]["tokens_per_s"] < found["floor", BASE, 32]["tokens_per_s"]
    assert result["ratios"]["8 adapters over PEFT"] > 0
    assert result["ratios"]["base over OpenVINO"] is None, "it was not asked for"
    assert matplotlib.image.imread(picture).std() > 0.05, "the picture is blank"


def test_rows_use_the_adapters_that_their_mix_says():
    assert owners(BASE, 3) == [None] * 3
    assert set(owners(EIGHT, 32)) == {None, *range(8)} and owners(EIGHT, 1) == [0]
    assert sorted(owners(MANY, 32)) == [*range(8, 40)]
    assert {RANKS[owner] for owner in owners(MANY, 32)} == {8, 16, 32, 64}
    drawn = owners(ZIPF, 32)
    assert len(set(drawn)) < 32 and max(map(drawn.count, drawn)) > 2


def test_where_reading_is_slow_an_adapter_costs_the_floor_its_bytes():
    base = tiny_base("llama")
    sides = sum(s.in_features + s.out_features for s in base.spec.linears.values())
    ceilings = Ceilings(bytes_per_s=1000.0, multiply_adds_per_s=math.inf)
    plain, mixed = (Batch(mix, 32, 9, 6, base.spec.vocab_size) for mix in (BASE, MANY))
    extra = ceilings.seconds(base, mixed) - ceilings.seconds(base, plain)
    num_bytes = 4 * sides * sum(RANKS[owner] for owner in set(owners(MANY, 32)))  # float32
    assert extra == pytest.approx(5 * num_bytes / 1000)  # the prompt's step reads nothing again
    assert ceilings.adapter_seconds(base, mixed) == pytest.approx(extra)


def test_a_base_that_multiplies_for_longer_than_it_reads_hides_no_adapter():
    base = tiny_base("llama")
    ceilings = Ceilings(bytes_per_s=1000, multiply_adds_per_s=2000)
    mixed, plain = (Batch(mix, 32, 9, 6, base.spec.vocab_size) for mix in (EIGHT, BASE))
    sides = sum(s.in_features + s.out_features for s in base.spec.linears.values())
    num_bytes = 4 * sides * sum(RANKS[o] for o in {*mixed.owners()} - {None})  # float32
    found = ceilings.adapter_seconds(base, mixed)
    assert found > 5 * num_bytes / 1000  # and the prompt's products
    assert found > ceilings.seconds(base, mixed) - ceilings.seconds(base, plain)

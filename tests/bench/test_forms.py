"""Each form of the base is held, measured and written on a tiny base."""

from __future__ import annotations

import pytest

from bench.forms import Form, forms
from tests.bench.running import run_bench

SIZES = {"prompt-tokens": 9, "new-tokens": 6, "rounds": 1}


@pytest.mark.timeout(300)
def test_every_form_is_measured_in_a_process_of_its_own(tmp_path):
    more = ["--forms", "nf4", "--dtypes", "float32"]
    result = run_bench("bench.forms", tmp_path, SIZES, more)
    found = {(row["quantization"], row["dequantized_copy"]): row for row in result["forms"]}
    assert [*found] == [("nf4", True), ("nf4", False)]
    for row in found.values():
        assert [each["streams"] for each in row["streams"]] == [1, 32]
        for each in row["streams"]:
            (seconds,) = each["seconds"]
            assert each["tokens_per_s"] == pytest.approx(each["streams"] * 6 / seconds, rel=0.1)
        assert 0 < row["resident_bytes"]["base"] < row["resident_bytes"]["engine"]
    assert result["rounds"] == 1


def test_a_copy_is_a_form_where_float32_has_codes():
    assert forms(["nf4", "none"], ["bfloat16", "float32"]) == [
        Form("nf4", "bfloat16", has_copy=False),
        Form("none", "bfloat16", has_copy=False),
        Form("nf4", "float32", has_copy=True),
        Form("nf4", "float32", has_copy=False),
        Form("none", "float32", has_copy=False),
    ]

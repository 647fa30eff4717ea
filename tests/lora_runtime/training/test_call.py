"""`train` as one call: its keyword arguments are the settings, by any of their names."""

from __future__ import annotations

from importlib.metadata import version

import pytest

import loramux
from lora_runtime.errors import ConfigError
from lora_runtime.training import call


@pytest.fixture
def runs(monkeypatch):
    """The runs that were asked for; none is trained."""
    found = []
    monkeypatch.setattr(call, "train_run", lambda config: found.append(config) or [])
    return found


def test_names_of_other_libraries_are_taken_as_everywhere(runs):
    call.train(
        "a.jsonl",
        "out",
        base="some/base",
        units=[{"name": "a", "r": 8}, {"name": "b", "lora_alpha": 4}],
        lr=1e-3,
        num_train_epochs=2,
        max_length=64,
        quantization="none",
    )
    (run,) = runs
    first, second = run.units
    assert (first.rank, second.rank, second.alpha) == (8, 16, 4.0)
    assert {unit.learning_rate for unit in run.units} == {1e-3}
    assert {unit.num_epochs for unit in run.units} == {2}
    assert (run.max_seq_len, run.base.model, run.base.quantization) == (64, "some/base", "none")


def test_an_own_setting_goes_before_that_of_all_whatever_their_names(runs):
    call.train("a.jsonl", "out", rank=8, units=[{"name": "a", "r": 4}, {"name": "b"}])
    assert [unit.rank for unit in runs[0].units] == [4, 8]


@pytest.mark.parametrize(
    ("given", "expected"),
    [({"rnk": 8}, "rnk is not a setting; did you mean 'rank'?"), ({"r": 8, "rank": 8}, "same")],
)
def test_mistakes_are_named(runs, given, expected):
    with pytest.raises(ConfigError, match=expected.replace("?", r"\?")):
        call.train("a.jsonl", "out", **given)
    assert not runs


def test_the_package_says_its_version():
    assert loramux.__version__ == version("loramux")

"""Training as one call from Python.

(result,) = train("support.jsonl", "runs/support", rank=16, num_epochs=2)
folder, loss = result.folder, result.records[-1].loss
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_runtime.config import BaseConfig
from lora_runtime.settings import by_key, canonical_names, entries
from lora_runtime.training.config import TrainConfig, UnitConfig
from lora_runtime.training.report import UnitResult
from lora_runtime.training.trainer import train as train_run


def train(
    data: str | Path | None,
    output: str | Path,
    *,
    base: str | Path = "smollm2-135m",
    units: Sequence[Mapping[str, Any]] = ({},),
    **settings: Any,
) -> list[UnitResult]:
    """Train one adapter, or several at once on one base; return what became of each.

    `settings`: fields of UnitConfig, for every adapter, of TrainConfig and of BaseConfig, as
    `rank=16, learning_rate=1e-4, device="cpu"`. `units`: an adapter's own fields for each of
    several, as `[{"name": "a", "rank": 8}, {"name": "b", "data": "b.jsonl"}]`; `data` may be None
    where each has its own. Adapters are written to `output`/name, the report beside them.
    A unit that fails has its `error` in its result. Raises as `training.trainer.train`.
    """
    settings = _by_field(settings)
    run = _taken(settings, TrainConfig)
    base_settings = _taken(settings, BaseConfig)
    shared = {"name": "adapter", **({} if data is None else {"data": data}), **settings}
    whole = ({**shared, **_by_field(own)} for own in units)
    configs = [UnitConfig(**{**unit, "data": Path(unit["data"])}) for unit in whole]
    return train_run(
        TrainConfig(
            output=Path(output),
            units=tuple(configs),
            base=BaseConfig(model=str(base), **base_settings),
            **run,
        )
    )


def _by_field(given: Mapping[str, Any]) -> dict[str, Any]:
    """Settings by any of their names, as `lr` and `r`, by the names of their fields."""
    found = entries(UnitConfig) | entries(TrainConfig)
    known = {name: value for name, value in given.items() if name in canonical_names(found)}
    own = {name: value for name, value in given.items() if name not in known}
    return {**own, **{found[key].name: value for key, value in by_key(known, found).items()}}


def _taken(settings: dict[str, Any], owner: type) -> dict[str, Any]:
    """Take out of `settings` those that are fields of `owner`."""
    names = inspect.signature(owner).parameters.keys() & settings.keys()
    return {name: settings.pop(name) for name in names}

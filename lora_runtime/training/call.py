"""Training as one call from Python.

(result,) = train("support.jsonl", "runs/support", rank=16, num_epochs=2)
folder, loss = result.folder, result.records[-1].loss
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_runtime.errors import ConfigError
from lora_runtime.training.config import TrainConfig
from lora_runtime.training.report import UnitResult
from lora_runtime.training.trainer import train as train_run


def train(
    data: str | Path | None,
    output: str | Path,
    *,
    base: str | Path | None = None,
    units: Sequence[Mapping[str, Any]] = ({},),
    **settings: Any,
) -> list[UnitResult]:
    """Train one adapter, or several at once on one base; return what became of each.

    `settings`: settings of the run, and of every adapter, by any of their names, as in a file:
    `rank=16, lr=1e-4, device="cpu"`. `base`: None as BaseConfig has it. `units`: an adapter's own
    settings for each of several, as `[{"name": "a", "rank": 8}, {"name": "b", "data": "b.jsonl"}]`;
    `data` may be None where each has its own. Adapters are written to `output`/name, the report
    beside them.
    A unit that fails has its `error` in its result. Raises as `training.trainer.train`.
    """
    given = {"data": data, "output": output, "base": None if base is None else str(base)}
    settings |= {name: value for name, value in given.items() if value is not None}
    for index, own in enumerate(units):
        if not isinstance(own, Mapping):
            raise ConfigError(
                f"units[{index}] is {own!r:.100}; it must be a mapping of fields",
                field=f"units[{index}]",
            )
    return train_run(TrainConfig.of(settings, units, "units."))

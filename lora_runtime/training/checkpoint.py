"""Everything a run needs to continue exactly: safetensors and JSON, never pickle.

A checkpoint is a folder named after the number of forwards done. It is written under a temporary
name and renamed when complete; only then are older ones removed. There is no random state: the
order of the data is a function of (seed, epoch) and nothing else is drawn after the start.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import Parameter

from lora_runtime.errors import ConfigError
from lora_runtime.training.units import StepRecord, Unit, UnitStatus, Window

_TENSORS, _FACTS = "state.safetensors", "state.json"
_MOMENTS = ("step", "exp_avg", "exp_avg_sq")
"""Adam's state of one parameter."""


def save_checkpoint(folder: Path, units: Sequence[Unit], num_passes: int, fingerprint: str) -> None:
    """Write `folder`/`num_passes`, complete or not at all, then remove older checkpoints."""
    target = folder / f"{num_passes:08d}"
    if target.exists():
        return  # of the same run, so it holds the same
    temporary = folder / f"{target.name}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        save_file(_tensors(units), temporary / _TENSORS)
        facts = {
            "num_passes": num_passes,
            "base_fingerprint": fingerprint,
            "units": {unit.name: _facts(unit) for unit in units},
        }
        (temporary / _FACTS).write_text(json.dumps(facts), encoding="utf-8")
        for path in temporary.iterdir():
            _flush(path)
        os.replace(temporary, target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    for older in _complete(folder):
        if older != target:
            shutil.rmtree(older)


def has_checkpoint(folder: Path) -> bool:
    """True when an interrupted run can be continued from `folder`."""
    return bool(_complete(folder))


def load_checkpoint(folder: Path, units: Sequence[Unit], fingerprint: str) -> int:
    """Put the units where the newest checkpoint left them; returns the number of forwards done.

    Raises ConfigError when there is none, or when base, units, their settings or data differ.
    """
    checkpoints = _complete(folder)
    if not checkpoints:
        raise ConfigError(f"{folder} has no checkpoint to resume; start without it", field="resume")
    newest = checkpoints[-1]
    facts = json.loads((newest / _FACTS).read_text(encoding="utf-8"))
    _check_same(facts, units, fingerprint)
    tensors = load_file(newest / _TENSORS)
    for unit in units:
        _restore_tensors(unit, tensors)
        _restore_facts(unit, facts["units"][unit.name])
    return facts["num_passes"]


def _complete(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*") if path.name.isdecimal())


def _flush(path: Path) -> None:
    """Make the disk hold the file before its folder gets the final name."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _named_parameters(unit: Unit) -> Iterator[tuple[str, Parameter]]:
    for path, factors in unit.factors.items():
        for kind, parameter in factors._asdict().items():
            yield f"{unit.name}/{path}.{kind}", parameter


def _tensors(units: Sequence[Unit]) -> dict[str, Tensor]:
    """Weights, Adam moments and, inside an update's window, gradients."""
    found: dict[str, Tensor] = {}
    for unit in units:
        for name, parameter in _named_parameters(unit):
            found[name] = parameter.detach()
            if parameter.grad is not None:
                found[f"{name}.grad"] = parameter.grad
            for key, value in unit.optimizer.state.get(parameter, {}).items():
                found[f"{name}.{key}"] = value
    return found


def _restore_tensors(unit: Unit, tensors: Mapping[str, Tensor]) -> None:
    for name, parameter in _named_parameters(unit):
        saved = {
            key: tensors[f"{name}.{key}"].to(parameter.device)
            for key in ("grad", *_MOMENTS)
            if f"{name}.{key}" in tensors
        }
        parameter.data.copy_(tensors[name])
        parameter.grad = saved.pop("grad", None)
        if saved:
            unit.optimizer.state[parameter] = saved


def _facts(unit: Unit) -> dict[str, Any]:
    return {
        "identity": _identity(unit),
        "status": unit.status,
        "error": unit.error,
        "window": asdict(unit.window),
        "schedule": unit.schedule.state_dict(),
        "records": unit.records,
    }


def _restore_facts(unit: Unit, facts: Mapping[str, Any]) -> None:
    unit.status, unit.error = UnitStatus(facts["status"]), facts["error"]
    unit.window = Window(**facts["window"])
    unit.schedule.load_state_dict(facts["schedule"])
    unit.optimizer.param_groups[0]["lr"] = unit.schedule.get_last_lr()[0]
    unit.records = [StepRecord(*record) for record in facts["records"]]


def _identity(unit: Unit) -> dict[str, Any]:
    """What must stay the same between stop and resume; the data by content, not by path."""
    values = {**asdict(unit.config), "seed": unit.seed, "data": unit.dataset.digest}
    return json.loads(json.dumps(values))


def _check_same(facts: Mapping[str, Any], units: Sequence[Unit], fingerprint: str) -> None:
    if facts["base_fingerprint"] != fingerprint:
        raise ConfigError("the checkpoint was made on another base", field="base")
    names = [unit.name for unit in units]
    if list(facts["units"]) != names:
        raise ConfigError(
            f"the checkpoint has units {list(facts['units'])}, this run {names}", field="units"
        )
    for unit in units:
        identity = facts["units"][unit.name]["identity"]
        for key, value in _identity(unit).items():
            if identity.get(key) != value:
                raise ConfigError(
                    f"unit {unit.name!r}: {key} was {identity.get(key)!r} when the checkpoint was "
                    f"made and is {value!r} now; restore it or start without resume",
                    field=key,
                )

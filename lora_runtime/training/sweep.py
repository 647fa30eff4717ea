"""Sweeps: one unit becomes several that differ in some fields and train at once; losers stop early.

Successive halving (Jamieson and Talwalkar, arXiv:1502.07943) at fixed shares of the updates: when
every member that still runs has made `RUNGS[k]` of its updates, the half with the higher lowest
held-out loss up to there stops; of an odd number the smaller half. Members that are level keep
their order, so a run decides the same each time, resumed or not.
"""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

from lora_runtime.errors import ConfigError, nearest
from lora_runtime.settings import canonical_names, check_meaning, converted, entries
from lora_runtime.training.config import UnitConfig
from lora_runtime.training.data import Dataset
from lora_runtime.training.held_out import HeldOut
from lora_runtime.training.report import UnitResult
from lora_runtime.training.units import Unit, UnitStatus

RUNGS = (0.25, 0.5)
"""Shares of a member's updates after which the worse half stops."""

SHORT = {"learning_rate": "lr"}
"""Names of fields in the names of members."""

Sweeps = Mapping[str, Sequence[str]]
"""The name of a unit with a sweep → the names of its members."""


def expand(units: Sequence[UnitConfig]) -> tuple[tuple[UnitConfig, ...], Sweeps]:
    """Every unit with a sweep replaced by its members, and who belongs together.

    Raises ConfigError naming `sweep.<field>`.
    """
    expanded = {unit.name: _members(unit) if unit.sweep else (unit,) for unit in units}
    sweeps = {u.name: [m.name for m in expanded[u.name]] for u in units if u.sweep}
    return tuple(member for members in expanded.values() for member in members), sweeps


def sweep_of(name: str, sweeps: Sweeps) -> str | None:
    """The unit whose sweep the unit `name` is a member of, if any."""
    return next((sweep for sweep, members in sweeps.items() if name in members), None)


def held_out_of(unit: Unit, dataset: Dataset | None, sweep: str | None) -> HeldOut | None:
    """A unit's held-out data, if it has any; a member of a sweep is also evaluated at its rungs.

    Raises ConfigError when something of the unit needs held-out data and there is none.
    """
    default = entries(UnitConfig)["eval_interval"].default
    is_set = {
        "sweep": sweep,
        "patience": unit.config.patience,
        "eval_interval": unit.config.eval_interval != default,
    }
    needs = next((name for name, value in is_set.items() if value), None)
    if dataset is None and needs:
        raise ConfigError(
            f"unit {sweep or unit.name!r}: {needs} needs held-out data; give eval_data "
            "or eval_fraction",
            field=needs,
        )
    rungs = _rung_steps(unit.num_steps) if sweep else ()
    return HeldOut(unit.config, dataset, rungs) if dataset else None


def _rung_steps(num_steps: int) -> list[int]:
    """The updates after which a member of a sweep is compared."""
    return [math.ceil(share * num_steps) for share in RUNGS]


def stop_losers(units: Sequence[Unit], sweeps: Sweeps) -> list[Unit]:
    """Stop and return what loses at the next rung of each sweep that has all come there."""
    by_name = {unit.name: unit for unit in units}
    losers: list[Unit] = []
    for members in sweeps.values():
        contenders = [
            (unit, unit.held_out)
            for unit in map(by_name.__getitem__, members)
            if unit.status in (UnitStatus.RUNNING, UnitStatus.DONE) and unit.held_out
        ]
        losers += _decide(contenders)
    return losers


def winners(results: Sequence[UnitResult], sweeps: Sweeps, output: Path) -> list[UnitResult]:
    """The best member of each sweep that has ended, copied to the folder of the unit's name."""
    by_name = {result.name: result for result in results}
    found = []
    for name, members in sweeps.items():
        ended = [by_name[member] for member in members]
        done = [result for result in ended if result.folder is not None]
        if done and all(result.status is not UnitStatus.RUNNING for result in ended):
            best = min(done, key=lambda result: result.exported_loss)
            found.append(_under_name(best, name, output / name))
    return found


def _under_name(best: UnitResult, name: str, folder: Path) -> UnitResult:
    """The adapter's files under another name, complete or not at all."""
    if best.folder is None:
        raise ValueError(f"{best.name} has no adapter")
    temporary = folder.with_name(f".{name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    shutil.copytree(best.folder, temporary)
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)
    note = f"the best of its sweep: {best.name}"
    return replace(best, name=name, folder=folder, note=note, sweep=None, copy_of=best.name)


def _decide(contenders: Sequence[tuple[Unit, HeldOut]]) -> list[Unit]:
    rung = max((held_out.num_rungs_passed for _, held_out in contenders), default=len(RUNGS))
    if rung == len(RUNGS):
        return []
    steps = {unit.name: _rung_steps(unit.num_steps)[rung] for unit, _ in contenders}
    if any(unit.is_running and unit.step < steps[unit.name] for unit, _ in contenders):
        return []
    # A sort is stable: of equal losses the earlier member stays, resumed or not.
    ranked = sorted(contenders, key=lambda pair: pair[1].lowest_loss(steps[pair[0].name]))
    losers = [unit for unit, _ in ranked[math.ceil(len(ranked) / 2) :] if unit.is_running]
    for unit in losers:
        best = ranked[0][0].name
        unit.end(UnitStatus.STOPPED, f"behind {best} after update {steps[unit.name]}")
    for _, held_out in contenders:
        held_out.num_rungs_passed += 1
    return losers


def _members(unit: UnitConfig) -> tuple[UnitConfig, ...]:
    """A unit for every combination of the values."""
    found = entries(UnitConfig)
    names = canonical_names(found)
    tried: dict[str, list[Any]] = {}
    for key, values in unit.sweep.items():
        name = names.get(key, key)
        _check_field(name)
        if name in tried:
            raise ConfigError(f"sweep names {name} twice; remove one", field=f"sweep.{key}")
        for value in values:
            check_meaning(found[name], key, value, f"sweep.{key}")
        tried[name] = [converted(value, found[name], f"sweep.{name}") for value in values]
    choices = [[(name, value) for value in values] for name, values in tried.items()]
    members = tuple(
        replace(unit, sweep={}, name=_name(unit.name, chosen), **dict(chosen))
        for chosen in product(*choices)
    )
    if len({member.name for member in members}) < max(len(members), 2):
        raise ConfigError(
            f"unit {unit.name!r}: sweep is {unit.sweep!r}; it must have two or more different "
            "values",
            field="sweep",
        )
    return members


def _check_field(name: str) -> None:
    valid = [entry.name for entry in entries(UnitConfig).values() if not entry.is_fixed]
    if name not in valid:
        raise ConfigError(
            f"sweep.{name} is not a field to sweep; {nearest(name, valid)}", field=f"sweep.{name}"
        )


def _name(unit: str, chosen: Sequence[tuple[str, object]]) -> str:
    parts = [f"{SHORT.get(name, name)}={_text(value)}" for name, value in chosen]
    return "-".join([unit, *parts])


def _text(value: object) -> str:
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return re.sub(r"[^A-Za-z0-9._-]", "_", text)

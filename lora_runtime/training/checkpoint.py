"""Everything a run needs to continue exactly: safetensors and JSON, never pickle.

A checkpoint is a folder named after the number of forwards done, with the checksums of its files as
`sha256sum` writes and checks them. It is written under a temporary name and renamed when it is
complete. Only then are older ones removed, all but the one before it, which is used if the newest
is damaged. No random state is saved: the order of the data is a function of (seed, epoch), and
nothing else is drawn after the start.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lora_runtime.base.model.layer_order import LayerMap
from lora_runtime.errors import ConfigError
from lora_runtime.training.data import Example, Limits
from lora_runtime.training.held_out import EvalRecord
from lora_runtime.training.optimizers import restore_state, saved_state
from lora_runtime.training.preferences import Signal
from lora_runtime.training.units import StepRecord, Unit, UnitStatus, Window

_TENSORS, _FACTS, _SUMS = "state.safetensors", "state.json", "SHA256SUMS"
_NUM_KEPT = 2


def save_checkpoint(folder: Path, units: Sequence[Unit], num_passes: int, fingerprint: str) -> None:
    """Write `folder`/`num_passes`, complete or not at all; then keep it and the one before it.

    Raises ConfigError when it cannot be written; earlier checkpoints stay.
    """
    target = folder / f"{num_passes:08d}"
    if _damage(target) is None:
        return  # of the same run, so it holds the same
    temporary = folder / f"{target.name}.tmp"
    facts = {
        "num_passes": num_passes,
        "base_fingerprint": fingerprint,
        "units": {unit.name: _facts(unit) for unit in units},
    }
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        _write(temporary, _tensors(units), facts)
        if target.exists():
            shutil.rmtree(target)  # damaged
        os.replace(temporary, target)
    except (OSError, SafetensorError) as error:
        raise ConfigError(
            f"checkpoint {target} cannot be written: {error}; earlier ones are whole: make room "
            "and resume",
            field="output",
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    earlier = [path for path in _complete(folder) if path.name <= target.name]
    for other in _complete(folder):
        if other not in earlier[-_NUM_KEPT:]:  # older, or left behind as damaged
            shutil.rmtree(other)


def has_checkpoint(folder: Path) -> bool:
    """True when an interrupted run can be continued from `folder`."""
    return bool(_complete(folder))


def load_checkpoint(
    folder: Path,
    units: Sequence[Unit],
    fingerprint: str,
    say: Callable[[str], None] = lambda _: None,
) -> int:
    """Put the units where the newest whole checkpoint left them; returns the number of forwards
    done. `say` is called with a message for every damaged checkpoint that is newer.

    Raises ConfigError when there is no whole one, or when base, units, settings or data differ.
    """
    found = []
    for path in reversed(_complete(folder)):
        if (damage := _damage(path)) is None:
            return _load(path, units, fingerprint)
        found.append(f"{path} is damaged: {damage}")
        say(f"{found[-1]}; the one before it is used")
    known = "; ".join(found) or f"{folder} has no checkpoint to resume"
    raise ConfigError(f"{known}; start without resume, in another output", field="resume")


def _load(path: Path, units: Sequence[Unit], fingerprint: str) -> int:
    """Put the units where one whole checkpoint left them; returns the number of forwards done.

    Raises ConfigError, also for a checkpoint that another version has written.
    """
    try:
        facts = json.loads((path / _FACTS).read_text(encoding="utf-8"))
        _check_same(facts, units, fingerprint)
        tensors = load_file(path / _TENSORS)
        for unit in units:
            _restore_tensors(unit, tensors)
            _restore_facts(unit, facts["units"][unit.name])
        return int(facts["num_passes"])
    except (OSError, LookupError, TypeError, ValueError, RuntimeError, SafetensorError) as error:
        raise ConfigError(
            f"{path} cannot be read ({type(error).__name__}: {error}); it may be of another "
            "version: resume with the one that wrote it, or start without resume",
            field="resume",
        ) from error


def _damage(path: Path) -> str | None:
    """What is wrong with a checkpoint's files; None when their checksums are right."""
    try:
        lines = (path / _SUMS).read_text(encoding="utf-8").splitlines()
        sums = {name: digest for digest, name in (line.split("  ", 1) for line in lines)}
        if set(sums) != {_TENSORS, _FACTS}:
            return f"{_SUMS} does not name its files"
        changed = [name for name, digest in sums.items() if _sha256(path / name) != digest]
        return f"{changed[0]} is not as it was written" if changed else None
    except OSError as error:
        return f"{error.filename}: {error.strerror}"
    except ValueError:  # no UTF-8, or a line without a name
        return f"{_SUMS} is not as it was written"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _complete(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*") if path.name.isdecimal())


def _write(folder: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    folder.mkdir(parents=True)
    save_file(dict(tensors), folder / _TENSORS)
    (folder / _FACTS).write_text(json.dumps(facts), encoding="utf-8")
    sums = "".join(f"{_sha256(folder / name)}  {name}\n" for name in (_TENSORS, _FACTS))
    (folder / _SUMS).write_text(sums, encoding="utf-8")
    for path in folder.iterdir():
        _flush(path)


def _flush(path: Path) -> None:
    """Make the disk hold the file before its folder gets the final name."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _tensors(units: Sequence[Unit]) -> dict[str, Tensor]:
    """Weights, Adam's moments, the best weights and, inside an update's window, gradients."""
    found: dict[str, Tensor] = {}
    for unit in units:
        for index, values in enumerate(unit.held_out.best if unit.held_out else ()):
            found[_best_name(unit, index)] = values
        for name, constant in unit.named_constants().items():
            found[f"{unit.name}/{name}"] = constant
        for part, parameter in unit.named_parameters().items():
            name = f"{unit.name}/{part}"
            found[name] = parameter.detach()
            if parameter.grad is not None:
                found[f"{name}.grad"] = parameter.grad
            for key, value in saved_state(unit.optimizer, parameter).items():
                found[f"{name}.{key}"] = value
    return found


def _best_name(unit: Unit, index: int) -> str:
    return f"{unit.name}/best/{index}"


def _restore_tensors(unit: Unit, tensors: Mapping[str, Tensor]) -> None:
    """Put back what `_tensors` saved of a unit."""
    if unit.held_out:
        names = [_best_name(unit, index) for index in range(len(unit.parameters))]
        unit.held_out.best = [tensors[name] for name in names if name in tensors]
    for name, constant in unit.named_constants().items():
        constant.copy_(tensors[f"{unit.name}/{name}"])
    beside: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for name, tensor in tensors.items():
        owner, _, key = name.rpartition(".")
        beside[owner][key] = tensor
    for part, parameter in unit.named_parameters().items():
        name = f"{unit.name}/{part}"
        saved = beside[name]
        grad = saved.pop("grad", None)
        parameter.data.copy_(tensors[name])
        parameter.grad = grad if grad is None else grad.to(parameter.device)
        if saved:
            restore_state(unit.optimizer, parameter, saved)


def _facts(unit: Unit) -> dict[str, Any]:
    return {
        "identity": _identity(unit),
        "status": unit.status,
        "error": unit.error,
        "note": unit.note,
        "window": asdict(unit.window),
        "limits": asdict(unit.limits),
        "schedule": unit.schedule.state_dict(),
        "records": unit.records,
        "references": [unit.references.get(key) for key in _reference_keys(unit)],
        "eval_records": unit.held_out.records if unit.held_out else [],
        "num_rungs_passed": unit.held_out.num_rungs_passed if unit.held_out else 0,
    }


def _restore_facts(unit: Unit, facts: Mapping[str, Any]) -> None:
    unit.status = UnitStatus(facts["status"])
    unit.error, unit.note = facts["error"], facts["note"]
    window = facts["window"]
    unit.window = Window(window["done"], Signal(*window["signal"]), window["seconds"])
    references = zip(_reference_keys(unit), facts["references"], strict=True)
    unit.references.update((key, value) for key, value in references if value is not None)
    unit.limits = Limits(**facts["limits"])
    unit.schedule.load_state_dict(facts["schedule"])
    for group, rate in zip(unit.optimizer.param_groups, unit.schedule.get_last_lr(), strict=True):
        group["lr"] = rate
    unit.records = [StepRecord(*record) for record in facts["records"]]
    if unit.held_out:
        unit.held_out.records = [EvalRecord(*record) for record in facts["eval_records"]]
        unit.held_out.num_rungs_passed = facts["num_rungs_passed"]


def _reference_keys(unit: Unit) -> list[tuple[LayerMap | None, Example]]:
    """Keys of the reference log-probabilities of all a unit's preferences.

    They are saved, not computed again: their last bits depend on what shared the forward.
    """
    datasets = [unit.dataset, *([unit.held_out.dataset] if unit.held_out else [])]
    return [(unit.layer_map, e) for d in datasets if d.is_preference for e in d.examples]


def _identity(unit: Unit) -> dict[str, Any]:
    """What must be the same when a run is resumed: settings, and data by content, not by path."""
    values = {
        **asdict(unit.config),
        "seed": unit.seed,
        "data": unit.dataset.digest,
        "eval_data": unit.held_out.dataset.digest if unit.held_out else None,
    }
    as_read_back: dict[str, Any] = json.loads(json.dumps(values))
    return as_read_back


def _check_same(facts: Mapping[str, Any], units: Sequence[Unit], fingerprint: str) -> None:
    """Raise ConfigError naming what differs between the checkpoint and this run."""
    if facts["base_fingerprint"] != fingerprint:
        raise ConfigError(
            "base: the checkpoint was made on another base, or on this one in another "
            "quantization; name that or start without resume",
            field="base",
        )
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

"""What stays of a run: a UnitResult of every unit, and `report/` with curves, a plot, one page."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path

from matplotlib.figure import Figure  # without pyplot: no global state, no display

from lora_runtime.training.config import UnitConfig
from lora_runtime.training.held_out import EvalRecord
from lora_runtime.training.report.losses import NUM_AVERAGED, first_of, last_of, mean
from lora_runtime.training.report.outcome import warnings_of
from lora_runtime.training.units import StepRecord, Unit, UnitStatus

_STATUS = {
    UnitStatus.RUNNING: "interrupted",
    UnitStatus.DONE: "done",
    UnitStatus.STOPPED: "stopped",
    UnitStatus.FAILED: "failed",
}
_NOT_SETTINGS = ("name", "data", "eval_data", "sweep")


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitResult:
    """Facts of one unit after a run. Status `running` means interrupted: it can be resumed."""

    name: str
    status: UnitStatus
    error: str | None
    """Set if and only if the unit failed."""
    folder: Path | None
    """The adapter; set if and only if the unit is done."""
    data: str
    num_parameters: int
    num_steps: int
    """Updates that were planned."""
    records: tuple[StepRecord, ...]
    """Updates that were made."""
    note: str | None = None
    """Why the unit ended before its last update, or whose copy it is."""
    warnings: tuple[str, ...] = ()
    """Warnings about a finished adapter: see `outcome.py`."""
    sweep: str | None = None
    """The unit whose sweep this is a member of."""
    copy_of: str | None = None
    """Set for the unit of a sweep: the member whose adapter and curves it has."""
    eval_data: str | None = None
    eval_records: tuple[EvalRecord, ...] = ()
    best: EvalRecord | None = None
    """The evaluation with the lowest loss."""
    exported_step: int = 0
    """The update whose weights `folder` holds."""
    settings: Mapping[str, object] = field(default_factory=dict)
    """Settings that differ from the defaults of UnitConfig."""

    @classmethod
    def of(cls, unit: Unit, folder: Path | None, sweep: str | None = None) -> UnitResult:
        """The facts of a unit; `folder` holds its adapter if it is done."""
        held_out = unit.held_out
        return cls(
            name=unit.name,
            status=unit.status,
            error=unit.error,
            folder=folder,
            data=unit.dataset.describe(),
            num_parameters=unit.num_parameters,
            num_steps=unit.num_steps,
            records=tuple(unit.records),
            note=unit.note,
            warnings=warnings_of(unit) if folder else (),
            sweep=sweep,
            eval_data=held_out.dataset.describe() if held_out else None,
            eval_records=tuple(held_out.records) if held_out else (),
            best=held_out.best_record if held_out else None,
            exported_step=unit.exported_step,
            settings=_settings(unit.config),
        )

    @property
    def first_loss(self) -> float | None:
        """See `losses.py`; None before the first update."""
        first = first_of(self.records)
        return mean([record.loss for record in first]) if first else None

    @property
    def loss(self) -> float | None:
        """See `losses.py`; None before the first update."""
        last = last_of(self.records)
        return mean([record.loss for record in last]) if last else None

    @property
    def held_out_loss(self) -> float | None:
        """Held-out loss of the last evaluation; None before the first."""
        return self.eval_records[-1].loss if self.eval_records else None

    @property
    def exported_loss(self) -> float:
        """Held-out loss of the exported weights; inf when there is none."""
        losses = (r.loss for r in self.eval_records if r.step == self.exported_step)
        return next(filter(math.isfinite, losses), math.inf)


def _settings(config: UnitConfig) -> dict[str, object]:
    default = UnitConfig(name=config.name, data=config.data)
    values = {entry.name: getattr(config, entry.name) for entry in fields(UnitConfig)}
    return {
        name: value
        for name, value in values.items()
        if name not in _NOT_SETTINGS and value != getattr(default, name)
    }


def write_report(folder: Path, results: Sequence[UnitResult]) -> None:
    """Write loss.csv (a row per update), loss.png and summary.md."""
    folder.mkdir(parents=True, exist_ok=True)
    trained = [result for result in results if result.copy_of is None]
    _write_csv(folder / "loss.csv", trained)
    _write_plot(folder / "loss.png", trained)
    (folder / "summary.md").write_text(_summary(results), encoding="utf-8")


def _write_csv(path: Path, results: Sequence[UnitResult]) -> None:
    """Empty: `eval_…` where there was no evaluation, `accuracy` and `margin` but of preferences."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["unit", *StepRecord._fields, "eval_loss", "eval_accuracy"])
        for result in results:
            found = {record.step: (record.loss, record.accuracy) for record in result.eval_records}
            writer.writerows(
                [result.name, *record, *found.get(record.step, ("", ""))]
                for record in result.records
            )


def _write_plot(path: Path, results: Sequence[UnitResult]) -> None:
    """A line per unit; its held-out losses are dashed, in the same colour."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot(xlabel="update", ylabel="loss per target token or pair")
    for index, result in enumerate(results):
        colour = f"C{index % 10}"
        lines: list[tuple[Sequence[StepRecord] | Sequence[EvalRecord], str, str]] = [
            (result.records, "-", result.name),
            (result.eval_records, "o--", f"{result.name}, held out"),
        ]
        for records, style, label in lines:
            if records:
                steps, losses = [r.step for r in records], [r.loss for r in records]
                axes.plot(steps, losses, style, color=colour, markersize=4, label=label)
    if any(result.records for result in results):
        axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def _summary(results: Sequence[UnitResult]) -> str:
    lines = [
        "# Training run",
        "",
        "| unit | status | updates | first loss | loss | held-out loss | best held-out loss "
        "| parameters | tokens/s |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|",
        *(_summary_row(result) for result in results),
        "",
        f"The first loss is a mean over the first updates, the loss over the last: {NUM_AVERAGED}",
        "of each, of short runs half of all. Held-out losses are means over all held-out target",
        "tokens, of preferences over pairs; `held-out loss` is the last one. Forwards are shared",
        "by the units, so their speeds add up.",
        "",
        "![loss](loss.png)",
        "",
        *(line for result in results for line in _summary_facts(result)),
    ]
    return "\n".join(lines) + "\n"


def _summary_row(result: UnitResult) -> str:
    seconds = sum(record.seconds for record in result.records)
    num_tokens = sum(record.num_tokens for record in result.records)
    best = result.best
    cells = [
        result.name,
        _STATUS[result.status],
        f"{len(result.records)}/{result.num_steps}",
        _shown(result.first_loss),
        _shown(result.loss),
        _shown(result.held_out_loss),
        f"{best.loss:.4f} (update {best.step})" if best else "-",
        f"{result.num_parameters:,}",
        f"{num_tokens / seconds:.0f}" if seconds else "-",
    ]
    return f"| {' | '.join(cells)} |"


def _summary_facts(result: UnitResult) -> list[str]:
    """Data, settings, and what happened, one line each."""
    settings = ", ".join(f"{name} {value}" for name, value in result.settings.items())
    facts = [
        result.data,
        f"held out {result.eval_data}" if result.eval_data else None,
        *_preference_facts(result),
        f"settings: {settings or 'the defaults'}",
        f"{result.folder}: weights after update {result.exported_step}" if result.folder else None,
        result.note,
        *(f"warning: {warning}" for warning in result.warnings),
        f"{result.name} failed: {result.error}" if result.error else None,
    ]
    return [f"## {result.name}", "", *(f"- {fact}" for fact in facts if fact is not None), ""]


def _preference_facts(result: UnitResult) -> Iterator[str]:
    """The share of pairs whose chosen answer the adapter moved towards, and by how much."""
    signals = [
        (record.accuracy, record.margin)
        for record in result.records
        if record.accuracy is not None and record.margin is not None
    ]
    for when, some in [("first", first_of(signals)), ("last", last_of(signals))]:
        if some:
            accuracy, margin = (mean(values) for values in zip(*some, strict=True))
            yield f"{when} {len(some)} updates: accuracy {accuracy:.0%}, margin {margin:.3f}"
    if result.best and result.best.accuracy is not None:
        yield f"held out, best: accuracy {result.best.accuracy:.0%}"


def _shown(loss: float | None) -> str:
    return "-" if loss is None else f"{loss:.4f}"

"""`loramux train`: adapters on the very base that will serve them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from lora_runtime.settings import by_key
from lora_runtime.terminal import Terminal
from lora_runtime.training.config import TrainConfig, unit_fields
from server.cli import deploy as deploying
from server.cli.settings import TRAIN_SETTINGS, read_texts, with_flags
from server.config import environment

if TYPE_CHECKING:
    from lora_runtime.training.dry_run import DryRun, Estimate
    from lora_runtime.training.report import UnitResult

Deploy = Annotated[
    str | None,
    typer.Option(
        metavar="HOST:PORT",
        help="Upload what is finished to this server, in the place of what its names hold there.",
    ),
]
Units = Annotated[
    list[str] | None,
    typer.Option(
        "--unit",
        metavar="FIELD: VALUE, …",
        help="One of several adapters to train at once, as in 'name: a, data: a.jsonl, rank: 8'; "
        "other flags hold for all of them.",
    ),
]


@with_flags(TRAIN_SETTINGS.values())
def train(
    config: Annotated[
        Path | None,
        typer.Argument(
            help="YAML file; flags and LORAMUX_<FLAG> go before it, of an adapter in all of its "
            "units."
        ),
    ] = None,
    unit: Units = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Measure one micro-step, print memory and time, train nothing."
        ),
    ] = False,
    deploy: Deploy = None,
    deploy_name: Annotated[
        str | None, typer.Option(help="Its name on that server. Default: the unit's own.")
    ] = None,
    sample: Annotated[
        str | None,
        typer.Option(
            help="Asked of base and adapter there. Default: the first prompt of the data."
        ),
    ] = None,
    **flags: Any,
) -> None:
    """Train adapters on the quantized base; Ctrl-C saves a checkpoint and stops.

    One adapter by flags (--data and --output), or any number at once by --unit or a YAML file.
    Settings come from the file, then LORAMUX_<FLAG> in the environment, then these flags.
    Written in PEFT's format, ready for `loramux adapters load`. Several devices share an update by
    `torchrun --nproc-per-node N -m server train …`.
    """
    run = _run_of(config, unit or [], flags)
    if dry_run:
        return show_dry_run(run, Terminal())
    _train(run, deploy, deploy_name, sample)


def _run_of(file: Path | None, units: list[str], flags: dict[str, Any]) -> TrainConfig:
    """The run that `train` was given, by a file or by flags."""
    variables = read_texts(environment(TRAIN_SETTINGS), TRAIN_SETTINGS)
    values = {**by_key(variables, TRAIN_SETTINGS), **read_texts(flags, TRAIN_SETTINGS)}
    if file is not None:
        if units:
            raise typer.BadParameter("--unit cannot stand beside a YAML file; write its unit there")
        return TrainConfig.from_yaml(file, values)
    own = [unit_fields(text) for text in units] or [{}]
    for required, is_given in [
        ("data", "data" in values or all("data" in each for each in own)),
        ("output", "output" in values),
    ]:
        if not is_given:
            raise typer.BadParameter(f"give --{required}, or a YAML file")
    return TrainConfig.from_flags(values, units)


def _train(
    run: TrainConfig, deploy: str | None, deploy_name: str | None, sample: str | None
) -> None:
    if deploy is not None:
        deploying.check_server(deploy, deploy_name, len(run.units))
    from lora_runtime.training.trainer import train as train_run

    results = train_run(run, Terminal())
    if not results:
        return  # of several processes one shows and deploys
    Terminal(markup=False).print(_table(results))
    finished = deploying.deployments(results, run.units, deploy_name) if deploy else []
    is_deployed = not finished or deploying.deploy(str(deploy), finished, sample)
    if any(result.error for result in results) or not is_deployed:
        raise typer.Exit(1)


def _table(results: list[UnitResult]) -> Table:
    table = Table("adapter", "status", "updates", "last loss", "held out", "folder or error")
    for result in results:
        loss = f"{result.records[-1].loss:.4f}" if result.records else ""
        updates = f"{len(result.records)}/{result.num_steps}"
        held_out = f"{result.best.loss:.4f}" if result.best else ""
        end = result.error or str(result.folder or result.note or "continue with --resume")
        table.add_row(result.name, result.status.value, updates, loss, held_out, end)
    return table


def show_dry_run(config: TrainConfig, console: Console) -> None:
    """Measure a run and print what each unit and all of them together would take."""
    from lora_runtime.training.dry_run import dry_run
    from lora_runtime.training.progress import show_data

    with console.status("loading the base") as status:
        found = dry_run(config, on_progress=status.update)
    show_data(console, found.data)
    console.print(_estimates(found))
    total = found.base_bytes + found.together.total_bytes
    console.print(
        f"The base takes {decimal(found.base_bytes)}, the whole run {decimal(total)}. Activations "
        "are those of the longest examples; times go by one micro-step, and a sweep's losers "
        "count as if they went on. Memory is that of tensors; a process takes more. Nothing was "
        "trained or written.",
        soft_wrap=True,
    )


def _estimates(found: DryRun) -> Table:
    columns = ["parameters", "targets", "updates", "tokens", "weights", "gradients", "optimizer"]
    table = Table("adapter", *columns, "activations", "time")
    for unit in found.units:
        table.add_row(unit.name, *_cells(unit))
    if len(found.units) > 1:
        table.add_section()
        table.add_row("all at once", *_cells(found.together))
    return table


def _cells(unit: Estimate) -> list[str]:
    sizes = (unit.weight_bytes, unit.gradient_bytes, unit.optimizer_bytes, unit.activation_bytes)
    return [
        f"{unit.num_parameters:,}",
        " ".join(unit.targets),
        f"{unit.num_steps:,}",
        f"{unit.num_tokens:,}",
        *(decimal(size) for size in sizes),
        _duration(unit.seconds),
    ]


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"

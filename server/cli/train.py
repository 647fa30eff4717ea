"""`loramux train`: adapters on the very base that will serve them."""

from __future__ import annotations

import os
import select
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.filesize import decimal

from lora_runtime.adapters.files.file_names import CONFIG_FILE
from lora_runtime.settings import by_key
from lora_runtime.terminal import Terminal, echo
from lora_runtime.training.config import TrainConfig, unit_fields
from lora_runtime.training.rows import read_rows
from loramux.server.cli import deploy as deploying
from loramux.server.cli.connection import Connect, connecting
from loramux.server.cli.settings import TRAIN_SETTINGS, read_texts, with_flags
from loramux.server.cli.tables import show_table
from loramux.server.config import environment

if TYPE_CHECKING:
    from lora_runtime.training.dry_run import Estimate
    from lora_runtime.training.report import UnitResult

SIGNALLED = 128
"""A command that signal N stopped exits with 128 + N, as a shell has it."""

DATA_SUFFIXES = (".jsonl", ".csv", ".tsv", ".parquet")
"""Of files that hold rows and no settings; JSON is YAML too."""

Deploy = Annotated[
    str | None,
    typer.Option(
        metavar="HOST:PORT",
        help="Upload finished adapters to this server; they replace what their names hold there.",
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


@connecting
@with_flags(TRAIN_SETTINGS.values())
def train(
    connect_to: Connect,
    config: Annotated[
        Path | None,
        typer.Argument(
            help="YAML file of settings. Flags and LORAMUX_<FLAG> override it; those of an adapter "
            "do so in all of its units."
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
        str | None, typer.Option(help="The adapter's name on that server. Default: its own.")
    ] = None,
    sample: Annotated[
        str | None,
        typer.Option(
            help="Prompt to try on base and adapter there. Default: the first one of the data."
        ),
    ] = None,
    **flags: Any,
) -> None:
    """Train adapters on the quantized base; Ctrl-C saves a checkpoint and stops.

    One adapter by flags (--data and --output), or any number at once by --unit or a YAML file.
    Settings come from the file, then LORAMUX_<FLAG> in the environment, then these flags. Other
    libraries' names, such as --lr or --num-train-epochs, are taken too.

    A run that Ctrl-C or SIGTERM stops ends with status 130 or 143; --resume continues it, starts
    where there is nothing to continue, and does nothing where all is done.

    --deploy connects as --api-key and --tls… say, or LORAMUX_API_KEY and LORAMUX_TLS_CA.

    Adapters are written in PEFT's format, ready for `loramux adapters load`. Several devices share
    an update by `torchrun --nproc-per-node N -m loramux train …`.
    """
    run = _run_of(config, unit or [], flags)
    check_data(run)
    if dry_run:
        return show_dry_run(run, Terminal())
    if run.resume:
        found = _resumable(run)
        if found is None:
            return _say_nothing_to_resume(run, deploy)
        run = found
    if deploy is not None:
        deploying.check_server(connect_to, deploy, deploy_name, len(run.units))
    results, signals = _trained(run)
    if not results:
        return  # of several processes one shows and deploys
    finished = deploying.deployments(results, run.units, deploy_name) if deploy else []
    is_deployed = not finished or deploying.deploy(connect_to, str(deploy), finished, sample)
    if any(result.error for result in results) or not is_deployed:
        raise typer.Exit(1)
    if signals and any(result.status.value == "running" for result in results):
        raise typer.Exit(SIGNALLED + signals[0])


def _say_nothing_to_resume(run: TrainConfig, deploy: str | None) -> None:
    echo(f"nothing to resume: {run.output} has every adapter of this run already")
    if deploy is not None:
        echo(
            "--deploy sends only what it sees trained; send what is there by "
            f"`loramux adapters upload NAME {run.output}/NAME --replace`"
        )


def _run_of(file: Path | None, units: list[str], flags: dict[str, Any]) -> TrainConfig:
    """The run that `train` was given, by a file or by flags."""
    variables = read_texts(environment(TRAIN_SETTINGS), TRAIN_SETTINGS)
    values = {**by_key(variables, TRAIN_SETTINGS), **read_texts(flags, TRAIN_SETTINGS)}
    if file is not None:
        if file.suffix in DATA_SUFFIXES:
            raise typer.BadParameter(f"{file} is data and no YAML file; write --data {file}")
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


def check_data(run: TrainConfig) -> None:
    """Read every row once, before the seconds that torch takes. Raises DataError."""
    paths = {path for unit in run.units for path in (unit.data, unit.eval_data) if path}
    for path in sorted(paths):
        for _ in read_rows(path):
            pass


def _resumable(run: TrainConfig) -> TrainConfig | None:
    """The run as it is to go on: from its checkpoint, from the start where there is none, None
    where all its adapters are written. So a job may always be given --resume.
    """
    from lora_runtime.training.checkpoint import has_checkpoint
    from lora_runtime.training.run_folder import checkpoints_of

    if has_checkpoint(checkpoints_of(run)):
        return run
    if all((run.output / unit.name / CONFIG_FILE).is_file() for unit in run.units):
        return None
    return replace(run, resume=False)


@contextmanager
def _seen_signals() -> Iterator[Callable[[], bytes]]:
    """Yield a function that tells the numbers of the signals that came; it handles none."""
    reader, writer = os.pipe()
    for end in (reader, writer):
        os.set_blocking(end, False)
    previous = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    try:
        yield lambda: os.read(reader, 1) if select.select([reader], [], [], 0)[0] else b""
    finally:
        signal.set_wakeup_fd(previous)
        os.close(reader)
        os.close(writer)


def _trained(run: TrainConfig) -> tuple[Sequence[UnitResult], bytes]:
    """Train and show how it went; with the numbers of the signals that came."""
    from lora_runtime.training.trainer import train as train_run

    with _seen_signals() as seen:
        results = train_run(run, Terminal())
        signals = seen()
    if results:
        show_table(
            ("adapter", "status", "updates", *LOSSES, "folder or error"),
            map(_row, results),
        )
    return results, signals


LOSSES = ("loss", "held-out loss", "best held-out loss")


def _row(result: UnitResult) -> list[str]:
    is_stopped = result.status.value == "running"
    losses = (result.loss, result.held_out_loss, result.best.loss if result.best else None)
    return [
        result.name,
        "stopped" if is_stopped else result.status.value,
        f"{len(result.records)}/{result.num_steps}",
        *("" if loss is None else f"{loss:.4f}" for loss in losses),
        result.error or str(result.folder or result.note or "continue with --resume"),
    ]


ESTIMATES = (
    "adapter", "parameters", "targets", "updates", "tokens", "weights", "gradients", "optimizer",
    "activations", "time",
)  # fmt: skip


def show_dry_run(config: TrainConfig, console: Console) -> None:
    """Measure a run and print what each unit and all of them together would take."""
    from lora_runtime.training.dry_run import dry_run
    from lora_runtime.training.report import show_data

    with console.status("loading the base") as status:
        found = dry_run(config, on_progress=status.update)
    show_data(console, found.data)
    rows = [[unit.name, *_cells(unit)] for unit in found.units]
    if len(found.units) > 1:
        rows.append(["all at once", *_cells(found.together)])
    show_table(ESTIMATES, rows, console=console)
    total = found.base_bytes + found.together.total_bytes
    console.print(
        f"The base takes {decimal(found.base_bytes)}, the whole run {decimal(total)}. Activations "
        "are those of the longest examples; times go by one micro-step, and a sweep's losers "
        "count as if they went on. Memory is that of tensors; a process takes more. Nothing was "
        "trained or written.",
        soft_wrap=True,
    )


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

"""`loramux train`: adapters on the very base that will serve them."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from lora_runtime.config import BaseConfig
from lora_runtime.training.config import TrainConfig, UnitConfig, Variant

if TYPE_CHECKING:
    from lora_runtime.training.report import UnitResult

RUN_FLAGS = ("output", "max_seq_len", "seed", "resume")
DEFAULTS = {
    field.name: field.default for kind in (TrainConfig, UnitConfig) for field in fields(kind)
}


def _option(name: str, text: str) -> Any:
    """A flag that shows the default of the setting `name`."""
    return typer.Option(help=f"{text} Default: {DEFAULTS[name]}.")


def train(
    config: Annotated[
        Path | None,
        typer.Argument(help="YAML file of a run; only --output and --resume go beside it."),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(help="JSONL of chat `messages`, or of `prompt` and `completion`."),
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Folder for adapter and report.")] = None,
    name: Annotated[
        str | None, typer.Option(help="The adapter's folder below it. Default: adapter.")
    ] = None,
    base: Annotated[str | None, typer.Option(help="As in `loramux serve`.")] = None,
    variant: Annotated[Variant | None, _option("variant", "How it is scaled.")] = None,
    rank: Annotated[int | None, _option("rank", "Rank of the update.")] = None,
    alpha: Annotated[float | None, _option("alpha", "Scale of the update.")] = None,
    learning_rate: Annotated[float | None, _option("learning_rate", "At its peak.")] = None,
    num_epochs: Annotated[int | None, _option("num_epochs", "Passes over the data.")] = None,
    max_steps: Annotated[int | None, typer.Option(help="Updates; overrides epochs.")] = None,
    micro_batch_size: Annotated[
        int | None, _option("micro_batch_size", "Examples in one forward.")
    ] = None,
    gradient_accumulation: Annotated[
        int | None, _option("gradient_accumulation", "Forwards in one update.")
    ] = None,
    max_seq_len: Annotated[int | None, _option("max_seq_len", "Longer ones are cut.")] = None,
    seed: Annotated[int | None, typer.Option(help="Order of the data, start of weights.")] = None,
    resume: Annotated[
        bool | None, typer.Option("--resume", help="Continue from the newest checkpoint.")
    ] = None,
) -> None:
    """Train adapters on the quantized base; Ctrl-C saves a checkpoint and stops.

    One adapter by flags (--data and --output), or any number at once by a YAML file. Written in
    PEFT's format, ready for `loramux adapters load`.
    """
    flags = {key: value for key, value in locals().items() if value is not None}
    flags.pop("config", None)
    run = _from_flags(flags) if config is None else _from_file(config, flags)
    from lora_runtime.training.trainer import train as train_run

    results = train_run(run, Console())
    Console(markup=False).print(_table(results))
    if any(result.error for result in results):
        raise typer.Exit(1)


def _from_file(file: Path, flags: dict[str, Any]) -> TrainConfig:
    if others := flags.keys() - {"output", "resume"}:
        flag = min(others).replace("_", "-")
        raise typer.BadParameter(f"--{flag} cannot stand beside a YAML file; set it there")
    return replace(TrainConfig.from_yaml(file), **flags)


def _from_flags(flags: dict[str, Any]) -> TrainConfig:
    for required in ("data", "output"):
        if required not in flags:
            raise typer.BadParameter(f"give --{required}, or a YAML file")
    run = {key: flags.pop(key) for key in RUN_FLAGS if key in flags}
    if "base" in flags:
        run["base"] = BaseConfig(model=flags.pop("base"))
    return TrainConfig(units=(UnitConfig(**{"name": "adapter", **flags}),), **run)


def _table(results: list[UnitResult]) -> Table:
    table = Table("adapter", "status", "updates", "last loss", "folder or error")
    for result in results:
        loss = f"{result.records[-1].loss:.4f}" if result.records else ""
        updates = f"{len(result.records)}/{result.num_steps}"
        end = result.error or str(result.folder or "continue with --resume")
        table.add_row(result.name, result.status.value, updates, loss, end)
    return table

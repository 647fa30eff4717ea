"""`loramux train`: adapters on the very base that will serve them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from lora_runtime.config import BaseConfig
from lora_runtime.terminal import Terminal
from lora_runtime.training.config import SweepValue, TrainConfig, UnitConfig
from server.cli import deploy as deploying
from server.cli import train_flags as flag

if TYPE_CHECKING:
    from lora_runtime.training.dry_run import DryRun, Estimate
    from lora_runtime.training.report import UnitResult

RUN_FLAGS = (
    "output", "max_seq_len", "seed", "activation_checkpointing", "tensorboard", "resume",
)  # fmt: skip

BASE_FLAGS = {
    "base": "model", "quantization": "quantization", "dtype": "dtype", "device": "device",
    "dequantized_cache": "dequantized_cache",
}  # fmt: skip
"""Flag → field of BaseConfig."""

ACTION_FLAGS = ("dry_run", "deploy", "deploy_name", "sample")
"""What is done with a run."""


def train(
    config: flag.ConfigFile = None,
    unit: flag.Units = None,
    data: flag.Data = None,
    column: flag.Column = None,
    instructions: flag.Instructions = None,
    truncation: flag.TruncationName = None,
    eval_data: flag.EvalData = None,
    eval_fraction: flag.EvalFraction = None,
    output: flag.Output = None,
    name: flag.Name = None,
    base: flag.Base = None,
    quantization: flag.QuantizationName = None,
    dtype: flag.Dtype = None,
    device: flag.Device = None,
    dequantized_cache: flag.DequantizedCache = None,
    variant: flag.VariantName = None,
    rank: flag.Rank = None,
    alpha: flag.Alpha = None,
    dpo_beta: flag.DpoBeta = None,
    label_smoothing: flag.LabelSmoothing = None,
    dpo_sft_weight: flag.DpoSftWeight = None,
    learning_rate: flag.LearningRate = None,
    num_epochs: flag.NumEpochs = None,
    max_steps: flag.MaxSteps = None,
    micro_batch_size: flag.MicroBatchSize = None,
    max_tokens_per_batch: flag.MaxTokensPerBatch = None,
    gradient_accumulation: flag.GradientAccumulation = None,
    optimizer: flag.Optimizer = None,
    max_seq_len: flag.MaxSeqLen = None,
    seed: flag.Seed = None,
    eval_interval: flag.EvalInterval = None,
    patience: flag.Patience = None,
    sweep: flag.Sweep = None,
    activation_checkpointing: flag.ActivationCheckpointing = None,
    tensorboard: flag.Tensorboard = None,
    dry_run: flag.DryRun = False,
    resume: flag.Resume = None,
    deploy: flag.Deploy = None,
    deploy_name: flag.DeployName = None,
    sample: flag.SamplePrompt = None,
) -> None:
    """Train adapters on the quantized base; Ctrl-C saves a checkpoint and stops.

    One adapter by flags (--data and --output), or any number at once by --unit or a YAML file.
    Settings come from the file, then LORAMUX_<FLAG> in the environment, then these flags.
    Written in PEFT's format, ready for `loramux adapters load`. Several devices share an update by
    `torchrun --nproc-per-node N -m server train …`.
    """
    run = _run_of(locals())
    if dry_run:
        return show_dry_run(run, Terminal())
    _train(run, deploy, deploy_name, sample)


def _run_of(arguments: dict[str, Any]) -> TrainConfig:
    """The run that `train` was given, by a file or by flags."""
    others = ("config", *ACTION_FLAGS)
    flags = {k: v for k, v in arguments.items() if v is not None and k not in others}
    file = arguments["config"]
    return _from_flags(flags) if file is None else _from_file(file, flags)


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


def _from_file(file: Path, flags: dict[str, Any]) -> TrainConfig:
    if "unit" in flags:
        raise typer.BadParameter("--unit cannot stand beside a YAML file; write its unit there")
    config = TrainConfig.from_yaml(file)
    run, base, unit = _parted(flags)
    units = tuple(replace(each, **unit) for each in config.units)
    return replace(config, units=units, base=replace(config.base, **base), **run)


def _from_flags(flags: dict[str, Any]) -> TrainConfig:
    own = [TrainConfig.unit_fields(text) for text in flags.pop("unit", ())] or [{}]
    for required, is_given in [
        ("data", "data" in flags or all("data" in values for values in own)),
        ("output", "output" in flags),
    ]:
        if not is_given:
            raise typer.BadParameter(f"give --{required}, or a YAML file")
    run, base, unit = _parted(flags)
    units = (UnitConfig(**{"name": "adapter", **unit, **values}) for values in own)
    return TrainConfig(units=tuple(units), base=BaseConfig(**base), **run)


def _parted(flags: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """What flags say of the run, of its base and of every unit."""
    run = {key: flags.pop(key) for key in RUN_FLAGS if key in flags}
    base = {name: flags.pop(key) for key, name in BASE_FLAGS.items() if key in flags}
    if "column" in flags:
        flags["columns"] = _mapping("column", map(_column, flags.pop("column")))
    if "sweep" in flags:
        flags["sweep"] = _mapping("sweep", map(_sweep, flags["sweep"]))
    return run, base, flags


def _mapping(flag_name: str, pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise typer.BadParameter(f"--{flag_name} gives {key} twice; give it once")
        found[key] = value
    return found


def _column(text: str) -> tuple[str, str]:
    """`prompt=question` as key and the file's name for it."""
    key, found, column = text.partition("=")
    if not found:
        raise typer.BadParameter(f"--column {text} names no column; write --column KEY=NAME")
    return key.strip(), column


def _sweep(text: str) -> tuple[str, tuple[SweepValue, ...]]:
    """`learning_rate=1e-4,3e-4` as field and values."""
    field, found, values = text.partition("=")
    if not found:
        raise typer.BadParameter(f"--sweep {text} has no values; write --sweep FIELD=A,B")
    return field.strip().replace("-", "_"), tuple(_number(value) for value in values.split(","))


def _number(text: str) -> SweepValue:
    """A number if it is one, else the text."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text.strip()


def _table(results: list[UnitResult]) -> Table:
    headings = ("loss", "held-out loss", "best held-out loss")
    table = Table("adapter", "status", "updates", *headings, "folder or error")
    for result in results:
        updates = f"{len(result.records)}/{result.num_steps}"
        found = (result.loss, result.held_out_loss, result.best.loss if result.best else None)
        losses = ["" if loss is None else f"{loss:.4f}" for loss in found]
        end = result.error or str(result.folder or result.note or "continue with --resume")
        table.add_row(result.name, result.status.value, updates, *losses, end)
    return table


def show_dry_run(config: TrainConfig, console: Console) -> None:
    """Measure a run and print what each unit and all of them together would take."""
    from lora_runtime.training.dry_run import dry_run
    from lora_runtime.training.report import show_data

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

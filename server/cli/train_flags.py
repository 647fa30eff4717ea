"""The flags of `loramux train`, with the defaults of the settings they stand for."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import typer

from lora_runtime.config import DtypeName, Quantization
from lora_runtime.training.config import (
    InstructionStyle,
    OptimizerName,
    TrainConfig,
    Truncation,
    UnitConfig,
    Variant,
)
from server.config import PREFIX, ServerConfig

DEFAULTS = {
    field.name: field.default for kind in (TrainConfig, UnitConfig) for field in fields(kind)
}


VARIABLES = set[str]()
"""Names of the environment's variables that stand for flags, without LORAMUX_."""


def _flag(name: str, text: str, *flags: str, **options: Any) -> Any:
    """A flag of the setting `name`; the variable LORAMUX_<NAME> stands for it."""
    VARIABLES.add(name.upper())
    variable = PREFIX + name.upper()
    return typer.Option(*flags, help=text, envvar=variable, show_envvar=False, **options)


def _option(name: str, text: str) -> Any:
    """A flag that shows the default of the setting `name`."""
    return _flag(name, f"{text} Default: {DEFAULTS[name]}.")


def _switch(name: str, text: str) -> Any:
    return _flag(name.replace("-", "_"), text, f"--{name}")


def _of_base(name: str) -> Any:
    """A flag of the server that holds here too."""
    return _flag(
        name, f"As in `loramux serve`. Default: {ServerConfig.model_fields[name].default}."
    )


ConfigFile = Annotated[
    Path | None,
    typer.Argument(
        help="YAML file; flags and LORAMUX_<FLAG> go before it, of an adapter in all of its units."
    ),
]
Data = Annotated[
    Path | None,
    _flag(
        "data",
        "JSONL, JSON, CSV or Parquet of chat `messages` or `conversations`, of `prompt` and "
        "`completion`, of `instruction`, `input` and `output`, of `text`, or of preferences: "
        "`prompt`, `chosen` and `rejected`, learned by DPO.",
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
Column = Annotated[
    list[str] | None,
    _flag("column", "What the data calls a key, as in prompt=question.", metavar="KEY=NAME"),
]
Instructions = Annotated[
    InstructionStyle | None, _option("instructions", "How `instruction` data is asked.")
]
TruncationName = Annotated[
    Truncation | None, _option("truncation", "What too long examples lose, or that they fail.")
]
EvalData = Annotated[Path | None, _flag("eval_data", "Held-out examples in the same format.")]
EvalFraction = Annotated[float | None, _option("eval_fraction", "Share of the data held out.")]
Output = Annotated[Path | None, _flag("output", "Folder for adapter and report.")]
Name = Annotated[str | None, _flag("name", "The adapter's folder below it. Default: adapter.")]
Base = Annotated[str | None, _of_base("base")]
QuantizationName = Annotated[Quantization | None, _of_base("quantization")]
Dtype = Annotated[DtypeName | None, _of_base("dtype")]
Device = Annotated[str | None, _of_base("device")]
DequantizedCache = Annotated[bool | None, _of_base("dequantized_cache")]
VariantName = Annotated[Variant | None, _option("variant", "How it is scaled.")]
Rank = Annotated[int | None, _option("rank", "Rank of the update.")]
Alpha = Annotated[float | None, _option("alpha", "Scale of the update.")]
DpoBeta = Annotated[
    float | None, _option("dpo_beta", "Preferences: how dear it is to leave the base.")
]
LabelSmoothing = Annotated[
    float | None, _option("label_smoothing", "Preferences: the share taken to be wrong.")
]
DpoSftWeight = Annotated[
    float | None, _option("dpo_sft_weight", "Preferences: what the chosen answer's loss adds.")
]
LearningRate = Annotated[float | None, _option("learning_rate", "At its peak.")]
NumEpochs = Annotated[int | None, _option("num_epochs", "Passes over the data.")]
MaxSteps = Annotated[int | None, _flag("max_steps", "Updates; overrides epochs.")]
MicroBatchSize = Annotated[
    int | None, _option("micro_batch_size", "Examples (or pairs) in one forward.")
]
MaxTokensPerBatch = Annotated[
    int | None,
    _flag("max_tokens_per_batch", "Form forwards by tokens; an update takes as many examples."),
]
GradientAccumulation = Annotated[
    int | None, _option("gradient_accumulation", "Forwards in one update.")
]
Optimizer = Annotated[
    OptimizerName | None, _option("optimizer", "8-bit moments, or paged ones on CUDA.")
]
MaxSeqLen = Annotated[int | None, _option("max_seq_len", "Longer ones are cut.")]
Seed = Annotated[int | None, _flag("seed", "Order of the data, start of weights.")]
EvalInterval = Annotated[int | None, _option("eval_interval", "Updates between evaluations.")]
Patience = Annotated[int | None, _flag("patience", "Evaluations without a lower loss to stop at.")]
Sweep = Annotated[
    list[str] | None,
    _flag(
        "sweep",
        "Train one adapter per value at once; losers stop early, the best gets the name.",
        metavar="FIELD=A,B,…",
    ),
]
ActivationCheckpointing = Annotated[
    bool | None, _switch("activation-checkpointing", "Less memory, about a third more time.")
]
Tensorboard = Annotated[bool | None, _switch("tensorboard", "Also write TensorBoard curves.")]
DryRun = Annotated[
    bool, _switch("dry-run", "Measure one micro-step, print memory and time, train nothing.")
]
Resume = Annotated[bool | None, _switch("resume", "Continue from the newest checkpoint.")]
Deploy = Annotated[
    str | None,
    typer.Option(
        metavar="HOST:PORT",
        help="Upload what is finished to this server, in the place of what its names hold there.",
    ),
]
DeployName = Annotated[
    str | None, typer.Option(help="Its name on that server. Default: the unit's own.")
]
SamplePrompt = Annotated[
    str | None,
    typer.Option(help="Asked of base and adapter there. Default: the first prompt of the data."),
]

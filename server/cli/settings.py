"""The settings that other commands share with `serve`: one file, one environment, one order."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from lora_runtime.config import DtypeName, EngineConfig, Quantization
from server.config import PREFIX, ServerConfig, load_config


def setting(name: str, *flags: str) -> Any:
    """An option whose help and default are those of the setting `name`."""
    field = ServerConfig.model_fields[name]
    default = field.default or "none"
    return typer.Option(*flags, help=f"{field.description} Default: {default}.")


ConfigFile = Annotated[
    Path | None, typer.Option(envvar=f"{PREFIX}CONFIG", help="YAML file of settings.")
]
BaseName = Annotated[str | None, setting("base")]
Format = Annotated[Quantization | None, setting("quantization")]
ComputeDtype = Annotated[DtypeName | None, setting("dtype")]
Device = Annotated[str | None, setting("device")]


def engine_settings(config: Path | None, **flags: str | None) -> EngineConfig:
    """The settings a server would take from the file, the environment and these flags, None for
    those not given. Raises ConfigError.
    """
    return load_config(config, flags).to_engine_config()

"""`loramux serve`: a base and its adapters over gRPC, until a signal ends it."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Annotated, Any

import typer
import yaml

from lora_runtime.terminal import write
from loramux.server.cli.settings import ConfigFile, with_flags
from loramux.server.config import SETTINGS, ServerConfig, load_config
from loramux.server.logs import setup_logging


@with_flags(SETTINGS.values())
def serve(
    config: ConfigFile = None,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="Show the settings and end.")
    ] = False,
    **flags: Any,
) -> None:
    """Serve the base and its adapters over gRPC, with metrics and probes over HTTP.

    Settings come from the YAML file, then LORAMUX_<SETTING> in the environment, then these flags.
    Sizes are bytes or have a unit, as 512MiB or 2GB. SIGTERM drains; a second one ends at once.
    """
    with _keeping_all_objects():
        settings = load_config(config, flags)
        if print_config:
            write(yaml.safe_dump(_by_key(settings), sort_keys=False))
            return
        setup_logging(level=settings.log_level, log_format=settings.log_format)
        from loramux.server.app import run

    run(settings)


@contextmanager
def _keeping_all_objects() -> Iterator[None]:
    """For imports, whose half a million objects stay: no collection of garbage looks through them
    while they come, which is a tenth of a start, nor afterwards.
    """
    gc.disable()
    try:
        yield
        gc.freeze()
    finally:
        gc.enable()


def _by_key(settings: ServerConfig) -> dict[str, Any]:
    """The settings as a YAML file has them."""
    values = asdict(settings)
    found = {
        key: (values[entry.part] if entry.part else values)[entry.name]
        for key, entry in SETTINGS.items()
    }
    return {key: _plain(value) for key, value in found.items()}


def _plain(value: object) -> object:
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, tuple):
        return [_plain(each) for each in value]
    return value if isinstance(value, bool | int | float | None) else str(value)

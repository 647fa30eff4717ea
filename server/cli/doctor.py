"""`loramux doctor`: what this installation has, on one page."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from typing import Any

from rich.filesize import decimal
from rich.table import Table

from lora_runtime.config import BaseConfig
from lora_runtime.errors import ConfigError
from lora_runtime.terminal import Terminal
from server.cli.settings import BASE_FLAGS, ConfigFile, with_flags
from server.config import load_config
from server.versions import PACKAGES, installed_versions


@with_flags(BASE_FLAGS)
def doctor(
    config: ConfigFile = None,
    **flags: Any,
) -> None:
    """Show versions, device, kernel backend, memory, and whether the base is on this machine.

    Settings are those that `serve` would take. What the GPU path lacks is listed below, with what
    to change.
    """
    from lora_runtime.kernels.gpu_needs import gpu_needs

    chosen = load_config(config, flags).base
    needs = list(gpu_needs())
    table = Table("what", "found", title="loramux doctor")
    for what, found in (*_versions(), *_machine(), *_runtime(chosen)):
        table.add_row(what, found)
    table.add_section()
    for need in needs:
        table.add_row(need.name, need.found)
    console = Terminal(markup=False, soft_wrap=True, highlight=False)
    console.print(table)
    missing = [need for need in needs if need.advice]
    console.print(
        "What the GPU path lacks here (a CPU needs none of it):"
        if missing
        else "A GPU can be used."
    )
    for need in missing:
        console.print(f"- {need.name}: {need.found}. {need.advice}")


def _versions() -> Iterator[tuple[str, str]]:
    yield "python", platform.python_version()
    found = installed_versions()
    for package in PACKAGES:
        yield package, found.get(package, "not installed")


def _machine() -> Iterator[tuple[str, str]]:
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    yield "processors", str(os.cpu_count())
    yield "memory", decimal(memory_bytes)


def _runtime(chosen: BaseConfig) -> Iterator[tuple[str, str]]:
    import torch

    from lora_runtime import kernels
    from lora_runtime.base.device import resolve_device, resolve_dtype

    device = resolve_device(chosen.device)
    yield "device", str(device)
    yield "dtype", str(resolve_dtype(chosen.dtype, device)).removeprefix("torch.")
    yield "quantization", chosen.quantization
    yield "threads", str(torch.get_num_threads())
    yield "kernel backend", kernels.BACKEND
    yield "base", _base(chosen.model)


def _base(name: str) -> str:
    from lora_runtime.base.catalog import cached_base, check_base_name

    if folder := cached_base(name):
        return f"{name}: {folder}"
    try:
        check_base_name(name)
    except ConfigError as error:
        return f"{name}: {error}"
    return f"{name}: not in the cache yet; `serve` will fetch or convert it"

"""`loramux doctor`: what this installation has, on one page."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Iterator
from typing import Annotated

import typer
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

PACKAGES = (
    "loramux",
    "torch",
    "transformers",
    "bitsandbytes",
    "safetensors",
    "grpcio",
    "protobuf",
)


def doctor(
    base: Annotated[str, typer.Option(help="The base to look for.")] = "smollm2-135m",
) -> None:
    """Show versions, device, kernel backend, memory, and whether the base is on this machine.

    What the GPU path lacks is listed below, with what to change.
    """
    from lora_runtime.kernels.gpu_needs import gpu_needs

    needs = list(gpu_needs())
    table = Table("what", "found", title="loramux doctor")
    for what, found in (*_versions(), *_machine(), *_runtime(), ("base", _base(base))):
        table.add_row(what, found)
    table.add_section()
    for need in needs:
        table.add_row(need.name, need.found)
    console = Console(markup=False, soft_wrap=True, highlight=False)
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
    for package in PACKAGES:
        try:
            yield package, importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            yield package, "not installed"


def _machine() -> Iterator[tuple[str, str]]:
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    yield "processors", str(os.cpu_count())
    yield "memory", decimal(memory_bytes)


def _runtime() -> Iterator[tuple[str, str]]:
    import torch

    from lora_runtime import kernels
    from lora_runtime.base.device import resolve_device, resolve_dtype

    device = resolve_device("auto")
    yield "device", str(device)
    yield "dtype", str(resolve_dtype("auto", device)).removeprefix("torch.")
    yield "threads", str(torch.get_num_threads())
    yield "kernel backend", kernels.BACKEND


def _base(name: str) -> str:
    from lora_runtime.base.catalog import cached_base

    folder = cached_base(name)
    return f"{name}: {folder}" if folder else f"{name}: not here yet; `serve` will fetch it"

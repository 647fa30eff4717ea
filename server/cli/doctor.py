"""`loramux doctor`: what this installation has, on one page."""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Iterator
from typing import Annotated, Any

import typer
from rich.filesize import decimal
from rich.table import Table

from lora_runtime import threads
from lora_runtime.config import BaseConfig
from lora_runtime.errors import ConfigError, LoramuxError
from lora_runtime.terminal import Terminal
from loramux.server.cli.settings import BASE_FLAGS, ConfigFile, with_flags
from loramux.server.config import load_config
from loramux.server.versions import PACKAGES, installed_versions


@with_flags(BASE_FLAGS)
def doctor(
    config: ConfigFile = None,
    check: Annotated[
        bool,
        typer.Option("--check", help="Run the base as serve does before it quantises it."),
    ] = False,
    **flags: Any,
) -> None:
    """Show versions, device, kernel backend, memory, and whether the base would be served.

    Settings are those that `serve` would take. Of a base on this machine the config is looked at,
    and with --check its weights: whether it gives its own logits here. What the GPU path lacks is
    listed below, with what to change.
    """
    from lora_runtime.kernels.gpu_needs import gpu_needs

    chosen = load_config(config, flags).base
    needs = list(gpu_needs())
    table = Table("what", "found", title="loramux doctor")
    for what, found in (*_versions(), *_machine(), *_runtime(chosen), *_base(chosen, check)):
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
    yield "processors", _processors()
    yield "memory", decimal(memory_bytes)


def _threads(number: int, num_cores: int) -> str:
    if number == num_cores:
        return f"{number}, one for every core that may be used; OMP_NUM_THREADS sets fewer"
    return f"{number} for {num_cores} cores, by OMP_NUM_THREADS"


def _processors() -> str:
    """How many there are, and what keeps this process from some of them."""
    limits, own = [], threads.usable_processors()
    if own is not None and len(own) != os.cpu_count():
        limits.append(f"{len(own)} of them for this process")
    if (quota := threads.quota()) != math.inf:
        limits.append(f"a quota of {quota:g}")
    return ", ".join([str(os.cpu_count()), *limits])


def _runtime(chosen: BaseConfig) -> Iterator[tuple[str, str]]:
    import torch

    from lora_runtime import kernels
    from lora_runtime.base.device import dtype_name, resolve_device, resolve_dtype

    device = resolve_device(chosen.device)
    yield "device", str(device)
    yield "dtype", dtype_name(resolve_dtype(chosen.dtype, device))
    yield "quantization", chosen.quantization
    yield "threads", _threads(torch.get_num_threads(), threads.num_usable_cores())
    missing = f": {kernels.LIBRARY_MISSING}" if kernels.BACKEND == "torch" else ""
    yield "kernel backend", f"{kernels.BACKEND}{missing}"


def _base(chosen: BaseConfig, is_checked: bool) -> Iterator[tuple[str, str]]:
    from lora_runtime.base.catalog import cached_base, check_base_name

    name = chosen.model
    if folder := cached_base(name):
        yield "base", f"{name}: {folder}"
        yield from _judgement(chosen, is_checked)
        return
    try:
        check_base_name(name)
    except ConfigError as error:
        yield "base", f"{name}: {error}"
    else:
        yield "base", f"{name}: not in the cache yet; `serve` will fetch or convert it"
        if is_checked:
            yield "served", "not checked: it is not on this machine"


def _judgement(chosen: BaseConfig, is_checked: bool) -> Iterator[tuple[str, str]]:
    """Whether `serve` would take a base on this machine, and how much memory its rows take."""
    from lora_runtime.base.catalog import resolve_base
    from lora_runtime.base.device import resolve_device, resolve_dtype
    from lora_runtime.base.loader import judge_base
    from lora_runtime.base.outline import outline

    try:
        base = resolve_base(chosen.model)
        if is_checked:
            judged = judge_base(chosen, base)
            yield "served", f"yes: {judged.model_type} gave its own logits here, unquantised"
            yield "a token takes", f"{judged.kv_bytes_per_token:,} bytes of keys and values"
            state_bytes = judged.state_bytes
        else:
            dtype = resolve_dtype(chosen.dtype, resolve_device(chosen.device))
            found = outline(base.folder, dtype)
            state_bytes = found.state_bytes
            yield (
                "served",
                f"nothing in the config speaks against {found.model_type}; whether it gives its "
                "own logits here, --check says",
            )
    except LoramuxError as error:
        yield "served", f"no: {error}"
        return
    if state_bytes:
        yield "a row takes", f"{state_bytes:,} bytes of recurrent state, as each snapshot does"

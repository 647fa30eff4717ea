"""What every result carries: when, on what, with which versions, and this machine's ceilings."""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from lora_runtime.kernels import BACKEND

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "triton", "transformers", "peft", "bitsandbytes")


def asked(args: argparse.Namespace) -> dict[str, object]:
    """What a benchmark was asked for: its flags but `--out`, the folder of its result."""
    return {name: value for name, value in vars(args).items() if name != "out"}


def facts() -> dict[str, object]:
    """Date, commit, CPU and versions of this run."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "cpu": _cpu_name(),
        "threads": torch.get_num_threads(),
        "torch_capability": torch.backends.cpu.get_cpu_capability(),
        "kernel_backend": BACKEND,
        "python": platform.python_version(),
        **{package: version_of(package) for package in PACKAGES},
    }


def version_of(package: str) -> str:
    """Of an installed package; "unknown" where there is none, or its files without metadata."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"


def _commit() -> str:
    """Of the checkout; from LORAMUX_COMMIT where the files came without git."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    try:
        found = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    except FileNotFoundError:
        found = ""
    return found or os.environ.get("LORAMUX_COMMIT", "unknown")


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":")[1].strip() for line in lines if "model name" in line), "")


def best_seconds(action: Callable[[], object], repeats: int) -> float:
    """The fastest of `repeats` runs: ceilings are about the machine, not about its noise."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        action()
        times.append(time.perf_counter() - start)
    return min(times)


def percentile(values: Iterable[float], percent: int) -> float:
    """The least of some values that so many percent of them do not exceed."""
    ordered = sorted(values)
    return ordered[-(-percent * len(ordered) // 100) - 1]


def read_bandwidth() -> float:
    """Bytes a second that all threads read from memory, from a sum over 512 MiB."""
    values = torch.ones(128 << 20)
    return values.nbytes / best_seconds(values.sum, 5)


def gemm_rate(dtype: torch.dtype) -> float:
    """Multiply-adds a second of a large matrix product."""
    a, b = torch.randn(1024, 1024).to(dtype), torch.randn(1024, 1024).to(dtype)
    return 1024**3 / best_seconds(lambda: a @ b, 5)


def result_file(name: str, date: object, folder: Path = RESULTS) -> Path:
    """Where the result of that date is kept."""
    stamp = str(date).replace(":", "").replace("+0000", "Z")
    return folder / f"{name}-{stamp}.json"


def keep(result: Mapping[str, object], path: Path) -> None:
    """Write or replace a file whole: whoever reads it, or stops this, finds no half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(result, indent=2) + "\n")
    os.replace(unfinished, path)


def save(name: str, result: Mapping[str, object], folder: Path = RESULTS) -> Path:
    """Print `result` as one JSON line and keep it in `folder`."""
    path = result_file(name, result["date"], folder)
    keep(result, path)
    print(json.dumps(result))
    return path

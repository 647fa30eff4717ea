"""A GPU that is not there: the product's launchers run, and say what Triton would compile.

Triton asks its driver for the card and compiles on the host. So with a driver that names a card and
launches nothing, ops, engines and training run on tensors of the CPU, or of no memory at all
("meta"), as a run on that card would be driven: `launches_on` notes every launch with the very
specialisation Triton would compile for it, and `compiled` compiles one of them. What a kernel would
have written is zero.

Only where TRITON_INTERPRET is not set: the kernels are Triton's own then.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import triton
from torch.overrides import TorchFunctionMode
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction, driver

from lora_runtime.kernels import gpu

KB = 1024


@dataclass(frozen=True)
class Card:
    """What a kind of GPU offers. Source: CUDA C++ Programming Guide, «Compute Capabilities»."""

    arch: int
    """Compute capability, times ten."""
    block_shared_bytes: int
    """Shared memory that one block may ask for."""
    shared_bytes: int
    """Of a multiprocessor; a block takes 1 KB more of it than it asks for."""
    threads: int
    """Of a multiprocessor."""
    registers: int = 65536
    """Of a multiprocessor."""
    blocks: int = 32
    """Of a multiprocessor."""
    multiprocessors: int = 132


CARDS = {
    card.arch: card
    for card in (
        Card(80, 163 * KB, 164 * KB, 2048, multiprocessors=108),
        Card(89, 99 * KB, 100 * KB, 1536, blocks=24, multiprocessors=128),
        Card(90, 227 * KB, 228 * KB, 2048),
        Card(120, 99 * KB, 100 * KB, 1536, blocks=24, multiprocessors=170),
    )
}
"""8.6 has what 8.9 has, but for 16 blocks of a multiprocessor."""


class Driver:
    """What Triton asks of a driver before it compiles. A device's number is its architecture, so
    that each has kernels of its own.
    """

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


@dataclass(frozen=True)
class Launch:
    """One launch: how many programs of what. `specialization` is Triton's own JSON of a compile:
    types, which integers are 1 or multiples of 16, constants, warps, stages and card.
    """

    kernel: str
    grid: tuple[int, ...]
    specialization: str

    @property
    def num_programs(self) -> int:
        return math.prod(self.grid)

    @property
    def arguments(self) -> dict[str, Any]:
        """Name → value of what is constant, type of what is not."""
        data = json.loads(self.specialization)
        names = list(data["signature"])
        keys = [names[place] for (place,) in data["constant_keys"]]
        return data["signature"] | dict(zip(keys, data["constant_vals"], strict=True))

    @property
    def options(self) -> dict[str, Any]:
        return json.loads(self.specialization)["options"]

    @property
    def arch(self) -> int:
        return json.loads(self.specialization)["target"]["arch"]

    def __str__(self) -> str:
        options = ", ".join(f"{name}={self.options[name]}" for name in ("num_warps", "num_stages"))
        values = [f"{name}={value}" for name, value in self.arguments.items()]
        return f"{self.kernel}({', '.join(values)}; {options})"


class _ZeroFilled(TorchFunctionMode):
    """What is allocated for a kernel to fill holds zeros, and on a card without memory nothing."""

    ZEROS = {
        torch.empty: torch.zeros,
        torch.empty_like: torch.zeros_like,
        torch.Tensor.new_empty: torch.Tensor.new_zeros,
    }

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return self.ZEROS.get(func, func)(*args, **(kwargs or {}))


@contextlib.contextmanager
def launches_on(card: Card) -> Iterator[list[Launch]]:
    """Within, every launch of the Triton backend on tensors of the CPU or without memory is noted
    in the list and not done.
    """
    found: list[Launch] = []
    grids: list[tuple[int, ...]] = []
    run = JITFunction.run

    def noting_the_grid(self, *args, grid, warmup, **options):
        grids.append(grid)
        return run(self, *args, grid=grid, warmup=True, **options)

    def note(*, fn, compile, **_) -> bool:
        found.append(Launch(fn.name, grids[-1], compile["specialization_data"]))
        return True  # as if it were compiled already

    properties = SimpleNamespace(
        major=card.arch // 10, minor=card.arch % 10, name=f"sm_{card.arch}",
        multi_processor_count=card.multiprocessors, total_memory=80 << 30,
        shared_memory_per_block_optin=card.block_shared_bytes,
        shared_memory_per_multiprocessor=card.shared_bytes,
    )  # fmt: skip
    driver.set_active(Driver(card.arch))
    with (
        mock.patch.object(JITFunction, "run", noting_the_grid),
        mock.patch.object(gpu, "DEVICES", gpu.DEVICES | {"cpu", "meta"}),
        mock.patch.object(torch.cuda, "get_device_properties", lambda _=None: properties),
        mock.patch.object(
            torch.cuda, "get_device_capability", lambda _=None: divmod(card.arch, 10)
        ),
        knobs.runtime.scope(),
        _ZeroFilled(),
    ):
        knobs.runtime.jit_cache_hook = note
        yield found


def distinct(launches: list[Launch]) -> list[Launch]:
    """One launch of every specialisation, in order."""
    return list({launch.specialization: launch for launch in launches}.values())


@dataclass(frozen=True)
class Result:
    """What came of compiling a launch."""

    error: str | None = None
    shared_bytes: int = 0
    registers: int = 0
    stack_bytes: int = 0
    """A thread's: registers that were spilled."""

    def complaint(self, card: Card) -> str | None:
        """Why the card cannot run it as it should, if it cannot."""
        if self.error is not None:
            return self.error
        if self.shared_bytes > card.block_shared_bytes:
            return f"{self.shared_bytes:,} bytes of shared memory, over {card.block_shared_bytes:,}"
        return f"{self.stack_bytes:,} bytes of spills a thread" if self.stack_bytes else None


def kernel_of(launch: Launch) -> JITFunction:
    module, _, name = json.loads(launch.specialization)["name"].rpartition(".")
    return getattr(import_module(module), name)


def compiled(launch: Launch) -> Any:
    """Triton's CompiledKernel of a launch; `asm["cubin"]` is the card's machine code."""
    driver.set_active(Driver(launch.arch))
    return kernel_of(launch).preload(launch.specialization)


def tool(name: str, cubin: bytes, *options: str) -> str:
    """What `cuobjdump` or `nvdisasm`, which come with Triton, say of machine code."""
    path = getattr(knobs.nvidia, name).path
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [path, *options, file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _compile(launch: Launch) -> Result:
    try:
        kernel = compiled(launch)
    except Exception as error:
        return Result(error=f"{type(error).__name__}: {str(error).strip()[-300:]}")
    usage = tool("cuobjdump", kernel.asm["cubin"], "-res-usage")
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
    return Result(None, kernel.metadata.shared, int(registers), int(stack))


def result_of(launch: Launch, cache: Path) -> Result:
    """Compile a launch, or read what came of it: results lie in `cache` by the kernel's source, the
    specialisation and Triton's version.
    """
    parts = (triton.__version__, kernel_of(launch).cache_key, launch.specialization)
    path = cache / hashlib.sha256("\n".join(parts).encode()).hexdigest()
    if path.exists():
        return Result(**json.loads(path.read_text()))
    result = _compile(launch)
    fresh = path.with_suffix(".new")
    fresh.write_text(json.dumps(asdict(result)))
    fresh.rename(path)
    return result

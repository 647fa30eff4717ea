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
import triton.language as tl
from torch.fx.experimental import _config as symbolic
from torch.overrides import TorchFunctionMode
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction, driver

from lora_runtime.kernels import gpu
from lora_runtime.kernels.triton import attention as triton_attention
from lora_runtime.kernels.triton import quantised as triton_quantised

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
    """What Triton asks of a driver before it compiles. `device`: kernels are kept by its number, so
    every architecture needs one, and another where launches are only noted: a kernel that is
    there already would not be noted.
    """

    def __init__(self, arch: int, device: int) -> None:
        self.arch, self.device = arch, device

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


@dataclass(frozen=True)
class Launch:
    """One launch: how many programs of what. `specialization` is Triton's own JSON of a compile:
    types, which integers are 1 or multiples of 16, constants, warps, stages. `integers`:
    the values of the other integers, by name.
    """

    kernel: str
    arch: int
    grid: tuple[int, ...]
    specialization: str
    integers: dict[str, int]

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
    def constants(self) -> set[str]:
        data = json.loads(self.specialization)
        names = list(data["signature"])
        return {names[place] for (place,) in data["constant_keys"]}

    @property
    def kinds(self) -> dict[str, Any]:
        """`arguments` with warps and stages; a type says where its values are multiples of 16."""
        data, found = json.loads(self.specialization), self.arguments
        names = list(found)
        for (place,), facts in zip(data["attrs_keys"], data["attrs_vals"], strict=True):
            if facts:
                found[names[place]] = f"{found[names[place]]} of 16s"
        return found | {name: data["options"][name] for name in ("num_warps", "num_stages")}

    def __str__(self) -> str:
        values = [f"{name}={value}" for name, value in self.kinds.items()]
        return f"{self.kernel}({', '.join(values)})"


class _Unread(TorchFunctionMode):
    """What is allocated for a kernel to fill holds zeros, and on a card without memory nothing;
    tensors without memory count as equal, and their numbers as finite.
    """

    INSTEAD = {
        torch.empty: torch.zeros,
        torch.empty_like: torch.zeros_like,
        torch.Tensor.new_empty: torch.Tensor.new_zeros,
        torch.equal: lambda a, b: a.is_meta or b.is_meta or a.tolist() == b.tolist(),
        torch.aminmax: lambda x, **by: (0, 0) if x.is_meta and not by else torch.aminmax(x, **by),
    }

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return self.INSTEAD.get(func, func)(*args, **(kwargs or {}))


@contextlib.contextmanager
def launches_on(card: Card) -> Iterator[list[Launch]]:
    """Within, every launch of the Triton backend on tensors of the CPU or without memory is noted
    in the list and not done.
    """
    found: list[Launch] = []
    asked: list[tuple[tuple[int, ...], dict[str, int]]] = []
    run = JITFunction.run

    def noting(self, *args, grid, warmup, **options):
        names = zip(self.arg_names, args, strict=False)
        asked.append((grid, {name: value for name, value in names if isinstance(value, int)}))
        return run(self, *args, grid=grid, warmup=True, **options)

    def note(*, fn, compile, **_) -> bool:
        grid, integers = asked[-1]
        found.append(Launch(fn.name, card.arch, grid, compile["specialization_data"], integers))
        return True  # as if it were compiled already

    properties = SimpleNamespace(
        major=card.arch // 10, minor=card.arch % 10, name=f"sm_{card.arch}",
        multi_processor_count=card.multiprocessors, total_memory=80 << 30,
        shared_memory_per_block_optin=card.block_shared_bytes,
        shared_memory_per_multiprocessor=card.shared_bytes,
    )  # fmt: skip
    tiles = triton_quantised.tiles_that_fit(card.block_shared_bytes)
    driver.set_active(Driver(card.arch, -card.arch))
    with (
        mock.patch.object(triton_quantised, "max_tiles", lambda _: tiles),
        mock.patch.object(triton_attention, "has_warpgroups", lambda _: card.arch // 10 == 9),
        mock.patch.object(JITFunction, "run", noting),
        mock.patch.object(gpu, "DEVICES", gpu.DEVICES | {"cpu", "meta"}),
        mock.patch.object(torch.cuda, "get_device_properties", lambda _=None: properties),
        mock.patch.object(
            torch.cuda, "get_device_capability", lambda _=None: divmod(card.arch, 10)
        ),
        # Without memory it is not known how many segments a mixture's pairs have: all that can be.
        mock.patch.object(symbolic, "meta_nonzero_assume_all_nonzero", True),
        knobs.runtime.scope(),
        _Unread(),
    ):
        knobs.runtime.jit_cache_hook = note
        yield found


def distinct(launches: list[Launch]) -> list[Launch]:
    """The first launch of every specialisation, in order."""
    found: dict[tuple[int, str], Launch] = {}
    for launch in launches:
        found.setdefault((launch.arch, launch.specialization), launch)
    return list(found.values())


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
    for name, value in launch.arguments.items():
        is_dtype = name in launch.constants and isinstance(value, str) and tl.dtype.is_dtype(value)
        assert not is_dtype, f"preload would make the constant {name}={value!r} a dtype"
    driver.set_active(Driver(launch.arch, launch.arch))
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
    source = kernel_of(launch).cache_key
    parts = (triton.__version__, str(launch.arch), source, launch.specialization)
    path = cache / hashlib.sha256("\n".join(parts).encode()).hexdigest()
    if path.exists():
        return Result(**json.loads(path.read_text()))
    result = _compile(launch)
    fresh = path.with_suffix(".new")
    fresh.write_text(json.dumps(asdict(result)))
    fresh.rename(path)
    return result

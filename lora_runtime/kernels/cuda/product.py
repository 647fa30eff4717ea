"""The 4-bit product in CUDA: four_bit_product.cu, compiled when it is first used by NVRTC,
which comes with torch; no compiler is needed on the machine.

On an H100 it is ahead of the same product in Triton (`triton/quantised.py`) at any number of rows,
so it is taken wherever it can be compiled; bench/NOTES.md has the figures, also of how rows and
inputs are cut up. Triton's remains for float32, for int8 and where there is no NVRTC.
Neither the splits of the inputs nor the order of a row's sums depends on the number of rows, so
that a row is the same in any batch of up to MAX_ROWS.
"""

from __future__ import annotations

import ctypes
import logging
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_runtime.kernels.compiling import compiling
from lora_runtime.kernels.counters import counters
from lora_runtime.kernels.types import NestedScales

SOURCE = Path(__file__).with_name("four_bit_product.cu")
OLDEST_CAPABILITY = (8, 0)
"""Compute capability that all of the kernels are written for, and newer ones: Ampere."""
OVERLAP_CAPABILITY = (9, 0)
"""The compute capability from which on a launch may begin before the one ahead of it has ended
(programmatic dependent launch)."""
MAX_ROWS = 128
"""More rows go through a dequantised W. On an H100 the two meet between 128 and 192 rows."""
CHUNK = 256
"""Inputs that a warp takes at once."""
MIN_CHUNKS = 2
"""Chunks that a split has at least."""
STAGE_BYTES = 8 * CHUNK * 2
"""Bytes of shared memory for a chunk of eight rows."""
GATES = {"": 0, "silu": 1, "gelu_tanh": 2}

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Variant:
    """The macros of the CUDA source for up to 8 · row_tiles rows; the source explains them."""

    row_tiles: int
    out_tiles: int
    max_warps: int
    """Most warps that run on a multiprocessor at once, by their registers."""
    stages: int

    def options(self, gate: int, is_nested: bool) -> list[str]:
        """Macros, as the compiler's options."""
        return [
            f"-DROW_TILES={self.row_tiles}",
            f"-DOUT_TILES={self.out_tiles}",
            f"-DMAX_WARPS={self.max_warps}",
            f"-DSTAGES={self.stages}",
            f"-DGATE={gate}",
            f"-DNESTED={int(is_nested)}",
        ]

    @property
    def shared_bytes(self) -> int:
        return self.stages * self.row_tiles * STAGE_BYTES


VARIANTS = (Variant(1, 1, 16, 3), Variant(2, 1, 16, 3), Variant(4, 2, 8, 3), Variant(8, 2, 8, 2))
"""Beyond 16 rows a warp makes two tiles of outputs, so that it reads x half as often."""


@dataclass(frozen=True)
class Plan:
    """How a product is spread over the multiprocessors."""

    variant: Variant
    row_blocks: int
    tiles: int
    """Tiles of outputs; a warp computes one."""
    warps: int
    """Warps of a program."""
    splits: int
    chunks_per_split: int

    @property
    def grid(self) -> tuple[int, int, int]:
        return self.row_blocks * -(-self.tiles // self.warps), self.splits, 1

    @property
    def partial_size(self) -> int:
        """Numbers of the partial sums; none if there is one split."""
        cells = 16 * self.variant.out_tiles * 8 * self.variant.row_tiles
        return self.splits * self.row_blocks * self.tiles * cells if self.splits > 1 else 0


@cache
def plan(
    num_rows: int, num_outputs: int, in_features: int, is_gated: bool, multiprocessors: int
) -> Plan:
    """Splits of the inputs until every multiprocessor has the warps that the smallest variant
    allows, then programs of as many warps as a multiprocessor's share.
    """
    variant = next((v for v in VARIANTS if num_rows <= 8 * v.row_tiles), VARIANTS[-1])
    tile_outputs = 8 if is_gated else 16
    chunks = -(-in_features // CHUNK)
    most = VARIANTS[0].max_warps * multiprocessors // -(-num_outputs // tile_outputs)
    chunks_per_split = -(-chunks // max(1, min(most, chunks // MIN_CHUNKS)))
    splits = -(-chunks // chunks_per_split)
    tiles = -(-num_outputs // (tile_outputs * variant.out_tiles))
    share = -(-tiles * splits // multiprocessors)
    return Plan(
        variant=variant,
        row_blocks=-(-num_rows // (8 * variant.row_tiles)),
        tiles=tiles,
        warps=min(share, variant.max_warps),
        splits=splits,
        chunks_per_split=chunks_per_split,
    )


def can_run(x: Tensor) -> bool:
    """True for bfloat16 rows on a device for which the source could be compiled."""
    return x.dtype == torch.bfloat16 and x.device.type == "cuda" and is_available(x.device)


def four_bit_product(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    code: Tensor,
    out_features: int,
    nested: NestedScales | None = None,
    gate: str = "",
    *,
    overlaps: bool = False,
) -> Tensor:
    """y (…, out) = x Wᵀ, or with `gate` (…, out / 2), see `lora_runtime.kernels`; one launch.

    x (…, in) bfloat16 of 1 to MAX_ROWS rows. `overlaps`: it may begin while the launch queued
    before it, which then must not write x, is at work; so it does if that one lets it.
    """
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    num_rows, in_features = rows.shape
    num_outputs = out_features // 2 if gate else out_features
    cut = plan(num_rows, num_outputs, in_features, bool(gate), _multiprocessors(x.device))
    y = rows.new_empty(num_rows, num_outputs)
    partial = rows.new_empty(cut.partial_size, dtype=torch.float32)
    scales = (absmax, code, code, code) if nested is None else (nested.absmax, absmax, *nested[1:])
    launch(
        _function(x.device, cut.variant, GATES[gate], nested is not None),
        cut,
        (y, partial, counters(x.device, cut.row_blocks * cut.tiles), packed, *scales, code, rows),
        (num_rows, in_features, out_features, cut.chunks_per_split, int(overlaps)),
        overlaps=overlaps and can_overlap(x.device),
    )
    return y.view(*x.shape[:-1], num_outputs)


def launch(
    function: Any,
    cut: Plan,
    tensors: tuple[Tensor, ...],
    numbers: tuple[int, ...],
    *,
    overlaps: bool = False,
) -> None:
    """Queue the kernel on the current stream."""
    from cuda.bindings import driver

    config = driver.CUlaunchConfig()
    config.gridDimX, config.gridDimY, config.gridDimZ = cut.grid
    config.blockDimX, config.blockDimY, config.blockDimZ = 32 * cut.warps, 1, 1
    config.sharedMemBytes = cut.variant.shared_bytes
    config.hStream = torch.cuda.current_stream(tensors[0].device).cuda_stream
    if overlaps:
        attribute, kinds = driver.CUlaunchAttribute(), driver.CUlaunchAttributeID
        attribute.id = kinds.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        attribute.value.programmaticStreamSerializationAllowed = 1
        config.attrs, config.numAttrs = [attribute], 1
    values = (*(tensor.data_ptr() for tensor in tensors), *numbers)
    types = (*(ctypes.c_void_p,) * len(tensors), *(ctypes.c_int,) * len(numbers))
    _checked(driver.cuLaunchKernelEx(config, function, (values, types), 0))


@cache
def can_overlap(device: torch.device) -> bool:
    """True where a launch may begin while the one before it is at work."""
    return torch.cuda.get_device_capability(device) >= OVERLAP_CAPABILITY


@cache
def is_available(device: torch.device) -> bool:
    """True when the source can be compiled for the device; otherwise one warning says why not."""
    if torch.version.cuda is None or torch.cuda.get_device_capability(device) < OLDEST_CAPABILITY:
        return False
    try:
        _function(device, VARIANTS[0], 0, False)
    except (ImportError, OSError, RuntimeError) as error:
        logger.warning("4-bit products run in Triton, which is slower here: %s", error)
        return False
    return True


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@cache
def _function(device: torch.device, variant: Variant, gate: int, is_nested: bool) -> Any:
    """The kernel, loaded on a device. The first call compiles it, in less than a second: it must
    not be part of a capture.
    """
    from cuda.bindings import driver

    major, minor = torch.cuda.get_device_capability(device)
    binary = compiled(f"sm_{major}{minor}", tuple(variant.options(gate, is_nested)))
    with torch.cuda.device(device):
        torch.cuda.current_stream().synchronize()  # a context, if nothing has run here yet
        module = _checked(driver.cuModuleLoadData(binary))
        function = _checked(driver.cuModuleGetFunction(module, b"four_bit_product"))
        attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        _checked(driver.cuFuncSetAttribute(function, attribute, variant.shared_bytes))
    return function


@cache
def compiled(architecture: str, options: tuple[str, ...]) -> bytes:
    """The source as machine code for `sm_…`. Raises RuntimeError with the compiler's words."""
    from cuda.bindings import nvrtc

    source, name = SOURCE.read_bytes(), SOURCE.name.encode()
    program = _checked(nvrtc.nvrtcCreateProgram(source, name, 0, [], []))
    words = [f"--gpu-architecture={architecture}".encode(), *(o.encode() for o in options)]
    with compiling():
        (status,) = nvrtc.nvrtcCompileProgram(program, len(words), words)
    if status.value:
        log = bytes(_checked(nvrtc.nvrtcGetProgramLogSize(program)))
        nvrtc.nvrtcGetProgramLog(program, log)
        raise RuntimeError(f"NVRTC, {architecture}: {log.decode().strip() or status}")
    binary = bytes(_checked(nvrtc.nvrtcGetCUBINSize(program)))
    _checked(nvrtc.nvrtcGetCUBIN(program, binary))
    return binary


def nvrtc_version() -> tuple[int, int]:
    """(major, minor) of NVRTC. Raises ImportError, OSError or RuntimeError if there is none."""
    from cuda.bindings import nvrtc

    major, minor = _checked(nvrtc.nvrtcVersion())
    return major, minor


def _checked(result: tuple[Any, ...]) -> Any:
    """The result of a CUDA call without its status: nothing, one value or several.

    Raises RuntimeError naming the status if that is an error.
    """
    status, *values = result
    if status.value:
        raise RuntimeError(f"CUDA answers {status.name}")
    return values[0] if len(values) == 1 else values

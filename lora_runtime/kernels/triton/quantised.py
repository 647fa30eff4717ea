"""Products with quantised weights: codes are dequantised in registers.

4-bit products of bfloat16 go to `cuda/product.py` where it can be compiled; the others, and int8,
are Triton's. There, one kernel for any number of rows: tiles of W are made in registers and
multiplied by up to 64 rows on tensor cores; more rows are further programs, which find the codes in
the cache. A second kernel is the same with shrink of the adapters of the same x
(`triton/adapters.py`).
Inputs are split where the outputs alone give too few programs; the program that comes last adds up
the partial sums, always in the same order. Neither the split nor the order of the inputs depends on
the number of rows, so that a row is the same in any batch.
W = fp32(code × absmax) is rounded once to the compute dtype; sums are float32.
Tile sizes come from counting the instructions of the compiled loop, 4 to 5 a weight; bench/NOTES.md
has them, and the times measured on an H100.
Source: QLoRA (arXiv:2305.14314) for the format, split-K as in arXiv:2402.00025.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from lora_runtime.kernels.counters import counters
from lora_runtime.kernels.cuda import product as cuda_product
from lora_runtime.kernels.triton.adapters import ShrinkLaunch, shrink_launch
from lora_runtime.kernels.triton.quantised_kernels import (
    grouped_product_kernel,
    product_and_shrink_kernel,
    product_kernel,
    scales_kernel,
    values_kernel,
)
from lora_runtime.kernels.types import NestedScales, PooledAdapters

MAX_PROGRAMS = 512
"""Inputs are split until a launch has about as many programs for one tile of rows, four a
multiprocessor."""
MAX_SPLITS = 16
BLOCK_N = 128
UNALIGNED_TILES = 2
"""Tiles of rows of a program at most where rows of y begin anywhere: each number is written by an
address of its own, and with more of them registers spill."""
VALUES_BLOCK = 1024
"""Bytes of codes that one program dequantises."""


class Tiling(NamedTuple):
    """How a format's product is cut up.

    block_m: rows of a tile; max_tiles: of a program; max_uneven_tiles: where the last pass has
    fewer inputs; block_k: inputs a pass; num_stages: of the loop, one more than the passes whose
    copies to shared memory are on their way.
    """

    block_m: int
    max_tiles: int
    max_uneven_tiles: int
    block_k: int
    num_stages: int


TILINGS = {
    ("four_bit", torch.bfloat16): Tiling(8, 8, 8, 256, 3),
    ("four_bit", torch.float32): Tiling(16, 1, 1, 64, 1),
    ("eight_bit", torch.bfloat16): Tiling(8, 8, 4, 128, 3),
    ("eight_bit", torch.float32): Tiling(16, 1, 1, 64, 1),
}
"""By format and dtype. No format is called like a dtype: Triton's preload would make it one."""
MAX_REGISTERS = 255
"""Said of products in float32, and of those whose last pass has fewer inputs: left to itself the
compiler takes 80 to 128 registers a thread and spills some."""


def four_bit_product(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    code: Tensor,
    out_features: int,
    nested: NestedScales | None = None,
) -> Tensor:
    """See `lora_runtime.kernels.four_bit_product`."""
    if cuda_product.can_run(x):
        return cuda_product.four_bit_product(x, packed, absmax, code, out_features, nested)
    return _product(x, packed, _scales(absmax, nested), code, out_features, "four_bit")


def four_bit_gated_product(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    code: Tensor,
    out_features: int,
    kind: str,
    nested: NestedScales | None = None,
) -> Tensor:
    """See `lora_runtime.kernels.four_bit_gated_product`."""
    if cuda_product.can_run(x):
        return cuda_product.four_bit_product(x, packed, absmax, code, out_features, nested, kind)
    return _product(x, packed, _scales(absmax, nested), code, out_features, "four_bit", kind)


def int8_product(x: Tensor, codes: Tensor, absmax: Tensor) -> Tensor:
    """See `lora_runtime.kernels.int8_product`."""
    return _product(x, codes, absmax, absmax, len(codes), "eight_bit")


def grouped_four_bit_product(
    x: Tensor,
    starts: Tensor,
    packed: Tensor,
    absmax: Tensor,
    code: Tensor,
    out_features: int,
    nested: NestedScales | None = None,
) -> Tensor:
    """See `lora_runtime.kernels.grouped_four_bit_product`."""
    scales = _scales(absmax, nested)
    return _grouped_product(x, starts, packed, scales, code, out_features, "four_bit")


def grouped_int8_product(x: Tensor, starts: Tensor, codes: Tensor, absmax: Tensor) -> Tensor:
    """See `lora_runtime.kernels.grouped_int8_product`."""
    out_features = len(codes) // (len(starts) - 1)
    return _grouped_product(x, starts, codes, absmax, absmax, out_features, "eight_bit")


def _grouped_product(
    x: Tensor,
    starts: Tensor,
    codes: Tensor,
    absmax: Tensor,
    table: Tensor,
    out_features: int,
    name: str,
) -> Tensor:
    """The sums of an output are over all inputs in order, in one program: as many programs as
    experts and tiles of outputs fill a GPU.
    """
    x = x.contiguous()
    num_rows, in_features = x.shape
    tiling = TILINGS[name, x.dtype]
    tiles = row_tiles(starts, num_rows, tiling.block_m)
    y = x.new_empty(num_rows, out_features)
    is_even = in_features % tiling.block_k == 0
    grouped_product_kernel[(len(tiles) * triton.cdiv(out_features, BLOCK_N),)](
        *(y, x, codes, absmax, table, tiles, len(tiles)),
        *(in_features, in_features // 64, out_features),
        FORMAT=name,
        IS_EVEN=is_even,
        TILES=1,
        BLOCK_M=tiling.block_m,
        BLOCK_N=BLOCK_N,
        BLOCK_K=tiling.block_k,
        num_warps=4,
        num_stages=tiling.num_stages,
        maxnreg=_max_registers(x.dtype, is_even),
    )
    return y


def row_tiles(starts: Tensor, num_rows: int, height: int) -> Tensor:
    """(n, 3) int32: the group, first and end row of every tile of up to `height` rows of a group.

    How many there are is known on the device alone: n is their largest number for so many rows,
    and those beyond are empty. Nothing is read back from the device.
    """
    num_groups = len(starts) - 1
    counts = starts[1:] - starts[:-1]
    ends = ((counts + height - 1) // height).cumsum(0)
    tiles = torch.arange(num_rows // height + min(num_groups, num_rows), device=starts.device)
    groups = torch.searchsorted(ends, tiles, right=True)
    own = groups.clamp(max=num_groups - 1)
    before = (ends - (counts + height - 1) // height)[own]
    first = starts[own] + (tiles - before) * height
    end = torch.minimum(first + height, starts[own + 1])
    return torch.stack([own, first, torch.where(groups < num_groups, end, first)], 1).int()


def four_bit_product_and_shrink(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    code: Tensor,
    out_features: int,
    adapters: PooledAdapters,
    nested: NestedScales | None = None,
) -> tuple[Tensor, Tensor]:
    """See `lora_runtime.kernels.four_bit_product_and_shrink`."""
    launch = shrink_launch(x.contiguous(), *adapters)
    if cuda_product.can_run(x):
        launch.run(lets_next_begin=cuda_product.can_overlap(x.device))
        y = cuda_product.four_bit_product(
            x, packed, absmax, code, out_features, nested, overlaps=True
        )
        return y, launch.hidden
    scales = _scales(absmax, nested)
    y = _product(x, packed, scales, code, out_features, "four_bit", shrink=launch)
    return y, launch.hidden


def int8_product_and_shrink(
    x: Tensor, codes: Tensor, absmax: Tensor, adapters: PooledAdapters
) -> tuple[Tensor, Tensor]:
    """See `lora_runtime.kernels.int8_product_and_shrink`."""
    shrink = shrink_launch(x.contiguous(), *adapters)
    return _product(x, codes, absmax, absmax, len(codes), "eight_bit", shrink=shrink), shrink.hidden


def four_bit_values(
    packed: Tensor,
    absmax: Tensor,
    code: Tensor,
    shape: tuple[int, int],
    dtype: torch.dtype,
    nested: NestedScales | None = None,
) -> Tensor:
    """See `lora_runtime.kernels.four_bit_values`."""
    values = torch.empty(shape, dtype=dtype, device=packed.device)
    is_plain = nested is None
    values_kernel[(triton.cdiv(len(packed), VALUES_BLOCK),)](
        values, packed, absmax, code, *(nested or (code, code, code)), values.numel(), len(packed),
        IS_NESTED=not is_plain, BLOCK=VALUES_BLOCK,
        enable_fp_fusion=is_plain,  # bitsandbytes rounds between × and +
    )  # fmt: skip
    return values


def _scales(absmax: Tensor, nested: NestedScales | None) -> Tensor:
    """float32, made anew for every product: kept, they would take 0.5 bits a weight more."""
    if nested is None:
        return absmax
    scales = torch.empty(absmax.shape, device=absmax.device)
    scales_kernel[(triton.cdiv(len(absmax), VALUES_BLOCK),)](
        scales, absmax, *nested, len(absmax), BLOCK=VALUES_BLOCK, enable_fp_fusion=False
    )
    return scales


def _product(
    x: Tensor,
    codes: Tensor,
    absmax: Tensor,
    table: Tensor,
    out_features: int,
    name: str,
    gate: str = "",
    shrink: ShrinkLaunch | None = None,
) -> Tensor:
    """The product, and in the same launch the shrink of adapters of the same x."""
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    num_rows, in_features = rows.shape
    tiling = TILINGS[name, x.dtype]
    tiles = triton.next_power_of_2(triton.cdiv(num_rows, tiling.block_m))
    is_even = in_features % tiling.block_k == 0
    most = tiling.max_tiles if is_even else tiling.max_uneven_tiles
    most = most if out_features % 16 == 0 else min(most, UNALIGNED_TILES)
    tiles = min(tiles, most, max_tiles(rows.device))
    num_units = triton.cdiv(num_rows, tiles * tiling.block_m) * triton.cdiv(out_features, BLOCK_N)
    num_splits, inputs_per_split = _splits(out_features, in_features, tiling.block_k)
    y = rows.new_empty(num_rows, out_features // 2 if gate else out_features)
    partial = y
    if num_splits > 1:
        partial = rows.new_empty(num_splits, num_rows, out_features, dtype=torch.float32)
    arguments = (
        *(y, partial, counters(rows.device, num_units), rows, codes, absmax, table, num_rows),
        *(in_features, in_features // 64, out_features, inputs_per_split),
    )
    options = {
        "FORMAT": name,
        "GATE": gate,
        "IS_EVEN": is_even,
        "SPLITS": num_splits,
        "TILES": tiles,
        "BLOCK_M": tiling.block_m,
        "BLOCK_N": BLOCK_N,
        "BLOCK_K": tiling.block_k,
        "num_warps": 4,
        "num_stages": tiling.num_stages,
        "maxnreg": _max_registers(x.dtype, is_even),
    }
    num_programs = num_units * num_splits
    if shrink is None:
        product_kernel[(num_programs,)](*arguments, **options)
    else:
        num_tiles, num_parts, num_shrink_splits = shrink.grid
        num_programs += num_tiles * num_parts * num_shrink_splits
        product_and_shrink_kernel[(num_programs,)](
            *arguments,
            *(shrink.hidden, num_tiles, num_parts, *shrink.arguments),
            **options,
            **{f"SHRINK_{name}": value for name, value in shrink.options.items()},
        )
    return y.view(*x.shape[:-1], y.shape[1])


def _max_registers(dtype: torch.dtype, is_even: bool) -> int | None:
    """Of a thread; None for the compiler's own choice."""
    return None if is_even and dtype == torch.bfloat16 else MAX_REGISTERS


def _splits(out_features: int, in_features: int, block_k: int) -> tuple[int, int]:
    """Number of splits and inputs of one; at least four passes each."""
    num_passes = triton.cdiv(in_features, block_k)
    num_splits = MAX_PROGRAMS // triton.cdiv(out_features, BLOCK_N)
    num_splits = max(1, min(num_splits, MAX_SPLITS, num_passes // 4))
    passes_per_split = triton.cdiv(num_passes, num_splits)
    return triton.cdiv(num_passes, passes_per_split), passes_per_split * block_k


@cache
def max_tiles(device: torch.device) -> int:
    """Tiles of rows that one program multiplies on a device."""
    if device.type != "cuda":
        return tiles_that_fit(0)
    properties = torch.cuda.get_device_properties(device)
    return tiles_that_fit(properties.shared_memory_per_block_optin)


def tiles_that_fit(shared_bytes: int) -> int:
    """8 tiles of rows where a block may have the 102 KB of shared memory that they take, 4 (70 KB)
    where it has 99 KB, as on Ada and Blackwell's workstation cards.
    """
    return 8 if shared_bytes > 128 * 1024 else 4

"""Paged attention and the write of keys and values in Triton.

Rows with one token, which is every row of a decode step, take the decode kernel: keys and values
are read once for all query heads that share them, by as many programs as the row's length is
worth, of which the last joins their results. Rows with more tokens take the prefill kernel, in
tiles of queries. Which row is which is found on the device; grids follow from shapes alone, so a
CUDA graph of a decode step can be replayed for rows of any length.
torch's own varlen attention with paged keys is not used: not every torch that we support has it.
Source: PagedAttention (arXiv:2309.06180), FlashAttention-2 (arXiv:2307.08691), split keys as in
Flash-Decoding (Dao et al., 2023).
"""

from __future__ import annotations

from functools import cache

import torch
import triton
from torch import Tensor

from lora_runtime.kernels.counters import counters
from lora_runtime.kernels.triton.attention_kernels import (
    decode_kernel,
    prefill_kernel,
    write_kv_kernel,
)
from lora_runtime.kernels.types import AttentionMeta

MIN_PROGRAMS = 1056
"""The decode kernel splits a row's keys until it has as many programs, eight a multiprocessor: a
long row among short ones is still spread, and the splits that a short row has no use for return at
once."""
MAX_SPLITS = 16
MIN_SPLIT_KEYS = 512
"""Keys that a split has at least, the last of a row excepted: splits of fewer take longer to be
written, read and joined than to be gone through."""
FEW_SPLIT_KEYS = 64
"""The same where so few rows are decoded that half of the programs would be missing."""
DECODE_BYTES = 16384
"""Keys, and as much of values, that a decode program looks at together."""
DECODE_HEADS = {torch.bfloat16: 64, torch.float32: 16}
"""Query heads of one key head in a decode program, as prefill's tiles; more of them read the keys
once more."""
WIDE_WARPS = 8
"""Warps of a program in float32, which has no tensor cores, and of a prefill tile of heads wider
than 128: with the usual 4 registers spill on some card."""
MAX_REGISTERS = 255
"""Said of a prefill tile in float32, or of heads below 64: left to itself the compiler takes 72 to
128 a thread and spills, mostly for the sake of programs that shared memory has no room for."""
DECODE_REGISTERS = 168
"""Said of a decode program of heads of 64 and more in bfloat16, for the same reason: as many as
the three programs can have for which a multiprocessor has shared memory. More than 16 query heads
of a key head need more."""
JOINED_VALUES = 512
"""Values of each split that the last program of a row looks at together."""
PREFILL_TILES = {torch.bfloat16: (64, 8192, 4), torch.float32: (16, 8192, WIDE_WARPS)}
"""Queries of one row and head in a tile, bytes of keys, and warps: what the registers hold, as
float32 products run without tensor cores."""
WARPGROUP_TILE = (128, 16384, 8)
"""In bfloat16 where warps multiply in groups of four: on an H100 a prompt of 8,192 tokens takes
0.89 of the time of the tile above, 512 tokens after 8,192 take 0.62. Elsewhere registers spill."""
WIDE_TILE = (64, 8192, WIDE_WARPS)
"""In bfloat16 for heads wider than 128."""
WRITE_BLOCK = 1024
MIN_DOT = 16


def write_kv(keys: Tensor, values: Tensor, k: Tensor, v: Tensor, cache_slots: Tensor) -> None:
    """See `lora_runtime.kernels.write_kv`. k and v may be views with rows and heads anywhere."""
    assert k.stride(2) == v.stride(2) == 1
    num_tokens, num_heads, head_dim = k.shape
    grid = (num_tokens, triton.cdiv(num_heads * head_dim, WRITE_BLOCK))
    write_kv_kernel[grid](
        keys,
        values,
        k,
        v,
        cache_slots,
        num_heads * head_dim,
        head_dim,
        *k.stride()[:2],
        *v.stride()[:2],
        BLOCK=WRITE_BLOCK,
    )


def paged_attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    meta: AttentionMeta,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """See `lora_runtime.kernels.paged_attention`."""
    assert q.stride(2) == 1
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    num_rows = len(meta.block_tables)
    is_decode = len(q) == num_rows
    starts = meta.rows if is_decode else _row_starts(meta)
    arguments = (out, q, keys, values, meta.block_tables, meta.positions, starts)
    sizes = (*_sizes(q, keys, meta), scale, window or 0, softcap or 0.0)
    head_dim = max(MIN_DOT, triton.next_power_of_2(q.shape[2]))
    _decode(q, keys, meta, arguments, sizes, is_decode, head_dim)
    if not is_decode:
        block_q, num_bytes, num_warps = _prefill_tile(q, head_dim)
        num_tiles = num_rows + len(q) // block_q
        prefill_kernel[num_tiles, q.shape[1]](
            *arguments,
            num_rows,
            *sizes,
            HAS_WINDOW=window is not None,
            HAS_SOFTCAP=softcap is not None,
            BLOCK_SIZE=meta.block_size,
            BLOCK_Q=block_q,
            BLOCK_K=tile_keys(q, head_dim, num_bytes),
            BLOCK_D=head_dim,
            CHUNK=64,
            num_warps=num_warps,
            maxnreg=MAX_REGISTERS if q.dtype == torch.float32 or head_dim < 64 else None,
        )
    return out


def _prefill_tile(q: Tensor, head_dim: int) -> tuple[int, int, int]:
    """Queries of one row and head, bytes of keys, and warps."""
    if q.dtype == torch.bfloat16 and head_dim > 128:
        return WIDE_TILE
    if q.dtype == torch.bfloat16 and has_warpgroups(q.device):
        return WARPGROUP_TILE
    return PREFILL_TILES[q.dtype]


def _decode(
    q: Tensor,
    keys: Tensor,
    meta: AttentionMeta,
    arguments: tuple[Tensor, ...],
    sizes: tuple[float, ...],
    is_decode: bool,
    head_dim: int,
) -> None:
    num_rows, num_groups = len(meta.block_tables), keys.shape[1]
    heads_per_group = q.shape[1] // num_groups
    most = min(DECODE_HEADS[q.dtype], triton.next_power_of_2(heads_per_group))
    block_h = max(MIN_DOT, most)
    head_blocks = triton.cdiv(heads_per_group, block_h)
    num_units = num_rows * num_groups * head_blocks
    longest = meta.block_tables.shape[1] * meta.block_size
    is_few = 2 * num_units * MAX_SPLITS <= MIN_PROGRAMS
    min_keys = min(FEW_SPLIT_KEYS, MIN_SPLIT_KEYS) if is_few else MIN_SPLIT_KEYS
    num_splits = min(triton.cdiv(MIN_PROGRAMS, num_units), triton.cdiv(longest, min_keys))
    num_splits = min(num_splits, MAX_SPLITS)
    num_parts = num_units * num_splits * block_h if num_splits > 1 else 0
    parts = torch.empty(num_parts * head_dim, device=q.device)
    sums = torch.empty(num_parts * 2, device=q.device)
    decode_kernel[num_rows, num_groups * head_blocks, num_splits](
        *arguments,
        parts,
        sums,
        counters(q.device, num_units),
        num_splits,
        min_keys,
        head_blocks,
        *sizes,
        IS_DECODE=is_decode,
        HAS_WINDOW=sizes[-2] > 0,
        HAS_SOFTCAP=sizes[-1] > 0,
        BLOCK_SIZE=meta.block_size,
        MAX_SPLITS=MAX_SPLITS,
        BLOCK_H=block_h,
        BLOCK_JOIN=min(most, max(1, JOINED_VALUES // head_dim)),
        BLOCK_K=tile_keys(q, head_dim, DECODE_BYTES),
        BLOCK_D=head_dim,
        num_warps=WIDE_WARPS if q.dtype == torch.float32 else 4,
        maxnreg=_decode_registers(q.dtype, head_dim, block_h),
    )


def _decode_registers(dtype: torch.dtype, head_dim: int, block_h: int) -> int | None:
    """Of a thread of a decode program; None for the compiler's own choice."""
    if dtype == torch.float32 or head_dim < 64:
        return None
    return DECODE_REGISTERS if block_h == MIN_DOT else MAX_REGISTERS


@cache
def has_warpgroups(device: torch.device) -> bool:
    """True on Hopper, whose tensor cores take products of four warps together (`wgmma`)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9


def tile_keys(q: Tensor, head_dim: int, num_bytes: int) -> int:
    """How many keys are looked at together: as many as fill num_bytes."""
    return min(64, max(MIN_DOT, num_bytes // (head_dim * q.itemsize)))


def _row_starts(meta: AttentionMeta) -> Tensor:
    """(N + 1,) int32: the first token of each row, once a step; tokens are in order of rows."""
    if "row_starts" not in meta.derived:
        rows = torch.arange(len(meta.block_tables) + 1, device=meta.rows.device, dtype=torch.int32)
        meta.derived["row_starts"] = torch.searchsorted(meta.rows, rows, out_int32=True)
    return meta.derived["row_starts"]


def _sizes(q: Tensor, keys: Tensor, meta: AttentionMeta) -> tuple[int, ...]:
    """Blocks a row, query heads a key head, head size; strides of q, out and the cache."""
    return (
        meta.block_tables.shape[1],
        q.shape[1] // keys.shape[1],
        q.shape[2],
        q.stride(0),
        q.stride(1),
        q.shape[1] * q.shape[2],
        keys.stride(0),
        keys.stride(1),
    )

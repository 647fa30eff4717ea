"""The GPU kernels one by one: right against float64, then beside the bytes they must move."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any
from unittest import mock

import bitsandbytes.functional as bnb
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.gpu_rows import Case, Figures, Table
from bench.gpu_timing import DEVICE, HAS_GPU, Ceilings, copies_of, seconds_per_call
from lora_runtime import kernels
from lora_runtime.kernels import AdapterMemory, AttentionMeta, Extent, Span, StepMeta, reference
from lora_runtime.kernels.cuda import product as cuda_product

BFLOAT16 = torch.bfloat16
CHECKED_ROWS = (1, 2, 3, 7, 16, 33, 64, 65, 133) if HAS_GPU else (1, 3)
TIMED_ROWS = (1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 192) if HAS_GPU else (1, 16)
LINEARS = (
    {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)}
    if HAS_GPU
    else {"down": (96, 128)}
)
"""(out, in) of Llama-3.1-8B's products."""
SITES = (
    {
        "qkv": (4096, (4096, 1024, 1024)), "o": (4096, (4096,)),
        "gate_up": (4096, (14336, 14336)), "down": (14336, (4096,)),
    }
    if HAS_GPU
    else {"qkv": (64, (64, 32, 32))}
)  # fmt: skip
"""(in, widths) of the modules that get their adapters in one launch."""
RANK = 16
BLOCK_SIZE = 16


@dataclass(frozen=True)
class FourBit:
    """A random NF4 weight."""

    packed: Tensor
    absmax: Tensor
    code: Tensor
    shape: tuple[int, int]

    @classmethod
    def random(cls, out_features: int, in_features: int) -> FourBit:
        size = out_features * in_features
        packed = torch.randint(0, 256, (size // 2,), dtype=torch.uint8, device=DEVICE)
        absmax = torch.rand(size // 64, device=DEVICE) / in_features**0.5
        code = bnb.get_4bit_type("nf4", device=DEVICE.type)
        return cls(packed, absmax, code, (out_features, in_features))

    @property
    def nbytes(self) -> int:
        return self.packed.nbytes + self.absmax.nbytes

    def product(self, x: Tensor) -> Tensor:
        return kernels.four_bit_product(x, self.packed, self.absmax, self.code, self.shape[0])

    def triton_product(self, x: Tensor) -> Tensor:
        with mock.patch.object(cuda_product, "can_run", lambda x: False):
            return self.product(x)

    def cuda_product(self, x: Tensor) -> Tensor:
        return cuda_product.four_bit_product(x, self.packed, self.absmax, self.code, self.shape[0])

    def bitsandbytes_product(self, x: Tensor) -> Tensor:
        """bitsandbytes' own product of the same bytes. At few rows it rounds W twice."""
        return torch.ops.bitsandbytes.gemm_4bit.default(
            x, self.packed[:, None], self.shape, self.absmax, 64, "nf4"
        )

    def dequantised_product(self, x: Tensor) -> Tensor:
        return F.linear(x, self.values(x.dtype))

    def values(self, dtype: torch.dtype) -> Tensor:
        return kernels.four_bit_values(self.packed, self.absmax, self.code, self.shape, dtype)

    def dense(self) -> Tensor:
        """In float32, by indexing: what the kernels are checked against."""
        codes = torch.stack([self.packed >> 4, self.packed & 15], 1).flatten().long()
        scales = self.absmax.repeat_interleave(64)
        return (self.code[codes] * scales).view(self.shape)


@dataclass(frozen=True)
class EightBit:
    """A random int8 weight."""

    codes: Tensor
    absmax: Tensor

    @classmethod
    def random(cls, out_features: int, in_features: int) -> EightBit:
        shape = (out_features, in_features)
        codes = torch.randint(-127, 128, shape, dtype=torch.int8, device=DEVICE)
        return cls(codes, torch.rand(out_features, device=DEVICE) / in_features**0.5)

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.absmax.nbytes

    @property
    def shape(self) -> torch.Size:
        return self.codes.shape

    def product(self, x: Tensor) -> Tensor:
        return kernels.int8_product(x, self.codes, self.absmax)

    def dense(self) -> Tensor:
        return self.codes * (self.absmax[:, None] / 127)


FORMATS: dict[str, type[FourBit] | type[EightBit]] = {"nf4": FourBit, "int8": EightBit}
ODD_SHAPE = (1000, 1088) if HAS_GPU else (40, 192)
"""No multiple of a tile on either side."""


def error(y: Tensor, expected: Tensor) -> float:
    """Largest difference relative to the largest value; infinite if anything is not finite."""
    if not torch.isfinite(y).all():
        return float("inf")
    return float((y.double() - expected).abs().max() / expected.abs().max())


# Checks


def check_cases() -> Iterator[Case]:
    """Every kernel at odd numbers of rows, in both dtypes."""
    for dtype in ("bfloat16", "float32"):
        yield {"kernel": "values", "dtype": dtype}
        for rows in CHECKED_ROWS:
            for format_name in FORMATS:
                if rows <= 64:
                    case = {"kernel": "product", "dtype": dtype, "rows": rows}
                    yield {**case, "format_name": format_name}
            for kind in ("distinct", "uniform", "zipf", "identical"):
                yield {"kernel": "adapters", "dtype": dtype, "rows": rows, "popularity": kind}
        for lengths in ([1], [5, 1, 33], [1, 1, 200]):
            yield {"kernel": "attention", "dtype": dtype, "lengths": lengths}


def check(kernel: str, dtype: str, **case: Any) -> Figures:
    """Relative error against float64, with what kernels allocate full of NaN. bfloat16's half step
    is at most 2⁻⁸ = 0.0039 of a value.
    """
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills what is allocated with NaN
    try:
        return {"error": error(*PAIRS[kernel](getattr(torch, dtype), **case))}
    finally:
        torch.use_deterministic_algorithms(False)


def values_pair(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    weight = FourBit.random(*ODD_SHAPE)
    return weight.values(dtype), weight.dense().to(dtype).double()


def product_pair(dtype: torch.dtype, rows: int, format_name: str) -> tuple[Tensor, Tensor]:
    weight = FORMATS[format_name].random(*ODD_SHAPE)
    x = torch.randn(rows, weight.shape[1], device=DEVICE).to(dtype)
    return weight.product(x), x.double() @ weight.dense().to(dtype).double().T


def adapters_pair(dtype: torch.dtype, rows: int, popularity: str) -> tuple[Tensor, Tensor]:
    in_features, width, owners = 272, 336, owners_of(popularity, rows)
    adapters = Adapters(max(owners) + 1, 12, in_features, (width,), dtype)
    x = torch.randn(rows, in_features, device=DEVICE).to(dtype)
    base = torch.randn(rows, width, device=DEVICE).to(dtype)
    expected = base.double()
    for row, owner in enumerate(owners):
        expected[row] += adapters.dense(owner, in_features) @ x[row].double()
    return adapters.apply(base, x, step_of(owners)), expected


def attention_pair(dtype: torch.dtype, lengths: list[int]) -> tuple[Tensor, Tensor]:
    q, keys, values, meta = attention_step(lengths, lengths, (8, 2), 64, dtype)
    y = kernels.paged_attention(q, keys, values, meta, 0.125)
    exact = (t.double() for t in (q, keys, values))
    return y, reference.paged_attention(*exact, meta, 0.125, None, None)


PAIRS: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "values": values_pair,
    "product": product_pair,
    "adapters": adapters_pair,
    "attention": attention_pair,
}
"""Kernel → what it gives, and the same in float64."""


def owners_of(popularity: str, num_rows: int) -> list[int]:
    """The adapter of every row."""
    owner = {
        "distinct": lambda i: i,
        "uniform": lambda i: i % max(1, int(num_rows**0.5)),
        "zipf": lambda i: int((num_rows / (i + 1)) ** 0.5) - 1,
        "identical": lambda i: 0,
    }[popularity]
    return [owner(i) for i in range(num_rows)]


class Adapters:
    """Random adapters of one rank in a pool, for modules of `widths` that share their input."""

    def __init__(
        self, count: int, rank: int, in_features: int, widths: tuple[int, ...], dtype: torch.dtype
    ) -> None:
        self.widths = widths
        per_run = [rank * (in_features + width) for width in widths]
        size = count * sum(per_run)
        weights = (torch.randn(size, device=DEVICE) / in_features**0.5).to(dtype)
        vectors = torch.empty(0, device=DEVICE)
        self.memory = AdapterMemory(weights, vectors, vectors.int(), rank, 16)
        extents, offset = [], 0
        for own in per_run:
            starts = [offset + i * own for i in range(count)]
            extents.append(
                [[Extent(rank=rank, a=start, b=start + rank * in_features)] for start in starts]
            )
            offset += count * own
        self.extents = torch.tensor(extents, device=DEVICE)

    def apply(self, base: Tensor, x: Tensor, meta: StepMeta) -> Tensor:
        return kernels.apply_stacked_adapters(
            base, x, None, self.memory, self.extents, meta, self.widths
        )

    def dense(self, slot: int, in_features: int) -> Tensor:
        """ΔW (out, in) float64 of the first module."""
        extent = Extent(*self.extents[0, slot, 0].tolist())
        flat, width = self.memory.weights.double(), self.widths[0]
        a = flat[extent.a : extent.a + extent.rank * in_features].view(extent.rank, in_features)
        b = flat[extent.b : extent.b + extent.rank * width].view(extent.rank, width)
        return b.T @ a


def step_of(row_owners: Sequence[int]) -> StepMeta:
    """One token a row."""
    spans = [Span(slot=o, first_token=i, num_tokens=1) for i, o in enumerate(row_owners)]
    meta = StepMeta.build(spans, DEVICE)
    assert meta is not None
    return meta


# Times


def product_tables(ceilings: Ceilings, candidates: dict[str, Callable]) -> list[Table]:
    """Every product of a layer at every number of rows, by every candidate.

    A candidate takes x and a FourBit; one that cannot do a case leaves a row that says why.
    """

    def cases() -> Iterator[Case]:
        for linear in LINEARS:
            for rows in TIMED_ROWS:
                for candidate in candidates:
                    yield {"linear": linear, "rows": rows, "candidate": candidate}

    def measure(linear: str, rows: int, candidate: str) -> Figures:
        weights, call = _weights(linear), candidates[candidate]
        x = torch.randn(rows, weights[0].shape[1], device=DEVICE).bfloat16()
        exact = x.double() @ weights[0].dense().to(BFLOAT16).double().T if rows <= 64 else None
        seconds = seconds_per_call(lambda i: call(x, weights[i]), len(weights))
        floor = ceilings.read_seconds(weights[0].nbytes + 2 * rows * sum(weights[0].shape))
        return {
            "us": seconds * 1e6, "floor_us": floor * 1e6, "over_floor": seconds / floor,
            "error": None if exact is None else error(call(x, weights[0]), exact),
        }  # fmt: skip

    return [Table("products", cases, measure)]


@lru_cache(maxsize=1)
def _weights(linear: str) -> list[FourBit]:
    """Copies of a product's weight, more than the cache holds."""
    first = FourBit.random(*LINEARS[linear])
    return [first, *(FourBit.random(*first.shape) for _ in range(copies_of(first.nbytes) - 1))]


@lru_cache(maxsize=1)
def _dense_weights(linear: str) -> list[Tensor]:
    out_features, in_features = LINEARS[linear]
    num_copies = copies_of(2 * out_features * in_features)
    return [torch.randn(LINEARS[linear], device=DEVICE).bfloat16() for _ in range(num_copies)]


def values_table(ceilings: Ceilings) -> Table:
    """The dequantiser alone, and a bfloat16 product beside it: what more rows cost."""

    def cases() -> Iterator[Case]:
        for linear in LINEARS:
            yield {"linear": linear, "what": "dequantise"}
            for rows in TIMED_ROWS:
                yield {"linear": linear, "what": "bfloat16", "rows": rows}

    def measure(linear: str, what: str, rows: int = 0) -> Figures:
        out_features, in_features = LINEARS[linear]
        dense_bytes = 2 * out_features * in_features
        if what == "dequantise":
            weights = _weights(linear)
            seconds = seconds_per_call(lambda i: weights[i].values(BFLOAT16), len(weights))
            floor = ceilings.copy_seconds(weights[0].nbytes + dense_bytes)
        else:
            dense = _dense_weights(linear)
            x = torch.randn(rows, in_features, device=DEVICE).bfloat16()
            seconds = seconds_per_call(lambda i: F.linear(x, dense[i]), len(dense))
            floor = ceilings.read_seconds(dense_bytes + 2 * rows * (in_features + out_features))
        return {"us": seconds * 1e6, "floor_us": floor * 1e6, "over_floor": seconds / floor}

    return Table("values", cases, measure)


def adapter_table(ceilings: Ceilings) -> Table:
    """Shrink and expand of every site over some adapters of rank 16, beside their bytes."""

    def cases() -> Iterator[Case]:
        for site in SITES:
            for rows in (1, 8, 32, 64) if HAS_GPU else (4,):
                for count in sorted({1, min(8, rows), rows}) if HAS_GPU else (2,):
                    yield {"site": site, "rows": rows, "adapters": count}

    def measure(site: str, rows: int, adapters: int) -> Figures:
        in_features, widths = SITES[site]
        num_bytes = adapters * RANK * sum(in_features + width for width in widths) * 2
        pools = [
            Adapters(adapters, RANK, in_features, widths, BFLOAT16)
            for _ in range(min(64, copies_of(num_bytes)))
        ]
        x = torch.randn(rows, in_features, device=DEVICE).bfloat16()
        base = torch.randn(rows, sum(widths), device=DEVICE).bfloat16()
        meta = step_of([i % adapters for i in range(rows)])
        seconds = seconds_per_call(lambda i: pools[i].apply(base, x, meta), len(pools))
        floor = ceilings.read_seconds(num_bytes + 2 * base.nbytes + x.nbytes)
        return {"us": seconds * 1e6, "floor_us": floor * 1e6, "over_floor": seconds / floor}

    return Table("adapters", cases, measure)


ATTENTION_CASES: dict[str, tuple[list[int], list[int]]] = (
    {
        "decode 1 × 1,024": ([1024], [1]),
        "decode 32 × 1,024": ([1024] * 32, [1] * 32),
        "decode 1 × 8,192": ([8192], [1]),
        "prefill 8,192": ([8192], [8192]),
        "chunk of 512 after 8,192": ([8704], [512]),
    }
    if HAS_GPU
    else {"decode": ([9, 5], [1, 1])}
)
"""Name → lengths of the rows, and how many of each row's last tokens are asked for."""


def attention_table(ceilings: Ceilings) -> Table:
    """Decode over a cache larger than any other, and the prefill of one long row."""
    heads, head_dim = ((32, 8), 128) if HAS_GPU else ((4, 2), 16)

    def measure(attention: str) -> Figures:
        lengths, new = ATTENTION_CASES[attention]
        size = 2 * sum(lengths) * heads[1] * head_dim * 2
        steps = [
            attention_step(lengths, new, heads, head_dim, BFLOAT16)
            for _ in range(min(16, copies_of(size)))
        ]
        seconds = seconds_per_call(partial(_attend, steps, head_dim**-0.5), len(steps))
        pairs = sum(n * (2 * length - n + 1) / 2 for length, n in zip(lengths, new, strict=True))
        work = 2 * heads[0] * head_dim * pairs / ceilings.multiply_adds_per_s
        floor = max(ceilings.read_seconds(size), work)
        return {"us": seconds * 1e6, "floor_us": floor * 1e6, "over_floor": seconds / floor}

    return Table("attention", lambda: [{"attention": name} for name in ATTENTION_CASES], measure)


def _attend(steps: list, scale: float, index: int) -> Tensor:
    return kernels.paged_attention(*steps[index], scale)


def attention_step(
    lengths: list[int], new_tokens: list[int], heads: tuple[int, int], head_dim: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, AttentionMeta]:  # fmt: skip
    """q, keys, values and tables of rows of `lengths`, of which the last `new_tokens` are asked."""
    blocks = [-(-n // BLOCK_SIZE) for n in lengths]
    order = torch.randperm(sum(blocks), device=DEVICE).int()
    tables = torch.zeros(len(lengths), max(blocks), dtype=torch.int32, device=DEVICE)
    for row, own in enumerate(order.split(blocks)):
        tables[row, : len(own)] = own
    positions = [p for n, new in zip(lengths, new_tokens, strict=True) for p in range(n - new, n)]
    rows = [row for row, new in enumerate(new_tokens) for _ in range(new)]
    cache = torch.randn(2, sum(blocks) * BLOCK_SIZE, heads[1], head_dim, device=DEVICE).to(dtype)
    meta = AttentionMeta(
        rows=torch.tensor(rows, dtype=torch.int32, device=DEVICE),
        positions=torch.tensor(positions, dtype=torch.int32, device=DEVICE),
        cache_slots=torch.zeros(len(rows), dtype=torch.int64, device=DEVICE),
        block_tables=tables,
        block_size=BLOCK_SIZE,
    )
    q = torch.randn(len(rows), heads[0], head_dim, device=DEVICE).to(dtype)
    return q, cache[0], cache[1], meta

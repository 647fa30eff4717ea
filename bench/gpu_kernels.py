"""The Triton kernels one by one: right against float64, then as a share of the bytes they move."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import bitsandbytes.functional as bnb
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.gpu_timing import DEVICE, HAS_GPU, copies_of, seconds_per_call
from lora_runtime import kernels
from lora_runtime.kernels import AdapterMemory, AttentionMeta, Run, Span, StepMeta, reference

BFLOAT16 = torch.bfloat16
ODD_ROWS = (1, 2, 3, 7, 133) if HAS_GPU else (1, 3)
ROWS = (1, 2, 4, 8, 16, 32, 64) if HAS_GPU else (1, 16)
LINEARS = (
    {"down": (4096, 14336), "o": (4096, 4096), "qkv": (6144, 4096), "gate_up": (28672, 4096)}
    if HAS_GPU
    else {"down": (96, 128)}
)
"""(out, in) of Llama-3.1-8B's launches."""
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

    def values(self, dtype: torch.dtype) -> Tensor:
        return kernels.four_bit_values(self.packed, self.absmax, self.code, self.shape, dtype)

    def dense(self) -> Tensor:
        """In float32, by indexing: what the kernels are checked against."""
        codes = torch.stack([self.packed >> 4, self.packed & 15], 1).flatten().long()
        scales = self.absmax.repeat_interleave(64)
        return (self.code[codes] * scales).view(self.shape)


def error(y: Tensor, expected: Tensor) -> float:
    """Largest difference relative to the largest value; infinite if anything is not finite."""
    if not torch.isfinite(y).all():
        return float("inf")
    return float((y.double() - expected).abs().max() / expected.abs().max())


def checks() -> dict[str, float]:
    """Relative errors by name, with what kernels allocate full of NaN. bfloat16's half step is
    at most 2⁻⁸ = 0.0039 of a value.
    """
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills what is allocated with NaN
    try:
        return {name: error(*pair) for name, pair in _pairs()}
    finally:
        torch.use_deterministic_algorithms(False)


def _pairs() -> Iterator[tuple[str, tuple[Tensor, Tensor]]]:
    weight = FourBit.random(1000 if HAS_GPU else 40, 1088 if HAS_GPU else 192)
    exact = weight.dense()
    for dtype in (BFLOAT16, torch.float32):
        name = str(dtype).removeprefix("torch.")
        rounded = exact.to(dtype)
        yield f"nf4 values {name}", (weight.values(dtype), rounded.double())
        for rows in (n for n in ODD_ROWS if n <= 64):
            x = torch.randn(rows, weight.shape[1], device=DEVICE).to(dtype)
            yield f"nf4 product {name} {rows}", (weight.product(x), x.double() @ rounded.double().T)
        for rows in ODD_ROWS:
            for kind in ("distinct", "uniform", "zipf", "identical"):
                y, expected = adapters_and_oracle(owners(kind, rows), 272, 336, dtype)
                yield f"adapters {name} {kind} {rows}", (y, expected)
        for lengths in ([1], [5, 1, 33], [1, 1, 200]):
            yield f"attention {name} {lengths}", attention_and_oracle(lengths, dtype)


def owners(kind: str, num_rows: int) -> list[int]:
    """The adapter of every row at a popularity."""
    by_rank = {
        "distinct": lambda i: i,
        "uniform": lambda i: i % max(1, int(num_rows**0.5)),
        "zipf": lambda i: int((num_rows / (i + 1)) ** 0.5) - 1,
        "identical": lambda i: 0,
    }[kind]
    return [by_rank(i) for i in range(num_rows)]


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
        runs, offset = [], 0
        for own in per_run:
            starts = [offset + i * own for i in range(count)]
            runs.append(
                [[Run(rank=rank, a=start, b=start + rank * in_features)] for start in starts]
            )
            offset += count * own
        self.runs = torch.tensor(runs, device=DEVICE)

    def apply(self, base: Tensor, x: Tensor, meta: StepMeta) -> Tensor:
        return kernels.apply_stacked_adapters(
            base, x, None, self.memory, self.runs, meta, self.widths
        )

    def dense(self, slot: int, in_features: int) -> Tensor:
        """ΔW (out, in) float64 of the first module."""
        run = Run(*self.runs[0, slot, 0].tolist())
        flat, width = self.memory.weights.double(), self.widths[0]
        a = flat[run.a : run.a + run.rank * in_features].view(run.rank, in_features)
        b = flat[run.b : run.b + run.rank * width].view(run.rank, width)
        return b.T @ a


def step_of(row_owners: list[int]) -> StepMeta:
    """One token a row."""
    spans = [Span(slot=o, first_token=i, num_tokens=1) for i, o in enumerate(row_owners)]
    meta = StepMeta.build(spans, DEVICE)
    assert meta is not None
    return meta


def adapters_and_oracle(
    row_owners: list[int], in_features: int, width: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    adapters = Adapters(max(row_owners) + 1, 12, in_features, (width,), dtype)
    x = torch.randn(len(row_owners), in_features, device=DEVICE).to(dtype)
    base = torch.randn(len(row_owners), width, device=DEVICE).to(dtype)
    expected = base.double()
    for row, owner in enumerate(row_owners):
        expected[row] += adapters.dense(owner, in_features) @ x[row].double()
    return adapters.apply(base, x, step_of(row_owners)), expected


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
        slot_mapping=torch.zeros(len(rows), dtype=torch.int64, device=DEVICE),
        block_tables=tables,
        block_size=BLOCK_SIZE,
    )
    q = torch.randn(len(rows), heads[0], head_dim, device=DEVICE).to(dtype)
    return q, cache[0], cache[1], meta


def attention_and_oracle(lengths: list[int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    q, keys, values, meta = attention_step(lengths, lengths, (8, 2), 64, dtype)
    y = kernels.paged_attention(q, keys, values, meta, 0.125)
    oracle = reference.paged_attention(
        q.double(), keys.double(), values.double(), meta, 0.125, None, None
    )
    return y, oracle


def product_times(bandwidth: float) -> list[dict[str, object]]:
    """Every linear of the model at every number of rows: ours, bfloat16, dequantised first."""
    found = []
    for name, (out_features, in_features) in LINEARS.items():
        weights = [FourBit.random(out_features, in_features)]
        num = copies_of(weights[0].nbytes)
        weights += [FourBit.random(out_features, in_features) for _ in range(num - 1)]
        dense = [
            weights[0].values(BFLOAT16).clone() for _ in range(copies_of(weights[0].nbytes * 4))
        ]
        for rows in ROWS:
            x = torch.randn(rows, in_features, device=DEVICE).bfloat16()
            floor = (weights[0].nbytes + rows * (in_features + out_features) * 2) / bandwidth
            ours = seconds_per_call(lambda i: weights[i].product(x), num)  # noqa: B023
            plain = seconds_per_call(lambda i: F.linear(x, dense[i]), len(dense))  # noqa: B023
            first = seconds_per_call(
                lambda i: F.linear(x, weights[i].values(BFLOAT16)),  # noqa: B023
                num,
            )
            found.append(
                {
                    "linear": name, "rows": rows, "floor_us": floor * 1e6, "nf4_us": ours * 1e6,
                    "bf16_us": plain * 1e6, "dequantise_first_us": first * 1e6,
                    "floor_share": floor / ours,
                }
            )  # fmt: skip
    return found


def adapter_times(bandwidth: float) -> list[dict[str, object]]:
    """q, k and v at once for 32 rows over some adapters of rank 16, beside their bytes."""
    in_features, widths = (4096, (4096, 1024, 1024)) if HAS_GPU else (64, (64, 32, 32))
    rows, found = 32 if HAS_GPU else 4, []
    for count in (1, 4, 8, 32) if HAS_GPU else (2,):
        num_bytes = count * 16 * sum(in_features + width for width in widths) * 2
        pools = [
            Adapters(count, 16, in_features, widths, BFLOAT16)
            for _ in range(min(64, copies_of(num_bytes)))
        ]
        x = torch.randn(rows, in_features, device=DEVICE).bfloat16()
        base = torch.randn(rows, sum(widths), device=DEVICE).bfloat16()
        meta = step_of([i % count for i in range(rows)])
        seconds = seconds_per_call(lambda i: pools[i].apply(base, x, meta), len(pools))  # noqa: B023
        moved = num_bytes + 2 * (base.nbytes + x.nbytes)
        found.append({"adapters": count, "us": seconds * 1e6, "floor_us": moved / bandwidth * 1e6})
    return found


def _attend(steps: list, scale: float, index: int) -> Tensor:
    return kernels.paged_attention(*steps[index], scale)


def attention_times(bandwidth: float, rate: float) -> list[dict[str, object]]:
    """Decode over a cache larger than any other, and the prefill of one long row."""
    heads, head_dim = ((32, 8), 128) if HAS_GPU else ((4, 2), 16)
    cases = {
        "decode 32 × 1,024": ([1024] * 32, [1] * 32),
        "decode 1 × 8,192": ([8192], [1]),
        "prefill 8,192": ([8192], [8192]),
    }
    found = []
    for name, (lengths, new) in (cases if HAS_GPU else {"decode": ([9, 5], [1, 1])}).items():
        size = 2 * sum(lengths) * heads[1] * head_dim * 2
        steps = [
            attention_step(lengths, new, heads, head_dim, BFLOAT16)
            for _ in range(min(16, copies_of(size)))
        ]
        call = partial(_attend, steps, head_dim**-0.5)
        pairs = sum(n * (2 * length - n + 1) / 2 for length, n in zip(lengths, new, strict=True))
        work = 2 * heads[0] * head_dim * pairs / rate
        found.append(
            {
                "case": name, "us": seconds_per_call(call, len(steps)) * 1e6,
                "floor_us": max(size / bandwidth, work) * 1e6,
            }
        )  # fmt: skip
    return found

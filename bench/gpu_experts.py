"""Products of a mixture's experts, and adapters on them: right against float64, then beside the
bytes of the experts and blocks that tokens chose.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.gpu_kernels import (
    BFLOAT16,
    FORMATS,
    RANK,
    EightBit,
    FourBit,
    error,
    owners_of,
)
from bench.gpu_rows import Case, Figures, Table
from bench.gpu_timing import DEVICE, HAS_GPU, Ceilings, copies_of, seconds_per_call
from lora_runtime import kernels
from lora_runtime.base.model.routing import Routing
from lora_runtime.kernels import AdapterMemory, ExpertPairs, Extent, Span, StepMeta

NUM_EXPERTS, NUM_CHOSEN = (128, 8) if HAS_GPU else (6, 2)
"""Qwen3-30B-A3B's: of a layer, and of a token."""
LINEARS = (
    {"gate_up": (1536, 2048), "down": (2048, 768)} if HAS_GPU else {"down": (96, 128)}
)  # fmt: skip
"""(out, in) of one of its experts."""
ODD_SHAPE = (1000, 1088) if HAS_GPU else (40, 192)
CHECKED_TOKENS = (1, 3, 33, 133) if HAS_GPU else (1, 5)
TIMED_TOKENS = (1, 8, 32, 64) if HAS_GPU else (3,)
NUM_ADAPTERS = 8
TABLES = ("tokens", "slots", "replicas", "weights", "segment_starts")
"""Of a StepMeta."""


@dataclass(frozen=True)
class Choice:
    """What tokens chose, and the adapters on their pairs, if any. Made on the host, so that how
    many rows an expert has is known there too; what the kernels read is on the device.

    bounds: where each expert's rows of x begin; segments: slot, expert and rows of every part of
    the pairs that one adapter's block acts on.
    """

    starts: Tensor
    bounds: list[int]
    meta: StepMeta | None
    extents: Tensor | None
    segments: list[tuple[int, int, Tensor]]

    @property
    def num_pairs(self) -> int:
        return self.bounds[-1]

    @property
    def num_experts_read(self) -> int:
        return sum(first < end for first, end in pairwise(self.bounds))


class Blocks:
    """Random adapters of one rank in a pool, a block of A and of B' for every expert."""

    def __init__(self, count: int, rank: int, shape: tuple[int, int], dtype: torch.dtype) -> None:
        self.rank, (out_features, in_features) = rank, shape
        half, own = (NUM_EXPERTS * rank * size for size in (in_features, sum(shape)))
        weights = (torch.randn(count * own, device=DEVICE) / in_features**0.5).to(dtype)
        vectors = torch.empty(0, device=DEVICE)
        self.shape = (out_features, in_features)
        self.memory = AdapterMemory(weights, vectors, vectors.int(), rank, 16)
        self.starts = [(i * own, i * own + half) for i in range(count)]
        rows = [[Extent(rank=rank, a=a, b=b)] for a, b in self.starts]
        self.table = torch.tensor(rows)

    def factors(self, slot: int, expert: int) -> tuple[Tensor, Tensor]:
        """A (rank, in) and B' (rank, out) of one expert."""
        sizes = reversed(self.shape)
        found = []
        for start, size in zip(self.starts[slot], sizes, strict=True):
            block = self.rank * size
            found.append(self.memory.weights[start + expert * block :][:block].view(-1, size))
        return found[0], found[1]


def choice_of(num_tokens: int, turn: int, blocks: Blocks | None, owners: list[int]) -> Choice:
    """Random experts of every token but the first, which takes others in every turn: of one token
    the cache would hold them else. `owners`: each token's adapter.
    """
    chosen = torch.rand(num_tokens, NUM_EXPERTS).topk(NUM_CHOSEN).indices
    chosen[0] = (torch.arange(NUM_CHOSEN) + turn * NUM_CHOSEN) % NUM_EXPERTS
    routing = Routing.of(chosen, NUM_EXPERTS)
    starts, bounds = routing.starts.to(DEVICE), routing.starts.tolist()
    if blocks is None:
        return Choice(starts, bounds, None, None, [])
    spans = [Span(slot=owner, first_token=i, num_tokens=1) for i, owner in enumerate(owners)]
    meta = StepMeta.build(spans)
    assert meta is not None
    pairs = ExpertPairs.of(meta, routing.places, routing.experts, NUM_EXPERTS)
    out_features, in_features = blocks.shape
    extents = pairs.extents(blocks.table, in_features, out_features).to(DEVICE)
    edges = pairs.meta.segment_starts.tolist()
    rows = [pairs.meta.tokens[first:end].long().to(DEVICE) for first, end in pairwise(edges)]
    names = zip(pairs.slots.tolist(), pairs.experts.tolist(), rows, strict=True)
    tables = {name: getattr(pairs.meta, name).to(DEVICE) for name in TABLES}
    return Choice(starts, bounds, replace(pairs.meta, **tables, derived={}), extents, list(names))


def by_kernel(
    weight: FourBit | EightBit, blocks: Blocks | None, x: Tensor, choice: Choice
) -> Tensor:
    """W_e x of every pair, and its adapter's part."""
    starts, out_features = choice.starts, weight.shape[0] // NUM_EXPERTS
    if isinstance(weight, FourBit):
        y = kernels.grouped_four_bit_product(
            x, starts, weight.packed, weight.absmax, weight.code, out_features
        )
    else:
        y = kernels.grouped_int8_product(x, starts, weight.codes, weight.absmax)
    if blocks is None:
        return y
    assert choice.meta is not None and choice.extents is not None
    return kernels.apply_adapters(y, x, None, blocks.memory, choice.extents, choice.meta)


def in_torch(dense: Tensor, blocks: Blocks | None, x: Tensor, choice: Choice) -> Tensor:
    """The same by one product for each expert and one for each block; dense (E, out, in)."""
    parts = [
        F.linear(x[first:end], dense[expert])
        for expert, (first, end) in enumerate(pairwise(choice.bounds))
        if first < end
    ]
    y = torch.cat(parts)
    for slot, expert, rows in choice.segments if blocks else ():
        a, b = (part.to(x.dtype) for part in blocks.factors(slot, expert))
        y.index_add_(0, rows, x.index_select(0, rows) @ a.T @ b)
    return y


def check_cases() -> Iterator[Case]:
    """Odd numbers of tokens in both dtypes and formats, with adapters and without."""
    for dtype in ("bfloat16", "float32"):
        for tokens in CHECKED_TOKENS:
            for format_name in FORMATS:
                case = {"kernel": "experts", "dtype": dtype, "tokens": tokens}
                for popularity in ("", "distinct", "uniform"):
                    yield {**case, "format_name": format_name, "popularity": popularity}


def check(kernel: str, dtype: str, tokens: int, format_name: str, popularity: str) -> Figures:
    """Relative error against float64; no popularity: without adapters."""
    out_features, in_features = ODD_SHAPE
    compute = getattr(torch, dtype)
    weight = FORMATS[format_name].random(NUM_EXPERTS * out_features, in_features)
    owners = owners_of(popularity, tokens) if popularity else []
    blocks = Blocks(max(owners) + 1, 12, ODD_SHAPE, compute) if owners else None
    choice = choice_of(tokens, 1, blocks, owners)
    x = torch.randn(choice.num_pairs, in_features, device=DEVICE).to(compute)
    dense = weight.dense().to(compute).double().view(NUM_EXPERTS, *ODD_SHAPE)
    expected = in_torch(dense, blocks, x.double(), choice)
    return {"error": error(by_kernel(weight, blocks, x, choice), expected)}


CANDIDATES: dict[str, Callable[..., Tensor]] = {"triton": by_kernel, "bfloat16": in_torch}
"""NF4 codes of all experts in one launch; bfloat16 weights, an expert a product."""


def experts_table(ceilings: Ceilings) -> Table:
    """Both products of a layer, each pair under one of 8 adapters of rank 16 or none."""

    def cases() -> Iterator[Case]:
        for linear in LINEARS:
            for tokens in TIMED_TOKENS:
                for adapters in (0, min(tokens, NUM_ADAPTERS)):
                    for candidate in CANDIDATES:
                        case = {"linear": linear, "tokens": tokens, "adapters": adapters}
                        yield {**case, "candidate": candidate}

    def measure(linear: str, tokens: int, adapters: int, candidate: str) -> Figures:
        out_features, in_features = shape = LINEARS[linear]
        weight: FourBit | Tensor = FourBit.random(NUM_EXPERTS * out_features, in_features)
        expert_bytes = weight.nbytes // NUM_EXPERTS
        if candidate == "bfloat16":
            weight = torch.randn(NUM_EXPERTS, *shape, device=DEVICE, dtype=BFLOAT16)
        blocks = Blocks(adapters, RANK, shape, BFLOAT16) if adapters else None
        owners = [i % adapters for i in range(tokens)] if adapters else []
        num_calls = min(32, copies_of(tokens * NUM_CHOSEN * expert_bytes))
        choices = [choice_of(tokens, turn, blocks, owners) for turn in range(num_calls)]
        x = torch.randn(tokens * NUM_CHOSEN, in_features, device=DEVICE).to(BFLOAT16)
        call = CANDIDATES[candidate]
        seconds = seconds_per_call(lambda i: call(weight, blocks, x, choices[i]), num_calls)
        moved = 2 * len(x) * (in_features + (3 if adapters else 1) * out_features)
        for choice in choices:
            moved += choice.num_experts_read * expert_bytes / num_calls
            moved += 2 * len(choice.segments) * RANK * sum(shape) / num_calls
        floor = ceilings.read_seconds(moved)
        return {"us": seconds * 1e6, "floor_us": floor * 1e6, "over_floor": seconds / floor}

    return Table("experts", cases, measure)

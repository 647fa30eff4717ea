"""What the benchmark of serving asks for: batches, the adapters that their rows use, and the time
that the machine's own ceilings allow for them.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch

from lora_runtime.base.loader import Base
from lora_runtime.kernels import adapter_dtype

OURS, FLOOR = "loramux", "floor"
"""Names among the sides."""
ROWS = (1, 4, 8, 16, 32)
RANKS = [16] * 8 + [8, 16, 32, 64] * 8
"""Of the adapters, by their number: eight alike, then 32 that differ."""
NUM_ALIKE, NUM_ADAPTERS = 8, len(RANKS)
BASE, ONE, EIGHT, MANY, ZIPF = (
    "base", "1 adapter", "8 adapters + base", "32 adapters", "32 adapters, zipf"
)  # fmt: skip
MIXES = (BASE, ONE, EIGHT, MANY, ZIPF)
"""Which adapters the rows of a batch use: none; all the same; eight of rank 16 and the base in
turn; each another of 32 with ranks 8 to 64; or one of those 32 by Zipf's law."""


def owners(mix: str, num_rows: int) -> list[int | None]:
    """The adapter of each row, None for the base."""
    if mix == BASE:
        return [None] * num_rows
    if mix == ONE:
        return [0] * num_rows
    if mix == EIGHT:
        in_turn = [*range(NUM_ALIKE), None]
        return [in_turn[row % len(in_turn)] for row in range(num_rows)]
    many = range(NUM_ALIKE, NUM_ADAPTERS)
    if mix == MANY:
        return [many[row % len(many)] for row in range(num_rows)]
    weights = [1 / place for place in range(1, len(many) + 1)]
    return [*random.Random(0).choices(many, weights, k=num_rows)]


@dataclass(frozen=True)
class Batch:
    """Requests that arrive together: `num_rows` of `prompt_tokens` + `new_tokens`."""

    mix: str
    num_rows: int
    prompt_tokens: int
    new_tokens: int
    vocab_size: int

    def prompts(self) -> list[list[int]]:
        """Random tokens, the same whenever this batch is asked for."""
        generator = torch.Generator().manual_seed(self.num_rows)
        shape = self.num_rows, self.prompt_tokens
        return torch.randint(5, self.vocab_size, shape, generator=generator).tolist()

    def owners(self) -> list[int | None]:
        return owners(self.mix, self.num_rows)

    @property
    def num_output_tokens(self) -> int:
        return self.num_rows * self.new_tokens


@dataclass(frozen=True)
class Ceilings:
    """What this machine does at most, measured in the same round as what is held against it."""

    bytes_per_s: float
    multiply_adds_per_s: float

    def seconds(self, base: Base, batch: Batch) -> float:
        """The least time of a batch: its prompts' multiply-adds, then for each step the longer of
        reading (the packed base, the output layer, each distinct adapter, keys and values) and
        multiplying.
        """
        spec = base.spec
        linear_size = sum(s.in_features * s.out_features for s in spec.linears.values())
        head_size = spec.hidden_size * spec.vocab_size
        adapter_bytes, adapter_work = _of_adapters(base, batch)
        moved = (
            linear_size * 9 / 16  # NF4: 4 bits a weight, and a float32 for each 64
            + head_size * base.dtype.itemsize
            + adapter_bytes
        )
        work = batch.num_rows * linear_size + adapter_work
        heads = batch.num_rows * head_size
        total = (batch.prompt_tokens * work + heads) / self.multiply_adds_per_s
        for position in range(1, batch.new_tokens):
            kv_tokens = batch.num_rows * (batch.prompt_tokens + position)
            read = moved + kv_tokens * base.kv_bytes_per_token()
            total += max(read / self.bytes_per_s, (work + heads) / self.multiply_adds_per_s)
        return total

    def adapter_seconds(self, base: Base, batch: Batch) -> float:
        """The same of what the adapters add, as if none of it passed while the base is multiplied:
        a base that multiplies for longer than it reads would hide all their bytes.
        """
        moved, work = _of_adapters(base, batch)
        step = max(moved / self.bytes_per_s, work / self.multiply_adds_per_s)
        return batch.prompt_tokens * work / self.multiply_adds_per_s + step * (batch.new_tokens - 1)


def _of_adapters(base: Base, batch: Batch) -> tuple[float, float]:
    """What a decode step reads of the distinct adapters in bytes, and its multiply-adds by them."""
    sides = sum(s.in_features + s.out_features for s in base.spec.linears.values())
    used = [owner for owner in batch.owners() if owner is not None]
    size = adapter_dtype(base.device, base.dtype).itemsize
    return sum(RANKS[o] for o in {*used}) * sides * size, sum(RANKS[o] for o in used) * sides

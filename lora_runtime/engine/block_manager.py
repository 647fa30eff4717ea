"""Which cache blocks belong to which sequence. Bookkeeping only: ints, no tensors."""

from __future__ import annotations

from lora_runtime.core import Sequence


class BlockManager:
    """A free list of `num_blocks` blocks of `block_size` tokens each."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks, self.block_size = num_blocks, block_size
        self._free = list(reversed(range(num_blocks)))

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_used(self) -> int:
        return self.num_blocks - self.num_free

    def num_missing(self, sequence: Sequence, num_tokens: int) -> int:
        """Blocks that `sequence` lacks to hold `num_tokens` tokens."""
        return max(0, -(-num_tokens // self.block_size) - len(sequence.block_table))

    def grow(self, sequence: Sequence, num_tokens: int) -> bool:
        """Extend the block table to hold `num_tokens` tokens; False if it cannot."""
        missing = self.num_missing(sequence, num_tokens)
        if missing > self.num_free:
            return False
        sequence.block_table.extend(self._free.pop() for _ in range(missing))
        return True

    def release(self, sequence: Sequence) -> None:
        """Give back all blocks of `sequence`."""
        self._free.extend(reversed(sequence.block_table))
        sequence.block_table.clear()

    def check_integrity(self, owners: list[Sequence]) -> None:
        """Assert that every block is free or owned by exactly one of `owners`."""
        owned = [block for sequence in owners for block in sequence.block_table]
        assert sorted(owned + self._free) == list(range(self.num_blocks))

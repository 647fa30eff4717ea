"""Random operations on the block manager; every block always has exactly one owner."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from lora_runtime.core import Request, Sequence
from lora_runtime.engine.block_manager import BlockManager


def sequence() -> Sequence:
    return Sequence.of(Request(request_id="r", prompt_token_ids=(1,)))


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 40)), max_size=60))
def test_blocks_are_never_lost_or_shared(operations):
    blocks = BlockManager(num_blocks=12, block_size=4)
    owners = [sequence() for _ in range(4)]
    for index, num_tokens in operations:
        owner, free = owners[index], blocks.num_free
        if num_tokens == 0:
            blocks.release(owner)
            assert owner.block_table == []
        else:
            missing = blocks.num_missing(owner, num_tokens)
            assert blocks.grow(owner, num_tokens) == (missing <= free)
            if missing <= free:
                assert len(owner.block_table) * 4 >= num_tokens
            else:
                assert blocks.num_free == free
        blocks.check_integrity(owners)
    for owner in owners:
        blocks.release(owner)
    assert blocks.num_free == 12 and blocks.num_used == 0


def test_blocks_are_taken_only_as_needed():
    blocks, owner = BlockManager(num_blocks=3, block_size=16), sequence()
    assert blocks.grow(owner, 16) and len(owner.block_table) == 1
    assert blocks.grow(owner, 17) and len(owner.block_table) == 2
    assert blocks.grow(owner, 5) and len(owner.block_table) == 2
    assert not blocks.grow(owner, 49)

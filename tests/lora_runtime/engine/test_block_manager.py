"""Random operations on the block manager against a plain record of what every block holds."""

from __future__ import annotations

from collections import Counter

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from lora_runtime.core import AdapterUse, Request, Row
from lora_runtime.engine.block_manager import BlockManager

NUM_BLOCKS, BLOCK_SIZE = 12, 2


def row(tokens=(1,), num_planes=1, **options) -> Row:
    request = Request(request_id="r", prompt_token_ids=tuple(tokens), **options)
    layer_map = None if num_planes == 1 else tuple(range(num_planes))
    return Row.of(request, layer_map, num_planes)


def begin(blocks: BlockManager, new: Row) -> int:
    """Share what is found and compute the rest; returns the number of tokens found."""
    blocks.share(new, blocks.find(new))
    num_found = new.num_computed_tokens
    assert blocks.grow(new, len(new.token_ids))
    new.num_computed_tokens = len(new.token_ids)
    blocks.publish(new, new.num_computed_tokens)
    return num_found


def history(owner: Row, position: int, plane: int):
    """All that the keys and values of one token depend on, and who may share them."""

    def active(at):
        uses = owner.request.adapters
        return sorted((use.digest, use.weight) for use in uses if at >= use.start_position)

    tokens = [(owner.token_ids[at], active(at)) for at in range(position + 1)]
    return repr((owner.request.cache_salt, owner.layer_map, plane, tokens))


ADAPTERS = st.lists(
    st.builds(
        AdapterUse,
        digest=st.sampled_from("ab"),
        weight=st.sampled_from([1.0, 0.0]),
        start_position=st.integers(0, 5),
    ),
    max_size=1,
)


class Blocks(RuleBasedStateMachine):
    """`memory[block]` is what was written there; `public` is the content that may be found."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = BlockManager(NUM_BLOCKS, BLOCK_SIZE)
        self.owners: list[Row] = []
        self.memory = [[None] * BLOCK_SIZE for _ in range(NUM_BLOCKS)]
        self.public: dict[tuple, int] = {}
        self.payers: dict[int, str] = {}
        """Findable block → the `cache_owner` of who published it."""
        self.num_offered: dict[Row, int] = {}

    def contents(self, owner, index):
        """For each plane of a token block, what its tokens must hold."""
        positions = range(index * BLOCK_SIZE, (index + 1) * BLOCK_SIZE)
        for plane in range(owner.num_planes):
            yield tuple(history(owner, position, plane) for position in positions)

    def unused(self):
        used = {block for owner in self.owners for block in owner.block_table}
        return set(range(NUM_BLOCKS)) - used

    @rule(
        tokens=st.lists(st.integers(0, 1), min_size=1, max_size=9),
        adapters=ADAPTERS,
        num_planes=st.sampled_from([1, 1, 1, 2]),
        salt=st.sampled_from(["", "", "", "tenant"]),
        payer=st.sampled_from(["", "one", "two"]),
    )
    def start(self, tokens, adapters, num_planes, salt, payer):
        new = row(tokens, num_planes, adapters=tuple(adapters), cache_salt=salt, cache_owner=payer)
        found, expected = self.blocks.find(new), []
        for index in range((len(tokens) - 1) // BLOCK_SIZE):
            here = [self.public.get(content) for content in self.contents(new, index)]
            if None in here:
                break
            expected += here
        assert found == expected
        total = -(-len(tokens) // BLOCK_SIZE) * num_planes
        fits = len(self.unused() - set(found)) >= total - len(found)
        assert self.blocks.has_room(new, found) == fits
        if fits:
            self.blocks.share(new, found)
            self.owners.append(new)
            self.num_offered[new] = len(found) // num_planes
            assert new.num_computed_tokens * num_planes == len(found) * BLOCK_SIZE < total * 2

    @rule(data=st.data(), num_tokens=st.integers(1, 6), output=st.integers(0, 1))
    def compute(self, data, num_tokens, output):
        if not self.owners:
            return
        owner = data.draw(st.sampled_from(self.owners))
        start = owner.num_computed_tokens
        stop = min(start + num_tokens, len(owner.token_ids))
        if self.grow(owner, stop):
            for position in range(start, stop):
                self.write(owner, position)
            owner.num_computed_tokens = stop
            self.blocks.publish(owner, stop)
            self.record(owner)
            if stop == len(owner.token_ids):
                owner.token_ids.append(output)

    def grow(self, owner, num_tokens):
        before, free = list(owner.block_table), self.unused()
        missing = self.blocks.num_missing(owner, num_tokens)
        has_grown = self.blocks.grow(owner, num_tokens)
        assert has_grown == (missing <= len(free))
        taken = owner.block_table[len(before) :]
        assert owner.block_table[: len(before)] == before
        assert len(taken) == missing * has_grown and set(taken) <= free
        cached = {block for block in self.public.values() if block in free}
        num_evicted = len(cached & set(taken))
        assert num_evicted == max(0, len(taken) - len(free - cached)), "empty blocks go first"
        for block in taken:
            if block in cached:
                held = Counter(self.payers[other] for other in cached)
                assert held[self.payers[block]] == max(held.values()), "of who has most"
                cached.remove(block)
        self.public = {c: block for c, block in self.public.items() if block not in taken}
        return has_grown

    def write(self, owner, position):
        for plane in range(owner.num_planes):
            block = owner.block_table[position // BLOCK_SIZE * owner.num_planes + plane]
            assert sum(block in other.block_table for other in self.owners) == 1
            assert block not in self.public.values(), "a findable block is written"
            self.memory[block][position % BLOCK_SIZE] = history(owner, position, plane)

    def record(self, owner):
        """Each block is offered once, when it is full; of equal ones the first is found."""
        for index in range(self.num_offered[owner], owner.num_computed_tokens // BLOCK_SIZE):
            for plane, content in enumerate(self.contents(owner, index)):
                block = owner.block_table[index * owner.num_planes + plane]
                if self.public.setdefault(content, block) == block:
                    self.payers[block] = owner.request.cache_owner
            self.num_offered[owner] = index + 1

    @rule(data=st.data(), is_suspect=st.booleans())
    def release(self, data, is_suspect):
        if self.owners:
            owner = data.draw(st.sampled_from(self.owners))
            mine = set(owner.block_table)
            if is_suspect:
                self.blocks.retract(owner)
                self.public = {c: b for c, b in self.public.items() if b not in mine}
            self.blocks.release(owner)
            self.owners.remove(owner)
            assert owner.block_table == []

    @invariant()
    def every_block_holds_what_its_users_and_its_key_say(self):
        self.blocks.check_integrity(self.owners)
        assert self.blocks.num_free == len(self.unused())
        for owner in self.owners:
            for position in range(owner.num_computed_tokens):
                for plane in range(owner.num_planes):
                    block = owner.block_table[position // BLOCK_SIZE * owner.num_planes + plane]
                    held = self.memory[block][position % BLOCK_SIZE]
                    assert held == history(owner, position, plane)
        for content, block in self.public.items():
            assert tuple(self.memory[block]) == content


Blocks.TestCase.settings = settings(max_examples=150, stateful_step_count=30)
TestBlocks = Blocks.TestCase


def test_blocks_are_taken_only_as_needed():
    blocks, owner = BlockManager(num_blocks=3, block_size=16), row()
    assert blocks.grow(owner, 16) and len(owner.block_table) == 1
    assert blocks.grow(owner, 17) and len(owner.block_table) == 2
    assert blocks.grow(owner, 5) and len(owner.block_table) == 2
    assert not blocks.grow(owner, 49)


def test_a_deeper_row_takes_a_block_for_each_plane():
    blocks, owner = BlockManager(num_blocks=7, block_size=4), row(num_planes=3)
    assert blocks.num_missing(owner, 5) == 6
    assert blocks.grow(owner, 4) and len(owner.block_table) == 3
    assert blocks.grow(owner, 8) and len(set(owner.block_table)) == 6
    assert not blocks.grow(owner, 9) and blocks.num_free == 1
    blocks.release(owner)
    assert blocks.num_free == 7


def test_the_last_token_is_never_found():
    blocks = BlockManager(num_blocks=20, block_size=4)
    begin(blocks, row(range(12)))
    found = {n: len(blocks.find(row(range(n)))) for n in (4, 5, 8, 9, 12, 13, 20)}
    assert found == {4: 0, 5: 1, 8: 1, 9: 2, 12: 2, 13: 3, 20: 3}


def test_the_least_recently_used_prefix_is_evicted_from_its_end():
    blocks = BlockManager(num_blocks=6, block_size=2)
    old, new = row([1] * 6), row([2] * 6)
    for owner in (old, new):
        begin(blocks, owner)
    blocks.release(old)
    blocks.release(new)
    blocks.check_integrity([])
    again = row([1] * 7)
    begin(blocks, again)  # uses the old prefix, and evicts the end of the newer one
    blocks.release(again)
    assert len(blocks.find(row([2] * 7))) == 2
    big = row([3] * 8)
    assert begin(blocks, big) == 0
    assert blocks.find(row([2] * 7)) == []
    assert len(blocks.find(row([1] * 7))) == 2


def test_many_prompts_of_one_owner_leave_the_prefixes_of_another():
    blocks = BlockManager(num_blocks=12, block_size=2)
    modest = row([1] * 6, cache_owner="modest", cache_salt="m")
    begin(blocks, modest)
    blocks.release(modest)
    for seed in range(30):
        greedy = row([2 + seed] * 8, cache_owner="greedy", cache_salt=f"g{seed}")
        begin(blocks, greedy)
        blocks.release(greedy)
        blocks.check_integrity([])
    assert len(blocks.find(row([1] * 7, cache_salt="m"))) == 3
    assert len(blocks.find(row([31] * 9, cache_salt="g29"))) == 4, "its own newest is there"
    assert blocks.find(row([2] * 9, cache_salt="g0")) == []


def test_of_equal_blocks_the_first_is_found_and_the_other_stays_private():
    blocks = BlockManager(num_blocks=8, block_size=2)
    first, second = row([1] * 4), row([1] * 4)
    for owner in (first, second):  # both begin before either is published
        blocks.share(owner, blocks.find(owner))
        assert blocks.grow(owner, 4)
        owner.num_computed_tokens = 4
    for owner in (first, second):
        blocks.publish(owner, 4)
    assert set(first.block_table).isdisjoint(second.block_table)
    assert blocks.find(row([1] * 5)) == first.block_table
    blocks.release(first)
    assert len(blocks.find(row([1] * 5))) == 2
    blocks.check_integrity([second])


def test_one_lost_plane_makes_a_miss():
    blocks = BlockManager(num_blocks=4, block_size=2)
    deep = row([1, 2], num_planes=3)
    begin(blocks, deep)
    assert len(blocks.find(row([1, 2, 3], num_planes=3))) == 3
    blocks.release(deep)
    begin(blocks, row([5, 6, 7]))  # the empty block, then one plane
    assert blocks.find(row([1, 2, 3], num_planes=3)) == []


def test_counters_and_the_switch():
    blocks = BlockManager(num_blocks=20, block_size=2)
    assert [begin(blocks, row([1] * 7)) for _ in range(3)] == [0, 6, 6]
    assert (blocks.num_prefix_queries, blocks.num_prefix_hits) == (21, 12)
    off = BlockManager(num_blocks=20, block_size=2, enable_prefix_cache=False)
    assert [begin(off, row([1] * 7)) for _ in range(3)] == [0, 0, 0]
    assert off.num_prefix_hits == 0

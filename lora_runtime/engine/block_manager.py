"""Which cache blocks belong to which rows. Bookkeeping only: ints, no tensors.

Full blocks are found again by their content and shared, read-only, by reference count. A block
without users stays findable until its space is needed: blocks without content go first, then the
least recently used of the owner who has most such blocks, so that nobody's many prompts empty the
cache of others. Source: vLLM's automatic prefix caching (PagedAttention, arXiv:2309.06180), which
knows no owners.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Sequence

from lora_runtime.core import Row
from lora_runtime.engine.block_key import BlockKey, block_key, influence_within
from lora_runtime.engine.client import StateStats

Content = tuple[BlockKey, int]
"""What a full block holds: the key of a token block, and which plane of the row's layers."""


class BlockManager:
    """`num_blocks` blocks of `block_size` tokens each, and a prefix cache over them."""

    def __init__(
        self, num_blocks: int, block_size: int, *, enable_prefix_cache: bool = True
    ) -> None:
        self.num_blocks, self.block_size = num_blocks, block_size
        self.num_prefix_queries = self.num_prefix_hits = 0
        """Tokens of all admissions (resumed rows too), and those of them found cached."""
        self._is_caching = enable_prefix_cache
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))
        self._num_users = [0] * num_blocks
        self._contents: dict[int, Content] = {}
        self._digests: dict[int, frozenset[str]] = {}
        """Block with content → the adapters that acted on its tokens or on a token before them."""
        self._cached: dict[Content, int] = {}
        self._owners: dict[int, str] = {}
        """Block with content → whose request wrote it first."""
        self._idle: dict[str, OrderedDict[int, None]] = {}
        """Owner → its blocks with content and without users, the least recently used first."""

    @property
    def num_free(self) -> int:
        """Blocks without users, those with content included."""
        return len(self._free)

    @property
    def num_used(self) -> int:
        return self.num_blocks - self.num_free

    @property
    def state_stats(self) -> StateStats | None:
        """Slots of recurrent states; None for a base without such."""
        return None

    def num_missing(self, row: Row, num_tokens: int) -> int:
        """Blocks that `row` lacks to hold `num_tokens` tokens."""
        num_token_blocks = -(-num_tokens // self.block_size)
        return max(0, num_token_blocks * row.num_planes - len(row.block_table))

    def find(self, row: Row) -> list[int]:
        """The cached blocks that hold a new row's leading tokens, in block table order.

        Whole blocks with all their planes, and never the last token: its logits are needed. None
        for a row that needs those of its prompt.
        """
        if not self._is_caching or row.lacks_prompt_logprobs:
            return []
        num_whole = (len(row.token_ids) - 1) // self.block_size
        self._extend_keys(row, num_whole)
        found: list[int] = []
        for key in row.block_keys[:num_whole]:
            contents = [(key, plane) for plane in range(row.num_planes)]
            if not all(content in self._cached for content in contents):
                break
            found.extend(self._cached[content] for content in contents)
        return found

    def has_room(
        self,
        row: Row,
        found: Sequence[int],
        leaving: Sequence[Row] = (),
    ) -> bool:
        """True when all tokens of a new row fit, its first blocks being `found`: now, or when
        the rows `leaving` have given theirs back.
        """
        uses = Counter(block for other in leaving for block in other.block_table)
        freed = {block for block, count in uses.items() if count == self._num_users[block]}
        num_idle = sum(block in self._free or block in freed for block in found)
        num_new = self.num_missing(row, len(row.token_ids)) - len(found)
        return num_idle + num_new <= self.num_free + len(freed)

    def share(self, row: Row, found: Sequence[int]) -> None:
        """Begin a new row with the blocks found for it; their tokens count as computed."""
        for block in found:
            self._free.pop(block, None)
            self._leave_idle(block)
            self._num_users[block] += 1
        row.block_table.extend(found)
        row.num_cached_blocks = len(found) // row.num_planes
        row.num_computed_tokens = row.num_cached_blocks * self.block_size
        self.num_prefix_queries += len(row.token_ids)
        self.num_prefix_hits += row.num_computed_tokens

    def grow(self, row: Row, num_tokens: int) -> bool:
        """Extend the block table to hold `num_tokens` tokens; False if it cannot."""
        missing = self.num_missing(row, num_tokens)
        if missing > self.num_free:
            return False
        row.block_table.extend(self._take() for _ in range(missing))
        return True

    def publish(self, row: Row, num_tokens: int) -> None:
        """Let other rows find the full blocks of a row's first tokens; of equal blocks the one
        that was published first stays findable.
        """
        num_whole = num_tokens // self.block_size
        if not self._is_caching or num_whole <= row.num_cached_blocks:
            return
        self._extend_keys(row, num_whole)
        for index in range(row.num_cached_blocks, num_whole):
            for plane in range(row.num_planes):
                block = row.block_table[index * row.num_planes + plane]
                content = row.block_keys[index], plane
                if self._cached.setdefault(content, block) == block:
                    self._contents[block] = content
                    self._owners[block] = row.request.cache_owner
                    self._digests[block] = _digests_before(row, (index + 1) * self.block_size)
        row.num_cached_blocks = num_whole

    def retract(self, row: Row) -> None:
        """Let no other row find the blocks of `row`, whose keys and values may be wrong."""
        for block in row.block_table:
            self._forget(block)

    def forget_adapter(self, digest: str) -> None:
        """Drop all content that depends on an adapter; no live row may use it."""
        for block in [block for block, digests in self._digests.items() if digest in digests]:
            self._forget(block)
            self._free.move_to_end(block, last=False)

    def release(self, row: Row) -> None:
        """Give back all blocks of `row`; the end of its cached prefix is evicted first."""
        for block in reversed(row.block_table):
            self._num_users[block] -= 1
            if self._num_users[block] == 0:
                self._free[block] = None
                self._free.move_to_end(block, last=block in self._contents)
                if block in self._contents:
                    self._idle.setdefault(self._owners[block], OrderedDict())[block] = None
        row.block_table.clear()
        row.num_cached_blocks = 0

    def check_integrity(self, owners: list[Row]) -> None:
        """Assert that users are counted right, unused blocks are free, and content is found."""
        users = Counter(block for row in owners for block in row.block_table)
        assert self._num_users == [users[block] for block in range(self.num_blocks)]
        assert set(self._free) == set(range(self.num_blocks)) - set(users)
        assert self._cached == {content: block for block, content in self._contents.items()}
        assert self._digests.keys() == self._owners.keys() == self._contents.keys()
        idle = {block: owner for owner, blocks in self._idle.items() for block in blocks}
        assert idle == {b: self._owners[b] for b in self._free if b in self._contents}
        assert all(self._idle.values())
        has_content = [block in self._contents for block in self._free]
        assert has_content == sorted(has_content), "a cached block would go before an empty one"

    def _take(self) -> int:
        block = next(iter(self._free))
        if block in self._contents and len(self._idle) > 1:
            most = max(self._idle.values(), key=len)
            block = next(iter(most))
        del self._free[block]
        self._forget(block)
        self._num_users[block] = 1
        return block

    def _forget(self, block: int) -> None:
        content = self._contents.pop(block, None)
        if content is not None:
            self._leave_idle(block)
            del self._cached[content], self._digests[block], self._owners[block]

    def _leave_idle(self, block: int) -> None:
        """Count a block no longer among its owner's that only make room."""
        owner = self._owners.get(block, "")
        blocks = self._idle.get(owner, OrderedDict())
        blocks.pop(block, None)
        if not blocks:
            self._idle.pop(owner, None)

    def _extend_keys(self, row: Row, num_blocks: int) -> None:
        """Compute the keys of a row's first `num_blocks` token blocks, each from the one before."""
        keys, request = row.block_keys, row.request
        for index in range(len(keys), num_blocks):
            start, stop = index * self.block_size, (index + 1) * self.block_size
            influence = influence_within(request, start, stop, row.layer_map)
            parent = keys[-1] if keys else None
            tokens = row.token_ids[start:stop]
            keys.append(block_key(parent, tokens, influence, request.cache_salt))


def _digests_before(row: Row, stop: int) -> frozenset[str]:
    uses = row.request.adapters
    return frozenset(use.digest for use in uses if use.start_position < stop)

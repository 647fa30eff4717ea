"""Blocks and recurrent states together, for bases with recurrent layers. Ints only, no tensors.

A running row has a slot of the state pool for the state behind its computed tokens. Further slots
hold *snapshots*: states behind the leading tokens of a block's end, kept under the key of that
block, which stands for every token up to there and for all that acted on them. A new row begins at
the last block end where both the blocks before it and a snapshot are found; what the cache holds of
keys and values beyond is computed again.

A state cannot be cut back to an earlier token as keys and values can, and takes as much memory as
those of hundreds to thousands of tokens, so not every block end can have one. Snapshots are made at

- every SNAPSHOT_INTERVAL tokens: whatever two prompts share, the second finds all but the last
  part of it. With one at the end of a prompt alone, as in engines that cut prompts at blocks and
  keep the last, requests find nothing as soon as that lies in what is their own.
- the last whole block before the end of a prompt: for the same prompt again, and the next turn. It
  gives way to that of the output, unless somebody has begun with it.
- the last block whose keys and values a new row found, where no snapshot was found there: that is
  where its prompt leaves what another began with, say the end of a system prompt. The third request
  of a kind finds all of it.
- the last whole block of an output: the next turn of a conversation begins with it. It moves along
  while the row runs, so a row has one.

A step is not cut for them: recurrent layers alone run such a chunk in several pieces.

When slots are short, a snapshot goes that is not known to be shared, as fewer than SHARED_BY rows
began with it: of the owner who has most of them the one unused longest; only where all are shared,
one of those. So a hundred long prompts of one kind do not push out the one system prompt that all
others begin with, while the end of a conversation's turn, with which the next turn begins and
nobody else, goes before that of the next. One whose block is evicted goes with it.
Sources: what vLLM's and SGLang's issues report of snapshots at ends of prompts alone, and of dense
ones that fill the cache.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence, Set
from dataclasses import dataclass

from lora_runtime.config import EngineConfig
from lora_runtime.core import Row
from lora_runtime.engine.block_key import BlockKey
from lora_runtime.engine.block_manager import BlockManager
from lora_runtime.engine.client import StateStats

SNAPSHOT_INTERVAL = 128
"""Tokens; rounded up to whole blocks."""
SHARED_BY = 2
LEAST_SNAPSHOTS = 16
"""Slots for snapshots where no setting says how many, however few rows run at once."""


@dataclass(slots=True)
class _Snapshot:
    slot: int
    owner: str
    last_use: int
    """By a clock that counts what is done with snapshots."""
    num_uses: int = 0
    """Rows that have begun with it."""


class Snapshots:
    """Which of `slots` hold states of which content."""

    def __init__(self, slots: range) -> None:
        self._slots = slots
        self._free = list(reversed(slots))
        self._reserved: set[int] = set()
        """Slots that planned or running steps write to, for rows that have not published them."""
        self._readers: Counter[int] = Counter()
        """Slot → rows that begin with it and have not done their first tokens."""
        self._by_key: dict[BlockKey, _Snapshot] = {}
        self._clock = 0
        self.num_hits = self.num_evictions = 0

    def __contains__(self, key: BlockKey) -> bool:
        return key in self._by_key

    @property
    def keys(self) -> Set[BlockKey]:
        """The blocks at whose end a state is held."""
        return self._by_key.keys()

    def reserve(self) -> int | None:
        """A slot to write a state to, or None where all are in use."""
        if not self._free:
            idle = {k: s for k, s in self._by_key.items() if s.slot not in self._readers}
            left = {k: s for k, s in idle.items() if s.num_uses < SHARED_BY} or idle
            if not left:
                return None
            counts = Counter(snapshot.owner for snapshot in left.values())
            self.num_evictions += 1
            self.drop(min(left, key=lambda k: (-counts[left[k].owner], left[k].last_use)))
        slot = self._free.pop()
        self._reserved.add(slot)
        return slot

    def give_back(self, slot: int) -> None:
        """Free a reserved slot whose state will not be kept."""
        self._reserved.remove(slot)
        self._free.append(slot)

    def publish(self, key: BlockKey, slot: int, owner: str) -> None:
        """Let new rows find a reserved slot's state; of equal ones the first stays."""
        if key in self._by_key:
            self.give_back(slot)
            return
        self._reserved.remove(slot)
        self._by_key[key] = _Snapshot(slot, owner, self._tick())

    def begin(self, key: BlockKey) -> int:
        """The slot of a snapshot that a row begins with; nothing is written to it until `begun`."""
        snapshot = self._by_key[key]
        snapshot.num_uses += 1
        snapshot.last_use = self._tick()
        self._readers[snapshot.slot] += 1
        self.num_hits += 1
        return snapshot.slot

    def begun(self, slot: int) -> None:
        """One row that began with this slot has done its first tokens, or has left before."""
        self._readers[slot] -= 1
        if not self._readers[slot]:
            del self._readers[slot]
            if all(snapshot.slot != slot for snapshot in self._by_key.values()):
                self._free.append(slot)  # it was dropped meanwhile

    @property
    def num_free(self) -> int:
        """Slots that nobody writes to, holds or reads."""
        return len(self._free)

    def drop(self, key: BlockKey) -> None:
        """Forget a snapshot, if there is one."""
        snapshot = self._by_key.pop(key, None)
        if snapshot is not None and snapshot.slot not in self._readers:
            self._free.append(snapshot.slot)

    def drop_unused(self, key: BlockKey) -> None:
        """Forget a snapshot that no row has begun with."""
        if key in self._by_key and not self._by_key[key].num_uses:
            self.drop(key)

    def check_integrity(self, rows: Sequence[Row]) -> None:
        """Assert that every slot is free, written to, held or read, and by whom."""
        held = {snapshot.slot for snapshot in self._by_key.values()}
        assert len(held) == len(self._by_key)
        assert sorted(slot for row in rows for _, slot in row.snapshots) == sorted(self._reserved)
        assert self._readers == Counter(row.resumed[1] for row in rows if row.resumed is not None)
        assert len(set(self._free)) == len(self._free)
        assert not held & self._reserved
        assert set(self._free) == set(self._slots) - held - self._reserved - set(self._readers)

    def _tick(self) -> int:
        self._clock += 1
        return self._clock


class StatefulBlockManager(BlockManager):
    """Blocks of a base with recurrent layers, with a slot of state for each row and snapshots.

    The first `num_rows` slots of the state pool are for running rows, those behind for snapshots.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        *,
        num_rows: int,
        num_snapshots: int,
        enable_prefix_cache: bool = True,
    ) -> None:
        super().__init__(num_blocks, block_size, enable_prefix_cache=enable_prefix_cache)
        self._num_rows = num_rows
        self._free_slots = list(reversed(range(num_rows)))
        self.snapshots = Snapshots(range(num_rows, num_rows + num_snapshots))
        self._interval = -(-SNAPSHOT_INTERVAL // block_size) * block_size
        self._junctions: dict[Row, int] = {}
        """Running row → tokens whose keys and values were found when it began."""
        self._ends: dict[Row, BlockKey] = {}
        """Running row → its last snapshot: that of its prompt's end, or of its output so far."""
        self._num_recomputed_tokens = 0

    @property
    def state_stats(self) -> StateStats:
        """See `BlockManager.state_stats`."""
        return StateStats(
            num_rows=self._num_rows - len(self._free_slots),
            num_rows_free=len(self._free_slots),
            num_snapshots=len(self.snapshots.keys),
            num_snapshots_free=self.snapshots.num_free,
            num_snapshot_hits=self.snapshots.num_hits,
            num_snapshot_evictions=self.snapshots.num_evictions,
            num_recomputed_tokens=self._num_recomputed_tokens,
        )

    def find(self, row: Row) -> list[int]:
        """As for a base without state, up to the last block end that has a snapshot."""
        found = super().find(row)
        while found and row.block_keys[len(found) - 1] not in self.snapshots:
            found.pop()
        return found

    def share(self, row: Row, found: Sequence[int]) -> None:
        """See `BlockManager.share`. The row gets a slot for its state."""
        self._junctions[row] = len(super().find(row)) * self.block_size
        super().share(row, found)
        self._num_recomputed_tokens += self._junctions[row] - row.num_computed_tokens
        row.state_slot = self._free_slots.pop()
        if found:
            slot = self.snapshots.begin(row.block_keys[len(found) - 1])
            row.resumed = row.num_computed_tokens, slot

    def grow(self, row: Row, num_tokens: int) -> bool:
        """See `BlockManager.grow`. Plans the snapshots of the tokens that are to be computed."""
        if not super().grow(row, num_tokens):
            return False
        if self._is_caching:
            self._plan_snapshots(row, num_tokens)
        return True

    def publish(self, row: Row, num_tokens: int) -> None:
        """See `BlockManager.publish`. The snapshots of these tokens can be found from now on."""
        super().publish(row, num_tokens)
        done = [planned for planned in row.snapshots if planned[0] <= num_tokens]
        row.snapshots = [planned for planned in row.snapshots if planned[0] > num_tokens]
        for position, slot in done:
            index = position // self.block_size - 1
            self._extend_keys(row, index + 1)
            key = row.block_keys[index]
            if (key, 0) not in self._cached:  # another row's equal block was evicted
                self.snapshots.give_back(slot)
                continue
            self.snapshots.publish(key, slot, row.request.cache_owner)
            if position >= self._end_of_prompt(row):
                self._ends[row] = key
        if row.resumed is not None and num_tokens > row.resumed[0]:
            self._end_resumption(row)

    def retract(self, row: Row) -> None:
        """Let no other row find the blocks and snapshots of `row`, which may be wrong."""
        super().retract(row)
        for key in row.block_keys:
            self.snapshots.drop(key)

    def release(self, row: Row) -> None:
        """Give back all blocks and slots of `row`."""
        super().release(row)
        self._free_slots.append(row.state_slot)
        for _, slot in row.snapshots:
            self.snapshots.give_back(slot)
        row.snapshots = []
        self._end_resumption(row)
        del self._junctions[row]
        self._ends.pop(row, None)

    def check_integrity(self, owners: list[Row]) -> None:
        """See `BlockManager.check_integrity`; slots and snapshots too."""
        super().check_integrity(owners)
        used = [row.state_slot for row in owners]
        assert sorted([*used, *self._free_slots]) == list(range(self._num_rows))
        assert self._junctions.keys() == set(owners) >= self._ends.keys()
        self.snapshots.check_integrity(owners)
        keys = {key for key, _ in self._cached}
        assert keys.issuperset(self.snapshots.keys), "a snapshot without its blocks"

    def _plan_snapshots(self, row: Row, end: int) -> None:
        planned = {position for position, _ in row.snapshots}
        for position in sorted(self._positions(row, row.num_computed_tokens, end) - planned):
            if position <= row.num_prompt_tokens:
                # An output's last token may be known to the device alone: it has no key yet.
                index = position // self.block_size - 1
                self._extend_keys(row, index + 1)
                if row.block_keys[index] in self.snapshots:
                    continue
            elif row in self._ends:
                self.snapshots.drop_unused(self._ends.pop(row))
            slot = self.snapshots.reserve()
            if slot is None:
                return
            row.snapshots.append((position, slot))

    def _positions(self, row: Row, start: int, end: int) -> set[int]:
        """Where snapshots are wanted behind `start` and up to `end`; see the top of this file."""
        first = (start // self._interval + 1) * self._interval
        last_of_all = end // self.block_size * self.block_size
        wanted = {*range(first, min(end, row.num_prompt_tokens) + 1, self._interval)}
        wanted |= {self._end_of_prompt(row), self._junctions[row]}
        if last_of_all > row.num_prompt_tokens:
            wanted.add(last_of_all)
        return {position for position in wanted if start < position <= end}

    def _end_of_prompt(self, row: Row) -> int:
        """The last whole block before a prompt's last token, whose logits are needed."""
        return (row.num_prompt_tokens - 1) // self.block_size * self.block_size

    def _end_resumption(self, row: Row) -> None:
        if row.resumed is not None:
            self.snapshots.begun(row.resumed[1])
            row.resumed = None

    def _forget(self, block: int) -> None:
        content = self._contents.get(block)
        super()._forget(block)
        if content is not None:
            self.snapshots.drop(content[0])


def num_snapshots(config: EngineConfig) -> int:
    """Slots for snapshots of a base with recurrent layers."""
    if not config.cache.prefix_cache:
        return 0
    wanted = config.cache.state_snapshots
    return max(LEAST_SNAPSHOTS, config.scheduler.max_num_seqs) if wanted is None else wanted

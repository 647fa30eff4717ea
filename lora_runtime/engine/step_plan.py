"""One step while it is planned: what runs in it, and how much of its token budget is left."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from collections.abc import Set as AbstractSet

from lora_runtime.core import (
    AdapterPlacement,
    Row,
    ScheduledBatch,
    ScheduledRow,
    StepOutput,
)


class StepPlan:
    """Rows, copies of adapters and failures of the next step."""

    def __init__(
        self, budget: int, loading: AbstractSet[str] | None, *, may_hold_back: bool
    ) -> None:
        self.budget = budget
        """Tokens that still fit. A prompt's token costs as many as its row has planes."""
        self.may_hold_back = may_hold_back
        """Rows may be held back in this step for others that came later."""
        self.loads: list[AdapterPlacement] = []
        self.failed: list[StepOutput] = []
        self.admitted: set[Row] = set()
        """Rows that begin in this step; they do not give way in it."""
        self.seen: set[Row] = set()
        """Waiting rows that have had their turn, whether they began or not."""
        self.without_room: set[tuple[str, ...]] = set()
        """Sets of adapters for which the pool has no room now."""
        self.crowded_out: set[str] = set()
        """Clients whose next row found no place or no blocks: none of theirs begins any more."""
        self.is_short_of_blocks = False
        """A running row found no free block: no other row begins in this step."""
        self._loading = loading
        self._rows: dict[Row, ScheduledRow] = {}
        self._shorter: dict[str, Iterator[Row]] = {}

    def __contains__(self, row: Row) -> bool:
        return row in self._rows

    def lacks_adapter(self, row: Row) -> bool:
        """True while an adapter of a row is being copied to the device, beside the steps."""
        if self._loading is None:
            return False
        missing = self._loading | {load.digest for load in self.loads}
        return any(use.digest in missing for use in row.request.adapters)

    def has_room(self, row: Row) -> bool:
        """True when the budget has room for all tokens that a row needs."""
        return row.num_uncomputed_tokens * row.num_planes <= self.budget

    def is_open(self, row: Row) -> bool:
        """True for a row that has had no turn in this step."""
        return row not in self._rows and row not in self.seen

    def shorter(self, client: str, first: Row, prompts: Iterable[Row]) -> Iterator[Row]:
        """Those of a client's open prompts that the budget has room for, each once in a step,
        without any of a lower priority than the first one's.
        """
        if client not in self._shorter:
            least = first.request.priority
            rows = [row for row in prompts if row.request.priority <= least and self.has_room(row)]
            self._shorter[client] = iter(rows)
        return (row for row in self._shorter[client] if self.is_open(row) and self.has_room(row))

    def num_fitting(self, row: Row) -> int:
        """Tokens of a row that the budget has room for.

        A prompt's token costs as many as its row has planes, so that a row of replicated layers
        makes no step longer than a plain row does.
        """
        return min(row.num_uncomputed_tokens, max(1, self.budget // row.num_planes))

    def add(self, row: Row, num_tokens: int) -> ScheduledRow:
        """Plan a row's next tokens."""
        samples = num_tokens == row.num_uncomputed_tokens
        scheduled = ScheduledRow(row, row.num_computed_tokens, num_tokens, samples)
        self._rows[row] = scheduled
        self.budget -= _cost(scheduled)
        return scheduled

    def drop(self, row: Row) -> None:
        """Take out a row that was preempted; it does not begin again in this step."""
        self.seen.add(row)
        scheduled = self._rows.pop(row, None)
        if scheduled is not None:
            self.budget += _cost(scheduled)

    def batch(self) -> ScheduledBatch:
        """The finished plan."""
        return ScheduledBatch(tuple(self._rows.values()), tuple(self.loads), tuple(self.failed))


def _cost(scheduled: ScheduledRow) -> int:
    return 1 if scheduled.num_tokens == 1 else scheduled.num_tokens * scheduled.row.num_planes

"""One step while it is planned: what runs in it, and what of its token budget is left."""

from __future__ import annotations

from collections.abc import Set as AbstractSet

from lora_runtime.core import (
    AdapterPlacement,
    ScheduledBatch,
    ScheduledSequence,
    Sequence,
    StepOutput,
)


class StepPlan:
    """Rows, copies of adapters and failures of the next step."""

    def __init__(self, budget: int, loading: AbstractSet[str] | None) -> None:
        self.budget = budget
        """Tokens that still fit, each of a prompt counted once for every plane of its row."""
        self.loads: list[AdapterPlacement] = []
        self.failed: list[StepOutput] = []
        self.admitted: set[Sequence] = set()
        """Rows that begin in this step; they do not give way in it."""
        self.seen: set[Sequence] = set()
        """Sequences that have had their turn, in vain or not."""
        self.without_room: set[tuple[str, ...]] = set()
        """Adapters, together, that find no room in the pool."""
        self.is_short_of_blocks = False
        """A running row found no block: nobody new begins."""
        self._loading = loading
        self._rows: dict[Sequence, ScheduledSequence] = {}

    def __contains__(self, sequence: Sequence) -> bool:
        return sequence in self._rows

    def lacks_adapter(self, sequence: Sequence) -> bool:
        """True while an adapter of a row is being copied beside the steps."""
        if self._loading is None:
            return False
        missing = self._loading | {load.digest for load in self.loads}
        return any(use.digest in missing for use in sequence.request.adapters)

    def num_fitting(self, sequence: Sequence) -> int:
        """Tokens of a row that the budget has room for. A prompt's cost as many as it has planes,
        so that a deep one makes no step longer than a plain one does.
        """
        return min(sequence.num_uncomputed_tokens, max(1, self.budget // sequence.num_planes))

    def add(self, sequence: Sequence, num_tokens: int) -> ScheduledSequence:
        """Plan a row's next tokens."""
        samples = num_tokens == sequence.num_uncomputed_tokens
        row = ScheduledSequence(sequence, sequence.num_computed_tokens, num_tokens, samples)
        self._rows[sequence] = row
        self.budget -= _cost(row)
        return row

    def drop(self, sequence: Sequence) -> None:
        """Take a row that was preempted out again; it does not begin anew in this step."""
        self.seen.add(sequence)
        row = self._rows.pop(sequence, None)
        if row is not None:
            self.budget += _cost(row)

    def batch(self) -> ScheduledBatch:
        """The finished plan."""
        return ScheduledBatch(tuple(self._rows.values()), tuple(self.loads), tuple(self.failed))


def _cost(row: ScheduledSequence) -> int:
    return 1 if row.num_tokens == 1 else row.num_tokens * row.sequence.num_planes

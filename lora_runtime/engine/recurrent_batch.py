"""A step of a base with recurrent layers: the pieces in which they run through its rows."""

from __future__ import annotations

from collections.abc import Sequence

from lora_runtime.base.model.recurrence import Piece
from lora_runtime.core import ScheduledRow


def pieces(rows: Sequence[ScheduledRow]) -> list[Piece]:
    """Cut each row's tokens where a snapshot of its state is planned.

    A row begins from nothing at position 0, from the snapshot that was found for it where it
    resumes, and else from its own slot, where its last piece leaves its state. What a slot held
    before a row began is never read.
    """
    found: list[Piece] = []
    first = 0
    for scheduled in rows:
        begin, after, loads = scheduled.start, None, _slot_before(scheduled)
        ends = {position for position, _ in scheduled.row.snapshots}
        inner = {position for position in ends if begin < position < scheduled.end}
        for end in sorted({*inner, scheduled.end}):
            start = first + begin - scheduled.start
            found.append(Piece(start, end - begin, after, loads, _slots_at(scheduled, end)))
            begin, after, loads = end, len(found) - 1, None
        first += scheduled.num_tokens
    return found


def held_slots(scheduled: ScheduledRow) -> tuple[int, int] | None:
    """Of a row's single token, whose state stays in the row's slot: this slot, and that of the
    snapshot behind it, −1 for none. None for a row that begins, or resumes from a snapshot.
    """
    own = scheduled.row.state_slot
    if _slot_before(scheduled) != own:
        return None
    kept = [slot for slot in _slots_at(scheduled, scheduled.end) if slot != own]
    return own, kept[0] if kept else -1


def _slot_before(scheduled: ScheduledRow) -> int | None:
    """The slot that holds the state before the row's tokens of this step."""
    row = scheduled.row
    if scheduled.start == 0:
        return None
    if row.resumed is not None and row.resumed[0] == scheduled.start:
        return row.resumed[1]
    return row.state_slot


def _slots_at(scheduled: ScheduledRow, position: int) -> tuple[int, ...]:
    """The slots that the state behind the tokens up to `position` goes to."""
    kept = tuple(slot for at, slot in scheduled.row.snapshots if at == position)
    return (*kept, scheduled.row.state_slot) if position == scheduled.end else kept

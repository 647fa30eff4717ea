"""Sequences that wait, by client: each client's by priority, then in order of arrival.

A preempted row has kept its place in that order.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator

from lora_runtime.core import Row


class WaitingQueue:
    """One queue for each client that has any; a length and an order over all."""

    def __init__(self) -> None:
        self._queues: dict[str, list[Row]] = {}
        self._num_arrivals = 0

    def __len__(self) -> int:
        return sum(map(len, self._queues.values()))

    def __iter__(self) -> Iterator[Row]:
        """Every row, client by client."""
        return (row for queue in self._queues.values() for row in queue)

    @property
    def clients(self) -> tuple[str, ...]:
        return tuple(self._queues)

    def arrive(self, row: Row) -> None:
        """Add a new row behind those of its client and priority."""
        self._num_arrivals += 1
        row.ticket = self._num_arrivals
        self.put_back(row)

    def put_back(self, row: Row) -> None:
        """Add a row that was here before, at its place."""
        insort(self._queues.setdefault(row.request.client, []), row, key=_place)

    def remove(self, row: Row) -> None:
        """Take a row out."""
        client = row.request.client
        queue = self._queues[client]
        index = bisect_left(queue, _place(row), key=_place)
        assert queue[index] is row
        del queue[index]
        if not queue:
            del self._queues[client]

    def of(self, client: str) -> tuple[Row, ...]:
        """The rows of a client, first one first."""
        return tuple(self._queues.get(client, ()))


def _place(row: Row) -> tuple[int, int]:
    return row.request.priority, row.ticket

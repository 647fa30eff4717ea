"""Sequences that wait, by client: each client's by priority, then in order of arrival.

A preempted sequence has kept its place in that order.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator

from lora_runtime.core import Sequence


class WaitingQueue:
    """One queue for each client that has any; a length and an order over all."""

    def __init__(self) -> None:
        self._queues: dict[str, list[Sequence]] = {}
        self._num_arrivals = 0

    def __len__(self) -> int:
        return sum(map(len, self._queues.values()))

    def __iter__(self) -> Iterator[Sequence]:
        """Every sequence, client by client."""
        return (sequence for queue in self._queues.values() for sequence in queue)

    @property
    def clients(self) -> tuple[str, ...]:
        return tuple(self._queues)

    def arrive(self, sequence: Sequence) -> None:
        """Add a new sequence behind those of its client and priority."""
        self._num_arrivals += 1
        sequence.ticket = self._num_arrivals
        self.put_back(sequence)

    def put_back(self, sequence: Sequence) -> None:
        """Add a sequence that was here before, at its place."""
        insort(self._queues.setdefault(sequence.request.client, []), sequence, key=_place)

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out."""
        client = sequence.request.client
        queue = self._queues[client]
        index = bisect_left(queue, _place(sequence), key=_place)
        assert queue[index] is sequence
        del queue[index]
        if not queue:
            del self._queues[client]

    def first_ticket(self, client: str) -> int:
        """When the first one of a client arrived; 0 where none waits."""
        queue = self._queues.get(client)
        return queue[0].ticket if queue else 0

    def by_client(self) -> dict[str, int]:
        """How many sequences of each client wait."""
        return {client: len(queue) for client, queue in self._queues.items()}

    def num_of(self, client: str) -> int:
        """How many sequences of a client wait."""
        return len(self._queues.get(client, ()))

    def of(self, client: str) -> tuple[Sequence, ...]:
        """The sequences of a client, first one first."""
        return tuple(self._queues.get(client, ()))


def _place(sequence: Sequence) -> tuple[int, int]:
    return sequence.request.priority, sequence.ticket

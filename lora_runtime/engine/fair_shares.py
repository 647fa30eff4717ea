"""How much each client has been served, in virtual tokens; the client with the least is next.

A row costs its client, times the depth of its layers over the base's, rounded up:
    price = num_planes · (PROMPT_PRICE · new prompt tokens + OUTPUT_PRICE · new output tokens)
divided by the client's weight: of two clients that always want more, one of weight 2 gets twice as
much as one of weight 1.
Tokens that the prefix cache held, and those computed again after a preemption, cost nothing: the
counter measures what a client asked for and got, not what the engine did twice.
A client that comes (back) is lifted to the least counter of those that have requests, so that
nobody saves service up; one that owes more keeps its own.
Source: the Virtual Token Counter, Sheng et al., OSDI '24 (arXiv:2401.00588), algorithm 2.
"""

from __future__ import annotations

from collections import Counter

from lora_runtime.core import ScheduledRow

PROMPT_PRICE = 1
OUTPUT_PRICE = 2
"""A prompt shares one pass over the weights among its tokens; an output token takes a pass of its
own, with its row and blocks held meanwhile. The paper's weights, after common prices of tokens."""


class FairShares:
    """Counters of the clients that have requests, and of those that owe more than these."""

    def __init__(self) -> None:
        self._counters: dict[str, float] = {}
        self._num_requests: Counter[str] = Counter()

    def enter(self, client: str) -> None:
        """A request of `client` has come."""
        if client not in self._num_requests:
            self._lift(client)
        self._num_requests[client] += 1

    def leave(self, client: str) -> None:
        """A request of `client` has ended."""
        self._num_requests[client] -= 1
        if not self._num_requests[client]:
            del self._num_requests[client]

    def counter(self, client: str) -> float:
        """Virtual tokens of a client that has requests."""
        return self._counters[client]

    def charge(self, scheduled: ScheduledRow) -> None:
        """Add the price of a planned row to its client's counter."""
        row = scheduled.row
        stop = min(scheduled.end, row.num_prompt_tokens)
        num_new = max(0, stop - max(scheduled.start, row.num_priced_tokens))
        row.num_priced_tokens = max(stop, row.num_priced_tokens)
        price = PROMPT_PRICE * num_new + OUTPUT_PRICE * scheduled.samples
        self._counters[row.request.client] += price * row.num_planes / row.request.weight

    def check_integrity(self, num_requests: Counter[str]) -> None:
        """Assert that exactly `num_requests` of each client are counted."""
        assert self._num_requests == num_requests, (self._num_requests, num_requests)

    def _lift(self, client: str) -> None:
        """Raise a client's counter to the least of those that have requests.

        Clients without requests whose counters are not above that least are forgotten, because they
        would be raised to it anyway. If nobody has requests, all are forgotten.
        """
        present = [self._counters[other] for other in self._num_requests]
        least = min(present, default=None)
        self._counters = {
            name: counter
            for name, counter in self._counters.items()
            if name in self._num_requests or (least is not None and counter > least)
        }
        self._counters[client] = max(self._counters.get(client, 0), least or 0)

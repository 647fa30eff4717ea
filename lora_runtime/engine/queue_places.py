"""Who may still wait for the engine: one bound for all requests, and one for those of a client.

A client may hold at most three quarters of the places (rounded up), however few others there are:
who comes while one client floods the server finds a place, and then its turn (`fair_shares.py`).
"""

from __future__ import annotations

from lora_runtime.errors import Overloaded


def check_place(max_queued: int, num_waiting: int, num_own: int) -> None:
    """Raise Overloaded for one request too many, of all or of its client.

    `max_queued`: places; `num_waiting`: requests that wait, of which `num_own` are its client's.
    """
    if num_waiting >= max_queued:
        raise Overloaded(f"{num_waiting} requests are waiting already; try again later")
    if num_own >= places_of_one(max_queued):
        raise Overloaded(
            f"{num_own} requests of this client are waiting already, and {max_queued} places are "
            "for all; try again later"
        )


def places_of_one(max_queued: int) -> int:
    """Return how many places one client may hold."""
    return max_queued - max_queued // 4

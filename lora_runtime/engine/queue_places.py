"""Bounds on the requests that wait for the engine: one for all, and one for those of a client.

A client may hold at most three quarters of the places (rounded up), however few others there are:
while one client floods the server, others still find a place, and then their turn
(`fair_shares.py`).
"""

from __future__ import annotations

from lora_runtime.errors import Overloaded


def check_place(max_queued: int, num_waiting: int, num_own: int) -> None:
    """Raise Overloaded if all places are taken, or all that one client may hold.

    `max_queued`: places; `num_waiting`: requests that wait, of which `num_own` are its client's.
    """
    if num_waiting >= max_queued:
        raise Overloaded(f"{num_waiting} requests are waiting already; try again later")
    if num_own >= max_queued - max_queued // 4:
        raise Overloaded(
            f"{num_own} requests of this client are waiting already, and {max_queued} places are "
            "for all; try again later"
        )

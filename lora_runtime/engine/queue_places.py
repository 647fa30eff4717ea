"""Bounds on the requests that wait for the engine: one for all, and one for those of a client.

A client may hold at most three quarters of the places (rounded up), however few others there are:
while one client floods the server, others still find a place, and then their turn
(`fair_shares.py`).
"""

from __future__ import annotations

from lora_runtime.errors import InvalidRequest, Overloaded


def check_place(max_queued: int, num_waiting: int, num_own: int, num_new: int = 1) -> None:
    """Raise Overloaded if fewer than `num_new` places are free, or left to the client; and
    InvalidRequest (field `sampling.n`) if a client may never hold so many.

    `max_queued`: places; `num_waiting`: requests that wait, of which `num_own` are its client's.
    """
    most_own = max_queued - max_queued // 4
    if num_new > max(1, most_own):
        raise InvalidRequest(
            f"sampling.n is {num_new}; each output takes a place in the queue, and a client may "
            f"hold {most_own}",
            field="sampling.n",
        )
    if num_waiting + num_new > max_queued:
        raise Overloaded(f"{num_waiting} requests are waiting already; try again later")
    if num_own + num_new > most_own:
        raise Overloaded(
            f"{num_own} requests of this client are waiting already, and {max_queued} places are "
            "for all; try again later"
        )

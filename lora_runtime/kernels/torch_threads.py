"""How many threads torch computes in, thread by thread.

torch keeps the number for each thread, but a thread that has not asked for its own yet gets what
any other has set last. So who changes it does so where nobody else can take it for theirs.
"""

from __future__ import annotations

import torch


def keep_number() -> None:
    """Whatever other threads set, this one keeps the number that it has now."""
    torch.set_num_threads(torch.get_num_threads())


def compute_alone() -> None:
    """From now on torch computes on this thread alone: for work beside an engine, whose cores a
    second thread would take, and wait for them longer than it computes.
    """
    keep_number()
    torch.set_num_threads(1)

"""How many threads torch computes in, thread by thread.

torch keeps the number for each thread, but a thread that has not asked for its own yet gets what
any other has set last.
"""

from __future__ import annotations

import torch

from lora_runtime.kernels.cpu_library import set_torch_threads


def keep_number() -> None:
    """Whatever other threads set from now on, this one keeps the number that it has."""
    torch.get_num_threads()  # asked for once, it is this thread's own


def compute_alone() -> None:
    """From now on this thread's ops of torch use no other thread, where the compiled library is
    there to say so (`set_torch_threads`); without it nothing changes. No other thread is changed.
    For work beside an engine: a second thread would take one of the engine's cores, and be waited
    for longer than it computes.
    """
    keep_number()
    set_torch_threads(1)

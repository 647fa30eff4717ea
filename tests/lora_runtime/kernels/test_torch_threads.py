"""Threads that set torch's number for themselves, and others that keep theirs."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import torch

from lora_runtime.kernels import torch_threads


def test_a_thread_that_computes_alone_takes_no_number_from_others():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        has_kept, is_alone = threading.Event(), threading.Event()

        def engine() -> int:
            torch_threads.keep_number()
            has_kept.set()
            is_alone.wait(60)
            return torch.get_num_threads()

        def reader() -> int:
            has_kept.wait(60)
            torch_threads.compute_alone()
            is_alone.set()
            return torch.get_num_threads()

        with ThreadPoolExecutor(2) as pool:
            numbers = [task.result() for task in [pool.submit(engine), pool.submit(reader)]]
        assert numbers == [3, 1] and torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)

"""Threads that set torch's number for themselves, and others that keep theirs."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from lora_runtime.kernels import torch_threads
from lora_runtime.kernels.cpu_library import library
from lora_runtime.kernels.tape import Tape

pytestmark = pytest.mark.skipif(library() is None, reason="needs the compiled library")


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
            torch.set_num_threads(2)  # what every thread gets that has not asked for its own yet
            torch_threads.compute_alone()
            is_alone.set()
            return torch.get_num_threads()

        with ThreadPoolExecutor(2) as pool:
            numbers = [task.result() for task in [pool.submit(engine), pool.submit(reader)]]
        assert numbers == [3, 1] and torch.get_num_threads() == 3
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(torch.get_num_threads).result() == 2, "a thread that begins later"
    finally:
        torch.set_num_threads(before)


def test_a_thread_that_begins_while_a_tape_is_played_gets_every_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        seen = []

        def others() -> None:
            seen.append(torch.get_num_threads())
            with ThreadPoolExecutor(1) as pool:
                seen.append(pool.submit(torch.get_num_threads).result())

        tape = Tape()
        tape.steps.append((others, ()))
        tape.play()
        assert seen == [1, 3] and torch.get_num_threads() == 3

        def fails() -> None:
            raise RuntimeError("in the middle")

        broken = Tape()
        broken.steps.append((fails, ()))
        with pytest.raises(RuntimeError, match="in the middle"):
            broken.play()
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)

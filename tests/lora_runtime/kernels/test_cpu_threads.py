"""The compiled backend's own threads: processes of their own, so that their ends are seen too."""

from __future__ import annotations

import textwrap

import pytest

from lora_runtime.kernels.cpu_library import library
from lora_runtime.threads import usable_processors
from tests.fork_server import run_program

pytestmark = pytest.mark.skipif(library() is None, reason="needs the compiled library")

SETUP = """
import os, resource, threading, time
from pathlib import Path
import numpy as np
import torch
from lora_runtime.kernels import cpu
from lora_runtime.kernels.tape import Tape, recorded_on

torch.set_num_threads(1)  # torch's own threads, which do not live through a fork, stay out of it
x, weight = torch.randn(64, 512), torch.randn(2048, 512)
panels, expected = cpu.pack_panels(weight), x.double().numpy() @ weight.double().numpy().T

def tasks():
    return {int(task.name) for task in Path("/proc/self/task").iterdir()}

def check():
    y = cpu.panel_product(x, panels, 2048).numpy()
    np.testing.assert_allclose(y, expected, rtol=1e-3, atol=1e-3)
"""


@pytest.fixture
def run_alone(tmp_path):
    """Run SETUP and a body as a program; it ends by itself, without an error."""

    def run(body):
        program = tmp_path / "program.py"
        program.write_text(SETUP + textwrap.dedent(body))
        done = run_program([program], timeout=40)
        assert done.returncode == 0, done.stderr

    return run


def test_an_op_runs_in_fewer_threads_where_the_system_gives_no_more(run_alone):
    run_alone("""
        torch.set_num_threads(16)
        used = next(
            int(line.split()[1]) << 10
            for line in Path("/proc/self/status").read_text().splitlines()
            if line.startswith("VmSize")
        )
        resource.setrlimit(resource.RLIMIT_AS, (used + (16 << 20),) * 2)  # stacks take 8 MiB each
        for _ in range(3):
            check()
    """)


def test_a_forked_process_has_threads_of_its_own(run_alone):
    run_alone("""
        torch.set_num_threads(3)
        check()
        for _ in range(3):
            child = os.fork()
            check()
            if child == 0:
                os._exit(0)
            assert os.waitpid(child, 0)[1] == 0
    """)


def test_a_helper_that_takes_the_callers_core_costs_nothing(run_alone):
    """On one core, as where others keep the rest of the cores busy: two threads take as much of the
    processor as one.
    """
    run_alone("""
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})

        def processor_s(num_threads):
            torch.set_num_threads(num_threads)
            begun = time.process_time()
            for _ in range(400):
                cpu.panel_product(x[:8], panels, 2048)
            return time.process_time() - begun

        processor_s(2)
        pairs = [(processor_s(1), processor_s(2)) for _ in range(7)]
        assert min(two / one for one, two in pairs) < 1.25
    """)


@pytest.mark.skipif(len(usable_processors() or ()) < 2, reason="there is no other core")
def test_a_helper_on_the_callers_core_takes_another(run_alone):
    """As where a neighbour keeps the other cores busy, and the system leaves it where it woke."""
    run_alone("""
        before = tasks()
        torch.set_num_threads(2)
        cpu.panel_product(x[:8], panels, 2048)
        (helper,) = tasks() - before

        def own_core():
            return int(Path("/proc/thread-self/stat").read_text().rsplit(")", 1)[1].split()[36])

        all_cores, until = os.sched_getaffinity(0), time.monotonic() + 30
        while True:
            assert time.monotonic() < until
            core = own_core()
            os.sched_setaffinity(helper, {core})
            for _ in range(20):
                cpu.panel_product(x[:8], panels, 2048)
            if (cores := os.sched_getaffinity(helper)) != {core}:
                break
        assert len(cores) == len(all_cores) - 1 and cores < all_cores, cores
    """)


@pytest.mark.skipif(len(usable_processors() or ()) < 2, reason="there is no other core")
def test_a_helper_keeps_to_the_cores_of_the_child_that_it_helps(run_alone):
    run_alone("""
        torch.set_num_threads(2)
        check()
        if os.fork() == 0:
            allowed = {min(os.sched_getaffinity(0))}
            os.sched_setaffinity(0, allowed)
            until = time.monotonic() + 2
            while time.monotonic() < until:
                cpu.panel_product(x[:8], panels, 2048)
            os._exit(any(os.sched_getaffinity(task) != allowed for task in tasks()))
        assert os.wait()[1] == 0
    """)


def test_threads_that_call_at_once_and_a_process_that_ends_meanwhile(run_alone):
    run_alone("""
        failed = []

        def work(count):
            try:
                torch.set_num_threads(count)
                for _ in range(30):
                    check()
            except AssertionError as error:
                failed.append(error)

        threads = [threading.Thread(target=work, args=(n,)) for n in (1, 2, 5, 64)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failed
        # Of the library alone: torch ends a program with an error where one of its calls is left by
        # a thread that ends with the program.
        tape = Tape()
        torch.set_num_threads(4)
        with recorded_on(tape):
            cpu.panel_product(x, panels, 2048)
        threading.Thread(target=lambda: [tape.play() for _ in iter(int, 1)], daemon=True).start()
        check()
    """)

"""How many threads are chosen, on machines made of files."""

from __future__ import annotations

import math
import os

import pytest

from lora_runtime import threads


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A function that makes a machine: which processors are of one core, and the quota's text."""

    def make(cores, quota):
        for processor, siblings in cores.items():
            folder = tmp_path / f"cpu{processor}/topology"
            folder.mkdir(parents=True)
            (folder / "thread_siblings_list").write_text(siblings)
        if quota is not None:
            (tmp_path / "cpu.max").write_text(quota)
        monkeypatch.setattr(threads, "TOPOLOGY", tmp_path)
        monkeypatch.setattr(threads, "CPU_QUOTA", tmp_path / "cpu.max")
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(cores), raising=False)

    return make


@pytest.mark.parametrize(
    ("cores", "quota", "expected"),
    [
        ({0: "0,2", 1: "1,3", 2: "0,2", 3: "1,3"}, None, 2),
        ({0: "0", 1: "1", 2: "2", 3: "3"}, "max 100000", 4),
        ({0: "0", 1: "1", 2: "2", 3: "3"}, "150000 100000", 2),
        ({0: "0", 1: "1"}, "20000 100000", 1),
        ({5: "4,5"}, "not a quota", 1),
    ],
)
def test_a_thread_for_every_core_within_the_quota(machine, cores, quota, expected):
    machine(cores, quota)
    assert threads.num_usable_cores() == expected
    environ = {}
    threads.choose(environ)
    assert environ == {"OMP_NUM_THREADS": str(expected)}


def test_what_is_set_holds(machine):
    machine({0: "0", 1: "1"}, None)
    environ = {"OMP_NUM_THREADS": "7"}
    threads.choose(environ)
    assert environ == {"OMP_NUM_THREADS": "7"}


def test_a_system_without_such_files_has_a_thread_a_processor(monkeypatch, tmp_path):
    monkeypatch.setattr(threads, "TOPOLOGY", tmp_path)
    monkeypatch.setattr(threads, "CPU_QUOTA", tmp_path / "none")
    assert threads._quota() == math.inf
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2}, raising=False)
    assert threads.num_usable_cores() == 3

"""How many threads are chosen, on machines made of files."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import threading

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
        (tmp_path / "own").write_text("3:cpuset:/somewhere\n0::/\n")
        monkeypatch.setattr(threads, "TOPOLOGY", tmp_path)
        monkeypatch.setattr(threads, "OWN_GROUPS", tmp_path / "own")
        monkeypatch.setattr(threads, "GROUPS", tmp_path)
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


@pytest.mark.parametrize("wanted", ["7", " 3 ", "4,2"])
def test_what_is_set_holds(machine, wanted):
    machine({0: "0", 1: "1"}, None)
    environ = {"OMP_NUM_THREADS": wanted}
    threads.choose(environ)
    assert environ == {"OMP_NUM_THREADS": wanted}


@pytest.mark.parametrize("wanted", ["abc", "0", "-2", "1.5", ","])
def test_what_is_no_number_of_threads_is_said(machine, wanted):
    machine({0: "0", 1: "1"}, None)
    environ = {"OMP_NUM_THREADS": wanted}
    with pytest.warns(UserWarning, match=f"OMP_NUM_THREADS='{wanted}' is no number .* 2 are used"):
        threads.choose(environ)
    assert environ == {"OMP_NUM_THREADS": "2"}


def test_an_empty_variable_is_none(machine):
    machine({0: "0", 1: "1"}, None)
    environ = {"OMP_NUM_THREADS": " "}
    threads.choose(environ)
    assert environ == {"OMP_NUM_THREADS": "2"}


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="sets what it may run on")
def test_where_torch_was_first_it_is_told():
    program = """
import os, torch
torch.set_num_threads(64)
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
import lora_runtime
print(torch.get_num_threads())
"""
    environ = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environ, capture_output=True, text=True, timeout=60
    )
    assert done.stdout.strip() == "1", done.stderr


def test_a_system_without_such_files_has_a_thread_a_processor(monkeypatch, tmp_path):
    monkeypatch.setattr(threads, "TOPOLOGY", tmp_path)
    monkeypatch.setattr(threads, "OWN_GROUPS", tmp_path / "none")
    assert threads.quota() == math.inf
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2}, raising=False)
    assert threads.num_usable_cores() == 3


@pytest.mark.parametrize(
    ("own", "files", "expected"),
    [
        ("0::/a/b", {"a/b/cpu.max": "max 100000", "a/cpu.max": "50000 100000"}, 0.5),
        ("0::/a/b", {"a/b/cpu.max": "150000 100000", "cpu.max": "max 100000"}, 1.5),
        (
            "4:cpu,cpuacct:/pod/c\n0::/",
            {"cpu/pod/c/cpu.cfs_quota_us": "200000", "cpu/pod/c/cpu.cfs_period_us": "100000"},
            2.0,
        ),
        ("1:cpu:/", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, math.inf),
        ("1:cpuset:/x", {"cpu/x/cpu.cfs_quota_us": "1", "x/cpu.max": "1 1"}, math.inf),
    ],
)
def test_the_least_quota_of_a_group_and_those_above_it(own, files, expected, monkeypatch, tmp_path):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text + "\n")
    (tmp_path / "own").write_text(own + "\n")
    monkeypatch.setattr(threads, "OWN_GROUPS", tmp_path / "own")
    monkeypatch.setattr(threads, "GROUPS", tmp_path)
    assert threads.quota() == expected


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a niceness is a whole process's")
def test_a_thread_that_gives_way_changes_no_other():
    def niceness():
        return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    def give_way():
        threads.give_way()
        found.append(niceness())

    before, found = niceness(), []
    thread = threading.Thread(target=give_way)
    thread.start()
    thread.join()
    assert found == [min(19, before + threads.NICENESS)] and niceness() == before

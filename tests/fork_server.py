"""Python programs as forks of a process that has imported torch, transformers and the server.

To import them takes seconds of processor time, more than most programs of the tests need. A program
runs as `python -m module` or `python script` runs it, with its own arguments, environment, output
and end. What is read from the environment by an import (`TRITON_INTERPRET`, `OMP_NUM_THREADS`) is
as it was in the test's process. The servers of test_cli.py, of the soak and of
examples/serve_two_adapters.py start without this.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import import_module
from pathlib import Path

import torch

REPO = Path(__file__).parents[1]
IMPORTED = (
    "bitsandbytes",
    "transformers.models.llama.modeling_llama",
    "lora_runtime.engine.loop",
    "lora_runtime.training.trainer",
    "loramux.server.app",
    "loramux.server.cli",
)
MAX_REQUEST_BYTES = 1 << 17


def start_program(
    command: Sequence[str | Path],
    *,
    stdout: int = subprocess.DEVNULL,
    stderr: int = subprocess.DEVNULL,
    env: Mapping[str, str] | None = None,
) -> Program | subprocess.Popen:
    """Start `command`, `-m` and a module or a script, and arguments, in the repository's folder.

    `stdout`, `stderr`: open files. Where there is a GPU it is no fork: imports look at the GPU, and
    then a fork cannot use it.
    """
    env = {**(os.environ if env is None else env), "OMP_NUM_THREADS": "1"}
    if torch.cuda.is_available():
        command = [sys.executable, *command]
        return subprocess.Popen(command, cwd=REPO, stdout=stdout, stderr=stderr, env=env)
    return Program(command, stdout, stderr, env)


class Program:
    """A running fork; it is used as a subprocess.Popen."""

    def __init__(
        self, command: Sequence[str | Path], stdout: int, stderr: int, env: Mapping[str, str]
    ) -> None:
        request = {"command": [*map(str, command)], "env": dict(env)}
        self.returncode: int | None = None
        self._facts, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs, open(os.devnull, "wb") as null:
            files = [null.fileno() if f == subprocess.DEVNULL else f for f in (stdout, stderr)]
            socket.send_fds(_server(), [json.dumps(request).encode()], [theirs.fileno(), *files])
        self.pid = int(self._facts.recv(64))

    def poll(self) -> int | None:
        """Its exit code, negative for a signal; None while it runs."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """As `poll`, when it has ended. Raises subprocess.TimeoutExpired."""
        if self.returncode is None:
            if not select.select([self._facts], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(str(self.pid), timeout or 0)
            self.returncode = int(self._facts.recv(64))
            self._facts.close()
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):  # it has ended, and is about to say so
                os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


@cache
def _server() -> socket.socket:
    """What this process asks for programs; the server ends when nobody holds the socket."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.fork_server", str(theirs.fileno())],
            cwd=REPO, env={**os.environ, "OMP_NUM_THREADS": "1"}, pass_fds=[theirs.fileno()],
        )  # fmt: skip
    atexit.register(process.wait)
    atexit.register(ours.close)  # before it, which the server ends by
    return ours


def run_program(
    command: Sequence[str | Path], *, timeout: float, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a program to its end, as subprocess.run does with `capture_output`."""
    with tempfile.TemporaryFile("w+") as stdout, tempfile.TemporaryFile("w+") as stderr:
        program = start_program(command, stdout=stdout.fileno(), stderr=stderr.fileno(), env=env)
        try:
            code = program.wait(timeout)
        finally:
            program.kill()
            program.wait()
        for file in (stdout, stderr):
            file.seek(0)
        return subprocess.CompletedProcess(command, code, stdout.read(), stderr.read())


def _import_all() -> None:
    """Start no thread, which a fork would not have."""
    for name in IMPORTED:
        import_module(name)
    gc.collect()
    gc.freeze()
    assert len(os.listdir("/proc/self/task")) == 1, "a thread is lost in forks"


def _next_program(requests: socket.socket) -> list[str]:
    """Returns in a new process, once for every request: the command that it must run."""
    while True:
        content, files, _, _ = socket.recv_fds(requests, MAX_REQUEST_BYTES, 3)
        if not content:
            os._exit(0)  # to take torch apart takes long
        if not os.fork():
            requests.close()
            return _watched(json.loads(content), *files)
        for file in files:
            os.close(file)


def _watched(request: dict, facts: int, stdout: int, stderr: int) -> list[str]:
    """Returns in a child, of which this process tells the id and then the exit code."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    child = os.fork()
    if child:
        os.write(facts, str(child).encode())
        _, status = os.waitpid(child, 0)
        with contextlib.suppress(BrokenPipeError):
            os.write(facts, str(os.waitstatus_to_exitcode(status)).encode())
        os._exit(0)
    # As from a terminal: what a shell runs in its background ignores Ctrl-C, its children too.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number, file in enumerate((stdout, stderr), 1):
        os.dup2(file, number)
    for file in (facts, stdout, stderr):
        os.close(file)
    os.environ.clear()
    os.environ.update(request["env"])
    return request["command"]


def _run(command: Sequence[str]) -> None:
    """Run `-m` and a module, or a script, as the interpreter would."""
    if command[0] == "-m":
        sys.argv = list(command[1:])
        runpy.run_module(command[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = list(command)
        sys.path.insert(0, str(Path(command[0]).parent))
        runpy.run_path(command[0], run_name="__main__")


if __name__ == "__main__":
    _import_all()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    _run(_next_program(socket.socket(fileno=int(sys.argv[1]))))

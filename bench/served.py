"""A `loramux serve` in a process of its own, for benchmarks that measure it over a wire."""

from __future__ import annotations

import contextlib
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil

START_S = 300


@dataclass(slots=True)
class Served:
    """A server's process and where it listens."""

    process: subprocess.Popen[bytes]
    grpc: str
    http: str

    def cpu_s(self) -> tuple[float, float]:
        """Seconds of processor of the process, and of the thread of its event loop."""
        process = psutil.Process(self.process.pid)
        loop = next(t for t in process.threads() if t.id == self.process.pid)
        return sum(process.cpu_times()[:2]), loop.user_time + loop.system_time


@contextlib.contextmanager
def serving(base: str, folder: Path, max_num_seqs: int, *flags: str) -> Iterator[Served]:
    """A server over the base and the adapters below `folder`, until the context ends."""
    grpc, http = free_address(), free_address()
    command = [
        sys.executable, "-m", "loramux", "serve", "--base", base, "--grpc-address", grpc,
        "--http-address", http, "--adapter-root", str(folder), "--adapter-store",
        str(folder / "store"), "--max-num-seqs", str(max_num_seqs), "--log-level", "warning",
        *flags,
    ]  # fmt: skip
    log = folder / "server.log"
    with log.open("wb") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=stream)
    # A benchmark that is told to end ends its server, as by Ctrl-C.
    before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        wait_until_ready(process, http, log)
        yield Served(process, grpc, http)
    finally:
        signal.signal(signal.SIGTERM, before)
        process.terminate()
        process.wait()


def wait_until_ready(process: subprocess.Popen[bytes], http: str, log: Path) -> None:
    """Return once the server serves. Raises RuntimeError with the end of its log if it does not."""
    deadline = time.monotonic() + START_S
    while True:
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(f"http://{http}/readyz").status_code == 200:
                return
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"the server does not serve:\n{log.read_text()[-3000:]}")
        time.sleep(0.1)


def free_address() -> str:
    """An address of this machine on which nothing listens now."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        return f"127.0.0.1:{free.getsockname()[1]}"

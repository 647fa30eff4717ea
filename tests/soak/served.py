"""A real server in a process of its own, and what it holds: memory, files, threads, series."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
import torch

from loramux.server.client import AsyncClient
from tests.fork_server import REPO, Program, start_program
from tests.peft_adapters import write_adapter
from tests.server.test_process import free_address
from tests.tiny import tiny_model
from tests.tiny_tokenizer import write_tokenizer

START_S = 90
NUM_ADAPTERS = 8
NAMES = [f"a{index}" for index in range(NUM_ADAPTERS)]


@dataclass(frozen=True)
class Holdings:
    """What a process holds at one moment."""

    rss_mb: float
    num_files: int
    num_threads: int
    num_series: int


@dataclass(frozen=True)
class Running:
    """A server's process that is ready."""

    process: subprocess.Popen | Program
    target: str
    http: str
    log: Path
    folder: Path
    """Where its adapters lie, and its base if it is a tiny one."""
    base: str
    """Its base, for people."""


class Served:
    """A client of a running server, and what it sees of it."""

    def __init__(self, server: Running):
        self.process, self.target, self.log = server.process, server.target, server.log
        self.http = httpx.AsyncClient(base_url=server.http, timeout=30)
        self.client = AsyncClient(server.target)

    async def __aenter__(self) -> Served:
        await self.http.__aenter__()
        await self.client.__aenter__()
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.client.__aexit__(*error)
        await self.http.__aexit__(*error)

    async def metrics(self) -> dict[str, float]:
        """Every sample of /metrics, by name and labels as they are written there."""
        page = (await self.http.get("/metrics")).text
        lines = (line for line in page.splitlines() if not line.startswith("#"))
        return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}

    async def holdings(self) -> Holdings:
        num_series = len(await self.metrics())
        process = psutil.Process(self.process.pid)
        return Holdings(
            process.memory_info().rss / 1e6,
            process.num_fds(),
            process.num_threads(),
            num_series,
        )

    def cpu_s(self) -> float:
        """Seconds of processor that the server has used."""
        return sum(psutil.Process(self.process.pid).cpu_times()[:2])

    async def assert_nothing_is_left(self) -> None:
        """Every row and block is free, and every request that has started has ended."""
        async with asyncio.timeout(30):
            while any([v for n, v in (await self.metrics()).items() if is_busy(n)]):
                await asyncio.sleep(0.1)
        found = await self.metrics()
        started = sum(v for n, v in found.items() if n.startswith("loramux:requests_started_total"))
        ended = sum(v for n, v in found.items() if n.startswith("loramux:requests_total"))
        assert started == ended, (started, ended)
        assert all(a.num_in_flight == 0 for a in await self.client.list_adapters())

    def errors(self) -> list[str]:
        """Tracebacks and errors in the log."""
        return re.findall(
            r".*(?:Traceback|\[error|\"error\"|internal error).*", self.log.read_text()
        )


def is_busy(name: str) -> bool:
    return name.startswith(
        ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc")
    )


def write_world(folder: Path, *, vocab_size: int | None = None) -> Path:
    """Write a base of random weights and adapters a0 to a7, of ranks 2 to 9."""
    model = tiny_model("llama")
    for index, name in enumerate(NAMES):
        write_adapter(model, folder / "adapters" / name, seed=index, r=2 + index)
    base = tiny_model("llama", dtype=torch.bfloat16)
    if vocab_size is not None:
        base.resize_token_embeddings(vocab_size, mean_resizing=False)
    base.save_pretrained(folder / "base")
    write_tokenizer(folder / "base")
    return folder


@contextlib.contextmanager
def running(
    folder: Path,
    *flags: str,
    base: str | None = None,
    store: Path | None = None,
    is_fork: bool = False,
) -> Iterator[Running]:
    """A server over `folder`/base in float32 and on one thread, or over `base` as it is served by
    default, with `folder`/adapters as its root, until the context ends.

    `store`: what outlasts it; None: nothing does. `is_fork`: it starts sooner, and its memory is
    shared with others, so that it says nothing.
    """
    target, http = free_address(), free_address()
    store = store or Path(tempfile.mkdtemp(prefix="store-", dir=folder))
    log = store.with_suffix(".log")
    command = [
        "-m", "loramux", "--base", base or str(folder / "base"), "--device", "cpu",
        "--grpc-address", target, "--http-address", http,
        "--adapter-roots", str(folder / "adapters"), "--adapter-store", str(store),
        "--log-format", "console", "--log-level", "warning", *flags,
    ]  # fmt: skip
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    environment.pop("OMP_NUM_THREADS", None)  # `make soak` sets it
    if base is None:
        command += ["--dtype", "float32", "--kv-bytes", str(8 << 20)]
        environment["OMP_NUM_THREADS"] = "1"
    process: subprocess.Popen | Program
    with log.open("a") as stream:
        if is_fork:
            output = stream.fileno()
            process = start_program(command, stdout=output, stderr=output, env=environment)
        else:
            process = subprocess.Popen(
                [sys.executable, *command], cwd=REPO, stderr=stream, stdout=stream, env=environment
            )
    try:
        server = Running(process, target, f"http://{http}", log, folder, base or "a tiny base")
        wait_until_ready(server)
        yield server
    finally:
        process.kill()
        process.wait()


def wait_until_ready(server: Running) -> None:
    deadline = time.monotonic() + START_S
    while True:
        assert server.process.poll() is None, server.log.read_text()[-3000:]
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(f"{server.http}/readyz").status_code == 200:
                return
        assert time.monotonic() < deadline, "the server does not become ready"
        time.sleep(0.1)

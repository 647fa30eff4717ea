"""A real server in a process of its own, and what it holds: memory, files, threads, series."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import sys
import tempfile
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil

from server.client import AsyncClient
from tests.server.test_process import REPO, free_address

START_S = 90


@dataclass(frozen=True)
class Holdings:
    """What a process holds at one moment."""

    rss_mb: float
    num_files: int
    num_threads: int
    num_series: int


class Served:
    """A running server and a client of it."""

    def __init__(self, process: asyncio.subprocess.Process, target: str, http: str, log: Path):
        self.process, self.target, self.log = process, target, log
        self.http = httpx.AsyncClient(base_url=f"http://{http}", timeout=30)
        self.client = AsyncClient(target)

    async def ready(self) -> None:
        async with asyncio.timeout(START_S):
            while True:
                assert self.process.returncode is None, self.log.read_text()[-3000:]
                with contextlib.suppress(httpx.HTTPError):
                    if (await self.http.get("/readyz")).status_code == 200:
                        return
                await asyncio.sleep(0.1)

    async def metrics(self) -> dict[str, float]:
        """Every sample of /metrics, by name and labels as they are written there."""
        page = (await self.http.get("/metrics")).text
        lines = (line for line in page.splitlines() if not line.startswith("#"))
        return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}

    async def holdings(self) -> Holdings:
        process = psutil.Process(self.process.pid)
        return Holdings(
            process.memory_info().rss / 1e6,
            process.num_fds(),
            process.num_threads(),
            len(await self.metrics()),
        )

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


@contextlib.asynccontextmanager
async def served(folder: Path, *flags: str, store: Path | None = None) -> AsyncIterator[Served]:
    """A server over `folder`/base with `folder`/adapters as its root, until the context ends.

    `store`: what outlasts it; None: nothing does.
    """
    target, http = free_address(), free_address()
    store = store or Path(tempfile.mkdtemp(prefix="store-", dir=folder))
    log = store.with_suffix(".log")
    command = [
        sys.executable, "-m", "server", "--base", str(folder / "base"), "--device", "cpu",
        "--dtype", "float32", "--grpc-address", target, "--http-address", http,
        "--adapter-roots", str(folder / "adapters"), "--adapter-store", str(store),
        "--kv-bytes", str(8 << 20), "--log-format", "console", "--log-level", "warning", *flags,
    ]  # fmt: skip
    with log.open("a") as stream:
        process = await asyncio.create_subprocess_exec(
            *command, cwd=REPO, stderr=stream, stdout=stream,
            env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        )  # fmt: skip
    server = Served(process, target, http, log)
    try:
        async with server.http, server.client:
            await server.ready()
            yield server
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()

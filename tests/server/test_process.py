"""Real processes: `loramux serve` whose engine hangs, freezes or fails, and how they end."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import subprocess
import time
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import httpx
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from lora_runtime.errors import Unavailable
from loramux.server.client import AsyncClient
from loramux.server.watchdog import MAX_FAILED_IN_A_ROW
from tests.fork_server import Program, start_program
from tests.server.faulty_server import FROZEN_S
from tests.tiny import tiny_checkpoint
from tests.tiny_tokenizer import write_tokenizer

START_S = 60
SERVING = health_pb2.HealthCheckResponse.SERVING


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tiny_checkpoint(tmp_path_factory.mktemp("base"))
    write_tokenizer(folder)
    return folder


def free_address() -> str:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return f"127.0.0.1:{free.getsockname()[1]}"


class Server:
    """A server's process and its clients."""

    def __init__(
        self, process: Program | subprocess.Popen, log: Path, fault: Path, target: str, http: str
    ):
        self.process, self.log, self.fault, self.target = process, log, fault, target
        self.http = httpx.AsyncClient(base_url=f"http://{http}", timeout=2)
        self.client = AsyncClient(target)
        self.probes_before: set[int] = set()

    async def readyz(self) -> int:
        try:
            return (await self.http.get("/readyz")).status_code
        except httpx.HTTPError:
            return 0

    async def until_readyz(self, status: int, timeout_s: float) -> float:
        """Return after how many seconds the probe gave that status."""
        begun = time.monotonic()
        async with asyncio.timeout(timeout_s):
            while (found := await self.readyz()) != status:
                self.probes_before.add(found)
                assert self.process.poll() is None, self.log.read_text()
                await asyncio.sleep(0.05)
        return time.monotonic() - begun

    async def end(self, timeout_s: float) -> tuple[int, float]:
        """Wait for the process: its exit code, and after how many seconds."""
        begun = time.monotonic()
        code = await asyncio.to_thread(self.process.wait, timeout_s)
        return code, time.monotonic() - begun

    async def endless_stream(self) -> asyncio.Task:
        """Start a request and return when it has given something."""
        begun = asyncio.Event()

        async def consume() -> None:
            options = {"max_tokens": 400, "ignore_eos": True, "temperature": 0.0}
            async for _ in self.client.generate(token_ids=[5, 6, 7], **options):
                begun.set()

        task = asyncio.create_task(consume())
        await asyncio.wait_for(begun.wait(), 10)
        return task


@contextlib.asynccontextmanager
async def started(base: Path, tmp_path: Path, *flags: str) -> AsyncIterator[Server]:
    """A server's process that is ready; killed in the end if it still lives."""
    target, http = free_address(), free_address()
    fault, log = tmp_path / "fault", tmp_path / "log"
    arguments = [
        "serve", "--base", str(base), "--device", "cpu", "--dtype", "float32",
        "--grpc-address", target, "--http-address", http, "--kv-bytes", str(1 << 20),
        "--adapter-store", str(tmp_path / "store"), *flags,
    ]  # fmt: skip
    with log.open("wb") as stream:
        process = start_program(
            ["-m", "tests.server.faulty_server", fault, *arguments], stderr=stream.fileno()
        )
    server = Server(process, log, fault, target, http)
    try:
        async with server.http, server.client:
            await server.until_readyz(200, START_S)
            yield server
    finally:
        process.kill()
        process.wait()


async def health_statuses(target: str, seen: list[tuple[int, float]]) -> None:
    begun = time.monotonic()
    async with grpc.aio.insecure_channel(target) as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        with contextlib.suppress(grpc.aio.AioRpcError):
            async for response in watch:
                seen.append((response.status, time.monotonic() - begun))


async def test_a_hang_turns_the_probes_ends_streams_typed_and_the_process(base, tmp_path):
    async with started(base, tmp_path, "--engine-timeout-s", "6") as server:
        assert 503 in server.probes_before, "probes answer while the base is loading"
        stream = await server.endless_stream()
        server.fault.write_text("hang")
        seen: list[tuple[int, float]] = []
        watching = asyncio.create_task(health_statuses(server.target, seen))
        assert await server.until_readyz(503, 10) <= 5
        with pytest.raises(Unavailable, match="no progress"):
            await asyncio.wait_for(stream, 8)
        code, _ = await server.end(8)
        assert code == 1, server.log.read_text()
        await watching
        (_, _), (status, seconds), *_ = seen
        assert status != SERVING and seconds <= 5
        text = server.log.read_text()
        assert "gemm_4bit" not in text and "%|" not in text
        for line in text.splitlines():
            assert line.startswith(("{", "error: ")), line


async def test_sigterm_ends_a_stuck_server_with_watches_open(base, tmp_path):
    async with started(base, tmp_path, "--drain-s", "1", "--engine-timeout-s", "60") as server:
        stream = await server.endless_stream()
        watching = asyncio.create_task(health_statuses(server.target, []))
        server.fault.write_text("hang")
        await asyncio.sleep(0.3)
        server.process.send_signal(signal.SIGTERM)
        _, seconds = await server.end(15)
        assert seconds <= 6
        with pytest.raises(Unavailable):
            await stream
        await watching


async def test_an_interpreter_that_is_frozen_ends_too(base, tmp_path):
    async with started(base, tmp_path) as server:
        stream = await server.endless_stream()
        server.fault.write_text("freeze")
        await asyncio.sleep(0.3)
        server.process.send_signal(signal.SIGTERM)
        code, seconds = await server.end(FROZEN_S + 5)
        assert code == 1 and seconds <= FROZEN_S + 2
        assert "faulty_server.py" in server.log.read_text(), "it says what it was doing"
        with pytest.raises(Unavailable):
            await stream


async def test_when_every_request_fails_the_server_is_not_ready(base, tmp_path):
    async with started(base, tmp_path) as server:
        server.fault.write_text("fail")
        for _ in range(MAX_FAILED_IN_A_ROW):
            with pytest.raises(Exception, match="internal error"):
                await server.client.generate(token_ids=[5], max_tokens=2).text()
        assert await server.until_readyz(503, 5) < 2
        server.fault.unlink()
        await server.client.generate(token_ids=[5], max_tokens=2).text()
        await server.until_readyz(200, 5)
        begun = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        assert (await server.end(10))[0] == 0 and time.monotonic() - begun < 5

"""Do all panels and alerts of deploy/ have data, in a real Prometheus that scrapes a real server?

Starts `loramux serve` over a tiny random base and a Prometheus beside it, and loads the server for
a minute with what the panels show: requests of many adapters for a small pool, callers that leave,
calls that are refused, adapters that come and go. Then asks Prometheus for every panel's and every
alert's query, the alert's comparison left out, and whether the number of series is back where it
was after a thousand adapters. Exits with 1 if anything is empty. Needs `prometheus` on the PATH.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import yaml

from lora_runtime.errors import LoramuxError
from loramux.server.client import AsyncClient
from tests.peft_adapters import write_adapter
from tests.tiny import tiny_checkpoint, tiny_model
from tests.tiny_tokenizer import write_tokenizer

DEPLOY = Path(__file__).resolve().parents[1] / "deploy"
SHAPE = "granite-h"
"""Of the tiny base: a hybrid, as some panels are about recurrent layers."""
NUM_ADAPTERS = 12
NUM_COMING_AND_GOING = 1000
SETTINGS = {
    "device": "cpu",
    "dtype": "float32",
    "max_num_seqs": 8,
    "max_queued_requests": 40,
    "max_adapter_slots": 3,
    "adapter_pool_bytes": "1MiB",
    "log_level": "warning",
}
COMPARISON = re.compile(r" (?:>|<|==) [\d.]+$")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


@contextlib.contextmanager
def process(*command: object, **options) -> Iterator[None]:
    """Run a program in the background while the context lasts."""
    running = subprocess.Popen(list(map(str, command)), **options)
    try:
        yield
    finally:
        running.send_signal(signal.SIGTERM)
        running.wait(20)


def queries() -> Iterator[tuple[str, str]]:
    """Title and expression of every panel's target and of every alert."""
    dashboard = json.loads((DEPLOY / "grafana/loramux.json").read_text())
    for panel in dashboard["panels"]:
        for target in panel.get("targets", ()):
            expression = target["expr"].replace("$__rate_interval", "30s")
            expression = expression.replace("$job", "loramux").replace("$instance", ".+")
            yield f"panel {panel['title']}", expression
    rules = yaml.safe_load((DEPLOY / "prometheus/alerts.yaml").read_text())
    for rule in (rule for group in rules["groups"] for rule in group["rules"]):
        for part in rule["expr"].strip().split(" and "):
            yield f"alert {rule['alert']}", COMPARISON.sub("", part)


async def request(client: AsyncClient, index: int) -> None:
    """One request of a mixed load; every seventh caller leaves, every ninth asks for nothing."""
    adapter = f"a{index % (NUM_ADAPTERS + 1)}"
    known = adapter != f"a{NUM_ADAPTERS}"
    if index % 9 == 0:
        adapter, known = "ghost", True
    with contextlib.suppress(LoramuxError):
        stream = client.generate(
            f"Hello {index % 5} and so on", adapter=adapter if known else None, max_tokens=24
        )
        async for _ in stream:
            if index % 7 == 0:
                return


async def load(client: AsyncClient, http: httpx.AsyncClient, folder: Path, seconds: float) -> int:
    """Ask in waves that overflow the queue now and then; return how many requests were sent."""
    begun, index = time.monotonic(), 0
    while time.monotonic() - begun < seconds:
        wave = 80 if index % 5 == 0 else 12
        await asyncio.gather(*(request(client, index + k) for k in range(wave)))
        index += wave
        await client.load_adapter("passing", str(folder / "a0"), replace=True)
        with contextlib.suppress(LoramuxError):
            await client.load_adapter("broken", str(folder / "missing"))
        await client.unload_adapter("passing")
        for path in ("/healthz", "/readyz", "/nowhere"):
            await http.get(path)
    return index


async def come_and_go(client: AsyncClient, folder: Path, count: int) -> None:
    """Load, use and unload adapters under ever new names."""
    for number in range(count):
        name = f"guest{number}"
        await client.load_adapter(name, str(folder / f"a{number % NUM_ADAPTERS}"))
        async for _ in client.generate("Hello", adapter=name, max_tokens=1):
            pass
        await client.unload_adapter(name)


class Prometheus:
    """A Prometheus' HTTP API."""

    def __init__(self, port: int) -> None:
        self._http = httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}")

    async def ask(self, expression: str) -> list[dict]:
        answer = await self._http.get("/api/v1/query", params={"query": expression})
        if answer.status_code != 200:
            raise SystemExit(f"{expression}: {answer.text}")
        return answer.json()["data"]["result"]

    async def number(self, expression: str) -> float:
        found = await self.ask(expression)
        return float(found[0]["value"][1]) if found else 0.0

    async def until(self, expression: str, seconds: float = 60.0) -> None:
        """Wait until a query has a result."""
        async with asyncio.timeout(seconds):
            while not await self._answers(expression):
                await asyncio.sleep(0.5)

    async def _answers(self, expression: str) -> bool:
        with contextlib.suppress(httpx.HTTPError):
            return bool(await self.ask(expression))
        return False


async def check(ports: dict[str, int], folder: Path, seconds: float) -> bool:
    prometheus = Prometheus(ports["prometheus"])
    http = httpx.AsyncClient(base_url=f"http://127.0.0.1:{ports['http']}")
    async with AsyncClient(f"127.0.0.1:{ports['grpc']}") as client:
        await prometheus.until("loramux:engine_up == 1")
        for index in range(NUM_ADAPTERS):
            await client.load_adapter(f"a{index}", str(folder / f"a{index}"))
        sent = await load(client, http, folder, seconds)
        await asyncio.sleep(2)
        empty = 0
        for title, expression in queries():
            found = await prometheus.ask(expression)
            values = [float(sample["value"][1]) for sample in found]
            good = [value for value in values if value == value]
            empty += not good
            shown = f"{len(found):3} series, largest {max(good):.4g}" if good else "EMPTY"
            print(f"{title:55} {shown}")
        series = 'count({job="loramux"})'
        before = await prometheus.number(series)
        await come_and_go(client, folder, NUM_COMING_AND_GOING)
        await asyncio.sleep(2)
        after = await prometheus.number(series)
        colons = await prometheus.number('count({job="loramux",__name__=~"vllm:.+"})')
        broken = await prometheus.number('count({job="loramux",__name__=~"(vllm|loramux)_.+"})')
    print(
        f"{sent} requests; {empty} empty queries; {colons:.0f} series named vllm:…, "
        f"{broken:.0f} named vllm_… or loramux_…"
    )
    print(f"series: {before:.0f} before {NUM_COMING_AND_GOING} adapters, {after:.0f} after")
    return not empty and not broken and after <= before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0, help="of load")
    seconds = parser.parse_args().seconds
    ports = {name: free_port() for name in ("grpc", "http", "prometheus")}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_tokenizer(tiny_checkpoint(folder / "base", SHAPE))
        model = tiny_model(SHAPE)
        for index in range(NUM_ADAPTERS):
            write_adapter(model, folder / "adapters" / f"a{index}", seed=index, r=2 + index)
        settings = {
            **SETTINGS,
            "base": str(folder / "base"),
            "grpc_address": f"127.0.0.1:{ports['grpc']}",
            "http_address": f"127.0.0.1:{ports['http']}",
            "adapter_roots": [str(folder / "adapters")],
            "adapter_store": str(folder / "store"),
        }
        (folder / "serve.yaml").write_text(yaml.safe_dump(settings))
        target = {"targets": [f"127.0.0.1:{ports['http']}"]}
        job = {"job_name": "loramux", "scrape_interval": "1s", "static_configs": [target]}
        (folder / "prometheus.yaml").write_text(yaml.safe_dump({"scrape_configs": [job]}))
        serve = process(sys.executable, "-m", "loramux", "serve", "--config", folder / "serve.yaml")
        scrape = process(
            "prometheus",
            f"--config.file={folder / 'prometheus.yaml'}",
            f"--storage.tsdb.path={folder / 'tsdb'}",
            f"--web.listen-address=127.0.0.1:{ports['prometheus']}",
            "--log.level=warn",
            env={**os.environ, "HOME": name},
        )
        with serve, scrape:
            is_good = asyncio.run(check(ports, folder / "adapters", seconds))
    sys.exit(0 if is_good else 1)


if __name__ == "__main__":
    main()

"""HTTP's API over a real socket, around any service."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import httpx
from openai import AsyncOpenAI

from loramux.server.access.gate import OPEN_GATE, Gate
from loramux.server.access.http_gate import HttpGate
from loramux.server.http_gateway import build_http_app
from loramux.server.http_server import HttpServer
from loramux.server.openai.boundary import Backend
from loramux.server.openai.routes import routes
from loramux.server.running_calls import Calls
from loramux.server.service import Service


class NoMetrics:
    def render(self, accept: str = "") -> tuple[bytes, str]:
        return b"", "text/plain"


@dataclass
class Api:
    """A running API and clients of it."""

    port: int
    calls: Calls
    client: AsyncOpenAI
    http: httpx.AsyncClient
    service: Service | None
    """What is served; None: still loading."""
    url: str = field(init=False)

    def __post_init__(self) -> None:
        self.url = f"http://127.0.0.1:{self.port}"

    async def post(self, path: str, **body) -> httpx.Response:
        return await self.http.post(path, json=body)

    async def error(self, path: str, **body) -> tuple[int, dict]:
        answer = await self.post(path, **body)
        assert list(answer.json()) == ["error"]
        assert list(answer.json()["error"]) == ["message", "type", "param", "code"]
        return answer.status_code, answer.json()["error"]


@asynccontextmanager
async def serving_http(
    service: Service | None, max_calls: int = 100, gate: Gate = OPEN_GATE
) -> AsyncIterator[Api]:
    calls = Calls(max_calls)
    api: Api
    backend = Backend(lambda: api.service, calls)
    app = build_http_app(
        metrics=NoMetrics(),
        is_alive=lambda: True,
        is_ready=lambda: True,
        routes=routes(backend),
    )
    server = HttpServer(HttpGate(app, gate))
    server.config.port = 0
    task = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.005)
    port = server.servers[0].sockets[0].getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    openai = AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    try:
        async with openai, httpx.AsyncClient(base_url=url, timeout=20) as http:
            api = Api(port, calls, openai, http, service)
            yield api
    finally:
        server.should_exit = True
        await task

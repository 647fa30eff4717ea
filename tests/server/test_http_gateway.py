from __future__ import annotations

import asyncio

import httpx
import jsonschema
import pytest

from loramux.server.http_gateway import build_http_app
from loramux.server.openai import description


class State:
    """What the probes ask, and a page instead of metrics."""

    alive = True
    ready = True

    def render(self, accept: str) -> tuple[bytes, str]:
        return f"accept={accept}\n".encode(), "text/plain; version=1.0.0"


@pytest.fixture
def state():
    return State()


@pytest.fixture
def get(state):
    app = build_http_app(metrics=state, is_alive=lambda: state.alive, is_ready=lambda: state.ready)

    async def ask(path: str, **headers: str) -> httpx.Response:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://loramux") as client:
            return await client.get(path, headers=headers)

    return lambda path, **headers: asyncio.run(ask(path, **headers))


@pytest.mark.parametrize(
    ("alive", "ready", "healthz", "readyz"),
    [(True, True, 200, 200), (True, False, 200, 503), (False, True, 503, 503)],
)
def test_probes(state, get, alive, ready, healthz, readyz):
    state.alive, state.ready = alive, ready
    assert get("/healthz").status_code == healthz
    assert get("/readyz").status_code == get("/health").status_code == readyz


def test_metrics_are_served_in_the_format_asked_for(get):
    response = get("/metrics", accept="application/openmetrics-text")
    assert response.text == "accept=application/openmetrics-text\n"
    assert response.headers["content-type"] == "text/plain; version=1.0.0"


@pytest.mark.parametrize("path", ["/", "/v1/models", "/v1/models/a%0Ab"])
def test_nothing_else_is_there(get, path):
    response = get(path)
    assert response.status_code == 404
    jsonschema.validate(
        response.json(), description.described([])["components"]["schemas"]["Error"]
    )
    assert response.json()["error"]["code"] == "not_found"

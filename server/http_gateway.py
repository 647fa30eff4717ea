"""The plain HTTP port: /metrics for Prometheus, /healthz and /readyz for probes."""

from __future__ import annotations

from collections.abc import Callable

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from server.metrics import Metrics


def build_http_app(
    *, metrics: Metrics, is_alive: Callable[[], bool], is_ready: Callable[[], bool]
) -> Starlette:
    """Build the routes. A probe answers 200 or 503: restart a dead server, spare a busy one."""

    async def show_metrics(request: Request) -> Response:
        body, content_type = metrics.render(request.headers.get("accept", ""))
        return Response(body, headers={"content-type": content_type})

    async def healthz(_: Request) -> Response:
        return _probe(is_alive(), "the engine has died")

    async def readyz(_: Request) -> Response:
        return _probe(is_alive() and is_ready(), "not ready, or draining")

    return Starlette(
        routes=[
            Route("/metrics", show_metrics),
            Route("/healthz", healthz),
            Route("/readyz", readyz),
        ]
    )


def _probe(is_good: bool, problem: str) -> Response:
    return PlainTextResponse("ok\n") if is_good else PlainTextResponse(f"{problem}\n", 503)

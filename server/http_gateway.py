"""The plain HTTP port: /metrics for Prometheus, /healthz and /readyz for probes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route


class MetricsPage(Protocol):
    """Where the page of metrics comes from."""

    def render(self, accept: str = "") -> tuple[bytes, str]:
        """Return the page and its content type, in the format an Accept header asks for."""
        ...


def build_http_app(
    *,
    metrics: MetricsPage,
    is_alive: Callable[[], bool],
    is_ready: Callable[[], bool],
    routes: Sequence[Route] = (),
) -> Starlette:
    """Build the routes, and `routes` beside them. A probe answers 200 or 503: restart a dead
    server, spare a busy one.

    While the engine is loading neither is 200; give a probe that restarts time for that.
    """

    async def show_metrics(request: Request) -> Response:
        body, content_type = metrics.render(request.headers.get("accept", ""))
        return Response(body, headers={"content-type": content_type})

    async def healthz(_: Request) -> Response:
        return _probe(is_alive(), "the engine is loading, hangs or has died")

    async def readyz(_: Request) -> Response:
        return _probe(is_alive() and is_ready(), "loading, not ready, or draining")

    return Starlette(
        routes=[
            Route("/metrics", show_metrics),
            Route("/healthz", healthz),
            Route("/readyz", readyz),
            *routes,
        ]
    )


def _probe(is_good: bool, problem: str) -> Response:
    return PlainTextResponse("ok\n") if is_good else PlainTextResponse(f"{problem}\n", 503)

"""The HTTP port: /metrics for Prometheus, /healthz and /readyz for probes, and the routes that it
is given. What no route takes is answered in the form of OpenAI's errors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from http import HTTPStatus
from typing import Protocol

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import BaseRoute, Route

PROBE_AGAIN_S = 5
"""What Retry-After says to a probe."""


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
    routes: Iterable[BaseRoute] = (),
) -> Starlette:
    """Build the application: its own routes and the given ones.

    A probe answers 200 or 503: restart a dead server, spare a busy one.
    While the engine is loading neither is 200; give a probe that restarts time for that.
    """

    async def show_metrics(request: Request) -> Response:
        body, content_type = metrics.render(request.headers.get("accept", ""))
        return Response(body, headers={"content-type": content_type})

    async def healthz(_: Request) -> Response:
        return _probe(is_alive(), "the engine is loading, hangs or has died")

    async def readyz(_: Request) -> Response:
        return _probe(is_alive() and is_ready(), "loading, not ready, or draining")

    app = Starlette(
        routes=[
            Route("/metrics", show_metrics),
            Route("/healthz", healthz),
            Route("/readyz", readyz),
            Route("/health", readyz),  # what vLLM's tools ask before they begin
            *routes,
        ],
        exception_handlers={HTTPException: _no_route},
    )
    # `/metrics/` is no route: starlette would lead to `/metrics` on whatever host a caller names.
    app.router.redirect_slashes = False
    return app


async def _no_route(request: Request, error: Exception) -> Response:
    """404 and 405."""
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path[:200]}: {error.detail}"
    code = HTTPStatus(error.status_code).name.lower()
    body = {"message": message, "type": "invalid_request_error", "param": None, "code": code}
    return JSONResponse({"error": body}, error.status_code, error.headers)


def _probe(is_good: bool, problem: str) -> Response:
    if is_good:
        return PlainTextResponse("ok\n")
    return PlainTextResponse(f"{problem}\n", 503, {"retry-after": str(PROBE_AGAIN_S)})

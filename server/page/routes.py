"""HTTP routes of the status page: its files, what it shows, and what `/v1` has no route for.

The files hold nothing about this server, so anybody may have them; the JSON routes answer callers
as the API does.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from types import MappingProxyType

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from lora_runtime.errors import InvalidRequest, LoramuxError, Unavailable
from loramux.server.adapters.adapters import Adapters
from loramux.server.errors import http_error
from loramux.server.fields import adapter_name
from loramux.server.page.history import History
from loramux.server.page.snapshot import Condition, adapter, snapshot

INDEX = "index.html"
CONTENT_TYPES = MappingProxyType(
    {
        ".html": "text/html; charset=utf-8",
        ".css": "text/css; charset=utf-8",
        ".js": "text/javascript; charset=utf-8",
        ".svg": "image/svg+xml",
    }
)
COMMON_HEADERS = MappingProxyType(
    {
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cross-Origin-Resource-Policy": "same-origin",
    }
)
FILE_HEADERS = MappingProxyType(
    {
        **COMMON_HEADERS,
        # Nothing comes from elsewhere or goes there, nobody frames the page, and text never becomes
        # markup: names, sources and outputs are other people's.
        "Content-Security-Policy": (
            "default-src 'self'; object-src 'none'; base-uri 'none'; form-action 'none'; "
            "frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
        ),
        "Cross-Origin-Opener-Policy": "same-origin",
        "Cache-Control": "no-cache",  # kept, but asked for by its ETag every time
    }
)
DATA_HEADERS = MappingProxyType({**COMMON_HEADERS, "Cache-Control": "no-store"})


@dataclass(frozen=True, slots=True)
class StaticFile:
    """A file of the page, in memory."""

    body: bytes
    content_type: str
    etag: str


def read_files() -> dict[str, StaticFile]:
    """Return the page's files by name, read from the package."""
    found = {}
    for file in resources.files("loramux.server.page").joinpath("static").iterdir():
        content_type = CONTENT_TYPES.get(file.name[file.name.rfind(".") :])
        if content_type is not None:
            body = file.read_bytes()
            etag = f'"{hashlib.sha256(body).hexdigest()[:32]}"'
            found[file.name] = StaticFile(body, content_type, etag)
    return found


def routes(condition: Condition) -> list[Route]:
    """Return the routes of the page of a server, which may still be loading."""
    page = Page(condition)
    return [
        Route("/", page.show_file),
        Route("/api/status", page.show_status),
        Route("/page/{file}", page.show_file),
        Route("/api/adapters/{name:path}/rollback", page.roll_back, methods=["POST"]),
        Route("/api/adapters/{name:path}", page.show_adapter),
    ]


class Page:
    """The endpoints."""

    def __init__(self, condition: Condition) -> None:
        self._condition = condition
        self._files: Mapping[str, StaticFile] = read_files()

    async def show_file(self, request: Request) -> Response:
        """Answer with a file, or 304 to who has it."""
        file = self._files.get(request.path_params.get("file", INDEX))
        if file is None:
            return Response("no such file\n", 404, COMMON_HEADERS, "text/plain")
        headers = {**FILE_HEADERS, "ETag": file.etag}
        if file.etag in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=headers)
        return Response(file.body, headers={**headers, "content-type": file.content_type})

    async def show_status(self, request: Request) -> Response:
        """Answer with all that the page shows; `since`: the samples that the caller has."""
        since = request.query_params.get("since", "0")
        if not (since.isascii() and since.isdecimal() and len(since) <= 15):
            error = InvalidRequest(f"since is {since[:40]!r}; it must be a count", field="since")
            return _failed(error)
        return JSONResponse(
            snapshot(self._condition, request.state.caller, int(since)), headers=DATA_HEADERS
        )

    async def show_adapter(self, request: Request) -> Response:
        """Answer with all that is known of one adapter."""
        try:
            adapters, history = self._parts()
            name = adapter_name(request.path_params["name"])
            record = adapters.get(request.state.caller, name)
        except LoramuxError as error:
            return _failed(error)
        return JSONResponse(adapter(record, history), headers=DATA_HEADERS)

    async def roll_back(self, request: Request) -> Response:
        """Give a name its former content back; answer with the adapter.

        Only JSON is taken: a foreign page that a browser shows cannot send that without being
        asked for its permission first, which nobody gives.
        """
        if request.headers.get("content-type", "").partition(";")[0] != "application/json":
            error = InvalidRequest("send Content-Type: application/json", field="Content-Type")
            return _failed(error, status=415)
        try:
            adapters, history = self._parts()
            name = adapter_name(request.path_params["name"])
            record = await adapters.rollback(request.state.caller, name)
        except Exception as error:
            return _failed(error)
        return JSONResponse(adapter(record, history), headers=DATA_HEADERS)

    def _parts(self) -> tuple[Adapters, History]:
        service, history = self._condition.service, self._condition.history
        if service is None or history is None:
            raise Unavailable("the base is being loaded; try again later")
        return service.adapters, history


def _failed(error: Exception, status: int | None = None) -> JSONResponse:
    known, body = http_error(error)
    return JSONResponse(body, status or known, DATA_HEADERS)

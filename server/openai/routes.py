"""The routes of HTTP's API, and the page that describes them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from starlette.routing import Route

from loramux.server.openai import models
from loramux.server.openai.boundary import Backend, Endpoint, Exchange, Handler
from loramux.server.openai.chat import chat
from loramux.server.openai.completions import complete
from loramux.server.openai.description import described
from loramux.server.openai.responses import respond
from loramux.server.openai.schema import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    LoadAdapterRequest,
    RequestModel,
    ResponsesRequest,
    TokenizeRequest,
    UnloadAdapterRequest,
)

OPENAPI = "/openapi.json"


@dataclass(frozen=True, slots=True)
class Operation:
    """One route: who answers, and what it takes (None: no body)."""

    method: str
    path: str
    handle: Handler
    request: type[RequestModel] | None = None


OPERATIONS = (
    Operation("GET", "/v1/models", models.list_models),
    Operation("GET", "/v1/models/{model:path}", models.show_model),
    Operation("POST", "/v1/completions", complete, CompletionRequest),
    Operation("POST", "/v1/chat/completions", chat, ChatRequest),
    Operation("POST", "/v1/responses", respond, ResponsesRequest),
    Operation("POST", "/v1/embeddings", models.refuse_embeddings),
    Operation("POST", "/v1/load_lora_adapter", models.load_adapter, LoadAdapterRequest),
    Operation("POST", "/v1/unload_lora_adapter", models.unload_adapter, UnloadAdapterRequest),
    Operation("POST", "/tokenize", models.tokenize, TokenizeRequest),
    Operation("POST", "/detokenize", models.detokenize, DetokenizeRequest),
    Operation("GET", "/version", models.show_version),
)


def routes(backend: Backend) -> list[Route]:
    """Return the API's routes over a backend."""
    page = described([(o.method, o.path, o.handle.__doc__ or "", o.request) for o in OPERATIONS])

    async def describe(exchange: Exchange) -> None:
        await exchange.answer.json(page)

    return [*_routes(backend), Route(OPENAPI, Endpoint(backend, describe, takes_body=False))]


def _routes(backend: Backend) -> Iterator[Route]:
    for operation in OPERATIONS:
        endpoint = Endpoint(backend, operation.handle, takes_body=operation.request is not None)
        yield Route(operation.path, endpoint, methods=[operation.method])

"""The base and its adapters as models, and vLLM's calls that load and unload adapters and show
tokens.
"""

from __future__ import annotations

import time
from typing import Any

from lora_runtime.errors import InvalidRequest, UnsupportedFeature
from lora_runtime.text.text_side import TextSide
from loramux.server.calls import AdapterRecord, AdapterState, Prompt, TokenPrompt
from loramux.server.fields import adapter_name
from loramux.server.openai.boundary import Exchange
from loramux.server.openai.decode import chat_prompt, model_adapter, text_prompt, token_ids
from loramux.server.openai.encode import token_text
from loramux.server.openai.schema import (
    DetokenizeRequest,
    LoadAdapterRequest,
    TokenizeRequest,
    UnloadAdapterRequest,
    parse_request,
)
from loramux.server.service import Service

OWNER = "loramux"
STARTED_AT = int(time.time())
"""When the base was made available, roughly; seconds since 1970."""


async def list_models(exchange: Exchange) -> None:
    """GET /v1/models: the base and every loaded adapter."""
    service = exchange.service
    records = [
        r for r in service.adapters.records(exchange.caller) if r.state is AdapterState.LOADED
    ]
    data = [_base(exchange), *(_adapter(service, record) for record in records)]
    await exchange.answer.json({"object": "list", "data": data})


async def show_model(exchange: Exchange) -> None:
    """GET /v1/models/{model}."""
    service, name = exchange.service, exchange.path["model"]
    if name == service.facts.base_name:
        return await exchange.answer.json(_base(exchange))
    name = model_adapter(name)
    service.adapters.text_side(exchange.caller, name)  # refuses what is not loaded
    await exchange.answer.json(_adapter(service, service.adapters.get(exchange.caller, name)))


async def load_adapter(exchange: Exchange) -> None:
    """POST /v1/load_lora_adapter: content that the name holds already is success. Notes follow
    vLLM's sentence, each in a line of its own.
    """
    request = parse_request(LoadAdapterRequest, exchange.body)
    name = adapter_name(request.lora_name, "lora_name")
    record, _ = await exchange.service.adapters.load(
        exchange.caller, name, request.lora_path, replace=request.load_inplace
    )
    success = f"Success: LoRA adapter '{name}' added successfully."
    await exchange.answer.text("\n".join([success, *(f"Note: {note}" for note in record.notes)]))


async def unload_adapter(exchange: Exchange) -> None:
    """POST /v1/unload_lora_adapter."""
    request = parse_request(UnloadAdapterRequest, exchange.body)
    name = adapter_name(request.lora_name, "lora_name")
    await exchange.service.adapters.unload(exchange.caller, name)
    await exchange.answer.text(f"Success: LoRA adapter '{name}' removed successfully.")


async def tokenize(exchange: Exchange) -> None:
    """POST /tokenize."""
    service = exchange.service
    request, prompt = await exchange.run(_tokenized, exchange)
    side = _known(exchange, request.model)
    found = await service.prompts.tokenize(prompt, side)
    body: dict[str, Any] = {
        "count": len(found),
        "max_model_len": service.facts.info(exchange.caller).engine.max_model_len,
        "tokens": found,
        "token_strs": None,
    }
    if request.return_token_strs:
        read = service.prompts.token_reader(side)
        body["token_strs"] = [token_text(read(token_id)) for token_id in found]
    await exchange.answer.json(body)


async def detokenize(exchange: Exchange) -> None:
    """POST /detokenize."""
    request, prompt = await exchange.run(_detokenized, exchange)
    side = _known(exchange, request.model)
    detokenize = exchange.service.prompts.detokenize
    text = await exchange.run(detokenize, prompt.token_ids, side, "tokens")
    await exchange.answer.json({"prompt": text})


async def show_version(exchange: Exchange) -> None:
    """GET /version."""
    versions = exchange.service.facts.info(exchange.caller).versions
    await exchange.answer.json({"version": versions["loramux"], "versions": dict(versions)})


async def refuse_embeddings(exchange: Exchange) -> None:
    """POST /v1/embeddings."""
    raise UnsupportedFeature("embeddings are not served: this server generates text", field=None)


def _base(exchange: Exchange) -> dict[str, Any]:
    service = exchange.service
    name, info = service.facts.base_name, service.facts.info(exchange.caller).engine
    return _model(name, STARTED_AT, name, None) | {"max_model_len": info.max_model_len}


def _adapter(service: Service, record: AdapterRecord) -> dict[str, Any]:
    return _model(record.name, int(record.loaded_at_s), record.source, service.facts.base_name)


def _model(name: str, created: int, root: str, parent: str | None) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": created,
        "owned_by": OWNER,
        "root": root,
        "parent": parent,
        "permission": [],
    }


def _known(exchange: Exchange, model: str | None) -> TextSide | None:
    if model is None or model == exchange.service.facts.base_name:
        return None
    return exchange.service.adapters.text_side(exchange.caller, model_adapter(model))


def _detokenized(exchange: Exchange) -> tuple[DetokenizeRequest, TokenPrompt]:
    request = parse_request(DetokenizeRequest, exchange.body)
    return request, token_ids(request.tokens, "tokens", exchange.service.prompts.limits)


def _tokenized(exchange: Exchange) -> tuple[TokenizeRequest, Prompt]:
    request, limits = parse_request(TokenizeRequest, exchange.body), exchange.service.prompts.limits
    if (request.prompt is None) == (request.messages is None):
        raise InvalidRequest("give either prompt or messages", field="prompt")
    is_text = request.prompt is not None
    if request.add_special_tokens not in (None, is_text):
        raise UnsupportedFeature(
            f"add_special_tokens is {request.add_special_tokens}; tokens are shown as generation "
            f"takes them, which is {is_text} here: leave it out",
            field="add_special_tokens",
        )
    if request.prompt is not None:
        if request.tools or request.chat_template_kwargs:
            raise InvalidRequest("tools are for messages, not for a prompt", field="tools")
        return request, text_prompt(request.prompt, "prompt", limits)
    return request, chat_prompt(
        request.messages or (),
        limits,
        [tool.function for tool in request.tools or ()],
        template_variables=request.chat_template_kwargs,
    )
